// A convolution step on the engine of conv_engine_cpu.h (fp32; x is read as channels_last, an input in
// another layout is copied once) or, with algorithm 0, on the library's primitive.
#include "ops/conv_bn_act/conv_step_cpu.h"

#include <algorithm>
#include <cstring>

#include "common/cpu/parallel.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_bn_act";

void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t least) {
    DL4DS_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, kOp, ": ", name,
                ": expected two numbers of at least ", least);
}

/// Stride, padding and dilation into `s`, whose map has its size.
void set_geometry(ConvShape& s, const Convolution& conv) {
    check_pair("stride", conv.stride, 1);
    check_pair("padding", conv.padding, 0);
    check_pair("dilation", conv.dilation, 1);
    s.stride_h = conv.stride[0], s.stride_w = conv.stride[1];
    s.pad_h = conv.padding[0], s.pad_w = conv.padding[1];
    s.dilation_h = conv.dilation[0], s.dilation_w = conv.dilation[1];
    DL4DS_CHECK(s.height + 2 * s.pad_h >= s.dilation_h * (s.kernel_h - 1) + 1 &&
                    s.width + 2 * s.pad_w >= s.dilation_w * (s.kernel_w - 1) + 1,
                kOp, ": x: expected a padded input at least as large as the kernel, got a map of ", s.height,
                "x", s.width);
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

void check_packed(const TensorInfo& packed, ConvAlgorithm how, const ConvShape& s) {
    DL4DS_CHECK(conv_supports(how, s), kOp, ": algorithm: ", static_cast<int>(how),
                " does not fit this convolution");
    check_dtype(kOp, "packed", packed, DType::kFloat32);
    DL4DS_CHECK(packed.numel == conv_packed_floats(how, s) && packed.dim == 1, kOp, ": packed: expected ",
                conv_packed_floats(how, s), " values, got shape ", packed.shape());
}

/// x with a channel stride of 1, and where it lies.
TensorInfo readable(Tensor& x) {
    TensorInfo info = tensor_info(x);
    if (info.dim == 4 && info.sizes[1] > 1 && info.strides[1] != 1) {
        x = as_channels_last(x, info);
        info = tensor_info(x);
    }
    return info;
}

/// The inputs of a step where they lie: sizes into `s`, places into the result.
std::vector<ConvSource> sources_of(ConvStep& step, ConvShape& s) {
    DL4DS_CHECK(!step.xs.empty(), kOp, ": xs: expected at least one tensor");
    std::vector<ConvSource> sources;
    sources.reserve(step.xs.size());
    int64_t channels = 0;
    for (Tensor& x : step.xs) {
        const TensorInfo xi = readable(x);
        DL4DS_CHECK(xi.dim == 4 && (sources.empty() || (xi.sizes[0] == s.n && xi.sizes[2] == s.height &&
                                                        xi.sizes[3] == s.width)),
                    kOp, ": xs: expected (N, C, H, W) tensors that differ in C alone, got ", xi.shape());
        DL4DS_CHECK(channels % kChunk == 0, kOp, ": xs: expected multiples of ", kChunk,
                    " channels in all but the last");
        check_dtype(kOp, "xs", xi, DType::kFloat32);
        s.n = xi.sizes[0], s.height = xi.sizes[2], s.width = xi.sizes[3];
        channels += xi.sizes[1];
        sources.push_back({xi.as<float>(), xi.sizes[1], xi.strides[0], xi.strides[2], xi.strides[3]});
    }
    DL4DS_CHECK(channels == s.channels, kOp, ": xs: expected ", s.channels, " channels in all, got ",
                channels);
    return sources;
}

/// What a prologue asks of its step; the map becomes the one behind the pooling.
void check_before(const ConvStep& step, ConvShape& s) {
    const BnVectors& before = *step.before;
    DL4DS_CHECK(before.activation == Activation::kNone || before.activation == Activation::kRelu ||
                    before.activation == Activation::kRelu6,
                kOp, ": in_activation: expected none, relu or relu6, got ",
                activation_name(before.activation));
    DL4DS_CHECK(s.taps() == 1, kOp, ": weight: expected a 1x1 kernel, got ",
                tensor_info(step.weight).shape());
    DL4DS_CHECK(step.pool == 1 || step.pool == 2, kOp, ": pool: expected 1 or 2, got ", step.pool);
    s.height /= step.pool, s.width /= step.pool;
    DL4DS_CHECK(s.height > 0 && s.width > 0, kOp, ": xs: expected maps of at least ", step.pool, "x",
                step.pool, ", got ", tensor_info(step.xs[0]).shape());
    for (const TensorInfo v : {tensor_info(before.running_mean), tensor_info(before.running_var),
                               tensor_info(before.weight), tensor_info(before.bias)}) {
        DL4DS_CHECK(!v.present || (v.dim == 1 && v.sizes[0] == s.channels && is_floating(v.dtype)), kOp,
                    ": BatchNorm before the convolution: expected vectors of shape (", s.channels, ",), got ",
                    v.shape());
    }
}

/// Whether Winograd's transform can read the tensors where they lie.
bool is_readable_apart(const ConvStep& step) {
    return is_winograd(step.algorithm) &&
           std::all_of(step.xs.begin(), step.xs.end() - 1, [](const Tensor& x) {
               const TensorInfo xi = tensor_info(x);
               return xi.dim == 4 && xi.sizes[1] % kChunk == 0;
           });
}

/// What the step reads: the rest of its shape, and where the inputs lie.
std::vector<ConvSource> read_inputs(ConvStep& step, ConvShape& s, ConvArgs& args) {
    std::vector<ConvSource> sources;
    if (step.before) {
        sources = sources_of(step, s);
        check_before(step, s);
        return sources;
    }
    if (step.xs.size() > 1) {
        sources = sources_of(step, s);
        args.parts = sources.data(), args.part_count = static_cast<int64_t>(sources.size());
    } else {
        const TensorInfo xi = readable(step.xs.at(0));
        DL4DS_CHECK(xi.dim == 4 && xi.sizes[1] == s.channels, kOp, ": x: expected shape (N, ", s.channels,
                    ", H, W), got ", xi.shape());
        check_dtype(kOp, "x", xi, DType::kFloat32);
        s.n = xi.sizes[0], s.height = xi.sizes[2], s.width = xi.sizes[3];
        args.x = xi.as<float>();
        args.stride_n = xi.strides[0], args.stride_h = xi.strides[2], args.stride_w = xi.strides[3];
    }
    set_geometry(s, step.conv);
    return sources;  // moved or elided: args.parts stays where it points
}

/// The output: the residual's own memory if that is free and lies as the output does.
Tensor output_of(const ConvStep& step, const ConvShape& s) {
    if (step.residual_is_dead && step.algorithm == ConvAlgorithm::kDirect) {
        const TensorInfo ri = tensor_info(step.residual);
        const int64_t sizes[4] = {s.n, s.channels_out, s.out_height(), s.out_width()};
        if (ri.dim == 4 && ri.dtype == DType::kFloat32 && std::equal(sizes, sizes + 4, ri.sizes) &&
            is_dense_channels_last(ri)) {
            return *step.residual;
        }
    }
    return empty_channels_last(s.n, s.channels_out, s.out_height(), s.out_width(), DType::kFloat32);
}

}  // namespace

