// conv_bn_act by the engine of conv_engine_cpu.h, with a weight that conv_bn_act_pack packed. fp32; x is read as
// channels_last (an input in another layout is copied once), the output is channels_last.
#include <torch/csrc/stable/library.h>

#include "ops/conv_bn_act/conv_bn_act_cpu.h"
#include "ops/conv_bn_act/conv_engine_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_bn_act";

ConvAlgorithm algorithm_from_code(int64_t code) {
    DL4DS_CHECK(code == 1 || code == 2 || code == 4, kOp, ": algorithm: expected 1, 2 or 4, got ", code);
    return static_cast<ConvAlgorithm>(code);
}

ConvShape weight_shape(const TensorInfo& weight, int64_t groups) {
    DL4DS_CHECK(weight.dim == 4 && groups > 0 && weight.sizes[0] % groups == 0, kOp,
                ": weight: expected shape (C_out, C / groups, kH, kW), got ", weight.shape(), " with groups=", groups);
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
    DL4DS_CHECK(x.dim == 4 && x.sizes[1] == s.channels, kOp, ": x: expected shape (N, ", s.channels, ", H, W), got ",
                x.shape());
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

/// scale and shift of every output channel, `padding` entries more than there are channels.
void fill_scale_shift(const BnVectors& bn, const TensorInfo& bias, int64_t channels, int64_t padding, float* scale,
                      float* shift) {
    const TensorInfo mean = tensor_info(bn.running_mean), var = tensor_info(bn.running_var),
                     gamma = tensor_info(bn.weight), beta = tensor_info(bn.bias);
    for (int64_t c = 0; c < channels; ++c) {
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
    return same_strides(info.strides, strides.data(), info.sizes, info.dim) ? t
                                                                            : copy_with_strides(t, info, strides.data());
}

}  // namespace

Tensor conv_bn_act_pack(Tensor weight, int64_t groups, int64_t algorithm) {
    const TensorInfo wi = tensor_info(weight);
    const ConvAlgorithm how = algorithm_from_code(algorithm);
    const ConvShape s = weight_shape(wi, groups);
    DL4DS_CHECK(conv_supports(how, s), kOp, ": algorithm: expected one for weight ", wi.shape(), ", got ", algorithm);
    const Tensor dense = is_contiguous(wi.sizes, wi.strides, wi.dim)
                             ? weight
                             : copy_with_strides(weight, wi, contiguous_strides(wi).data());
    Tensor packed = empty_vector_cpu(conv_packed_floats(how, s), DType::kFloat32);
    conv_pack_weight(how, s, tensor_info(dense).as<float>(), tensor_info(packed).as<float>());
    return packed;
}

Tensor conv_bn_act_packed(Tensor x, Tensor weight, Tensor packed, int64_t algorithm, std::optional<Tensor> bias,
                          std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                          std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                          std::optional<Tensor> residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, double eps, bool eps_std, int64_t activation,
                          double negative_slope) {
    const ConvAlgorithm how = algorithm_from_code(algorithm);
    const Convolution conv{std::move(stride), std::move(padding), std::move(dilation), groups};
    const BnVectors bn{std::move(running_mean), std::move(running_var), std::move(bn_weight), std::move(bn_bias),
                       eps, eps_std, activation_from_code(kOp, activation), negative_slope};
    const TensorInfo wi = tensor_info(weight), pi = tensor_info(packed), bi = tensor_info(bias);
    TensorInfo xi = tensor_info(x);
    const ConvShape s = full_shape(xi, wi, conv);
    DL4DS_CHECK(conv_supports(how, s), kOp, ": algorithm: ", algorithm, " does not fit this convolution");
    DL4DS_CHECK(pi.numel == conv_packed_floats(how, s) && pi.dim == 1, kOp, ": packed: expected ",
                conv_packed_floats(how, s), " values for weight ", wi.shape(), ", got shape ", pi.shape());
    check_dtype(kOp, "packed", pi, DType::kFloat32);
    Tensor input = x;
    if (s.channels > 1 && xi.strides[1] != 1) {
        input = as_channels_last(x, xi);
        xi = tensor_info(input);
    }
    const int64_t sizes[4] = {s.n, s.channels_out, s.out_height(), s.out_width()};
    Tensor out = empty_cpu(sizes, dense_strides(sizes, 4, Format::kChannelsLast).data(), 4, DType::kFloat32);
    const TensorInfo oi = tensor_info(out);
    check_bn_vectors(kOp, bn, oi);
    check_channel_vector(kOp, "bias", bi, oi);
    std::optional<Tensor> added;
    if (residual) {
        const TensorInfo ri = tensor_info(residual);
        check_same_shape(kOp, "residual", ri, oi);
        check_dtype(kOp, "residual", ri, DType::kFloat32);
        added = dense_channels_last(*residual, ri);
    }
    const int64_t padding_entries = conv_kernels().panel, entries = s.channels_out + padding_entries;
    Scratch vectors(2 * entries * int64_t{sizeof(float)});
    float *scale = vectors.as<float>(), *shift = scale + entries;
    fill_scale_shift(bn, bi, s.channels_out, padding_entries, scale, shift);
    uint32_t threads = 1;
    shim_check(torch_get_num_threads(&threads), "get_num_threads");
    const ConvArgs args{s,
                        xi.as<float>(),
                        xi.strides[0],
                        xi.strides[2],
                        xi.strides[3],
                        pi.as<float>(),
                        oi.as<float>(),
                        {scale, shift, added ? tensor_info(*added).as<float>() : nullptr, bn.activation,
                         static_cast<float>(bn.negative_slope)},
                        threads};
    if (oi.numel > 0 && !conv_run(how, args)) {
        return conv_bn_act_library(input, weight, bias, conv, bn, residual);
    }
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("conv_bn_act_pack", TORCH_BOX(&conv_bn_act_pack));
    m.impl("conv_bn_act_packed", TORCH_BOX(&conv_bn_act_packed));
}

}  // namespace dl4ds
