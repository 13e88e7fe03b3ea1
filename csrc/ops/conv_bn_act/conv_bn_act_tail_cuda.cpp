// The end of a bottleneck block in inference on CUDA, act2(bn2(conv1x1(act1(bn1(conv(x))))) [+ residual]):
// one kernel, or the op conv_bn_act twice. The op contract is in dl4ds_kernels/ops/_conv_bn_act_tail.py.
#include <torch/csrc/stable/library.h>

#include "ops/conv_bn_act/conv_bn_act_cuda.h"
#include "ops/conv_bn_act/conv_bn_act_tail_plan.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_bn_act_tail";

struct TailRoute {
    int reason = 0;  // ConvReason, ConvRefusal or ConvTailReason; 0: one kernel
    ConvTailChoice choice;
    ConvTailParams params;
};

/// DL4DS_CUDA_TAIL: auto (or unset), 1 (wherever it can) or 0 (never).
ConvWish tail_wish() {
    const char* value = std::getenv("DL4DS_CUDA_TAIL");
    if (value == nullptr || *value == '\0' || std::strcmp(value, "auto") == 0) {
        return ConvWish::kAuto;
    }
    const bool always = std::strcmp(value, "1") == 0;
    DL4DS_CHECK(always || std::strcmp(value, "0") == 0, kOp, ": DL4DS_CUDA_TAIL: expected auto, 1 or 0, got ",
                value);
    return always ? ConvWish::kFused : ConvWish::kLibrary;
}

TailRoute tail_route(const TensorInfo& x, const TensorInfo& weight, const TensorInfo& weight2, bool residual,
                     const ConvGeometry& geometry, Activation activation, Activation activation2) {
    TailRoute route;
    const ConvWish wish = tail_wish();
    if (wish == ConvWish::kLibrary) {
        route.reason = static_cast<int>(ConvTailReason::kOff);
        return route;
    }
    ConvRoute first = conv_route(x, weight, false, geometry, activation, {.measure = false});
    route.reason = first.reason == static_cast<int>(ConvReason::kModel) ? 0 : first.reason;
    if (route.reason != 0) {
        return route;
    }
    ConvBnActFwdParams &a = route.params.first, &b = route.params.second;
    a = first.params;
    a.tile = ConvTile::k64x64;
    a.slices = 1;
    b.dtype = a.dtype;
    b.tile = ConvTile::k64x64;
    b.batch = a.batch, b.height = b.height_out = a.height_out, b.width = b.width_out = a.width_out;
    const bool rank = weight2.dim == 4;
    b.channels = rank ? weight2.sizes[1] : 0, b.channels_out = rank ? weight2.sizes[0] : 0;
    b.kernel_h = rank ? weight2.sizes[2] : 0, b.kernel_w = rank ? weight2.sizes[3] : 0;
    b.x_stride_w = b.channels, b.x_stride_h = b.width * b.x_stride_w, b.x_stride_n = b.height * b.x_stride_h;
    b.activation = activation2;
    route.reason = weight2.dtype == a.dtype ? conv_bn_act_tail_refusal(route.params)
                                            : static_cast<int>(ConvRefusal::kDType);
    if (route.reason != 0) {
        return route;
    }
    const int64_t rows = b.batch * b.height * b.width, pixels = a.batch * a.height * a.width;
    route.choice = choose_conv_tail(conv_bn_act_architecture(), a.dtype, rows, b.channels_out, a.channels,
                                    a.kernel_h * a.kernel_w, pixels, residual);
    if (wish == ConvWish::kAuto && conv_autotune()) {
        const int64_t code =
            conv_measured("conv_bn_act_tail_measured",
                          {conv_bn_act_architecture(), static_cast<int64_t>(a.dtype), residual,
                           static_cast<int64_t>(activation), static_cast<int64_t>(activation2), a.batch,
                           a.channels, a.height, a.width, b.channels_out, a.kernel_h, a.kernel_w, a.stride_h,
                           a.stride_w, a.pad_h, a.pad_w, a.dilation_h, a.dilation_w, route.choice.parts});
        route.choice.fused = code < 0 ? route.choice.fused : code > 0;
        route.choice.parts = code > 0 ? static_cast<int>(code) : route.choice.parts;
    }
    route.params.parts = route.choice.parts;
    if (!route.choice.fused && wish == ConvWish::kAuto) {
        route.reason = static_cast<int>(ConvReason::kModel);
    }
    return route;
}

