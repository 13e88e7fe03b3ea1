// The sums of bn_act_pair's backward: of both BatchNorms, from one read of dout, its bits, x and residual.
//
// Blocks, walks and the order of every addition are those of bn_act_bwd_reduce_kernel_*, so that the results
// have the bits of two calls of bn_act_bwd; only dout and its bits are not read a second time.
#pragma once

#include "ops/bn_act/bn_act_pair_kernel.cuh"

namespace dl4ds {

/// sum dz, sum dz * (x - mean), sum dz * (residual - residual_mean).
struct PairSums {
    static constexpr int kFields = 3;
    float v[kFields] = {0, 0, 0};

    __device__ __forceinline__ void merge(const PairSums& other) {
#pragma unroll
        for (int k = 0; k < kFields; ++k) {
            v[k] += other.v[k];
        }
    }
    /// Where bn_act_pair_finalize_kernel looks for a part's sums.
    __device__ __forceinline__ void store(float* partial, int64_t channels) const {
#pragma unroll
        for (int k = 0; k < kFields; ++k) {
            partial[k * channels] = v[k];
        }
    }
};

struct BnPairReduceArgs {
    const void *dout, *x, *residual;
    const uint8_t* mask;
    const float *mean, *residual_mean;
    Activation activation;
    float slope;
    int64_t channels, numel;
    int64_t row_vecs, vecs;  // NHWC: vectors of a pixel, of the map
    int64_t row_step;        // NHWC: vectors from one row of a thread to the next
    int length;              // NCHW: of a plane
    ReducePlan plan;
    float* partial;           // [parts][3][channels], see PairSums
    uint32_t word_bits = 32;  // of zero_after()
};

struct BnPairFinalizeArgs {
    int64_t channels, parts;
    const float *partial, *rstd, *residual_rstd;
    float *dweight, *residual_dweight, *dbias;
};

/// kCount values of dz from `first` on.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ void pair_dz(const BnPairReduceArgs& a, const RawPack<T, kVec>& gradient,
                                        int first, unsigned bits, float (&dz)[kCount]) {
    get_values<T, kVec, kCount>(gradient, first, dz);
    masked_gradient(dz, bits >> first, a.activation, a.slope);
}

/// Blocks and rows as in bn_act_bwd_reduce_kernel_nhwc. A thread's 24 sums of 16-bit maps and two rows of the
/// three are more than 64 registers: three blocks then have more loads under way (72 KB) than four with a
/// row.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, kVec == 4 ? 4 : 3)
    bn_act_pair_reduce_kernel_nhwc(const BnPairReduceArgs a) {
    constexpr int kGroup = 4;
    __shared__ alignas(16) float shared[PairSums::kFields * kThreads * kVec];
    // Means of the tile's channels: first those of the groups of four that begin a vector of eight, then the
    // others, so that neighbouring threads read neighbouring groups.
    __shared__ alignas(16) float means[2][kThreads];
    const int width = a.plan.width, height = a.plan.height, tile_channels = a.plan.tile_channels;
    const int tx = threadIdx.x % width, ty = threadIdx.x / width;
    const unsigned tiles = static_cast<unsigned>(a.plan.tiles), tile = blockIdx.x % tiles,
                   part = blockIdx.x / tiles;
    const int column = static_cast<int>(tile) * width + tx;
    if (threadIdx.x < tile_channels && int64_t(tile) * tile_channels + threadIdx.x < a.channels) {
        const int64_t channel = int64_t(tile) * tile_channels + threadIdx.x;
        const int vector = threadIdx.x / kVec, value = threadIdx.x % kVec;
        const int place = value / kGroup * (width * kGroup) + vector * kGroup + value % kGroup;
        means[0][place] = a.mean[channel];
        means[1][place] = a.residual_mean[channel];
    }
    __syncthreads();
    PairSums own[kVec];
    // kRows pixels' vectors from `f` on: all are loaded before the first is looked at.
    const auto take = [&](int64_t f, auto rows) {
        constexpr int kRows = decltype(rows)::value;
        // Offsets are computed where they are needed, not kept for every operand.
        asm volatile("" : "+l"(f));
        RawPack<T, kVec> gradient[kRows], value[kRows], other[kRows];
        unsigned bits[kRows];
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
            bits[u] = a.mask != nullptr ? load_mask<kVec>(a.mask, f + u * a.row_step) : ~0u;
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
            const int64_t first = (f + u * a.row_step) * kVec;
            gradient[u] = load_raw<T, kVec>(static_cast<const T*>(a.dout) + first);
            value[u] = load_raw<T, kVec>(static_cast<const T*>(a.x) + first);
            other[u] = load_raw<T, kVec>(static_cast<const T*>(a.residual) + first);
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
            pin<T, kVec>(gradient[u]);
            pin<T, kVec>(value[u]);
            pin<T, kVec>(other[u]);
        }
        // (Means are not kept over the loop: there is no room.)
        const int place = (tx + static_cast<int>(zero_after(static_cast<uint32_t>(f), a.word_bits))) * kGroup;
#pragma unroll
        for (int g = 0; g < kVec; g += kGroup) {
            float dz[kRows][kGroup];
#pragma unroll
            for (int u = 0; u < kRows; ++u) {
                pair_dz<T, kVec, kGroup>(a, gradient[u], g, bits[u], dz[u]);
#pragma unroll
                for (int k = 0; k < kGroup; ++k) {
                    own[g + k].v[0] += dz[u][k];
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float mean[kGroup];
                reload_shared(&means[i][place + g * width], mean);
#pragma unroll
                for (int u = 0; u < kRows; ++u) {
                    float v[kGroup];
                    get_values<T, kVec, kGroup>(i == 0 ? value[u] : other[u], g, v);
#pragma unroll
                    for (int k = 0; k < kGroup; ++k) {
                        own[g + k].v[1 + i] += dz[u][k] * (v[k] - mean[k]);
                    }
                }
            }
        }
    };
    if (ty < height && column < a.row_vecs) {
        constexpr int kUnroll = 2;
        int64_t f = (int64_t(part) * height + ty) * a.row_vecs + column;
        for (; f + a.row_step < a.vecs; f += kUnroll * a.row_step) {
            take(f, std::integral_constant<int, kUnroll>{});
        }
        if (f < a.vecs) {
            take(f, std::integral_constant<int, 1>{});
        }
    }
    const PairSums merged = column_merge<PairSums, float, kVec>(own, width, height, shared);
    unsigned block;  // (tile and part are not kept through the loop)
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    const int64_t channel = int64_t(block % tiles) * tile_channels + threadIdx.x;
    if (threadIdx.x < tile_channels && channel < a.channels) {
        merged.store(a.partial + int64_t(block / tiles) * PairSums::kFields * a.channels + channel,
                     a.channels);
    }
}

