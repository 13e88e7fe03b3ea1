// The convolutions of a training step on our own kernels: conv2d_exact and its gradients. The library's
// convolution answers where ours would spread an infinite value: a transform over its tile (see
// conv_engine_cpu.h), a product with the zeros of the padding that the library leaves out.
#include "ops/conv_bn_act/conv_train_cpu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>

#include "ops/conv_bn_act/conv_step_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv2d_exact";

ConvAlgorithm algorithm_of(int64_t code, const char* argument, bool may_be_none) {
    DL4DS_CHECK(code == 1 || code == 2 || (may_be_none && code == 0), kOp, ": ", argument,
                ": expected 1 (direct)",
                may_be_none ? ", 2 (Winograd) or 0 (not computed)" : " or 2 (Winograd)", ", got ", code);
    return static_cast<ConvAlgorithm>(code);
}

ConvShape shape_of(const TensorInfo& x, const TensorInfo& weight, const Convolution& conv) {
    ConvShape s = conv_weight_shape(weight, 1);
    const auto pair = [](const char* name, const std::vector<int64_t>& value, int64_t least) {
        DL4DS_CHECK(value.size() == 2 && value[0] >= least && value[1] >= least, kOp, ": ", name,
                    ": expected two numbers from ", least, " up");
    };
    pair("stride", conv.stride, 1), pair("padding", conv.padding, 0), pair("dilation", conv.dilation, 1);
    DL4DS_CHECK(x.dim == 4 && x.sizes[1] == s.channels, kOp, ": x: expected shape (N, ", s.channels,
                ", H, W), got ", x.shape());
    check_dtype(kOp, "x", x, DType::kFloat32);
    s.n = x.sizes[0], s.height = x.sizes[2], s.width = x.sizes[3];
    s.stride_h = conv.stride[0], s.stride_w = conv.stride[1];
    s.pad_h = conv.padding[0], s.pad_w = conv.padding[1];
    s.dilation_h = conv.dilation[0], s.dilation_w = conv.dilation[1];
    DL4DS_CHECK(s.height + 2 * s.pad_h > s.dilation_h * (s.kernel_h - 1) &&
                    s.width + 2 * s.pad_w > s.dilation_w * (s.kernel_w - 1),
                kOp, ": x: expected a padded input at least as large as the kernel, got ", x.shape());
    return s;
}

void check_algorithm(ConvAlgorithm algorithm, const char* argument, const ConvShape& s) {
    DL4DS_CHECK(algorithm != ConvAlgorithm::kWinograd2 ||
                    (conv_supports(algorithm, s) && s.pad_h <= 2 && s.pad_w <= 2),
                kOp, ": ", argument, ": Winograd takes a 3x3 kernel, stride and dilation 1, padding to 2");
}

/// dx by the algorithm, plus `added` unless that is null. False: as run_exact.
bool gradient_of_x(ConvAlgorithm algorithm, const ConvShape& s, const TensorInfo& dout,
                   const Filters& filters, const float* added, float* dx) {
    if (algorithm == ConvAlgorithm::kDirect) {
        return conv_dgrad_direct({s, dout.as<float>(), dout.strides[0], dout.strides[2], dout.strides[3],
                                  filters.info.as<float>(), filters.layout, dx, num_threads(), added});
    }
    ConvShape back = s;  // a convolution of dout, filters turned
    back.channels = s.channels_out, back.channels_out = s.channels;
    back.height = s.out_height(), back.width = s.out_width();
    back.pad_h = 2 - s.pad_h, back.pad_w = 2 - s.pad_w;
    return run_exact(algorithm, back, dout, filters, true, TensorInfo{}, dx, added);
}

/// to += from, of equal shape and layout.
void add_to(const TensorInfo& to, const TensorInfo& from) {
    float* const sum = to.as<float>();
    const float* const value = from.as<float>();
    const Blocks blocks = fixed_blocks(to.numel, 4, 32 << 10, 16, to.numel);
    parallel_for(blocks.count, 12 * to.numel, [&](int64_t first, int64_t last) {
        for (int64_t i = blocks.begin(first); i < blocks.end(last - 1); ++i) {
            sum[i] += value[i];
        }
    });
}

Tensor readable(const Tensor& x) {
    const TensorInfo info = tensor_info(x);
    return info.dim == 4 && info.sizes[1] > 1 && info.strides[1] != 1 ? as_channels_last(x, info) : x;
}