Tensor by_tail_kernel(const CudaScope& scope, ConvTailParams& params, const TensorInfo& x,
                      const Tensor& weight, const std::optional<Tensor>& bias, const ConvBehind& v,
                      const Tensor& weight2, const std::optional<Tensor>& bias2, const ConvBehind& v2,
                      const std::optional<Tensor>& residual) {
    ConvBnActFwdParams &a = params.first, &b = params.second;
    const int64_t sizes[4] = {b.batch, b.channels_out, b.height_out, b.width_out};
    const int64_t between[4] = {b.batch, b.channels, b.height, b.width};
    Tensor out = empty_cuda(x, sizes, dense_strides(sizes, 4, Format::kChannelsLast).data(), 4, x.dtype);
    const TensorInfo oi = tensor_info(out);
    TensorInfo middle = oi;  // of the map between the convolutions only sizes are asked for
    middle.sizes = between;
    Operand added(residual);
    check_residual(kOp, added, oi);
    make_dense(added);
    const Operand filter = dense_filter(weight), filter2 = dense_filter(weight2);
    const ConvVectors vectors(kOp, "", bias, v, middle), vectors2(kOp, "2", bias2, v2, oi);
    vectors.fill(a, v);
    vectors2.fill(b, v2);
    a.weight = filter.info.data;
    b.weight = filter2.info.data;
    b.residual = added.info.data;
    b.out = oi.data;
    check_launch(launch_conv_bn_act_tail(params, scope.stream()), kOp);
    return out;
}

}  // namespace

Tensor conv_bn_act_tail_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor running_mean,
                             Tensor running_var, std::optional<Tensor> bn_weight,
                             std::optional<Tensor> bn_bias, double eps, bool eps_std, int64_t activation,
                             std::vector<int64_t> stride, std::vector<int64_t> padding,
                             std::vector<int64_t> dilation, Tensor weight2, std::optional<Tensor> bias2,
                             Tensor running_mean2, Tensor running_var2, std::optional<Tensor> bn_weight2,
                             std::optional<Tensor> bn_bias2, double eps2, bool eps_std2, int64_t activation2,
                             double negative_slope, std::optional<Tensor> residual) {
    const TensorInfo xi = tensor_info(x), wi = tensor_info(weight), wi2 = tensor_info(weight2);
    check_batched(kOp, xi);
    check_cuda(kOp, xi);
    check_same_device(kOp, "weight", wi, xi);
    check_same_device(kOp, "weight2", wi2, xi);
    const ConvBehind v{
        running_mean,  running_var, bn_weight, bn_bias, eps, eps_std, checked_activation(kOp, activation),
        negative_slope};
    const ConvBehind v2{running_mean2,
                        running_var2,
                        bn_weight2,
                        bn_bias2,
                        eps2,
                        eps_std2,
                        checked_activation(kOp, activation2),
                        negative_slope};
    {
        const CudaScope scope(xi);
        TailRoute route = tail_route(xi, wi, wi2, residual.has_value(), {stride, padding, dilation, 1},
                                     v.activation, v2.activation);
        if (route.reason == 0) {
            return by_tail_kernel(scope, route.params, xi, weight, bias, v, weight2, bias2, v2, residual);
        }
    }
    const Tensor z =
        conv_bn_act_cuda(x, weight, bias, running_mean, running_var, bn_weight, bn_bias, std::nullopt, stride,
                         padding, dilation, 1, eps, eps_std, activation, negative_slope);
    return conv_bn_act_cuda(z, weight2, bias2, running_mean2, running_var2, bn_weight2, bn_bias2, residual,
                            {1, 1}, {0, 0}, {1, 1}, 1, eps2, eps_std2, activation2, negative_slope);
}

/// For dk.explain: reason, blocks of a tile, modelled nanoseconds of the one kernel and of the two layers.
std::vector<int64_t> conv_bn_act_tail_route_cuda(Tensor x, Tensor weight, Tensor weight2, bool residual,
                                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                 std::vector<int64_t> dilation, int64_t activation,
                                                 int64_t activation2) {
    const TensorInfo xi = tensor_info(x);
    check_batched(kOp, xi);
    check_cuda(kOp, xi);
    const CudaScope scope(xi);
    const TailRoute route =
        tail_route(xi, tensor_info(weight), tensor_info(weight2), residual,
                   {std::move(stride), std::move(padding), std::move(dilation), 1},
                   checked_activation(kOp, activation), checked_activation(kOp, activation2));
    return {route.reason, route.choice.parts, static_cast<int64_t>(1e3 * route.choice.fused_us),
            static_cast<int64_t>(1e3 * route.choice.apart_us)};
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) {
    m.impl("conv_bn_act_tail", TORCH_BOX(&conv_bn_act_tail_cuda));
    m.impl("conv_bn_act_tail_route", TORCH_BOX(&conv_bn_act_tail_route_cuda));
}

}  // namespace dl4ds
