// conv_bn_act by the engine of conv_engine_cpu.h, with a weight that conv_bn_act_pack packed. fp32; x is read
// as channels_last (an input in another layout is copied once), the output is channels_last.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops/conv_bn_act/conv_bn_act_cpu.h"
#include "ops/conv_bn_act/conv_engine_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_bn_act";

ConvAlgorithm algorithm_from_code(int64_t code) {
    DL4DS_CHECK(code >= 1 && code <= 4, kOp, ": algorithm: expected 1, 2, 3 or 4, got ", code);
    return static_cast<ConvAlgorithm>(code);
}

ConvShape weight_shape(const TensorInfo& weight, int64_t groups) {
    DL4DS_CHECK(weight.dim == 4 && groups > 0 && weight.sizes[0] % groups == 0, kOp,
                ": weight: expected shape (C_out, C / groups, kH, kW), got ", weight.shape(),
                " with groups=", groups);
    check_dtype(kOp, "weight", weight, DType::kFloat32);
    ConvShape s{};
    s.channels_out = weight.sizes[0], s.channels = weight.sizes[1] * groups;
    s.kernel_h = weight.sizes[2], s.kernel_w = weight.sizes[3];
    s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    s.groups = groups;
    return s;
}

void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t least) {
    DL4DS_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, kOp, ": ", name,
                ": expected two numbers of at least ", least);
}

ConvShape full_shape(const TensorInfo& x, const TensorInfo& weight, const Convolution& conv) {
    check_pair("stride", conv.stride, 1);
    check_pair("padding", conv.padding, 0);
    check_pair("dilation", conv.dilation, 1);
    ConvShape s = weight_shape(weight, conv.groups);
    DL4DS_CHECK(x.dim == 4 && x.sizes[1] == s.channels, kOp, ": x: expected shape (N, ", s.channels,
                ", H, W), got ", x.shape());
    check_dtype(kOp, "x", x, DType::kFloat32);
    s.n = x.sizes[0], s.height = x.sizes[2], s.width = x.sizes[3];
    s.stride_h = conv.stride[0], s.stride_w = conv.stride[1];
    s.pad_h = conv.padding[0], s.pad_w = conv.padding[1];
    s.dilation_h = conv.dilation[0], s.dilation_w = conv.dilation[1];
    DL4DS_CHECK(s.height + 2 * s.pad_h >= s.dilation_h * (s.kernel_h - 1) + 1 &&
                    s.width + 2 * s.pad_w >= s.dilation_w * (s.kernel_w - 1) + 1,
                kOp, ": x: expected a padded input at least as large as the kernel, got ", x.shape());
    return s;
}

/// scale and shift of every channel of a BatchNorm (and the bias of a convolution before it), `padding`
/// entries more than there are channels.
void fill_scale_shift(const BnVectors& bn, const TensorInfo& bias, int64_t channels, int64_t padding,
                      float* scale, float* shift) {
    const TensorInfo mean = tensor_info(bn.running_mean), var = tensor_info(bn.running_var),
                     gamma = tensor_info(bn.weight), beta = tensor_info(bn.bias);
    const auto plain = [](const TensorInfo& v) {
        return !v.present || (v.dtype == DType::kFloat32 && v.strides[0] == 1);
    };
    const auto pointer = [](const TensorInfo& v) { return v.present ? v.as<float>() : nullptr; };
    const bool fast = plain(mean) && plain(var) && plain(gamma) && plain(beta) && plain(bias);
    if (fast) {
        conv_kernels().scale_shift({pointer(mean), pointer(var), pointer(gamma), pointer(beta), pointer(bias),
                                    channels, bn.eps, bn.eps_std, scale, shift});
    }
    for (int64_t c = fast ? channels : 0; c < channels; ++c) {
        const double rstd = var.present ? bn_rstd(channel_entry(var, c, 1.0), bn.eps, bn.eps_std) : 1.0;
        const double a = channel_entry(gamma, c, 1.0) * rstd;
        scale[c] = static_cast<float>(a);
        shift[c] = static_cast<float>(channel_entry(beta, c, 0.0) +
                                      (channel_entry(bias, c, 0.0) - channel_entry(mean, c, 0.0)) * a);
    }
    std::fill(scale + channels, scale + channels + padding, 0.0f);
    std::fill(shift + channels, shift + channels + padding, 0.0f);
}

/// t as it is if it lies densely in channels_last, else a copy that does.
Tensor dense_channels_last(const Tensor& t, const TensorInfo& info) {
    const auto strides = dense_strides(info.sizes, info.dim, Format::kChannelsLast);
    return same_strides(info.strides, strides.data(), info.sizes, info.dim)
               ? t
               : copy_with_strides(t, info, strides.data());
}

}  // namespace

