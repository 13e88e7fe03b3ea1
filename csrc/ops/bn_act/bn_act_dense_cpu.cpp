// What a dense block's training step does on its one buffer of features (ops/dense_block.py), all in slices
// of channels of channels_last buffers: append new features and take their statistics, the backward pass of a
// BatchNorm over the first channels, and a slice of the gradient when nobody adds to it any more.
#include "ops/bn_act/bn_act_dense_cpu.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "ops/bn_act/bn_act_reduce_cpu.h"

namespace dl4ds {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;
constexpr int64_t kMaxBlocks = 256;

BnPlan channels_plan(const TensorInfo& x) {
    BnPlan plan;
    plan.dtype = x.dtype;
    plan.channels = plan.len = x.sizes[1];
    return plan;
}

Blocks pixel_blocks(const TensorInfo& x) {
    const int64_t channels = x.sizes[1];
    return fixed_blocks(x.numel / channels, channels * dtype_size(x.dtype), kBlockBytes, 8, kMaxBlocks);
}

void copy_rows(const TensorInfo& x, int64_t x_pitch, const TensorInfo& out, int64_t out_pitch) {
    const int64_t size = dtype_size(x.dtype), bytes = x.sizes[1] * size;
    const Blocks blocks = pixel_blocks(x);
    parallel_for(blocks.count, 2 * x.numel * size, [&](int64_t first, int64_t last) {
        for (int64_t r = blocks.begin(first); r < blocks.end(last - 1); ++r) {
            std::memcpy(byte_offset(out.data, r * out_pitch * size),
                        byte_offset(static_cast<const void*>(x.data), r * x_pitch * size),
                        static_cast<size_t>(bytes));
        }
    });
}

template <typename T>
void write_moments(const BnPlan& plan, const TensorInfo& x, T* mean, T* var) {
    Scratch moments(2 * 8 * plan.channels);
    double* first = moments.as<double>();
    double* second = first + plan.channels;
    bn_stats_all(plan, x.data, first, second);
    const double n = static_cast<double>(plan.count());
    for (int64_t c = 0; c < plan.channels; ++c) {
        mean[c] = static_cast<T>(first[c]);
        var[c] = static_cast<T>(second[c] > 0 ? second[c] / n : second[c] * 0);  // NaN stays NaN
    }
}

struct Back {
    TensorInfo dz, x, grad, out, factor, offset;
    DenseNorm norm;
    Activation activation;
    int64_t pitch, x_pitch, grad_pitch, out_pitch;
};

/// The pass over all pixels: s1, s2 (C,) as doubles.
void run_pass(const Back& b, const BnDenseBwdArgs& whole, double* s1, double* s2) {
    const int64_t size = dtype_size(b.x.dtype), channels = b.x.sizes[1], padded = pad_elements(channels);
    const Blocks blocks = pixel_blocks(b.x);
    const auto kernel = bn_kernels().dense_bwd[static_cast<int>(b.x.dtype)][static_cast<int>(b.activation)];
    Scratch sums(2 * blocks.count * padded * 8);
    double* all = sums.as<double>();
    parallel_for(blocks.count, 4 * b.x.numel * size, [&](int64_t first, int64_t last) {
        Scratch scratch(bn_reduce_scratch_bytes(channels));
        for (int64_t block = first; block < last; ++block) {
            const int64_t begin = blocks.begin(block);
            BnDenseBwdArgs p = whole;
            p.dz = byte_offset(whole.dz, begin * p.pitch * size);
            p.x = byte_offset(whole.x, begin * p.x_pitch * size);
            p.grad = byte_offset(whole.grad, begin * p.grad_pitch * size);
            p.out = byte_offset(whole.out, begin * p.out_pitch * size);
            p.rows = blocks.end(block) - begin;
            p.s1 = all + 2 * block * padded;
            p.s2 = p.s1 + padded;
            std::memset(p.s1, 0, static_cast<size_t>(2 * padded) * sizeof(double));
            p.scratch = scratch.as<void>();
            kernel(p);
        }
    });
    for (int64_t c = 0; c < channels; ++c) {
        s1[c] = s2[c] = 0;
        for (int64_t block = 0; block < blocks.count; ++block) {
            s1[c] += all[2 * block * padded + c];
            s2[c] += all[(2 * block + 1) * padded + c];
        }
    }
}

template <typename T>
void run_back(const Back& b, BnDenseBwdArgs whole, T* dweight, T* dbias) {
    const BnPlan plan = channels_plan(b.x);
    const int64_t channels = plan.channels;
    ChannelArrays<T> arrays(plan, 3);
    Scratch work(2 * 8 * channels);
    double *s1 = work.as<double>(), *s2 = s1 + channels;
    for (int64_t c = 0; c < channels; ++c) {
        b.norm.constants<T>(c, arrays.array(0)[c], arrays.array(1)[c], arrays.array(2)[c]);
    }
    arrays.replicate(3);
    whole.mean = arrays.array(0);
    whole.scale = arrays.array(1);
    whole.shift = arrays.array(2);
    run_pass(b, whole, s1, s2);
    const double n = static_cast<double>(b.x.numel / channels);
    for (int64_t c = 0; c < channels; ++c) {  // the pass has added the first term
        b.norm.add_gradients<T>(c, n, s1[c], s2[c], dweight[c], dbias[c], b.factor.as<double>()[c],
                                b.offset.as<double>()[c]);
    }
}

template <typename T>
void run_take(const TensorInfo& grad, const TensorInfo& x, const TensorInfo& mean, const TensorInfo& factor,
              const TensorInfo& offset, void* out) {
    const BnPlan plan = channels_plan(x);
    ChannelArrays<T> arrays(plan, 3);
    for (int64_t c = 0; c < plan.channels; ++c) {
        arrays.array(0)[c] = channel_entry<T>(mean, c, T(0));
        arrays.array(1)[c] = static_cast<T>(factor.as<double>()[c]);
        arrays.array(2)[c] = static_cast<T>(offset.as<double>()[c]);
    }
    arrays.replicate(3);
    BnDenseTakeArgs whole{};
    whole.len = plan.channels;
    whole.grad_pitch = pixel_pitch(grad);
    whole.x_pitch = pixel_pitch(x);
    whole.mean = arrays.array(0);
    whole.factor = arrays.array(1);
    whole.offset = arrays.array(2);
    const int64_t size = dtype_size(x.dtype);
    const Blocks blocks = pixel_blocks(x);
    const auto kernel = bn_kernels().dense_take[static_cast<int>(x.dtype)];
    parallel_for(blocks.count, 3 * x.numel * size, [&](int64_t first, int64_t last) {
        const int64_t begin = blocks.begin(first);
        BnDenseTakeArgs p = whole;
        p.grad = byte_offset(static_cast<const void*>(grad.data), begin * p.grad_pitch * size);
        p.x = byte_offset(static_cast<const void*>(x.data), begin * p.x_pitch * size);
        p.out = byte_offset(out, begin * p.len * size);
        p.rows = blocks.end(last - 1) - begin;
        kernel(p);
    });
}

}  // namespace

