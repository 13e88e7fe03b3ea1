// A 3x3 convolution of a training step by Winograd's F(2x2, 3x3): conv2d_winograd and its gradients. The
// library's convolution answers where a transform would spread an infinite value (see conv_engine_cpu.h).
#include "ops/conv_bn_act/conv_train_cpu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>

#include "ops/conv_bn_act/conv_step_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv2d_winograd";

/// A weight that is dense in one of the two layouts, copied if it is not.
struct Filters {
    Tensor tensor;
    TensorInfo info;
    FilterLayout layout;

    explicit Filters(const Tensor& weight) : tensor(weight), info(tensor_info(weight)) {
        DL4DS_CHECK(info.dim == 4 && info.sizes[2] == 3 && info.sizes[3] == 3, kOp,
                    ": weight: expected shape (C_out, C, 3, 3), got ", info.shape());
        check_dtype(kOp, "weight", info, DType::kFloat32);
        const int64_t channels = info.sizes[1];
        if (is_contiguous(info.sizes, info.strides, info.dim)) {
            layout = {9 * channels, 9, 1};
            return;
        }
        tensor = dense_channels_last(tensor, info);
        info = tensor_info(tensor);
        layout = {9 * channels, 1, channels};
    }
};

ConvShape shape_of(const TensorInfo& x, const TensorInfo& weight, const std::vector<int64_t>& padding) {
    ConvShape s = conv_weight_shape(weight, 1);
    DL4DS_CHECK(
        padding.size() == 2 && padding[0] >= 0 && padding[0] <= 2 && padding[1] >= 0 && padding[1] <= 2, kOp,
        ": padding: expected two numbers from 0 to 2");
    DL4DS_CHECK(x.dim == 4 && x.sizes[1] == s.channels, kOp, ": x: expected shape (N, ", s.channels,
                ", H, W), got ", x.shape());
    check_dtype(kOp, "x", x, DType::kFloat32);
    s.n = x.sizes[0], s.height = x.sizes[2], s.width = x.sizes[3], s.pad_h = padding[0], s.pad_w = padding[1];
    DL4DS_CHECK(s.out_height() >= 1 && s.out_width() >= 1, kOp,
                ": x: expected a padded input at least as large as the kernel, got ", x.shape());
    return s;
}

/// The convolution of `x` with filters of this layout (see conv_pack_filters2). False: see conv_run.
bool convolve(const ConvShape& s, const TensorInfo& x, const Filters& filters, bool gradient,
              const TensorInfo& bias, float* out) {
    const int64_t floats = conv_packed_floats(ConvAlgorithm::kWinograd2, s);
    const int64_t entries = s.channels_out + conv_kernels().panel;
    Scratch scratch((floats + 2 * entries) * 4);
    float *packed = scratch.as<float>(), *scale = packed + floats, *shift = scale + entries;
    conv_pack_filters2(s, filters.info.as<float>(), filters.layout, gradient, packed);
    std::fill(scale, scale + entries, 1.0f);
    std::fill(shift, shift + entries, 0.0f);
    for (int64_t c = 0; bias.present && c < s.channels_out; ++c) {
        shift[c] = static_cast<float>(channel_entry(bias, c, 0.0));
    }
    ConvArgs args{};
    args.shape = s, args.packed = packed, args.out = out, args.threads = num_threads();
    args.x = x.as<float>();
    args.stride_n = x.strides[0], args.stride_h = x.strides[2], args.stride_w = x.strides[3];
    args.epilogue = {scale, shift, nullptr, Activation::kNone, 0.0f};
    return conv_run(ConvAlgorithm::kWinograd2, args);
}

Tensor readable(const Tensor& x) {
    const TensorInfo info = tensor_info(x);
    return info.dim == 4 && info.sizes[1] > 1 && info.strides[1] != 1 ? as_channels_last(x, info) : x;
}

