// Eval-mode act(bn(conv(x)) [+ residual]) on the CPU: the library's convolution, then one pass of ours over
// its output, in place. The weight is an ordinary tensor (aten::convolution) or one prepacked by oneDNN (an
// opaque tensor; then oneDNN's primitive is called directly and x is read as channels_last).
#include "ops/conv_bn_act/conv_bn_act_cpu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_bn_act";

/// Asked for while the library is loaded (see kShim).
const int32_t kMkldnnCode = aoti_torch_layout__mkldnn();

bool is_prepacked(const Tensor& weight) {
    int32_t layout = 0;
    shim_check(aoti_torch_get_layout(weight.get(), &layout), "get_layout");
    return layout == kMkldnnCode;
}

AtenTensorHandle* optional_handle(const std::optional<Tensor>& tensor, AtenTensorHandle& storage) {
    if (!tensor) {
        return nullptr;
    }
    storage = tensor->get();
    return &storage;
}

/// oneDNN's convolution with a prepacked weight.
Tensor convolve_prepacked(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const Convolution& conv) {
    using PointwiseFn = AOTITorchError(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const int64_t*,
                                       int64_t, const int64_t*, int64_t, const int64_t*, int64_t, int64_t,
                                       const char*, const double**, int64_t, const char**, AtenTensorHandle*);
    PointwiseFn* const pointwise = kShim<PointwiseFn, "aoti_torch_cpu_mkldnn__convolution_pointwise">;
    DL4DS_CHECK(
        pointwise != nullptr, kOp,
        ": weight: this torch is built without oneDNN (aoti_torch_cpu_mkldnn__convolution_pointwise is "
        "missing), so a prepacked weight cannot be used: pass the ordinary weight");
    const auto length = [](const std::vector<int64_t>& v) { return static_cast<int64_t>(v.size()); };
    AtenTensorHandle bias_handle = nullptr, out = nullptr;
    shim_check(pointwise(x.get(), weight.get(), optional_handle(bias, bias_handle), conv.padding.data(),
                         length(conv.padding), conv.stride.data(), length(conv.stride), conv.dilation.data(),
                         length(conv.dilation), conv.groups, "none", nullptr, 0, nullptr, &out),
               "conv_bn_act: mkldnn::_convolution_pointwise");
    return Tensor(out);
}

}  // namespace

Tensor library_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Convolution& conv) {
    using ConvolutionFn = AOTITorchError(
        AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const int64_t*, int64_t, const int64_t*,
        int64_t, const int64_t*, int64_t, int32_t, const int64_t*, int64_t, int64_t, AtenTensorHandle*);
    ConvolutionFn* const convolution = kShim<ConvolutionFn, "aoti_torch_cpu_convolution">;
    DL4DS_CHECK(convolution != nullptr, kOp, ": this torch has no aoti_torch_cpu_convolution");
    const std::vector<int64_t> output_padding(conv.stride.size(), 0);
    const auto length = [](const std::vector<int64_t>& v) { return static_cast<int64_t>(v.size()); };
    AtenTensorHandle bias_handle = nullptr, out = nullptr;
    shim_check(convolution(x.get(), weight.get(), optional_handle(bias, bias_handle), conv.stride.data(),
                           length(conv.stride), conv.padding.data(), length(conv.padding),
                           conv.dilation.data(), length(conv.dilation), 0, output_padding.data(),
                           length(output_padding), conv.groups, &out),
               "conv_bn_act: aten::convolution");
    return Tensor(out);
}

Tensor as_channels_last(const Tensor& x, const TensorInfo& info) {
    if (suggest_format(info) == Format::kChannelsLast || info.dim < 4) {
        return x;
    }
    const auto strides = dense_strides(info.sizes, info.dim, Format::kChannelsLast);
    if (same_strides(info.strides, strides.data(), info.sizes, info.dim)) {
        return x;
    }
    return copy_with_strides(x, info, strides.data());
}

Tensor conv_bn_act_library(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Convolution& conv, const BnVectors& bn,
                           const std::optional<Tensor>& residual) {
    const TensorInfo xi = tensor_info(x);
    check_batched(kOp, xi);
    Tensor out = is_prepacked(weight) ? convolve_prepacked(as_channels_last(x, xi), weight, bias, conv)
                                      : library_convolution(x, weight, bias, conv);
    TensorInfo oi = tensor_info(out);
    const BnPlan plan = bn_plan_or_copy(out, oi);
    BnEvalArgs args{oi.data,
                    nullptr,
                    oi.data,
                    nullptr,
                    tensor_info(bn.weight),
                    tensor_info(bn.bias),
                    tensor_info(bn.running_mean),
                    tensor_info(bn.running_var),
                    bn.running_var ? bn.eps : 0.0,
                    bn.eps_std,
                    bn.activation,
                    bn.negative_slope};
    check_bn_vectors(kOp, bn, oi);
    std::optional<Tensor> added;
    if (residual) {
        const TensorInfo ri = tensor_info(residual);
        check_same_shape(kOp, "residual", ri, oi);
        check_dtype(kOp, "residual", ri, oi.dtype);
        check_same_device(kOp, "residual", ri, oi);
        added = in_plan_order(*residual, ri, plan);
        args.residual = tensor_info(*added).data;
    }
    bn_apply_eval(plan, args);
    return out;
}

Tensor conv_bn_act_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor running_mean,
                       Tensor running_var, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                       std::optional<Tensor> residual, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                       double eps, bool eps_std, int64_t activation, double negative_slope) {
    return conv_bn_act_library(
        x, weight, bias, {std::move(stride), std::move(padding), std::move(dilation), groups},
        bn_vectors(kOp, std::move(running_mean), std::move(running_var), std::move(bn_weight),
                   std::move(bn_bias), eps, eps_std, activation, negative_slope),
        residual);
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) { m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, MkldnnCPU, m) { m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act_cpu)); }

}  // namespace dl4ds