/// aten::convolution_backward for one of (dx, dweight).
Tensor library_gradient(const Tensor& dout, const Tensor& x, const Tensor& weight, const Convolution& conv,
                        int which) {
    if (Team::current() != nullptr) {
        throw NeedsPool();
    }
    using BackwardFn = AOTITorchError(
        AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, const int64_t**, int64_t, const int64_t*,
        int64_t, const int64_t*, int64_t, const int64_t*, int64_t, int32_t, const int64_t*, int64_t, int64_t,
        const int32_t*, int64_t, AtenTensorHandle*, AtenTensorHandle*, AtenTensorHandle*);
    BackwardFn* const backward = kShim<BackwardFn, "aoti_torch_cpu_convolution_backward">;
    DL4DS_CHECK(backward != nullptr, kOp, ": this torch has no aoti_torch_cpu_convolution_backward");
    const int64_t zeros[2] = {0, 0};
    const int32_t mask[3] = {which == 0, which == 1, 0};
    AtenTensorHandle results[3] = {nullptr, nullptr, nullptr};
    shim_check(
        backward(dout.get(), x.get(), weight.get(), nullptr, 0, conv.stride.data(), 2, conv.padding.data(), 2,
                 conv.dilation.data(), 2, 0, zeros, 2, 1, mask, 3, &results[0], &results[1], &results[2]),
        "conv2d_exact_bwd: aten::convolution_backward");
    Tensor result(results[which]);
    for (int i = 0; i < 3; ++i) {
        if (i != which && results[i] != nullptr) {
            aoti_torch_delete_tensor_object(results[i]);
        }
    }
    return result;
}

}  // namespace

Filters::Filters(const Tensor& weight) : tensor(weight), info(tensor_info(weight)) {
    DL4DS_CHECK(info.dim == 4, kOp, ": weight: expected shape (C_out, C, kH, kW), got ", info.shape());
    check_dtype(kOp, "weight", info, DType::kFloat32);
    const int64_t channels = info.sizes[1], taps = info.sizes[2] * info.sizes[3];
    if (is_contiguous(info.sizes, info.strides, info.dim)) {
        layout = {taps * channels, taps, 1};
        return;
    }
    tensor = dense_channels_last(tensor, info);
    info = tensor_info(tensor);
    layout = {taps * channels, 1, channels};
}

bool run_exact(ConvAlgorithm algorithm, const ConvShape& s, const TensorInfo& x, const Filters& filters,
               bool gradient, const TensorInfo& bias, float* out, const float* added,
               const ConvPrologue* prologue) {
    const int64_t floats = conv_packed_floats(algorithm, s);
    const int64_t entries = s.channels_out + conv_kernels().panel;
    Scratch scratch((floats + 2 * entries) * 4);
    float *packed = scratch.as<float>(), *scale = packed + floats, *shift = scale + entries;
    if (algorithm == ConvAlgorithm::kWinograd2) {
        conv_pack_filters2(s, filters.info.as<float>(), filters.layout, gradient, packed);
    } else {
        std::vector<int64_t> taps(static_cast<size_t>(s.taps()));
        for (size_t t = 0; t < taps.size(); ++t) {
            taps[t] = static_cast<int64_t>(t) * filters.layout.tap;
        }
        if (!conv_pack_taps(s, filters.info.as<float>(), filters.layout, false, taps, packed) &&
            s.pad_h + s.pad_w > 0) {
            return false;
        }
    }
    std::fill(scale, scale + entries, 1.0f);
    std::fill(shift, shift + entries, 0.0f);
    for (int64_t c = 0; bias.present && c < s.channels_out; ++c) {
        shift[c] = static_cast<float>(channel_entry(bias, c, 0.0));
    }
    ConvArgs args{};
    args.shape = s, args.packed = packed, args.out = out, args.threads = num_threads(),
    args.prologue = prologue;
    args.x = x.as<float>();
    args.stride_n = x.strides[0], args.stride_h = x.strides[2], args.stride_w = x.strides[3];
    args.epilogue = {scale, shift, added, Activation::kNone, 0.0f};
    return conv_run(algorithm, args);
}

Tensor conv2d_exact(Tensor x, Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t algorithm) {
    const Filters filters(weight);
    const Tensor source = readable(x);
    const TensorInfo xi = tensor_info(source), bi = tensor_info(bias);
    const Convolution conv{std::move(stride), std::move(padding), std::move(dilation), 1};
    const ConvShape s = shape_of(xi, filters.info, conv);
    const ConvAlgorithm how = algorithm_of(algorithm, "algorithm", false);
    check_algorithm(how, "algorithm", s);
    Tensor out = empty_channels_last(s.n, s.channels_out, s.out_height(), s.out_width(), DType::kFloat32);
    const TensorInfo oi = tensor_info(out);
    check_channel_vector(kOp, "bias", bi, oi);
    bool done = oi.numel == 0;
    with_team(num_threads(),
              [&] { done = done || run_exact(how, s, xi, filters, false, bi, oi.as<float>()); });
    if (!done) {
        return library_convolution(source, weight, bias, conv);
    }
    return out;
}

