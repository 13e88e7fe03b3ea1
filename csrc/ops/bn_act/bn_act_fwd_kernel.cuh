// Forward kernels of bn_act: the merge of the batch statistics and the elementwise pass.
#pragma once

#include "ops/bn_act/bn_act_kernel.cuh"

namespace dl4ds {

struct BnActFinalizeArgs {
    int64_t channels, parts;                // parts 0: x has no elements
    const void *origin, *partial, *counts;  // origin null: zero
    bool eps_std;
    double eps, momentum;
    void *mean, *rstd;
    ChannelVector weight, bias;
    void* table;  // [2][table_stride]: scale and shift for the elementwise pass
    int64_t table_stride;
    ChannelVector running_mean, running_var;
    void *new_running_mean, *new_running_var;
};

/// Merges the partials of each channel in fp64, in a fixed order, and derives what the later passes read.
template <typename acc_t>
__global__ void __launch_bounds__(kFinalizeChannels* kFinalizeGroups, 2)
    bn_act_finalize_kernel(const BnActFinalizeArgs a) {
    __shared__ double shared[3][kFinalizeGroups][kFinalizeChannels];
    const int64_t c = int64_t(blockIdx.x) * kFinalizeChannels + threadIdx.x % kFinalizeChannels;
    const int group = threadIdx.x / kFinalizeChannels;
    const bool active = c < a.channels;
    const acc_t* partial = static_cast<const acc_t*>(a.partial) + c;
    const acc_t* counts = static_cast<const acc_t*>(a.counts);
    // Relative to the first partial mean: its own part of the data bounds the cancellation by a factor
    // `parts`.
    const double shift = active && a.parts > 0 ? double(partial[0]) : 0;
    double value[3] = {0, 0, 0};  // count, sum, sum of squares
    if (active) {
#pragma unroll 4
        for (int64_t part = group; part < a.parts; part += kFinalizeGroups) {
            const double count = counts[part], d = partial[part * 2 * a.channels] - shift;
            value[0] += count;
            value[1] += count * d;
            value[2] += partial[(part * 2 + 1) * a.channels] + count * d * d;
        }
    }
    finalize_sum(value, shared);
    if (!active || group != 0) {
        return;
    }
    const double n = value[0] > 0 ? value[0] : 1, offset = value[1] / n;
    double m2 = value[2] - value[1] * offset;
    m2 = m2 < 0 ? 0 : m2;  // NaN stays NaN
    const double origin =
        a.parts > 0 && a.origin != nullptr ? static_cast<const acc_t*>(a.origin)[c] : acc_t(0);
    const double mean = origin + (shift + offset), var = m2 / n;
    const double rstd = a.eps_std ? 1 / (::sqrt(var) + a.eps) : 1 / ::sqrt(var + a.eps);
    static_cast<acc_t*>(a.mean)[c] = static_cast<acc_t>(mean);
    static_cast<acc_t*>(a.rstd)[c] = static_cast<acc_t>(rstd);
    const double weight = a.weight.data != nullptr ? load_channel<double>(a.weight, c) : 1;
    const double bias = a.bias.data != nullptr ? load_channel<double>(a.bias, c) : 0;
    const acc_t scale = static_cast<acc_t>(weight * rstd);
    static_cast<acc_t*>(a.table)[c] = scale;
    static_cast<acc_t*>(a.table)[a.table_stride + c] = static_cast<acc_t>(bias - mean * scale);
    if (a.new_running_mean != nullptr) {
        const double old = load_channel<double>(a.running_mean, c);
        store_channel(a.new_running_mean, a.running_mean.dtype, c,
                      (1 - a.momentum) * old + a.momentum * mean);
    }
    if (a.new_running_var != nullptr) {
        const double old = load_channel<double>(a.running_var, c), unbiased = n > 1 ? m2 / (n - 1) : m2;
        store_channel(a.new_running_var, a.running_var.dtype, c,
                      (1 - a.momentum) * old + a.momentum * unbiased);
    }
}

struct BnActApplyArgs {
    const void *x, *residual;
    void* out;
    uint8_t* mask;
    Affine affine;
    Activation activation;
    double slope;
    Rows rows;
    RowStrides x_rows, residual_rows;
    Planes planes;
    PlaneStrides x_planes, residual_planes;
    int64_t row_vecs, row_step, vecs, numel;  // rows: vectors of a row, rows that the grid's stride spans
    PlaneStep plane_step;                     // planes in order: the grid's stride
    ChannelWindows windows;                   // planes by channel
};

/// Normalises and activates a vector in place, four values at a time: whole vectors of fp16 would not leave
/// enough registers. residual: whether `add` is added; scale(k) and shift(k): of value k. Returns the mask's
/// bits.
template <typename T, int kVec, typename Residual, typename Scale, typename Shift>
__device__ __forceinline__ unsigned apply_vector(const BnActApplyArgs& a, Residual residual,
                                                 RawPack<T, kVec>& value, RawPack<T, kVec>& add,
                                                 const Scale& scale, const Shift& shift) {
    using acc_t = acc_type<T>;
    constexpr int kGroup = kVec < 4 ? kVec : 4;
    const acc_t slope = static_cast<acc_t>(a.slope);
    unsigned bits = 0;
    pin<T, kVec>(value);
    if (residual) {
        pin<T, kVec>(add);
    }
#pragma unroll
    for (int g = 0; g < kVec; g += kGroup) {
        acc_t v[kGroup], z[kGroup];
        get_values<T, kVec, kGroup>(value, g, v);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
            z[k] = fma(v[k], scale(g + k), shift(g + k));
        }
        if (residual) {
            get_values<T, kVec, kGroup>(add, g, v);
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
                z[k] += v[k];
            }
        }
        if (a.mask != nullptr) {
            bits |= positive_bits<T, kGroup>(z, a.activation) << g;
        }
        activate(z, a.activation, slope);
        put_values<T, kVec, kGroup>(value, g, z);
    }
    return bits;
}

