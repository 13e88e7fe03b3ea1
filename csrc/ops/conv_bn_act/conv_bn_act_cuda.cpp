// Eval-mode act(bn(conv(x)) [+ residual]) on CUDA, one of two ways (conv_route_cuda.cpp decides): the fused
// kernel, or the library's convolution (cuDNN through the dispatcher) and then one pass of bn_act's kernel
// over its output, in place. The op contract is in dl4ds_kernels/ops/conv_bn_act.py.
#include "ops/conv_bn_act/conv_bn_act_cuda.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "ops/bn_act/bn_act_cuda.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_bn_act";

}  // namespace

void check_residual(const char* op, const Operand& residual, const TensorInfo& out) {
    if (residual.info.present) {
        check_same_shape(op, "residual", residual.info, out);
        check_dtype(op, "residual", residual.info, out.dtype);
        check_same_device(op, "residual", residual.info, out);
    }
}

namespace {

bool is_dense(const Operand& t) {
    const auto strides = dense_strides(t.info.sizes, t.info.dim, Format::kChannelsLast);
    return same_strides(t.info.strides, strides.data(), t.info.sizes, t.info.dim);
}

Tensor by_library(const CudaScope& scope, const Tensor& x, const Tensor& weight,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  const ConvGeometry& geometry, const ConvBehind& v) {
    BnActFwdParams p;
    Tensor out = convolve(x, weight, bias, geometry);
    Operand y(out), added(residual);
    check_residual(kOp, added, y.info);
    const Operand rm = channel_operand(kOp, "running_mean", v.mean, y.info);
    const Operand rv = channel_operand(kOp, "running_var", v.var, y.info);
    const Operand w = channel_operand(kOp, "bn_weight", v.weight, y.info);
    const Operand b = channel_operand(kOp, "bn_bias", v.bias, y.info);
    const Format format = suggest_format(y.info);
    if (!same_strides(y.info.strides, dense_strides(y.info.sizes, y.info.dim, format).data(), y.info.sizes,
                      y.info.dim)) {
        y.copy_to(format);  // the kernel writes a dense output; the library's is one, whatever its algorithm
        out = *y.tensor;
    }
    read_or_copy(p, y, added, format);
    p.running_mean = channel_vector(rm);
    p.running_var = channel_vector(rv);
    p.weight = channel_vector(w);
    p.bias = channel_vector(b);
    p.eps_std = v.eps_std;
    p.eps = v.eps;
    p.activation = v.activation;
    p.negative_slope = v.negative_slope;
    p.out = y.info.data;
    check_launch(launch_bn_act_fwd(p, scope.stream()), kOp);
    return out;
}

}  // namespace

void make_dense(Operand& t) {
    if (t.info.present && (!is_dense(t) || reinterpret_cast<uintptr_t>(t.info.data) % 16 != 0)) {
        t.copy_to(Format::kChannelsLast);
    }
}

Operand dense_filter(const Tensor& weight) {
    Operand filter(weight);
    make_dense(filter);
    return filter;
}

/// aten::convolution (not transposed).
Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const ConvGeometry& g) {
    using torch::stable::detail::from;
    const std::vector<int64_t> output_padding(g.stride.size(), 0);
    StableIValue stack[9] = {from(x),        from(weight),         from(bias),
                             from(g.stride), from(g.padding),      from(g.dilation),
                             from(false),    from(output_padding), from(g.groups)};
    shim_check(torch_call_dispatcher("aten::convolution", "", stack, TORCH_ABI_VERSION), "aten::convolution");
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor by_fused_kernel(const char* op, const CudaScope& scope, ConvBnActFwdParams& p, const TensorInfo& x,
                       const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const ConvBehind& v) {
    const int64_t sizes[4] = {p.batch, p.channels_out, p.height_out, p.width_out};
    Tensor out = empty_cuda(x, sizes, dense_strides(sizes, 4, Format::kChannelsLast).data(), 4, x.dtype);
    const TensorInfo oi = tensor_info(out);
    Operand added(residual);
    check_residual(op, added, oi);
    const Operand filter = dense_filter(weight);
    make_dense(added);
    const ConvVectors vectors(op, "", bias, v, oi);
    vectors.fill(p, v);
    p.weight = filter.info.data;
    p.residual = added.info.data;
    p.out = oi.data;
    const Tensor workspace = empty_vector_cuda(x, conv_bn_act_fwd_workspace(p), DType::kUInt8);
    p.workspace = tensor_info(workspace).data;
    check_launch(launch_conv_bn_act_fwd(p, scope.stream()), op);
    return out;
}

Tensor conv_bn_act_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor running_mean,
                        Tensor running_var, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                        std::optional<Tensor> residual, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        double eps, bool eps_std, int64_t activation, double negative_slope) {
    const TensorInfo xi = tensor_info(x), wi = tensor_info(weight);
    check_batched(kOp, xi);
    check_cuda(kOp, xi);
    check_same_device(kOp, "weight", wi, xi);
    const ConvBehind v{std::move(running_mean),
                       std::move(running_var),
                       std::move(bn_weight),
                       std::move(bn_bias),
                       eps,
                       eps_std,
                       checked_activation(kOp, activation),
                       negative_slope};
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    const CudaScope scope(xi);
    ConvRoute route = conv_route(xi, wi, residual.has_value(), geometry, v.activation);
    return route.reason == static_cast<int>(ConvReason::kFused)
               ? by_fused_kernel(kOp, scope, route.params, xi, weight, bias, residual, v)
               : by_library(scope, x, weight, bias, residual, geometry, v);
}

