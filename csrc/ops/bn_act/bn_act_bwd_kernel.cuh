// Backward kernels of bn_act behind the sums: their merge, and the elementwise pass.
#pragma once

#include "ops/bn_act/bn_act_reduce_kernel.cuh"

namespace dl4ds {

/// Tables hold a record of four values a channel. Threads with neighbouring vectors of `vec` channels read
/// neighbouring records: first come those of the channels that begin a vector, then those of the second ones,
/// ...
__host__ __device__ __forceinline__ int64_t record_index(int64_t c, int64_t channels, int vec) {
    return c % vec * (channels / vec) + c / vec;
}

/// kCount records from `first` on, `stride` records apart; read again whenever they are needed, as there is
/// no room for them in registers.
template <typename acc_t, int kCount>
__device__ __forceinline__ void load_records(const acc_t* table, int first, int stride,
                                             acc_t (&out)[4][kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        acc_t record[4];
        const acc_t* p = table + int64_t(first + k * stride) * 4;
        if constexpr (sizeof(acc_t) == 8) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                record[i] = p[i];
            }
        } else {
            reload_global(p, record);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[i][k] = record[i];
        }
    }
}

struct BnActBwdFinalizeArgs {
    int64_t channels, parts;  // parts 0: no sums were taken
    double count;             // values per channel
    const void* partial;
    Affine affine;
    const void* rstd;
    bool training, eps_std;
    double eps;
    void* table;  // what bn_act_bwd_kernel_* read: records (scale, factor, offset, shift)
    int vec;      // of record_index()
    void *dweight, *dbias;
};

/// Sums the partials of each channel in fp64, in a fixed order. dx = scale * dz + factor * x + offset.
template <typename acc_t>
__global__ void __launch_bounds__(kFinalizeChannels* kFinalizeGroups, 2)
    bn_act_bwd_finalize_kernel(const BnActBwdFinalizeArgs a) {
    __shared__ double shared[2][kFinalizeGroups][kFinalizeChannels];
    const int64_t c = int64_t(blockIdx.x) * kFinalizeChannels + threadIdx.x % kFinalizeChannels;
    const int group = threadIdx.x / kFinalizeChannels;
    const bool active = c < a.channels;
    const acc_t* partial = static_cast<const acc_t*>(a.partial) + c;
    double sum[2] = {0, 0};
    if (active) {
#pragma unroll 4
        for (int64_t part = group; part < a.parts; part += kFinalizeGroups) {
            sum[0] += partial[part * 2 * a.channels];
            sum[1] += partial[(part * 2 + 1) * a.channels];
        }
    }
    finalize_sum(sum, shared);
    if (!active || group != 0) {
        return;
    }
    const double mean = load_channel<double>(a.affine.mean, c), rstd = static_cast<const acc_t*>(a.rstd)[c];
    if (a.dweight != nullptr) {
        static_cast<acc_t*>(a.dbias)[c] = static_cast<acc_t>(sum[0]);
        static_cast<acc_t*>(a.dweight)[c] = static_cast<acc_t>(sum[1] * rstd);
    }
    acc_t scale[1], shift[1], factor = 0, offset = 0;
    load_affine<acc_t, 1>(a.affine, c, scale, shift);
    if (a.training) {
        // With rstd = 1 / (sigma + eps) the variance's gradient divides by sigma; a constant channel has
        // none.
        const double sigma = 1 / rstd - a.eps;
        const double k = !a.eps_std ? rstd * rstd : sigma > 0 ? rstd / sigma : 0;
        factor = static_cast<acc_t>(-scale[0] * k * sum[1] / a.count);
        offset = static_cast<acc_t>(-scale[0] * sum[0] / a.count - double(factor) * mean);
    }
    acc_t* record = static_cast<acc_t*>(a.table) + record_index(c, a.channels, a.vec) * 4;
    constexpr int kPack = 16 / sizeof(acc_t);
    const Pack<acc_t, 4> values{{scale[0], factor, offset, shift[0]}};
#pragma unroll
    for (int k = 0; k < 4; k += kPack) {
        uint4 raw;
        memcpy(&raw, &values.v[k], sizeof(raw));
        *reinterpret_cast<uint4*>(record + k) = raw;
    }
}