std::tuple<Tensor, Tensor> conv_gradients(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                          const Convolution& conv, std::optional<ConvAlgorithm> dgrad,
                                          std::optional<ConvAlgorithm> wgrad, const Tensor* added,
                                          bool added_is_dead) {
    const Filters filters(weight);
    const Tensor source = readable(x);
    const TensorInfo xi = tensor_info(source);
    const ConvShape s = shape_of(xi, filters.info, conv);
    check_algorithm(dgrad.value_or(ConvAlgorithm::kLibrary), "dgrad", s);
    check_algorithm(wgrad.value_or(ConvAlgorithm::kLibrary), "wgrad", s);
    DL4DS_CHECK(dgrad != ConvAlgorithm::kDirect || conv_dgrad_direct_supports(s), kOp,
                ": dgrad: no stride together with dilation, no padding beyond the kernel");
    TensorInfo di = tensor_info(dout);
    const int64_t sizes[4] = {s.n, s.channels_out, s.out_height(), s.out_width()};
    DL4DS_CHECK(di.dim == 4 && std::equal(sizes, sizes + 4, di.sizes), kOp,
                ": dout: expected the output's shape, got ", di.shape());
    check_dtype(kOp, "dout", di, DType::kFloat32);
    const Tensor gradient = dense_channels_last(dout, di);
    di = tensor_info(gradient);
    if (added != nullptr) {
        const TensorInfo ai = tensor_info(*added);
        check_same_shape(kOp, "added", ai, xi);
        check_dtype(kOp, "added", ai, DType::kFloat32);
        DL4DS_CHECK(is_dense_channels_last(ai), kOp, ": added: expected dense channels_last");
    }
    Tensor dx = empty_vector_cpu(0, DType::kFloat32), dweight = empty_vector_cpu(0, DType::kFloat32);
    if (dgrad) {
        bool done = false;
        if (*dgrad != ConvAlgorithm::kLibrary) {
            // These read what is added where they write, once; and whether they can is known before.
            const bool in_place = added != nullptr && added_is_dead && *dgrad == ConvAlgorithm::kDirect &&
                                  s.stride_h == 1 && s.stride_w == 1;
            dx = in_place ? *added : empty_channels_last(s.n, s.channels, s.height, s.width, DType::kFloat32);
            const TensorInfo to = tensor_info(dx);
            const float* const more = added == nullptr ? nullptr : tensor_info(*added).as<float>();
            done = to.numel == 0;
            with_team(num_threads(),
                      [&] { done = done || gradient_of_x(*dgrad, s, di, filters, more, to.as<float>()); });
        }
        if (!done) {
            dx = library_gradient(gradient, source, weight, conv, 0);
            if (added != nullptr) {
                dx = dense_channels_last(dx, tensor_info(dx));
                add_to(tensor_info(dx), tensor_info(*added));
            }
        }
    }
    if (wgrad) {
        bool done = false;
        if (*wgrad != ConvAlgorithm::kLibrary) {
            const TensorInfo& wi = filters.info;
            dweight = empty_cpu(wi.sizes, wi.strides, 4, DType::kFloat32);
            const WgradArgs args{s,
                                 xi.as<float>(),
                                 xi.strides[0],
                                 xi.strides[2],
                                 xi.strides[3],
                                 di.as<float>(),
                                 tensor_info(dweight).as<float>(),
                                 filters.layout,
                                 num_threads()};
            const auto compute =
                *wgrad == ConvAlgorithm::kDirect ? &conv_wgrad_direct : &conv_wgrad_winograd2;
            done = di.numel != 0 && compute(args);
        }
        if (!done) {
            dweight = library_gradient(gradient, source, weight, conv, 1);
        }
    }
    return {std::move(dx), std::move(dweight)};
}

/// (dx, dweight); what is not computed (code 0) is empty.
std::tuple<Tensor, Tensor> conv2d_exact_bwd(Tensor dout, Tensor x, Tensor weight, std::vector<int64_t> stride,
                                            std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                            int64_t dgrad, int64_t wgrad) {
    const auto wanted = [](int64_t code, const char* argument) -> std::optional<ConvAlgorithm> {
        const ConvAlgorithm algorithm = algorithm_of(code, argument, true);
        return code == 0 ? std::nullopt : std::optional(algorithm);
    };
    return conv_gradients(dout, x, weight, {std::move(stride), std::move(padding), std::move(dilation), 1},
                          wanted(dgrad, "dgrad"), wanted(wgrad, "wgrad"), nullptr, false);
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("conv2d_exact", TORCH_BOX(&conv2d_exact));
    m.impl("conv2d_exact_bwd", TORCH_BOX(&conv2d_exact_bwd));
}

}  // namespace dl4ds
