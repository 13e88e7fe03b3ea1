// Forward kernels of bn_act: batch statistics (partials, then one merge) and the elementwise pass.
#pragma once

#include "ops/bn_act/bn_act_kernel.cuh"

namespace dl4ds {

struct BnActStatsArgs {
    const void* x;
    Rows rows;
    RowStrides x_rows;
    Planes planes;
    PlaneStrides x_planes;
    int64_t channels;
    ReducePlan plan;
    // Means are kept relative to the channel's first value, so that rounding a partial mean costs nothing
    // where the mean is large beside the spread.
    void* origin;   // [channels]: that first value
    void* partial;  // [parts][2][channels]: mean - origin, sum of squared deviations
    void* counts;   // [parts]
};

template <typename acc_t>
__device__ __forceinline__ void store_moments(const BnActStatsArgs& a, int64_t part, int64_t c, acc_t origin,
                                              const Moments<acc_t>& m) {
    if (part == 0) {
        static_cast<acc_t*>(a.origin)[c] = origin;
    }
    acc_t* partial = static_cast<acc_t*>(a.partial) + part * 2 * a.channels + c;
    partial[0] = m.v[1];
    partial[a.channels] = m.v[2];
    if (c == 0) {
        static_cast<acc_t*>(a.counts)[part] = m.v[0];
    }
}

/// A block takes one channel tile and every parts-th group of `height` rows, so that all blocks move through
/// x together and its end is in the L2 cache when the elementwise pass begins there.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_stats_kernel_nhwc(const BnActStatsArgs a) {
    using acc_t = acc_type<T>;
    constexpr int kUnroll = 4;
    __shared__ alignas(16) acc_t shared[Moments<acc_t>::kFields * kThreads * kVec];
    const int width = a.plan.width, height = a.plan.height;
    const int tx = threadIdx.x % width, ty = threadIdx.x / width;
    const int64_t tile = blockIdx.x % a.plan.tiles, part = blockIdx.x / a.plan.tiles;
    const int64_t c = (tile * width + tx) * kVec;
    const int64_t first = part * height + ty, step = a.plan.row_step;
    Moments<acc_t> own[kVec];
    if (ty < height && c < a.channels && first < a.rows.count) {
        const T* x = static_cast<const T*>(a.x) + c;
        acc_t shift[kVec], sum[kVec], squares[kVec];
        const Pack<T, kVec> start = load_pack<T, kVec>(x + row_offset(a.rows, a.x_rows, first));
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            shift[k] = to_acc(start.v[k]);
            sum[k] = squares[k] = 0;
        }
        const auto add = [&](const Pack<T, kVec>& pack) {
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                const acc_t d = to_acc(pack.v[k]) - shift[k];
                sum[k] += d;
                squares[k] += d * d;
            }
        };
        int64_t row = first + step;
        int count = 1;
        for (; row + (kUnroll - 1) * step < a.rows.count; row += kUnroll * step, count += kUnroll) {
            Pack<T, kVec> packs[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                packs[u] = load_pack<T, kVec>(x + row_offset(a.rows, a.x_rows, row + u * step));
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                add(packs[u]);
            }
        }
        for (; row < a.rows.count; row += step, ++count) {
            add(load_pack<T, kVec>(x + row_offset(a.rows, a.x_rows, row)));
        }
        const Pack<T, kVec> origin = load_pack<T, kVec>(x);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            own[k] = Moments<acc_t>::from_shifted(static_cast<acc_t>(count), shift[k] - to_acc(origin.v[k]),
                                                  sum[k], squares[k]);
        }
    }
    const Moments<acc_t> merged = column_merge<Moments<acc_t>, acc_t, kVec>(own, width, height, shared);
    const int64_t channel = tile * width * kVec + threadIdx.x;
    if (threadIdx.x < width * kVec && channel < a.channels) {
        store_moments(a, part, channel, to_acc(static_cast<const T*>(a.x)[channel]), merged);
    }
}