struct BnActBwdArgs {
    BnActGradientArgs in;
    const void* table;
    bool training;
    void *dx, *dresidual;
    int64_t row_step, vecs;
    PlaneStep plane_step;    // planes in order: the grid's stride
    ChannelWindows windows;  // planes by channel

    /// The quick loops are for batch statistics.
    __device__ bool general() const { return !training || dx == nullptr; }
    template <From kFrom>
    __device__ bool trains() const {
        return kFrom != From::kAny || training;
    }
    template <From kFrom>
    __device__ bool makes_dx() const {
        return kFrom != From::kAny || dx != nullptr;
    }
    template <From kFrom>
    __device__ bool reads_x() const {
        return recomputes<kFrom>(in) || (trains<kFrom>() && makes_dx<kFrom>());
    }
};

/// dx and dz of kCount neighbouring values from `first` on, in place of x and dout.
template <From kFrom, typename T, int kVec, int kCount>
__device__ __forceinline__ void gradient_values(const BnActBwdArgs& a, RawPack<T, kVec>& value,
                                                RawPack<T, kVec>& gradient, const RawPack<T, kVec>& added,
                                                int first, const acc_type<T> (&record)[4][kCount],
                                                unsigned bits) {
    using acc_t = acc_type<T>;
    const auto& [scale, factor, offset, shift] = record;
    acc_t v[kCount], dz[kCount];
    get_values<T, kVec, kCount>(value, first, v);
    get_values<T, kVec, kCount>(gradient, first, dz);
    to_dz<kFrom, T, kVec, kCount>(a.in, dz, v, added, first, scale, shift, bits >> first);
    if (a.dresidual != nullptr) {
        put_values<T, kVec, kCount>(gradient, first, dz);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        dz[k] = a.trains<kFrom>() ? fma(scale[k], dz[k], fma(factor[k], v[k], offset[k])) : scale[k] * dz[k];
    }
    put_values<T, kVec, kCount>(value, first, dz);
}

/// The walk of bn_act_fwd_kernel_nhwc: from the end of the reduction backwards, channels fixed per thread.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 6 : 4)
    bn_act_bwd_kernel_nhwc(const BnActBwdArgs a) {
    using acc_t = acc_type<T>;
    constexpr int kGroup = kVec < 2 ? kVec : 2;
    const BnActGradientArgs& in = a.in;
    const int row_vecs = static_cast<int>(in.row_vecs);
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int step = static_cast<int>((a.vecs - 1 - base) / stride);
    int64_t row = (base + threadIdx.x) / row_vecs;
    const int column = static_cast<int>(base + threadIdx.x - row * row_vecs);
    row += step * a.row_step;
    if (row >= in.rows.count) {  // only a thread's first row can lie behind the last
        row -= a.row_step;
        --step;
    }
    const auto take = [&](auto rows, auto from) {
        constexpr int kRows = decltype(rows)::value;
        constexpr From kFrom = decltype(from)::value;
        // Offsets are computed where they are needed, not kept for every operand.
        asm volatile("" : "+l"(row));
        int place = column + static_cast<int>(zero_after(static_cast<uint32_t>(row), in.word_bits));
        const auto load = [&](const void* p, const RowStrides& s, int u) {
            return load_raw<T, kVec>(static_cast<const T*>(p) + place * kVec +
                                     row_place<kFrom != From::kAny>(in.rows, s, row - u * a.row_step));
        };
        RawPack<T, kVec> value[kRows], gradient[kRows], added[kRows];
        unsigned bits[kRows];
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
            gradient[u] = load(in.dout, in.dout_rows, u);
        }
        if (a.reads_x<kFrom>()) {
#pragma unroll
            for (int u = 0; u < kRows; ++u) {
                value[u] = load(in.x, in.x_rows, u);
            }
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
            if (adds<kFrom>(in)) {
                added[u] = load(in.residual, in.residual_rows, u);
            }
            if (masked<kFrom>(in)) {
                bits[u] = load_mask<kVec>(in.mask, (row - u * a.row_step) * row_vecs + place);
            }
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
            pin<T, kVec>(gradient[u]);
            pin<T, kVec>(value[u]);
        }
#pragma unroll
        for (int g = 0; g < kVec; g += kGroup) {
            acc_t own[4][kGroup];
            if constexpr (kVec == 8) {
                if (g > 0) {  // no record is read before the ones before are done with: there is no room
                    const uint32_t zero = zero_after(word(value[0], g / 2 - 1), in.word_bits);
                    place += zero;
                    set_word(value[0], g / 2, word(value[0], g / 2) + zero);
                    set_word(gradient[0], g / 2, word(gradient[0], g / 2) + zero);
                }
            }
            load_records(static_cast<const acc_t*>(a.table), place + g * row_vecs, row_vecs, own);
#pragma unroll
            for (int u = 0; u < kRows; ++u) {
                gradient_values<kFrom, T, kVec, kGroup>(a, value[u], gradient[u], added[u], g, own, bits[u]);
            }
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
            const int64_t first = ((row - u * a.row_step) * row_vecs + place) * kVec;
            if (a.makes_dx<kFrom>()) {
                store_raw<T, kVec>(static_cast<T*>(a.dx) + first, value[u]);
            }
            if (a.dresidual != nullptr) {
                store_raw<T, kVec>(static_cast<T*>(a.dresidual) + first, gradient[u]);
            }
        }
    };
    switch_from<kVec>(in, in.rows.sliced || a.general(), [&](auto from) {
        constexpr bool kWide = sizeof(acc_t) == 8 || decltype(from)::value == From::kAny;
        constexpr int kUnroll = kWide || sizeof(T) == 2 ? 1 : 2;
        for (; step >= kUnroll - 1; step -= kUnroll, row -= kUnroll * a.row_step) {
            take(std::integral_constant<int, kUnroll>{}, from);
        }
        if (kUnroll > 1 && step >= 0) {
            take(std::integral_constant<int, 1>{}, from);
        }
    });
}

