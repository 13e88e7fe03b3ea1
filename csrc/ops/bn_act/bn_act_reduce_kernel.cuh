// First backward pass of bn_act: per-channel sums of dz and dz * (x - mean), in both layouts.
#pragma once

#include "ops/bn_act/bn_act_kernel.cuh"

namespace dl4ds {

/// What dz follows from, in the quick loop that the kernels have for it: dout alone (no activation), dout and
/// the mask of relu or relu6, or dout and z, recomputed from x. kAny is the loop for everything: any
/// activation, with a residual added to z, slices, running statistics.
enum class From : int { kDout, kMask, kRelu, kLeakyRelu, kAny };

/// What both passes read.
struct BnActGradientArgs {
    const void *dout, *x, *residual;
    const uint8_t* mask;
    Activation activation;
    double slope;
    Rows rows;
    RowStrides dout_rows, x_rows, residual_rows;
    Planes planes;
    PlaneStrides dout_planes, x_planes, residual_planes;
    int64_t channels, row_vecs, numel;
    uint32_t word_bits = 32;  // of zero_after()

    __device__ bool recomputes() const { return mask == nullptr && activation != Activation::kNone; }
    __device__ bool reads_residual() const { return recomputes() && residual != nullptr; }
};

/// Calls fn(std::integral_constant<From, ...>{}), the same in all threads; kAny if `general`. Single accesses
/// have one loop only.
template <int kVec, typename Fn>
__device__ __forceinline__ void switch_from(const BnActGradientArgs& in, bool general, Fn&& fn) {
    if constexpr (kVec == 1) {
        fn(std::integral_constant<From, From::kAny>{});
    } else {
        const bool leaky = in.activation == Activation::kLeakyRelu;
        const bool known = in.mask != nullptr ? !leaky : in.activation <= Activation::kLeakyRelu;
        if (general || !known || in.reads_residual()) {
            fn(std::integral_constant<From, From::kAny>{});
        } else if (in.mask != nullptr) {
            fn(std::integral_constant<From, From::kMask>{});
        } else if (leaky) {
            static_assert(Activation::kLeakyRelu == Activation{2}, "there are loops for codes up to 2");
            fn(std::integral_constant<From, From::kLeakyRelu>{});
        } else if (in.activation == Activation::kRelu) {
            fn(std::integral_constant<From, From::kRelu>{});
        } else {
            fn(std::integral_constant<From, From::kDout>{});
        }
    }
}

/// Whether the loop reads the mask, recomputes z, adds the residual to it.
template <From kFrom>
__device__ __forceinline__ bool masked(const BnActGradientArgs& in) {
    return kFrom == From::kMask || (kFrom == From::kAny && in.mask != nullptr);
}
template <From kFrom>
__device__ __forceinline__ bool recomputes(const BnActGradientArgs& in) {
    return kFrom == From::kRelu || kFrom == From::kLeakyRelu || (kFrom == From::kAny && in.recomputes());
}
template <From kFrom>
__device__ __forceinline__ bool adds(const BnActGradientArgs& in) {
    return kFrom == From::kAny && in.reads_residual();
}

struct BnActReduceArgs {
    BnActGradientArgs in;
    Affine affine;  // without a table
    ReducePlan plan;
    void* partial;  // [parts][2][channels]: sum of dz, sum of dz * (x - mean)
};

/// dz = dout * act'(z) for kCount neighbouring values, in place.
template <From kFrom, typename T, int kVec, int kCount>
__device__ __forceinline__ void to_dz(const BnActGradientArgs& in, acc_type<T> (&dz)[kCount],
                                      const acc_type<T> (&x)[kCount], const RawPack<T, kVec>& residual,
                                      int first, const acc_type<T> (&scale)[kCount],
                                      const acc_type<T> (&shift)[kCount], unsigned bits) {
    using acc_t = acc_type<T>;
    const acc_t slope = static_cast<acc_t>(in.slope);
    if constexpr (kFrom == From::kMask) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            dz[k] = (bits >> k) & 1 ? dz[k] : acc_t(0);
        }
    } else if (masked<kFrom>(in)) {
        masked_gradient(dz, bits, in.activation, slope);
    } else if (recomputes<kFrom>(in)) {
        acc_t z[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            z[k] = fma(x[k], scale[k], shift[k]);
        }
        if (adds<kFrom>(in)) {
            acc_t added[kCount];
            get_values<T, kVec, kCount>(residual, first, added);
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                z[k] += added[k];
            }
        }
        if constexpr (kFrom == From::kAny) {
            rounded_gradient<T, kCount>(dz, z, in.activation, slope);
        } else {
            constexpr Activation kAct = kFrom == From::kRelu ? Activation::kRelu : Activation::kLeakyRelu;
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                dz[k] = activation_bwd_masked<kAct>(dz[k], rounded_positive<kAct, T>(z[k]), slope);
            }
        }
    }
}