/// A block takes one channel and every parts-th group of kThreads vectors. Planes of a dense x need not begin
/// at a vector: aligned windows of kVec values cover each plane, and values of the neighbours are left out.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_stats_kernel_nchw(const BnActStatsArgs a) {
    using acc_t = acc_type<T>;
    __shared__ Moments<acc_t> shared[kThreads / 32];
    const int64_t part = blockIdx.x % a.plan.parts;
    const int c = static_cast<int>(blockIdx.x / a.plan.parts);
    const T* x = static_cast<const T*>(a.x);
    const int64_t length = a.planes.length, numel = a.planes.batch * a.planes.channels * length;
    const int64_t item = part * kThreads + threadIdx.x;
    int64_t n = item / a.plan.windows;
    int64_t window = item - n * a.plan.windows;
    const acc_t origin = to_acc(x[c * a.x_planes.c]);
    acc_t count = 0, shift = 0, sum = 0, squares = 0;
    while (n < a.planes.batch) {
        const int64_t start = (n * a.planes.channels + c) * length;  // of the plane, in a dense tensor
        const int pos = static_cast<int>(window * kVec - start % kVec);
        if (pos < length) {
            const T* p = x + plane_offset(a.planes, a.x_planes, n, c, pos);
            const Pack<T, kVec> pack = load_upto<T, kVec>(p, numel - start - pos);
            const bool whole = pos >= 0 && pos + kVec <= length;
            if (count == 0) {
                shift = to_acc(whole ? pack.v[0] : p[pos < 0 ? -pos : 0]);
            }
            const auto add = [&](int k) {
                const acc_t d = to_acc(pack.v[k]) - shift;
                sum += d;
                squares += d * d;
            };
            if (whole) {  // nearly all windows: no test per value
#pragma unroll
                for (int k = 0; k < kVec; ++k) {
                    add(k);
                }
                count += kVec;
            } else {
#pragma unroll
                for (int k = 0; k < kVec; ++k) {
                    if (pos + k >= 0 && pos + k < length) {
                        add(k);
                        count += 1;
                    }
                }
            }
        }
        n += a.plan.step_n;
        window += a.plan.step_window;
        if (window >= a.plan.windows) {
            window -= a.plan.windows;
            ++n;
        }
    }
    const auto own = Moments<acc_t>::from_shifted(count, shift - origin, sum, squares);
    const Moments<acc_t> merged = block_merge(own, shared);
    if (threadIdx.x == 0) {
        store_moments(a, part, c, origin, merged);
    }
}

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
    PlaneStep plane_step;                     // planes: the grid's stride
};