Tensor dense_buffer_cpu(Tensor like, int64_t channels) {
    const TensorInfo x = tensor_info(like);
    check_batched("dense_buffer", x);
    DL4DS_CHECK(channels >= 0, "dense_buffer: channels: expected 0 or more, got ", channels);
    std::array<int64_t, kMaxDims> sizes{};
    std::copy(x.sizes, x.sizes + x.dim, sizes.begin());
    sizes[1] = channels;
    const auto strides = dense_strides(sizes.data(), x.dim, Format::kChannelsLast);
    return empty_cpu(sizes.data(), strides.data(), x.dim, x.dtype);
}

void dense_append_cpu(Tensor x, Tensor out, Tensor mean, Tensor var) {
    constexpr const char* kOp = "dense_append_into";
    TensorInfo info = tensor_info(x);
    const TensorInfo to = tensor_info(out), first = tensor_info(mean), second = tensor_info(var);
    check_batched(kOp, info);
    const int64_t out_pitch = dense_pitch(kOp, "out", to, info);
    const DType acc = acc_dtype(info.dtype);
    check_written(kOp, "mean", first, info, acc);
    check_written(kOp, "var", second, info, acc);
    if (info.numel == 0) {
        return;
    }
    BnPlan plan;
    if (pixel_pitch(info) == 0 || !make_bn_plan(info, Format::kChannelsLast, plan)) {
        x = copy_with_strides(x, info, dense_strides(info.sizes, info.dim, Format::kChannelsLast).data());
        info = tensor_info(x);
        make_bn_plan(info, Format::kChannelsLast, plan);
    }
    copy_rows(info, pixel_pitch(info), to, out_pitch);
    if (acc == DType::kFloat64) {
        write_moments<double>(plan, info, first.as<double>(), second.as<double>());
    } else {
        write_moments<float>(plan, info, first.as<float>(), second.as<float>());
    }
}