/// Blocks and windows as in bn_act_bwd_reduce_kernel_nchw.
template <typename T, int kVec, bool kWhole>
__global__ void __launch_bounds__(kThreads, 4) bn_act_pair_reduce_kernel_nchw(const BnPairReduceArgs a) {
    constexpr int kGroup = 4, kUnroll = 2;
    __shared__ PairSums shared[kThreads / 32];
    const ChannelWindows& w = a.plan.planes;
    const int part = static_cast<int>(blockIdx.x % w.parts), c = static_cast<int>(blockIdx.x / w.parts);
    const int index = part * kThreads + threadIdx.x;
    const float mean = a.mean[c], their_mean = a.residual_mean[c];
    PairSums own;
    int left = static_cast<int>(w.full) + (index < w.rest);
    WindowCursor at(w, index);
    for (; left > 0; left -= kUnroll) {
        RawPack<T, kVec> gradient[kUnroll], value[kUnroll], other[kUnroll];
        unsigned bits[kUnroll], inside[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t start = (at.n * a.channels + c) * a.length;
            int pos = at.window * kVec;
            if constexpr (kWhole) {
                inside[u] = u < left;
            } else {
                pos -= static_cast<int>(start & (kVec - 1));
                inside[u] = u < left ? window_bits<kVec>(pos, a.length) : 0;
            }
            if (inside[u] != 0) {
                const int64_t first = start + pos, there = kWhole ? kVec : a.numel - first;
                gradient[u] = load_raw_upto<T, kVec>(static_cast<const T*>(a.dout) + first, there);
                value[u] = load_raw_upto<T, kVec>(static_cast<const T*>(a.x) + first, there);
                other[u] = load_raw_upto<T, kVec>(static_cast<const T*>(a.residual) + first, there);
                bits[u] = a.mask != nullptr ? load_mask<kVec>(a.mask, first / kVec) : ~0u;
            }
            at.forward(w, w.step_n, w.step_window);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (inside[u] == 0) {
                continue;
            }
            pin<T, kVec>(gradient[u]);
            pin<T, kVec>(value[u]);
            pin<T, kVec>(other[u]);
#pragma unroll
            for (int g = 0; g < kVec; g += kGroup) {
                float dz[kGroup], v[kGroup], z[kGroup];
                pair_dz<T, kVec, kGroup>(a, gradient[u], g, bits[u], dz);
                get_values<T, kVec, kGroup>(value[u], g, v);
                get_values<T, kVec, kGroup>(other[u], g, z);
#pragma unroll
                for (int k = 0; k < kGroup; ++k) {
                    const bool ours = kWhole || (inside[u] >> (g + k)) & 1;
                    own.v[0] += ours ? dz[k] : 0.0f;
                    own.v[1] += ours ? dz[k] * (v[k] - mean) : 0.0f;
                    own.v[2] += ours ? dz[k] * (z[k] - their_mean) : 0.0f;
                }
            }
        }
    }
    const PairSums merged = block_merge(own, shared);
    if (threadIdx.x == 0) {
        merged.store(a.partial + int64_t(part) * PairSums::kFields * a.channels + c, a.channels);
    }
}

/// Sums the partials of each channel in fp64, in a fixed order: that of bn_act_bwd_finalize_kernel.
__global__ void __launch_bounds__(kFinalizeChannels* kFinalizeGroups, 2)
    bn_act_pair_finalize_kernel(const BnPairFinalizeArgs a) {
    __shared__ double shared[PairSums::kFields][kFinalizeGroups][kFinalizeChannels];
    const int64_t c = int64_t(blockIdx.x) * kFinalizeChannels + threadIdx.x % kFinalizeChannels;
    const int group = threadIdx.x / kFinalizeChannels;
    const bool active = c < a.channels;
    double sum[PairSums::kFields] = {0, 0, 0};
    if (active) {
#pragma unroll 4
        for (int64_t part = group; part < a.parts; part += kFinalizeGroups) {
#pragma unroll
            for (int k = 0; k < PairSums::kFields; ++k) {
                sum[k] += a.partial[(part * PairSums::kFields + k) * a.channels + c];
            }
        }
    }
    finalize_sum(sum, shared);
    if (active && group == 0) {
        a.dbias[c] = static_cast<float>(sum[0]);
        a.dweight[c] = static_cast<float>(sum[1] * a.rstd[c]);
        a.residual_dweight[c] = static_cast<float>(sum[2] * a.residual_rstd[c]);
    }
}

}  // namespace dl4ds