Tensor conv_bn_act_pack(Tensor weight, int64_t groups, int64_t algorithm) {
    const TensorInfo wi = tensor_info(weight);
    const ConvAlgorithm how = algorithm_from_code(algorithm);
    const ConvShape s = weight_shape(wi, groups);
    DL4DS_CHECK(conv_supports(how, s), kOp, ": algorithm: expected one for weight ", wi.shape(), ", got ",
                algorithm);
    const Tensor dense = is_contiguous(wi.sizes, wi.strides, wi.dim)
                             ? weight
                             : copy_with_strides(weight, wi, contiguous_strides(wi).data());
    Tensor packed = empty_vector_cpu(conv_packed_floats(how, s), DType::kFloat32);
    conv_pack_weight(how, s, tensor_info(dense).as<float>(), tensor_info(packed).as<float>());
    return packed;
}

namespace {

Tensor empty_output(const ConvShape& s) {
    const int64_t sizes[4] = {s.n, s.channels_out, s.out_height(), s.out_width()};
    return empty_cpu(sizes, dense_strides(sizes, 4, Format::kChannelsLast).data(), 4, DType::kFloat32);
}

/// A call's epilogue, output and thread count; `args` is complete but for the input.
class Call {
  public:
    Call(const ConvShape& shape, const TensorInfo& packed, const std::optional<Tensor>& bias,
         const BnVectors& bn, const std::optional<Tensor>& residual)
        : out(empty_output(shape)), vectors_(2 * entries(shape) * int64_t{sizeof(float)}) {
        const TensorInfo oi = tensor_info(out), bi = tensor_info(bias);
        check_bn_vectors(kOp, bn, oi);
        check_channel_vector(kOp, "bias", bi, oi);
        if (residual) {
            const TensorInfo ri = tensor_info(residual);
            check_same_shape(kOp, "residual", ri, oi);
            check_dtype(kOp, "residual", ri, DType::kFloat32);
            residual_ = dense_channels_last(*residual, ri);
        }
        float *scale = vectors_.as<float>(), *shift = scale + entries(shape);
        fill_scale_shift(bn, bi, shape.channels_out, conv_kernels().panel, scale, shift);
        uint32_t threads = 1;
        shim_check(torch_get_num_threads(&threads), "get_num_threads");
        args = {shape,
                nullptr,
                0,
                0,
                0,
                packed.as<float>(),
                oi.as<float>(),
                {scale, shift, residual_ ? tensor_info(*residual_).as<float>() : nullptr, bn.activation,
                 static_cast<float>(bn.negative_slope)},
                threads};
    }

    Tensor out;
    ConvArgs args;

  private:
    static int64_t entries(const ConvShape& s) { return s.channels_out + conv_kernels().panel; }

    std::optional<Tensor> residual_;
    Scratch vectors_;
};

void check_packed(const TensorInfo& packed, ConvAlgorithm how, const ConvShape& s) {
    DL4DS_CHECK(conv_supports(how, s), kOp, ": algorithm: ", static_cast<int>(how),
                " does not fit this convolution");
    check_dtype(kOp, "packed", packed, DType::kFloat32);
    DL4DS_CHECK(packed.numel == conv_packed_floats(how, s) && packed.dim == 1, kOp, ": packed: expected ",
                conv_packed_floats(how, s), " values, got shape ", packed.shape());
}

}  // namespace

Tensor conv_bn_act_packed(Tensor x, Tensor weight, Tensor packed, int64_t algorithm,
                          std::optional<Tensor> bias, std::optional<Tensor> running_mean,
                          std::optional<Tensor> running_var, std::optional<Tensor> bn_weight,
                          std::optional<Tensor> bn_bias, std::optional<Tensor> residual,
                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, double eps, bool eps_std,
                          int64_t activation, double negative_slope) {
    const ConvAlgorithm how = algorithm_from_code(algorithm);
    const Convolution conv{std::move(stride), std::move(padding), std::move(dilation), groups};
    const BnVectors bn{std::move(running_mean),
                       std::move(running_var),
                       std::move(bn_weight),
                       std::move(bn_bias),
                       eps,
                       eps_std,
                       activation_from_code(kOp, activation),
                       negative_slope};
    TensorInfo xi = tensor_info(x);
    const ConvShape s = full_shape(xi, tensor_info(weight), conv);
    check_packed(tensor_info(packed), how, s);
    Tensor input = x;
    if (s.channels > 1 && xi.strides[1] != 1) {
        input = as_channels_last(x, xi);
        xi = tensor_info(input);
    }
    Call call(s, tensor_info(packed), bias, bn, residual);
    call.args.x = xi.as<float>();
    call.args.stride_n = xi.strides[0], call.args.stride_h = xi.strides[2],
    call.args.stride_w = xi.strides[3];
    if (tensor_info(call.out).numel > 0 && !conv_run(how, call.args)) {
        return conv_bn_act_library(input, weight, bias, conv, bn, residual);
    }
    return call.out;
}