std::tuple<Tensor, Tensor> dense_back_cpu(Tensor dz, Tensor x, std::optional<Tensor> weight,
                                          std::optional<Tensor> bias, Tensor mean, Tensor var, Tensor grad,
                                          Tensor out, Tensor factor, Tensor offset, double eps, bool eps_std,
                                          int64_t activation, double negative_slope, bool activate) {
    constexpr const char* kOp = "dense_back_into";
    Back b{tensor_info(dz),
           tensor_info(x),
           tensor_info(grad),
           tensor_info(out),
           tensor_info(factor),
           tensor_info(offset),
           {tensor_info(weight), tensor_info(bias), tensor_info(mean), tensor_info(var), eps, eps_std},
           activation_from_code(kOp, activation),
           0,
           0,
           0,
           0};
    check_batched(kOp, b.x);
    b.x_pitch = dense_pitch(kOp, "x", b.x, b.x);
    b.pitch = dense_pitch(kOp, "dz", b.dz, b.x);
    b.grad_pitch = dense_pitch(kOp, "grad", b.grad, b.x);
    b.out_pitch = dense_pitch(kOp, "out", b.out, b.x);
    b.norm.check(kOp, b.x);
    check_written(kOp, "factor", b.factor, b.x, DType::kFloat64);
    check_written(kOp, "offset", b.offset, b.x, DType::kFloat64);
    const DType acc = acc_dtype(b.x.dtype);
    Tensor dweight = empty_vector_cpu(b.x.sizes[1], acc), dbias = empty_vector_cpu(b.x.sizes[1], acc);
    const TensorInfo first = tensor_info(dweight), second = tensor_info(dbias);
    if (b.x.numel == 0) {
        std::memset(first.data, 0, static_cast<size_t>(first.numel * dtype_size(acc)));
        std::memset(second.data, 0, static_cast<size_t>(second.numel * dtype_size(acc)));
        return {dweight, dbias};
    }
    BnDenseBwdArgs whole{};
    whole.dz = b.dz.data;
    whole.x = b.x.data;
    whole.grad = b.grad.data;
    whole.out = b.out.data;
    whole.len = b.x.sizes[1];
    whole.pitch = b.pitch;
    whole.x_pitch = b.x_pitch;
    whole.grad_pitch = b.grad_pitch;
    whole.out_pitch = b.out_pitch;
    whole.slope = negative_slope;
    whole.activate = activate;
    if (acc == DType::kFloat64) {
        run_back<double>(b, whole, first.as<double>(), second.as<double>());
    } else {
        run_back<float>(b, whole, first.as<float>(), second.as<float>());
    }
    return {dweight, dbias};
}

Tensor dense_take_cpu(Tensor grad, Tensor x, Tensor mean, Tensor factor, Tensor offset) {
    constexpr const char* kOp = "dense_take_step";
    const TensorInfo from = tensor_info(grad), features = tensor_info(x), center = tensor_info(mean);
    const TensorInfo slope = tensor_info(factor), constant = tensor_info(offset);
    check_batched(kOp, features);
    dense_pitch(kOp, "x", features, features);
    dense_pitch(kOp, "grad", from, features);
    check_channel_vector(kOp, "mean", center, features);
    check_written(kOp, "factor", slope, features, DType::kFloat64);
    check_written(kOp, "offset", constant, features, DType::kFloat64);
    const auto strides = dense_strides(features.sizes, features.dim, Format::kChannelsLast);
    Tensor out = empty_cpu(features.sizes, strides.data(), features.dim, features.dtype);
    if (features.numel == 0) {
        return out;
    }
    if (features.dtype == DType::kFloat64) {
        run_take<double>(from, features, center, slope, constant, tensor_info(out).data);
    } else {
        run_take<float>(from, features, center, slope, constant, tensor_info(out).data);
    }
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("dense_buffer", TORCH_BOX(&dense_buffer_cpu));
    m.impl("dense_append_into", TORCH_BOX(&dense_append_cpu));
    m.impl("dense_back_into", TORCH_BOX(&dense_back_cpu));
    m.impl("dense_take_step", TORCH_BOX(&dense_take_cpu));
}

}  // namespace dl4ds