namespace {

/// A convolution in training; where the route is the fused one, with the moments of its output.
struct ConvMoments {
    Tensor y, memory;  // the latter keeps what `known` points to
    BnMoments known;
};

ConvMoments convolve_with_moments(const char* op, const Tensor& x, const Tensor& weight,
                                  const std::optional<Tensor>& bias, const ConvGeometry& geometry) {
    const TensorInfo xi = tensor_info(x), wi = tensor_info(weight);
    check_batched(op, xi);
    check_cuda(op, xi);
    check_same_device(op, "weight", wi, xi);
    const CudaScope scope(xi);
    ConvRoute route = conv_route(xi, wi, false, geometry, Activation::kNone, {.stats = true});
    ConvMoments made;
    if (route.reason != static_cast<int>(ConvReason::kFused)) {
        made.y = convolve(x, weight, bias, geometry);
        return made;
    }
    ConvBnActFwdParams& p = route.params;
    const int64_t sizes[4] = {p.batch, p.channels_out, p.height_out, p.width_out};
    made.y = empty_cuda(xi, sizes, dense_strides(sizes, 4, Format::kChannelsLast).data(), 4, xi.dtype);
    const TensorInfo yi = tensor_info(made.y);
    const Operand filter = dense_filter(weight), cb = channel_operand(op, "bias", bias, yi);
    p.weight = filter.info.data;
    p.conv_bias = channel_vector(cb);
    p.out = yi.data;
    made.memory = empty_vector_cuda(xi, conv_bn_act_moments(p), DType::kFloat32);
    p.moments = tensor_info(made.memory).as<float>();
    check_launch(launch_conv_bn_act_fwd(p, scope.stream()), op);
    made.known = {p.moments, conv_bn_act_parts(p)};
    return made;
}

}  // namespace

/// Training: the convolution, the batch statistics of its output and act(bn(.) [+ residual]). Where the route
/// is the fused one, the statistics come with the convolution; else a kernel of bn_act reads its output
/// again.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_train_cuda(
    Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
    std::optional<Tensor> residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, int64_t groups, double momentum, double eps, bool eps_std,
    int64_t activation, double negative_slope, bool save_mask) {
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    const ConvMoments made = convolve_with_moments("conv_bn_act_train", x, weight, bias, geometry);
    auto [out, mean, rstd, mask, new_mean, new_var] =
        bn_act_forward(made.y, bn_weight, bn_bias, running_mean, running_var, residual, true, momentum, eps,
                       eps_std, activation, negative_slope, save_mask, made.known);
    return {out, made.y, mean, rstd, mask, new_mean, new_var};
}

/// The same without the elementwise pass, which another op makes of several outputs.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_stats_cuda(
    Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, int64_t groups, double momentum, double eps, bool eps_std) {
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    const ConvMoments made = convolve_with_moments("conv_bn_stats", x, weight, bias, geometry);
    auto [mean, rstd, new_mean, new_var] =
        bn_statistics(made.y, running_mean, running_var, momentum, eps, eps_std, made.known);
    return {made.y, mean, rstd, new_mean, new_var};
}

/// For dk.explain.
std::vector<int64_t> conv_bn_act_route_cuda(Tensor x, Tensor weight, bool residual,
                                            std::vector<int64_t> stride, std::vector<int64_t> padding,
                                            std::vector<int64_t> dilation, int64_t groups, int64_t activation,
                                            bool training) {
    const TensorInfo xi = tensor_info(x);
    check_batched(kOp, xi);
    check_cuda(kOp, xi);
    const CudaScope scope(xi);
    const ConvRoute route = conv_route(xi, tensor_info(weight), residual && !training,
                                       {std::move(stride), std::move(padding), std::move(dilation), groups},
                                       checked_activation(kOp, activation), {.stats = training});
    return route_answer(route);
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) {
    m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act_cuda));
    m.impl("conv_bn_act_train", TORCH_BOX(&conv_bn_act_train_cuda));
    m.impl("conv_bn_stats", TORCH_BOX(&conv_bn_stats_cuda));
    m.impl("conv_bn_act_route", TORCH_BOX(&conv_bn_act_route_cuda));
}

}  // namespace dl4ds
