// What the kernel of a bottleneck block's end is made of up to the first convolution's sums: its types and
// memory, the 1x1 convolution's filters on their way, and the main loop of the first one.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_prologue_kernel.cuh"
#include "ops/conv_bn_act/conv_bn_act_tail.h"

namespace dl4ds {

/// Both matrix products have 64 x 64 sums, so one set of types serves both.
template <typename T>
struct TailTypes : ConvTypes<T, 64, kTailChunk, 5> {
    using Base = ConvTypes<T, 64, kTailChunk, 5>;
    using Element = typename Base::Element;
    using Warp = typename Base::Mma::Operator;
    static constexpr int kMiddle = kTailMiddle, kChunk = kTailChunk;
    static constexpr int kSlots =
        32768 / (kChunk * kMiddle * static_cast<int>(sizeof(T)));  // 4, or 2 in fp32
    static_assert(Base::kN == kMiddle, "the first convolution's channels are one tile");

    struct Shared {
        union {
            typename Base::Mma::SharedStorage main;
            alignas(16) Element middle[Base::kM * kMiddle];  // written behind the first main loop
        };
        alignas(16) Element filter[kSlots][kChunk * kMiddle];
        typename Base::Staging::SharedStorage staging;
        float scale[kMiddle], shift[kMiddle];
    };
};

/// conv_affine's arithmetic for several channels of a thread, with all loads sent before the first value is
/// used: one after the other they would keep the main loop waiting for many times the memory's latency.
struct TailAffine {
    static constexpr int kVectors = 5;
    uint2 raw[kVectors];

    static __device__ __forceinline__ uint2 bits(const ChannelVector& v, int channel) {
        if (v.data == nullptr) {
            return {0u, 0u};
        }
        switch (v.dtype) {
            case DType::kFloat64:
                return static_cast<const uint2*>(v.data)[channel];
            case DType::kFloat16:
            case DType::kBFloat16:
                return {static_cast<const uint16_t*>(v.data)[channel], 0u};
            default:
                return {static_cast<const uint32_t*>(v.data)[channel], 0u};
        }
    }
    static __device__ __forceinline__ float value(const ChannelVector& v, uint2 b) {
        switch (v.dtype) {
            case DType::kFloat64:
                return static_cast<float>(__hiloint2double(static_cast<int>(b.y), static_cast<int>(b.x)));
            case DType::kFloat16:
                return __half2float(__ushort_as_half(static_cast<unsigned short>(b.x)));
            case DType::kBFloat16:
                return __uint_as_float(b.x << 16);
            default:
                return __uint_as_float(b.x);
        }
    }

    __device__ __forceinline__ void load(const ConvAffine& a, int channel) {
        raw[0] = bits(a.var, channel);
        raw[1] = bits(a.mean, channel);
        raw[2] = bits(a.weight, channel);
        raw[3] = bits(a.bias, channel);
        raw[4] = bits(a.conv_bias, channel);
    }
    __device__ __forceinline__ void work_out(const ConvAffine& a, float& scale, float& shift) const {
        const float var = value(a.var, raw[0]);
        scale = a.eps_std ? 1.0f / (sqrtf(var) + a.eps) : 1.0f / sqrtf(var + a.eps);
        if (a.weight.data != nullptr) {
            scale *= value(a.weight, raw[2]);
        }
        float center = -value(a.mean, raw[1]);
        if (a.conv_bias.data != nullptr) {
            center += value(a.conv_bias, raw[4]);
        }
        shift = fmaf(center, scale, a.bias.data != nullptr ? value(a.bias, raw[3]) : 0.0f);
    }
};

/// Filters of the 1x1 convolution on their way to the slots, in 16-byte asynchronous copies. Four threads
/// take 64 bytes of a row, as the copies of the main loop do: no bank conflicts.
template <typename Types>
struct TailFilters {
    using Element = typename Types::Element;
    using Layout = typename Types::Warp::LayoutB;
    static constexpr int kRows = Types::kThreads / 4;                 // side by side
    static constexpr int kSections = Types::kMiddle / Types::kK;      // of a row, 64 bytes each
    static constexpr int kParts = Types::kChunk / kRows * kSections;  // copies of a thread and chunk