/// From the statistics' end backwards (its tail is in the L2 cache). The grid's stride is a multiple of a
/// row, so a thread keeps its channels; out may be x, hence no read-only loads.
template <typename T, int kVec, bool kResidual>
__device__ __forceinline__ void apply_rows(const BnActApplyArgs& a) {
    using acc_t = acc_type<T>;
    constexpr int kUnroll = sizeof(acc_t) == 8 ? 1 : 2;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int step = static_cast<int>((a.vecs - 1 - base) / stride);  // the same in all threads of a block
    int64_t row = (base + threadIdx.x) / a.row_vecs;
    const int column = static_cast<int>(base + threadIdx.x - row * a.row_vecs);
    row += step * a.row_step;
    const T* x = static_cast<const T*>(a.x) + column * kVec;
    acc_t scale[kVec], shift[kVec];
    load_affine<acc_t, kVec>(a.affine, column * kVec, scale, shift);
    for (; step >= 0; step -= kUnroll, row -= kUnroll * a.row_step) {
        RawPack<T, kVec> value[kUnroll], add[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t r = row - u * a.row_step;
            if (step >= u && r < a.rows.count) {
                value[u] = load_raw<T, kVec>(x + row_offset(a.rows, a.x_rows, r));
                if constexpr (kResidual) {
                    add[u] = load_raw<T, kVec>(static_cast<const T*>(a.residual) + column * kVec +
                                               row_offset(a.rows, a.residual_rows, r));
                }
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t r = row - u * a.row_step, f = r * a.row_vecs + column;
            const bool valid = step >= u && r < a.rows.count;
            unsigned bits = 0;
            if (valid) {
                bits = apply_vector<T, kVec>(
                    a, std::bool_constant<kResidual>{}, value[u], add[u], [&](int k) { return scale[k]; },
                    [&](int k) { return shift[k]; });
                store_raw<T, kVec>(static_cast<T*>(a.out) + f * kVec, value[u]);
            }
            if (a.mask != nullptr && step >= u) {
                store_mask<kVec>(a.mask, f, bits, valid);
            }
        }
    }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_fwd_kernel_nhwc(const BnActApplyArgs a) {
    if (a.residual != nullptr) {
        apply_rows<T, kVec, true>(a);
    } else {
        apply_rows<T, kVec, false>(a);
    }
}

/// A block takes one channel and every parts-th group of kThreads windows, which are whole.
template <typename T, int kVec, bool kResidual>
__device__ __forceinline__ void apply_channel(const BnActApplyArgs& a) {
    using acc_t = acc_type<T>;
    constexpr int kUnroll = kResidual ? 2 : 4;
    const ChannelWindows& w = a.windows;
    const int part = static_cast<int>(blockIdx.x % w.parts), c = static_cast<int>(blockIdx.x / w.parts);
    const int index = part * kThreads + threadIdx.x;
    const T* x = static_cast<const T*>(a.x) + c * a.x_planes.c;
    const T* residual = static_cast<const T*>(a.residual) + c * a.residual_planes.c;
    const int64_t count = w.full + (index < w.rest);
    WindowCursor at(w, index);
    at.forward(w, w.last_n, w.last_window);
    acc_t scale[1], shift[1];
    load_affine<acc_t, 1>(a.affine, c, scale, shift);
    for (int64_t step = w.steps() - 1; step >= 0; step -= kUnroll) {
        RawPack<T, kVec> value[kUnroll], add[kUnroll];
        int64_t f[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            f[u] = (at.n * a.planes.channels + c) * w.windows + at.window;
            if (step >= u && step - u < count) {
                const int pos = at.window * kVec;
                value[u] =
                    load_raw<T, kVec>(x + at.n * a.x_planes.n + plane_place(a.planes, a.x_planes, pos));
                if constexpr (kResidual) {
                    add[u] = load_raw<T, kVec>(residual + at.n * a.residual_planes.n +
                                               plane_place(a.planes, a.residual_planes, pos));
                }
            }
            at.back(w);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const bool valid = step >= u && step - u < count;
            unsigned bits = 0;
            if (valid) {
                bits = apply_vector<T, kVec>(
                    a, std::bool_constant<kResidual>{}, value[u], add[u], [&](int) { return scale[0]; },
                    [&](int) { return shift[0]; });
                store_raw<T, kVec>(static_cast<T*>(a.out) + f[u] * kVec, value[u]);
            }
            if (a.mask != nullptr && step >= u) {
                store_mask<kVec>(a.mask, f[u], bits, valid);
            }
        }
    }
}

/// Vector by vector in the order of memory. A vector of a dense tensor may begin in one plane and end in the
/// next (a plane is never shorter than a vector, except for single elements).
template <typename T, int kVec>
__device__ __forceinline__ void apply_in_order(const BnActApplyArgs& a) {
    using acc_t = acc_type<T>;
    constexpr int kUnroll = kVec == 1 ? 1 : 2;
    const int64_t stride = int64_t(gridDim.x) * kThreads, base = int64_t(blockIdx.x) * kThreads;
    int step = static_cast<int>((a.vecs - 1 - base) / stride);
    int64_t f = base + threadIdx.x + step * stride;
    PlaneCursor at(a.planes, f * kVec);
    for (; step >= 0; step -= kUnroll, f -= kUnroll * stride) {
        RawPack<T, kVec> value[kUnroll], add[kUnroll];
        int c[kUnroll], here[kUnroll];  // here: values of the vector in the first of its planes
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t first = (f - u * stride) * kVec;
            c[u] = at.c;
            here[u] = static_cast<int>(a.planes.length) - at.pos;
            if (step >= u && first < a.numel) {
                // Single elements may lie anywhere; vectors that cross planes come from dense tensors, and
                // only a thread's first may be cut short.
                const T* x = static_cast<const T*>(a.x) +
                             (kVec > 1 ? first : plane_offset(a.planes, a.x_planes, at.n, at.c, at.pos));
                value[u] = u > 0 ? load_raw<T, kVec>(x) : load_raw_upto<T, kVec>(x, a.numel - first);
                if (a.residual != nullptr) {
                    const T* r =
                        static_cast<const T*>(a.residual) +
                        (kVec > 1 ? first : plane_offset(a.planes, a.residual_planes, at.n, at.c, at.pos));
                    add[u] = u > 0 ? load_raw<T, kVec>(r) : load_raw_upto<T, kVec>(r, a.numel - first);
                }
            }
            at.back(a.planes, a.plane_step);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t vec = f - u * stride, left = a.numel - vec * kVec;
            const bool valid = step >= u && left > 0;
            unsigned bits = 0;
            if (valid) {
                acc_t scale[1], shift[1], next_scale[1], next_shift[1];
                load_affine<acc_t, 1>(a.affine, c[u], scale, shift);
                if (kVec > 1 && here[u] < kVec) {
                    const int next = c[u] + 1 < a.planes.channels ? c[u] + 1 : 0;
                    load_affine<acc_t, 1>(a.affine, next, next_scale, next_shift);
                }
                bits = apply_vector<T, kVec>(
                    a, a.residual != nullptr, value[u], add[u],
                    [&](int k) { return k < here[u] ? scale[0] : next_scale[0]; },
                    [&](int k) { return k < here[u] ? shift[0] : next_shift[0]; });
                store_raw_upto<T, kVec>(static_cast<T*>(a.out) + vec * kVec, value[u], left);
                if (left < kVec) {
                    bits &= (1u << left) - 1;
                }
            }
            if (a.mask != nullptr && step >= u) {
                store_mask<kVec>(a.mask, vec, bits, valid);
            }
        }
    }
}

/// The same in NCHW order. kWhole: by_channel().
template <typename T, int kVec, bool kWhole>
__global__ void __launch_bounds__(kThreads, 4) bn_act_fwd_kernel_nchw(const BnActApplyArgs a) {
    if constexpr (kWhole) {
        if (a.residual != nullptr) {
            apply_channel<T, kVec, true>(a);
        } else {
            apply_channel<T, kVec, false>(a);
        }
    } else {
        apply_in_order<T, kVec>(a);
    }
}

}  // namespace dl4ds
