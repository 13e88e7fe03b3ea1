// Eval-mode act(bn(conv_transpose(x))) on the CPU: the library's transposed convolution, then one pass of
// ours over its output, in place. Without running_mean there is no BatchNorm.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/bn_act/bn_act_host_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_transpose_bn_act";

struct Geometry {
    std::vector<int64_t> stride, padding, output_padding, dilation;
    int64_t groups;
};

/// The transposed convolution with its bias. Inference with 2x2 and stride 2 on packed weights is
/// conv_transpose_bn_act_packed (ops/conv_bn_act/conv_transposed_cpu.cpp).
Tensor convolve_transposed(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Geometry& g) {
    using ConvolutionFn = AOTITorchError(
        AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const int64_t*, int64_t, const int64_t*,
        int64_t, const int64_t*, int64_t, int32_t, const int64_t*, int64_t, int64_t, AtenTensorHandle*);
    ConvolutionFn* const convolution = kShim<ConvolutionFn, "aoti_torch_cpu_convolution">;
    DL4DS_CHECK(convolution != nullptr, kOp, ": this torch has no aoti_torch_cpu_convolution");
    const auto length = [](const std::vector<int64_t>& v) { return static_cast<int64_t>(v.size()); };
    AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, out = nullptr;
    shim_check(
        convolution(x.get(), weight.get(), bias ? &bias_handle : nullptr, g.stride.data(), length(g.stride),
                    g.padding.data(), length(g.padding), g.dilation.data(), length(g.dilation), 1,
                    g.output_padding.data(), length(g.output_padding), g.groups, &out),
        "conv_transpose_bn_act: aten::convolution");
    return Tensor(out);
}

}  // namespace

Tensor conv_transpose_bn_act_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                 std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                 std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> output_padding, std::vector<int64_t> dilation,
                                 int64_t groups, double eps, bool eps_std, int64_t activation,
                                 double negative_slope) {
    check_batched(kOp, tensor_info(x));
    const Activation act = activation_from_code(kOp, activation);
    Tensor out = convolve_transposed(
        x, weight, bias,
        {std::move(stride), std::move(padding), std::move(output_padding), std::move(dilation), groups});
    TensorInfo oi = tensor_info(out);
    const TensorInfo mean = tensor_info(running_mean), var = tensor_info(running_var);
    const TensorInfo w = tensor_info(bn_weight), b = tensor_info(bn_bias);
    check_channel_vector(kOp, "running_mean", mean, oi);
    check_channel_vector(kOp, "running_var", var, oi);
    check_channel_vector(kOp, "bn_weight", w, oi);
    check_channel_vector(kOp, "bn_bias", b, oi);
    DL4DS_CHECK(mean.present == var.present, kOp,
                ": expected running_mean and running_var both given or both None");
    DL4DS_CHECK(mean.present || (!w.present && !b.present), kOp,
                ": bn_weight, bn_bias: expected None without running statistics");
    if (!mean.present && act == Activation::kNone) {
        return out;
    }
    const BnPlan plan = bn_plan_or_copy(out, oi);
    bn_apply_eval(plan, {oi.data, nullptr, oi.data, nullptr, w, b, mean, var, mean.present ? eps : 0.0,
                         mean.present && eps_std, act, negative_slope});
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("conv_transpose_bn_act", TORCH_BOX(&conv_transpose_bn_act_cpu));
}

}  // namespace dl4ds