/// aten::convolution_backward for one of (dx, dweight).
Tensor library_gradient(const Tensor& dout, const Tensor& x, const Tensor& weight,
                        const std::vector<int64_t>& padding, int which) {
    using BackwardFn = AOTITorchError(
        AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, const int64_t**, int64_t, const int64_t*,
        int64_t, const int64_t*, int64_t, const int64_t*, int64_t, int32_t, const int64_t*, int64_t, int64_t,
        const int32_t*, int64_t, AtenTensorHandle*, AtenTensorHandle*, AtenTensorHandle*);
    static BackwardFn* const backward = find_shim<BackwardFn>("aoti_torch_cpu_convolution_backward");
    DL4DS_CHECK(backward != nullptr, kOp, ": this torch has no aoti_torch_cpu_convolution_backward");
    const int64_t ones[2] = {1, 1}, zeros[2] = {0, 0};
    const int32_t mask[3] = {which == 0, which == 1, 0};
    AtenTensorHandle results[3] = {nullptr, nullptr, nullptr};
    shim_check(backward(dout.get(), x.get(), weight.get(), nullptr, 0, ones, 2, padding.data(), 2, ones, 2, 0,
                        zeros, 2, 1, mask, 3, &results[0], &results[1], &results[2]),
               "conv2d_winograd_bwd: aten::convolution_backward");
    Tensor result(results[which]);
    for (int i = 0; i < 3; ++i) {
        if (i != which && results[i] != nullptr) {
            aoti_torch_delete_tensor_object(results[i]);
        }
    }
    return result;
}

}  // namespace

Tensor conv2d_winograd(Tensor x, Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> padding) {
    const Filters filters(weight);
    const Tensor source = readable(x);
    const TensorInfo xi = tensor_info(source), bi = tensor_info(bias);
    const ConvShape s = shape_of(xi, filters.info, padding);
    Tensor out = empty_channels_last(s.n, s.channels_out, s.out_height(), s.out_width(), DType::kFloat32,
                                     /*lasting=*/true);
    const TensorInfo oi = tensor_info(out);
    check_channel_vector(kOp, "bias", bi, oi);
    if (oi.numel > 0 && !convolve(s, xi, filters, false, bi, oi.as<float>())) {
        const BnVectors none{std::nullopt, std::nullopt, std::nullopt,      std::nullopt,
                             0.0,          false,        Activation::kNone, 0.0};
        return conv_bn_act_library(source, weight, bias, {{1, 1}, std::move(padding), {1, 1}, 1}, none,
                                   std::nullopt);
    }
    return out;
}

/// (dx, dweight); what is not needed is empty.
std::tuple<Tensor, Tensor> conv2d_winograd_bwd(Tensor dout, Tensor x, Tensor weight,
                                               std::vector<int64_t> padding, bool need_dx,
                                               bool need_dweight) {
    const Filters filters(weight);
    const Tensor source = readable(x);
    const TensorInfo xi = tensor_info(source);
    const ConvShape s = shape_of(xi, filters.info, padding);
    TensorInfo di = tensor_info(dout);
    const int64_t sizes[4] = {s.n, s.channels_out, s.out_height(), s.out_width()};
    DL4DS_CHECK(di.dim == 4 && std::equal(sizes, sizes + 4, di.sizes), kOp,
                ": dout: expected the output's shape, got ", di.shape());
    check_dtype(kOp, "dout", di, DType::kFloat32);
    const Tensor gradient = dense_channels_last(dout, di);
    di = tensor_info(gradient);
    Tensor dx = empty_vector_cpu(0, DType::kFloat32), dweight = empty_vector_cpu(0, DType::kFloat32);
    if (need_dx) {
        dx = empty_channels_last(s.n, s.channels, s.height, s.width, DType::kFloat32);
        ConvShape back = s;  // a convolution of dout, filters turned
        back.channels = s.channels_out, back.channels_out = s.channels;
        back.height = s.out_height(), back.width = s.out_width();
        back.pad_h = 2 - s.pad_h, back.pad_w = 2 - s.pad_w;
        const TensorInfo to = tensor_info(dx);
        if (to.numel > 0 && !convolve(back, di, filters, true, TensorInfo{}, to.as<float>())) {
            dx = library_gradient(gradient, source, weight, padding, 0);
        }
    }
    if (need_dweight) {
        const TensorInfo& wi = filters.info;
        dweight = empty_cpu(wi.sizes, wi.strides, 4, DType::kFloat32, /*lasting=*/true);
        const WgradArgs args{s,
                             xi.as<float>(),
                             xi.strides[0],
                             xi.strides[2],
                             xi.strides[3],
                             di.as<float>(),
                             tensor_info(dweight).as<float>(),
                             filters.layout,
                             num_threads()};
        if (di.numel == 0 || !conv_wgrad_winograd2(args)) {
            dweight = library_gradient(gradient, source, weight, padding, 1);
        }
    }
    return {std::move(dx), std::move(dweight)};
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("conv2d_winograd", TORCH_BOX(&conv2d_winograd));
    m.impl("conv2d_winograd_bwd", TORCH_BOX(&conv2d_winograd_bwd));
}

}  // namespace dl4ds