/// The walk of apply_channel: one channel a block, its table in registers.
template <From kFrom, typename T, int kVec>
__device__ __forceinline__ void gradient_channel(const BnActBwdArgs& a) {
    using acc_t = acc_type<T>;
    constexpr int kGroup = kVec < 4 ? kVec : 4, kUnroll = kFrom == From::kAny ? 1 : 2;
    const BnActGradientArgs& in = a.in;
    const ChannelWindows& w = a.windows;
    const int part = static_cast<int>(blockIdx.x % w.parts), c = static_cast<int>(blockIdx.x / w.parts);
    const int index = part * kThreads + threadIdx.x;
    const int64_t count = w.full + (index < w.rest);
    const auto load = [&](const void* p, const PlaneStrides& s, int64_t n, int pos) {
        return load_raw<T, kVec>(static_cast<const T*>(p) + c * s.c + n * s.n +
                                 plane_place<kFrom != From::kAny>(in.planes, s, pos));
    };
    acc_t one[4][1], own[4][kGroup];
    load_records(static_cast<const acc_t*>(a.table), c, 0, one);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
            own[i][k] = one[i][0];
        }
    }
    WindowCursor at(w, index);
    at.forward(w, w.last_n, w.last_window);
    for (int64_t step = w.steps() - 1; step >= 0; step -= kUnroll) {
        RawPack<T, kVec> value[kUnroll], gradient[kUnroll], added[kUnroll];
        unsigned bits[kUnroll];
        int64_t f[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            f[u] = (at.n * in.planes.channels + c) * w.windows + at.window;
            if (step >= u && step - u < count) {
                const int pos = at.window * kVec;
                gradient[u] = load(in.dout, in.dout_planes, at.n, pos);
                if (a.reads_x<kFrom>()) {
                    value[u] = load(in.x, in.x_planes, at.n, pos);
                }
                if (adds<kFrom>(in)) {
                    added[u] = load(in.residual, in.residual_planes, at.n, pos);
                }
                if (masked<kFrom>(in)) {
                    bits[u] = load_mask<kVec>(in.mask, f[u]);
                }
            }
            at.back(w);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (step < u || step - u >= count) {
                continue;
            }
            pin<T, kVec>(gradient[u]);
            pin<T, kVec>(value[u]);
#pragma unroll
            for (int g = 0; g < kVec; g += kGroup) {
                gradient_values<kFrom, T, kVec, kGroup>(a, value[u], gradient[u], added[u], g, own, bits[u]);
            }
            if (a.makes_dx<kFrom>()) {
                store_raw<T, kVec>(static_cast<T*>(a.dx) + f[u] * kVec, value[u]);
            }
            if (a.dresidual != nullptr) {
                store_raw<T, kVec>(static_cast<T*>(a.dresidual) + f[u] * kVec, gradient[u]);
            }
        }
    }
}