    const Element* from;  // the block's first filter
    Element* slots;
    int left;  // filters from there on

    __device__ __forceinline__ void copy(int chunk, int part) const {
        const int row = part / kSections * kRows + threadIdx.x / 4;
        const int k = part % kSections * Types::kK + threadIdx.x % 4 * Types::kVec;
        const int filter = chunk * Types::kChunk + row;
        Element* to = slots + chunk % Types::kSlots * (Types::kChunk * Types::kMiddle) +
                      Layout::packed({Types::kMiddle, Types::kChunk})({k, row});
        cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
            to, from + static_cast<int64_t>(filter) * Types::kMiddle + k, filter < left);
    }
};

/// The first convolution's sums. early() runs while the first copies are under way; beside(step) issues
/// further copies, which have arrived at the end like all others.
template <typename Types, typename Early, typename Beside>
__device__ __forceinline__ void conv_tail_loop(typename Types::Shared& shared, const ConvFwdArgs& fwd,
                                               int row_tile, Early&& early, Beside&& beside,
                                               typename Types::Accumulators& accumulators) {
    using Mma = typename Types::Mma;
    using Warp = typename Types::Warp;
    using Element = typename Types::Element;
    constexpr int kStages = Mma::Base::kStages, kGroups = Mma::Base::kWarpGemmIterations;
    static_assert(kGroups % 2 == 0, "two sets of registers in turn");
    const int thread = threadIdx.x, warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32;
    ConvCopies<Types> copies{
        {fwd.x_walk, fwd.size, static_cast<Element*>(fwd.x), thread,
         cutlass::MatrixCoord(row_tile * Types::kM, 0)},
        {fwd.weight_walk, fwd.size, static_cast<Element*>(fwd.weight), thread, cutlass::MatrixCoord(0, 0)},
        {shared.main.operand_A_ref(), thread},
        {shared.main.operand_B_ref(), thread}};
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
#pragma unroll
        for (int part = 0; part < kGroups; ++part) {
            copies.issue(part);
        }
        copies.close();
    }
    early();
    typename Warp::IteratorA a_tile(shared.main.operand_A_ref(), lane);
    typename Warp::IteratorB b_tile(shared.main.operand_B_ref(), lane);
    a_tile.add_tile_offset({warp % Mma::Base::WarpCount::kM, 0});
    b_tile.add_tile_offset({0, warp / Mma::Base::WarpCount::kM});
    typename Warp::FragmentA a[2];
    typename Warp::FragmentB b[2];
    const auto read = [&](int group) {
        a_tile.set_kgroup_index(group % kGroups);
        b_tile.set_kgroup_index(group % kGroups);
        a_tile.load(a[group % 2]);
        b_tile.load(b[group % 2]);
        ++a_tile;
        ++b_tile;
    };
    accumulators.clear();
    cutlass::arch::cp_async_wait<kStages - 2>();
    __syncthreads();
    read(0);
    copies.issue(0);
    Warp multiply;
    int slot = 0;
#pragma unroll 1
    for (int step = 0; step < fwd.steps; ++step) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            read(group + 1);
            copies.issue((group + 1) % kGroups);
            typename Warp::TransformedFragmentA left;
            typename Warp::TransformedFragmentB right;
            multiply.transform(left, right, a[group % 2], b[group % 2]);
            multiply(accumulators, left, right, accumulators);
            if (group == kGroups - 2) {  // the next read is of the next stage
                beside(step);
                copies.close();
                cutlass::arch::cp_async_wait<kStages - 2>();
                __syncthreads();
                if (++slot == kStages) {
                    a_tile.add_tile_offset({0, -kStages * kGroups});
                    b_tile.add_tile_offset({-kStages * kGroups, 0});
                    slot = 0;
                }
            }
        }
    }
    cutlass::arch::cp_async_fence();
    cutlass::arch::cp_async_wait<0>();
    __syncthreads();
}

}  // namespace dl4ds