/// Blocks and rows as in bn_act_stats_kernel_nhwc.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) bn_act_bwd_reduce_kernel_nhwc(const BnActReduceArgs a) {
    using acc_t = acc_type<T>;
    constexpr int kGroup = kVec < 4 ? kVec : 4;
    __shared__ alignas(16) acc_t shared[Sums<acc_t>::kFields * kThreads * kVec];
    // Mean, scale and shift of the tile's channels: first those of the groups of four that begin a vector of
    // eight, then the others, so that neighbouring threads read neighbouring groups.
    __shared__ alignas(16) acc_t table[3][kThreads];
    const BnActGradientArgs& in = a.in;
    const int row_vecs = static_cast<int>(in.row_vecs);
    const int width = a.plan.width, height = a.plan.height, tile_channels = a.plan.tile_channels;
    const int tx = threadIdx.x % width, ty = threadIdx.x / width;
    const unsigned tiles = static_cast<unsigned>(a.plan.tiles), tile = blockIdx.x % tiles,
                   part = blockIdx.x / tiles;
    const int column = static_cast<int>(tile) * width + tx, c = column * kVec;
    if (threadIdx.x < tile_channels && int64_t(tile) * tile_channels + threadIdx.x < in.channels) {
        const int64_t channel = int64_t(tile) * tile_channels + threadIdx.x;
        acc_t scale[1], shift[1];
        load_affine<acc_t, 1>(a.affine, channel, scale, shift);
        const int vector = threadIdx.x / kVec, value = threadIdx.x % kVec;
        const int place = value / kGroup * (width * kGroup) + vector * kGroup + value % kGroup;
        table[0][place] = load_channel<acc_t>(a.affine.mean, channel);
        table[1][place] = scale[0];
        table[2][place] = shift[0];
    }
    __syncthreads();
    Sums<acc_t> own[kVec];
    const int64_t step = a.plan.row_step;
    // kRows rows from `row` on: all are loaded before the first is looked at.
    const auto take = [&](int64_t row, auto rows, auto from) {
        constexpr int kRows = decltype(rows)::value;
        constexpr From kFrom = decltype(from)::value;
        // Offsets are computed where they are needed, not kept for every operand.
        asm volatile("" : "+l"(row));
        const int zero = static_cast<int>(zero_after(static_cast<uint32_t>(row), in.word_bits));
        const int first = c + zero;
        RawPack<T, kVec> value[kRows], gradient[kRows], added[kRows];
        unsigned bits[kRows];
        const auto load = [&](const void* p, const RowStrides& s, int u) {
            return load_raw<T, kVec>(static_cast<const T*>(p) + first +
                                     row_place<kFrom != From::kAny>(in.rows, s, row + u * step));
        };
        if (masked<kFrom>(in)) {
#pragma unroll
            for (int u = 0; u < kRows; ++u) {
                bits[u] = load_mask<kVec>(in.mask, (row + u * step) * row_vecs + first / kVec);
            }
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
            value[u] = load(in.x, in.x_rows, u);
            gradient[u] = load(in.dout, in.dout_rows, u);
            if (adds<kFrom>(in)) {
                added[u] = load(in.residual, in.residual_rows, u);
            }
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
            pin<T, kVec>(value[u]);
            pin<T, kVec>(gradient[u]);
        }
#pragma unroll
        for (int g = 0; g < kVec; g += kGroup) {
            acc_t scale[kGroup], shift[kGroup], mean[kGroup];
            const int place = (tx + zero) * kGroup + g * width;
            if (recomputes<kFrom>(in)) {
                reload_shared(&table[1][place], scale);
                reload_shared(&table[2][place], shift);
            }
            reload_shared(&table[0][place], mean);
#pragma unroll
            for (int u = 0; u < kRows; ++u) {
                acc_t v[kGroup], dz[kGroup];
                get_values<T, kVec, kGroup>(value[u], g, v);
                get_values<T, kVec, kGroup>(gradient[u], g, dz);
                to_dz<kFrom, T, kVec, kGroup>(in, dz, v, added[u], g, scale, shift, bits[u] >> g);
#pragma unroll
                for (int k = 0; k < kGroup; ++k) {
                    own[g + k].v[0] += dz[k];
                    own[g + k].v[1] += dz[k] * (v[k] - mean[k]);
                }
            }
        }
    };
    if (ty < height && c < in.channels) {
        switch_from<kVec>(in, in.rows.sliced, [&](auto from) {
            constexpr bool kWide = sizeof(acc_t) == 8 || decltype(from)::value == From::kAny;
            constexpr int kUnroll = kWide ? 1 : 2;
            int64_t row = int64_t(part) * height + ty;
            for (; row + (kUnroll - 1) * step < in.rows.count; row += kUnroll * step) {
                take(row, std::integral_constant<int, kUnroll>{}, from);
            }
            if (kUnroll > 1 && row < in.rows.count) {
                take(row, std::integral_constant<int, 1>{}, from);
            }
        });
    }
    const Sums<acc_t> merged = column_merge<Sums<acc_t>, acc_t, kVec>(own, width, height, shared);
    unsigned block;  // (tile and part are not kept through the loop)
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    const int64_t channel = int64_t(block % tiles) * tile_channels + threadIdx.x;
    if (threadIdx.x < tile_channels && channel < in.channels) {
        acc_t* partial = static_cast<acc_t*>(a.partial) + int64_t(block / tiles) * 2 * in.channels + channel;
        partial[0] = merged.v[0];
        partial[in.channels] = merged.v[1];
    }
}