Tensor bn_act_conv_packed(std::vector<Tensor> xs, Tensor weight, Tensor packed, std::optional<Tensor> in_mean,
                          std::optional<Tensor> in_var, std::optional<Tensor> in_weight,
                          std::optional<Tensor> in_bias, double in_eps, bool in_eps_std,
                          int64_t in_activation, std::optional<Tensor> bias,
                          std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                          std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, double eps,
                          bool eps_std, int64_t activation, double negative_slope) {
    const BnVectors before{std::move(in_mean),
                           std::move(in_var),
                           std::move(in_weight),
                           std::move(in_bias),
                           in_eps,
                           in_eps_std,
                           activation_from_code(kOp, in_activation),
                           0.0};
    const BnVectors after{std::move(running_mean),
                          std::move(running_var),
                          std::move(bn_weight),
                          std::move(bn_bias),
                          eps,
                          eps_std,
                          activation_from_code(kOp, activation),
                          negative_slope};
    DL4DS_CHECK(before.activation == Activation::kNone || before.activation == Activation::kRelu ||
                    before.activation == Activation::kRelu6,
                kOp, ": in_activation: expected none, relu or relu6, got ",
                activation_name(before.activation));
    DL4DS_CHECK(!xs.empty(), kOp, ": xs: expected at least one tensor");
    ConvShape s = weight_shape(tensor_info(weight), 1);
    DL4DS_CHECK(s.taps() == 1, kOp, ": weight: expected a 1x1 kernel, got ", tensor_info(weight).shape());
    std::vector<ConvSource> sources;
    int64_t channels = 0;
    for (Tensor& x : xs) {
        TensorInfo xi = tensor_info(x);
        DL4DS_CHECK(xi.dim == 4 && (sources.empty() || (xi.sizes[0] == s.n && xi.sizes[2] == s.height &&
                                                        xi.sizes[3] == s.width)),
                    kOp, ": xs: expected (N, C, H, W) tensors that differ in C alone, got ", xi.shape());
        DL4DS_CHECK(channels % kChunk == 0, kOp, ": xs: expected multiples of ", kChunk,
                    " channels in all but the last");
        check_dtype(kOp, "xs", xi, DType::kFloat32);
        if (xi.sizes[1] > 1 && xi.strides[1] != 1) {
            x = as_channels_last(x, xi);
            xi = tensor_info(x);
        }
        s.n = xi.sizes[0], s.height = xi.sizes[2], s.width = xi.sizes[3];
        channels += xi.sizes[1];
        sources.push_back({xi.as<float>(), xi.sizes[1], xi.strides[0], xi.strides[2], xi.strides[3]});
    }
    DL4DS_CHECK(channels == s.channels, kOp, ": xs: expected ", s.channels, " channels in all, got ",
                channels);
    for (const TensorInfo v : {tensor_info(before.running_mean), tensor_info(before.running_var),
                               tensor_info(before.weight), tensor_info(before.bias)}) {
        DL4DS_CHECK(!v.present || (v.dim == 1 && v.sizes[0] == channels && is_floating(v.dtype)), kOp,
                    ": BatchNorm before the convolution: expected vectors of shape (", channels, ",), got ",
                    v.shape());
    }
    check_packed(tensor_info(packed), ConvAlgorithm::kDirect, s);
    Call call(s, tensor_info(packed), bias, after, std::nullopt);
    const int64_t entries = channels + kChunk;
    Scratch vectors(2 * entries * int64_t{sizeof(float)});
    float *scale = vectors.as<float>(), *shift = scale + entries;
    fill_scale_shift(before, TensorInfo{}, channels, kChunk, scale, shift);
    const ConvPrologue prologue{sources.data(), static_cast<int64_t>(sources.size()), scale, shift,
                                before.activation};
    call.args.prologue = &prologue;
    if (tensor_info(call.out).numel > 0) {
        conv_run(ConvAlgorithm::kDirect, call.args);
    }
    return call.out;
}

Tensor conv_buffer(Tensor x, int64_t channels) {
    const TensorInfo xi = tensor_info(x);
    check_batched("conv_buffer", xi);
    DL4DS_CHECK(xi.dim == 4 && channels >= 0, "conv_buffer: x: expected shape (N, C, H, W), got ",
                xi.shape());
    const int64_t sizes[4] = {xi.sizes[0], channels, xi.sizes[2], xi.sizes[3]};
    return empty_cpu(sizes, dense_strides(sizes, 4, Format::kChannelsLast).data(), 4, xi.dtype);
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("conv_bn_act_pack", TORCH_BOX(&conv_bn_act_pack));
    m.impl("conv_bn_act_packed", TORCH_BOX(&conv_bn_act_packed));
    m.impl("bn_act_conv_packed", TORCH_BOX(&bn_act_conv_packed));
    m.impl("conv_buffer", TORCH_BOX(&conv_buffer));
}

}  // namespace dl4ds
