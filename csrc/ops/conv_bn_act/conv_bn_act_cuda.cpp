// Eval-mode act(bn(conv(x)) [+ residual]) on CUDA: the library's convolution (cuDNN through the dispatcher),
// then one pass of bn_act's kernel over its output, in place. The op contract is in
// dl4ds_kernels/ops/conv_bn_act.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "ops/bn_act/bn_act_cuda.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_bn_act";

/// aten::convolution (not transposed).
Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, int64_t groups) {
    using torch::stable::detail::from;
    const std::vector<int64_t> output_padding(stride.size(), 0);
    StableIValue stack[9] = {from(x),        from(weight), from(bias),           from(stride), from(padding),
                             from(dilation), from(false),  from(output_padding), from(groups)};
    shim_check(torch_call_dispatcher("aten::convolution", "", stack, TORCH_ABI_VERSION), "aten::convolution");
    return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor conv_bn_act_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor running_mean,
                        Tensor running_var, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                        std::optional<Tensor> residual, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        double eps, bool eps_std, int64_t activation, double negative_slope) {
    const TensorInfo xi = tensor_info(x);
    check_batched(kOp, xi);
    check_cuda(kOp, xi);
    check_same_device(kOp, "weight", tensor_info(weight), xi);
    BnActFwdParams p;
    p.activation = checked_activation(kOp, activation);
    const CudaScope scope(xi);
    Tensor out = convolve(x, weight, bias, stride, padding, dilation, groups);
    Operand y(out), added(residual);
    if (added.info.present) {
        check_same_shape(kOp, "residual", added.info, y.info);
        check_dtype(kOp, "residual", added.info, y.info.dtype);
        check_same_device(kOp, "residual", added.info, y.info);
    }
    const Operand rm = channel_operand(kOp, "running_mean", running_mean, y.info);
    const Operand rv = channel_operand(kOp, "running_var", running_var, y.info);
    const Operand w = channel_operand(kOp, "bn_weight", bn_weight, y.info);
    const Operand b = channel_operand(kOp, "bn_bias", bn_bias, y.info);
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
    p.eps_std = eps_std;
    p.eps = eps;
    p.negative_slope = negative_slope;
    p.out = y.info.data;
    check_launch(launch_bn_act_fwd(p, scope.stream()), kOp);
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) { m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act_cuda)); }

}  // namespace dl4ds