/// The sums of one thread of bn_act_bwd_reduce_kernel_nchw.
template <From kFrom, typename T, int kVec, bool kWhole>
__device__ __forceinline__ Sums<acc_type<T>> reduce_windows(const BnActReduceArgs& a, int part, int c) {
    using acc_t = acc_type<T>;
    constexpr int kGroup = kVec < 4 ? kVec : 4;
    constexpr int kUnroll = sizeof(acc_t) == 8 || kFrom == From::kAny ? 1 : kWhole && kVec > 1 ? 3 : 2;
    const BnActGradientArgs& in = a.in;
    const ChannelWindows& w = a.plan.planes;
    const int index = part * kThreads + threadIdx.x, length = static_cast<int>(in.planes.length);
    acc_t scale[kGroup], shift[kGroup];
    {
        acc_t one_scale[1], one_shift[1];
        load_affine<acc_t, 1>(a.affine, c, one_scale, one_shift);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
            scale[k] = one_scale[0];
            shift[k] = one_shift[0];
        }
    }
    const acc_t mean = load_channel<acc_t>(a.affine.mean, c);
    Sums<acc_t> own;
    const auto load = [&](const void* p, const PlaneStrides& s, int64_t n, int pos) {
        return load_raw<T, kVec>(static_cast<const T*>(p) + c * s.c + n * s.n +
                                 plane_place<kFrom != From::kAny>(in.planes, s, pos));
    };
    int left = static_cast<int>(w.full) + (index < w.rest);
    WindowCursor at(w, index);
    int64_t cut = -1;  // place of the tensor's last vector if that is cut short; its values are of one plane
    for (; left > 0; left -= kUnroll) {
        RawPack<T, kVec> value[kUnroll], gradient[kUnroll], added[kUnroll];
        unsigned bits[kUnroll], inside[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t start = (at.n * in.planes.channels + c) * length;  // in a dense tensor
            int pos = at.window * kVec;
            if constexpr (kWhole) {
                inside[u] = u < left;
            } else {
                pos -= static_cast<int>(start & (kVec - 1));
                inside[u] = u < left ? window_bits<kVec>(pos, length) : 0;
                if (inside[u] != 0 && start + pos + kVec > in.numel) {
                    cut = start + pos;
                    inside[u] = 0;
                }
            }
            if (inside[u] != 0) {
                value[u] = load(in.x, in.x_planes, at.n, pos);
                gradient[u] = load(in.dout, in.dout_planes, at.n, pos);
                if (adds<kFrom>(in)) {
                    added[u] = load(in.residual, in.residual_planes, at.n, pos);
                }
                if (masked<kFrom>(in)) {
                    bits[u] = load_mask<kVec>(in.mask, (start + pos) / kVec);
                }
            }
            at.forward(w, w.step_n, w.step_window);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (inside[u] == 0) {
                continue;
            }
            pin<T, kVec>(value[u]);
            pin<T, kVec>(gradient[u]);
#pragma unroll
            for (int g = 0; g < kVec; g += kGroup) {
                acc_t v[kGroup], dz[kGroup];
                get_values<T, kVec, kGroup>(value[u], g, v);
                get_values<T, kVec, kGroup>(gradient[u], g, dz);
                to_dz<kFrom, T, kVec, kGroup>(in, dz, v, added[u], g, scale, shift, bits[u] >> g);
#pragma unroll
                for (int k = 0; k < kGroup; ++k) {
                    const bool ours = kWhole || (inside[u] >> (g + k)) & 1;
                    own.v[0] += ours ? dz[k] : acc_t(0);
                    own.v[1] += ours ? dz[k] * (v[k] - mean) : acc_t(0);
                }
            }
        }
    }
    if constexpr (!kWhole) {
        for (int64_t i = cut; cut >= 0 && i < in.numel; ++i) {
            const acc_t v[1] = {to_acc(static_cast<const T*>(in.x)[i])};
            acc_t dz[1] = {to_acc(static_cast<const T*>(in.dout)[i])};
            const acc_t one_scale[1] = {scale[0]}, one_shift[1] = {shift[0]};
            RawPack<T, 1> add;
            unsigned bit = 0;
            if (adds<kFrom>(in)) {
                add.v[0] = static_cast<const T*>(in.residual)[i];
            }
            if (masked<kFrom>(in)) {
                bit = load_mask<1>(in.mask, i);
            }
            to_dz<kFrom, T, 1, 1>(in, dz, v, add, 0, one_scale, one_shift, bit);
            own.v[0] += dz[0];
            own.v[1] += dz[0] * (v[0] - mean);
        }
    }
    return own;
}

/// Blocks and windows as in bn_act_stats_kernel_nchw.
template <typename T, int kVec, bool kWhole>
__global__ void __launch_bounds__(kThreads, 4) bn_act_bwd_reduce_kernel_nchw(const BnActReduceArgs a) {
    using acc_t = acc_type<T>;
    __shared__ Sums<acc_t> shared[kThreads / 32];
    const ChannelWindows& w = a.plan.planes;
    const int part = static_cast<int>(blockIdx.x % w.parts), c = static_cast<int>(blockIdx.x / w.parts);
    Sums<acc_t> own;
    switch_from<kVec>(a.in, a.in.planes.pitched, [&](auto from) {
        own = reduce_windows<decltype(from)::value, T, kVec, kWhole>(a, part, c);
    });
    const Sums<acc_t> merged = block_merge(own, shared);
    if (threadIdx.x == 0) {
        acc_t* partial = static_cast<acc_t*>(a.partial) + int64_t(part) * 2 * a.in.channels + c;
        partial[0] = merged.v[0];
        partial[a.in.channels] = merged.v[1];
    }
}

}  // namespace dl4ds