/// From the statistics' end backwards (its tail is in the L2 cache). The grid's stride is a multiple of a
/// row, so a thread keeps its channels; out may be x, hence no read-only loads.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_fwd_kernel_nhwc(const BnActApplyArgs a) {
    using acc_t = acc_type<T>;
    constexpr int kUnroll = sizeof(acc_t) == 8 ? 1 : 2, kGroup = kVec < 4 ? kVec : 4;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int step = static_cast<int>((a.vecs - 1 - base) / stride);  // the same in all threads of a block
    int64_t row = (base + threadIdx.x) / a.row_vecs;
    const int column = static_cast<int>(base + threadIdx.x - row * a.row_vecs);
    row += step * a.row_step;
    const T* x = static_cast<const T*>(a.x) + column * kVec;
    const acc_t slope = static_cast<acc_t>(a.slope);
    acc_t scale[kVec], shift[kVec];
    load_affine<acc_t, kVec>(a.affine, column * kVec, scale, shift);
    for (; step >= 0; step -= kUnroll, row -= kUnroll * a.row_step) {
        Pack<T, kVec> value[kUnroll], add[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t r = row - u * a.row_step;
            if (step >= u && r < a.rows.count) {
                value[u] = load_pack<T, kVec>(x + row_offset(a.rows, a.x_rows, r));
                if (a.residual != nullptr) {
                    add[u] = load_pack<T, kVec>(static_cast<const T*>(a.residual) + column * kVec +
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
                // Four values at a time: whole vectors of fp16 would not leave enough registers.
#pragma unroll
                for (int g = 0; g < kVec; g += kGroup) {
                    acc_t z[kGroup];
#pragma unroll
                    for (int k = 0; k < kGroup; ++k) {
                        z[k] = fma(to_acc(value[u].v[g + k]), scale[g + k], shift[g + k]);
                    }
                    if (a.residual != nullptr) {
#pragma unroll
                        for (int k = 0; k < kGroup; ++k) {
                            z[k] += to_acc(add[u].v[g + k]);
                        }
                    }
                    if (a.mask != nullptr) {
                        bits |= mask_bits<T, kGroup>(z, a.activation) << g;
                    }
                    activate(z, a.activation, slope);
                    set_values<T, kVec, kGroup>(value[u], g, z);
                }
                store_pack<T, kVec>(static_cast<T*>(a.out) + f * kVec, value[u]);
            }
            if (a.mask != nullptr && step >= u) {
                store_mask<kVec>(a.mask, f, bits, valid);
            }
        }
    }
}

/// The same in NCHW order. A vector of a dense tensor may begin in one plane and end in the next (a plane is
/// never shorter than a vector, except for single elements).
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_fwd_kernel_nchw(const BnActApplyArgs a) {
    using acc_t = acc_type<T>;
    const int64_t stride = int64_t(gridDim.x) * kThreads, base = int64_t(blockIdx.x) * kThreads;
    int step = static_cast<int>((a.vecs - 1 - base) / stride);
    int64_t f = base + threadIdx.x + step * stride;
    PlaneCursor at(a.planes, f * kVec);
    const acc_t slope = static_cast<acc_t>(a.slope);
    for (; step >= 0; --step, f -= stride, at.back(a.planes, a.plane_step)) {
        const bool valid = f < a.vecs;
        unsigned bits = 0;
        if (valid) {
            const int64_t left = a.numel - f * kVec;
            const auto value = load_upto<T, kVec>(
                static_cast<const T*>(a.x) + plane_offset(a.planes, a.x_planes, at.n, at.c, at.pos), left);
            Pack<T, kVec> add;
            if (a.residual != nullptr) {
                add = load_upto<T, kVec>(static_cast<const T*>(a.residual) +
                                             plane_offset(a.planes, a.residual_planes, at.n, at.c, at.pos),
                                         left);
            }
            acc_t scale[1], shift[1], next_scale[1], next_shift[1];
            load_affine<acc_t, 1>(a.affine, at.c, scale, shift);
            const int here =
                static_cast<int>(a.planes.length) - at.pos;  // values of the vector in this plane
            if (here < kVec) {
                const int next = at.c + 1 < a.planes.channels ? at.c + 1 : 0;
                load_affine<acc_t, 1>(a.affine, next, next_scale, next_shift);
            }
            acc_t z[kVec];
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                const bool same = k < here;
                z[k] =
                    fma(to_acc(value.v[k]), same ? scale[0] : next_scale[0], same ? shift[0] : next_shift[0]);
            }
            if (a.residual != nullptr) {
#pragma unroll
                for (int k = 0; k < kVec; ++k) {
                    z[k] += to_acc(add.v[k]);
                }
            }
            if (a.mask != nullptr) {
                bits = mask_bits<T, kVec>(z, a.activation);
            }
            activate(z, a.activation, slope);
            store_upto<T, kVec>(static_cast<T*>(a.out) + f * kVec, round_pack<T, kVec>(z), left);
            if (left < kVec) {
                bits &= (1u << left) - 1;
            }
        }
        if (a.mask != nullptr) {
            store_mask<kVec>(a.mask, f, bits, valid);
        }
    }
}

}  // namespace dl4ds