bool is_dense_channels_last(const TensorInfo& info) {
    const auto strides = dense_strides(info.sizes, info.dim, Format::kChannelsLast);
    return same_strides(info.strides, strides.data(), info.sizes, info.dim);
}

Tensor dense_channels_last(const Tensor& t, const TensorInfo& info) {
    return is_dense_channels_last(info)
               ? t
               : copy_with_strides(t, info,
                                   dense_strides(info.sizes, info.dim, Format::kChannelsLast).data());
}

Tensor join_channels(const std::vector<Tensor>& xs) {
    struct Part {
        const char* data;
        size_t bytes;
    };
    std::vector<Part> parts;
    std::vector<Tensor> dense;
    const TensorInfo first = tensor_info(xs.at(0));
    int64_t channels = 0;
    for (const Tensor& x : xs) {
        const TensorInfo xi = tensor_info(x);
        DL4DS_CHECK(xi.dim == 4 && xi.dtype == DType::kFloat32 && xi.sizes[0] == first.sizes[0] &&
                        xi.sizes[2] == first.sizes[2] && xi.sizes[3] == first.sizes[3],
                    kOp, ": xs: expected float32 (N, C, H, W) tensors that differ in C alone, got ",
                    xi.shape());
        channels += xi.sizes[1];
        dense.push_back(dense_channels_last(x, xi));
        parts.push_back({tensor_info(dense.back()).as<char>(), static_cast<size_t>(xi.sizes[1] * 4)});
    }
    Tensor out =
        empty_channels_last(first.sizes[0], channels, first.sizes[2], first.sizes[3], DType::kFloat32);
    char* to = tensor_info(out).as<char>();
    const int64_t pixels = first.sizes[0] * first.sizes[2] * first.sizes[3], row = channels * 4;
    parallel_for(pixels, 2 * pixels * row, [&](int64_t begin, int64_t end) {
        for (int64_t pixel = begin; pixel < end; ++pixel) {
            char* at = to + pixel * row;
            for (const Part& part : parts) {
                std::memcpy(at, part.data + static_cast<size_t>(pixel) * part.bytes, part.bytes);
                at += part.bytes;
            }
        }
    });
    return out;
}