/// The walk of apply_in_order: a vector may end in the next plane.
template <From kFrom, typename T, int kVec>
__device__ __forceinline__ void gradient_in_order(const BnActBwdArgs& a) {
    using acc_t = acc_type<T>;
    constexpr int kGroup = kVec < 4 ? kVec : 4, kUnroll = kVec == 1 || kFrom == From::kAny ? 1 : 2;
    const BnActGradientArgs& in = a.in;
    const int64_t base = int64_t(blockIdx.x) * kThreads, stride = int64_t(gridDim.x) * kThreads;
    int step = static_cast<int>((a.vecs - 1 - base) / stride);
    int64_t f = base + threadIdx.x + step * stride;
    PlaneCursor at(in.planes, f * kVec);
    const acc_t* table = static_cast<const acc_t*>(a.table);
    for (; step >= 0; step -= kUnroll, f -= kUnroll * stride) {
        RawPack<T, kVec> value[kUnroll], gradient[kUnroll], added[kUnroll];
        unsigned bits[kUnroll];
        int c[kUnroll], here[kUnroll];  // here: values of the vector in the first of its planes
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t vec = f - u * stride, first = vec * kVec;
            c[u] = at.c;
            here[u] = static_cast<int>(in.planes.length) - at.pos;
            const auto load = [&](const void* p, const PlaneStrides& s) {
                const T* place = static_cast<const T*>(p) +
                                 (kVec > 1 ? first : plane_offset(in.planes, s, at.n, at.c, at.pos));
                return u > 0 ? load_raw<T, kVec>(place) : load_raw_upto<T, kVec>(place, in.numel - first);
            };
            if (step >= u && first < in.numel) {
                gradient[u] = load(in.dout, in.dout_planes);
                if (a.reads_x<kFrom>()) {
                    value[u] = load(in.x, in.x_planes);
                }
                if (adds<kFrom>(in)) {
                    added[u] = load(in.residual, in.residual_planes);
                }
                if (masked<kFrom>(in)) {
                    bits[u] = load_mask<kVec>(in.mask, vec);
                }
            }
            at.back(in.planes, a.plane_step);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t first = (f - u * stride) * kVec, left = in.numel - first;
            if (step < u || left <= 0) {
                continue;
            }
            acc_t own[4][1], next[4][1];
            load_records(table, c[u], 0, own);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                next[i][0] = own[i][0];
            }
            if (kVec > 1 && here[u] < kVec) {
                load_records(table, c[u] + 1 < in.planes.channels ? c[u] + 1 : 0, 0, next);
            }
            pin<T, kVec>(gradient[u]);
            pin<T, kVec>(value[u]);
#pragma unroll
            for (int g = 0; g < kVec; g += kGroup) {
                acc_t mixed[4][kGroup];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int k = 0; k < kGroup; ++k) {
                        mixed[i][k] = g + k < here[u] ? own[i][0] : next[i][0];
                    }
                }
                gradient_values<kFrom, T, kVec, kGroup>(a, value[u], gradient[u], added[u], g, mixed,
                                                        bits[u]);
            }
            if (a.makes_dx<kFrom>()) {
                store_raw_upto<T, kVec>(static_cast<T*>(a.dx) + first, value[u], left);
            }
            if (a.dresidual != nullptr) {
                store_raw_upto<T, kVec>(static_cast<T*>(a.dresidual) + first, gradient[u], left);
            }
        }
    }
}

/// kWhole: by_channel().
template <typename T, int kVec, bool kWhole>
__global__ void __launch_bounds__(kThreads, 4) bn_act_bwd_kernel_nchw(const BnActBwdArgs a) {
    switch_from<kVec>(a.in, a.in.planes.pitched || a.general(), [&](auto from) {
        if constexpr (kWhole) {
            gradient_channel<decltype(from)::value, T, kVec>(a);
        } else {
            gradient_in_order<decltype(from)::value, T, kVec>(a);
        }
    });
}

}  // namespace dl4ds