ConvAlgorithm conv_algorithm_from_code(int64_t code) {
    DL4DS_CHECK((code >= 1 && code <= 4) || (code >= 6 && code <= 8), kOp,
                ": algorithm: expected 1, 2, 3, 4, 6, 7 or 8, got ", code);
    return static_cast<ConvAlgorithm>(code);
}

ConvShape conv_weight_shape(const TensorInfo& weight, int64_t groups) {
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

Tensor empty_channels_last(int64_t n, int64_t channels, int64_t height, int64_t width, DType dtype) {
    const int64_t sizes[4] = {n, channels, height, width};
    return empty_cpu(sizes, dense_strides(sizes, 4, Format::kChannelsLast).data(), 4, dtype);
}

Tensor run_conv_step(ConvStep& step) {
    const ConvAlgorithm how = step.algorithm;
    if (step.xs.size() > 1 && !step.before && !is_readable_apart(step)) {
        step.xs = {join_channels(step.xs)};
    }
    if (how == ConvAlgorithm::kLibrary) {
        return conv_bn_act_library(step.xs.at(0), step.packed, step.bias, step.conv, step.after,
                                   step.residual);
    }
    ConvShape s = conv_weight_shape(tensor_info(step.weight), step.before ? 1 : step.conv.groups);
    ConvArgs args{};
    const std::vector<ConvSource> sources = read_inputs(step, s, args);
    const TensorInfo packed = tensor_info(step.packed), bias = tensor_info(step.bias);
    check_packed(packed, how, s);
    Tensor out = output_of(step, s);
    const TensorInfo oi = tensor_info(out);
    check_bn_vectors(kOp, step.after, oi);
    check_channel_vector(kOp, "bias", bias, oi);
    std::optional<Tensor> residual;
    if (step.residual) {
        const TensorInfo ri = tensor_info(step.residual);
        check_same_shape(kOp, "residual", ri, oi);
        check_dtype(kOp, "residual", ri, DType::kFloat32);
        residual = dense_channels_last(*step.residual, ri);
    }
    const int64_t entries = s.channels_out + conv_kernels().panel, in_entries = s.channels + kChunk;
    Scratch vectors(2 * (entries + (step.before ? in_entries : 0)) * int64_t{sizeof(float)});
    float *scale = vectors.as<float>(), *shift = scale + entries, *in_scale = shift + entries,
          *in_shift = in_scale + in_entries;
    fill_scale_shift(step.after, bias, s.channels_out, conv_kernels().panel, scale, shift);
    args.shape = s, args.packed = packed.as<float>(), args.out = oi.as<float>(), args.threads = num_threads();
    args.epilogue = {scale, shift, residual ? tensor_info(*residual).as<float>() : nullptr,
                     step.after.activation, static_cast<float>(step.after.negative_slope)};
    ConvPrologue prologue{};
    if (step.before) {
        fill_scale_shift(*step.before, TensorInfo{}, s.channels, kChunk, in_scale, in_shift);
        prologue = {
            sources.data(), static_cast<int64_t>(sources.size()), in_scale, in_shift, step.before->activation,
            step.pool};
        args.prologue = &prologue;
    }
    if (oi.numel > 0 && !conv_run(how, args)) {
        const Tensor x = step.xs.size() > 1 ? join_channels(step.xs) : step.xs[0];
        return conv_bn_act_library(x, step.weight, step.bias, step.conv, step.after, step.residual);
    }
    return out;
}

}  // namespace dl4ds
