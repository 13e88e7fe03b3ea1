// A 1x1 convolution whose input gets BatchNorm and relu on the way in: relu(x * scale + shift) in fp32,
// rounded once to the operands' type, between shared memory and the tensor cores. The normalised map, which a
// pass of its own would write and the convolution read again, is never in memory. The epilogue is
// inference's.
//
// Rows and channels that the copies fill with zeros do not stay zero behind a shift. Neither is ever summed:
// rows past the last pixel are not stored, and channels past the last one have scale and shift zero. Padding,
// whose zeros must stay zero, is refused (conv_bn_act_fwd_refusal).
#pragma once

#include "ops/conv_bn_act/conv_bn_act_fwd_kernel.cuh"

namespace dl4ds {

struct ConvPrologueArgs {
    ConvFwdArgs fwd;
    ConvAffine input;  // of x's channels; without conv_bias
};

/// relu(v * scale + shift) of two values side by side in a register.
__device__ __forceinline__ uint32_t relu_pair(__half2 v, float4 q) {
    const float2 x = __half22float2(v);
    uint32_t pair;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;"
        : "=r"(pair)
        : "f"(fmaf(x.y, q.y, q.w)), "f"(fmaf(x.x, q.x, q.z)));
    return pair;
}
__device__ __forceinline__ uint32_t relu_pair(__nv_bfloat162 v, float4 q) {
    const float low = to_acc(__low2bfloat16(v)), high = to_acc(__high2bfloat16(v));
    uint32_t pair;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;"
        : "=r"(pair)
        : "f"(fmaf(high, q.y, q.w)), "f"(fmaf(low, q.x, q.z)));
    return pair;
}
/// relu that keeps NaN, in one instruction.
__device__ __forceinline__ float relu_one(float z) {
    float out;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(out) : "f"(z));
    return out;
}

/// Scale and shift as the threads of a warp need them: operand A of an mma holds, of every row, two channels
/// of each thread (twice as many in 16-bit types), the same two in every row. A quad is {scale, scale, shift,
/// shift} of two such channels; the four quads of 8 channels lie side by side, one for each lane % 4.
template <typename T>
struct ConvQuads {
    static constexpr int kGroup = 32 / sizeof(T);  // channels of an mma
    static constexpr int kOfLane = kGroup / 8;     // quads of a lane

    /// The float that holds the scale of a channel; its shift is two floats further on.
    static __device__ __forceinline__ int place(int channel) {
        if constexpr (sizeof(T) == 2) {  // neighbours make a pair
            return channel / 2 * 4 + channel % 2;
        } else {  // channels 4 apart do
            return (channel / 8 * 4 + channel % 4) * 4 + channel / 4 % 2;
        }
    }

    /// Normalises operand A of kRows mma of one group of channels, in its registers.
    template <int kRows, typename Fragment>
    static __device__ __forceinline__ void apply(Fragment& fragment, const float4* quads) {
        float4 q[kOfLane];
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            q[i] = quads[i * 4];
        }
        if constexpr (sizeof(T) == 2) {
            using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
            static_assert(Fragment::kElements == 8 * kRows, "four registers an mma");
            uint32_t* words = reinterpret_cast<uint32_t*>(&fragment);
#pragma unroll
            for (int i = 0; i < 4 * kRows; ++i) {  // rows 0-7, 8-15 of channels 0-7; the same of 8-15
                words[i] = relu_pair(reinterpret_cast<const Pair&>(words[i]), q[i / 2 % 2]);
            }
        } else {
            static_assert(Fragment::kElements == 4 * kRows, "four registers an mma");
#pragma unroll
            for (int i = 0; i < 4 * kRows; ++i) {  // rows 0-7, 8-15 of channels 0-3; the same of 4-7
                const bool second = i / 2 % 2 != 0;
                fragment[i] = relu_one(fmaf(fragment[i], second ? q[0].y : q[0].x, second ? q[0].w : q[0].z));
            }
        }
    }
};

/// x and the filter on their way from global memory to the ring of stages, in 16-byte asynchronous copies.
template <typename Types>
struct ConvCopies {
    using Mma = typename Types::Mma;
    static constexpr int kStages = Mma::Base::kStages, kParts = Mma::Base::kWarpGemmIterations;

    typename Mma::IteratorA x;
    typename Mma::IteratorB weight;
    typename Mma::SmemIteratorA x_slot;
    typename Mma::SmemIteratorB weight_slot;
    int slot = 0;

    template <cutlass::arch::CacheOperation::Kind kCache, typename From, typename To>
    static __device__ __forceinline__ void copy(From& from, To& to, int part) {
        constexpr int kCount = From::ThreadMap::Iterations::kCount;
        constexpr int kPart = (kCount + kParts - 1) / kParts;
        static_assert(From::kAccessesPerVector == 1, "one copy an access");
        from.set_iteration_index(part * kPart);
        to.set_iteration_index(part * kPart);
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
            if (part * kPart + i < kCount) {
                cutlass::arch::cp_async_zfill<16, kCache>(to.get(), from.get(), from.valid());
                ++from;
                ++to;
            }
        }
    }

    /// Issues one of the kParts parts of a stage.
    __device__ __forceinline__ void issue(int part) {
        copy<Mma::kCacheOpA>(x, x_slot, part);
        copy<Mma::kCacheOpB>(weight, weight_slot, part);
    }

    /// Closes a stage.
    __device__ __forceinline__ void close() {
        cutlass::arch::cp_async_fence();
        x.advance();
        weight.advance();
        x_slot.add_tile_offset({0, 1});
        weight_slot.add_tile_offset({1, 0});
        if (++slot == kStages) {
            x_slot.add_tile_offset({0, -kStages});
            weight_slot.add_tile_offset({-kStages, 0});
            slot = 0;
        }
    }
};

/// The sums of a tile. The table is worked out while the first copies are under way. Operands of the next mma
/// are read before those at hand are multiplied, across the border of stages too.
template <typename T, typename Types>
__device__ __forceinline__ void conv_prologue_loop(typename Types::Shared& shared, float4* table,
                                                   const ConvPrologueArgs& args, int row_tile,
                                                   int column_tile,
                                                   typename Types::Accumulators& accumulators) {
    using Mma = typename Types::Mma;
    using Warp = typename Mma::Operator;
    using Element = typename Types::Element;
    using Quads = ConvQuads<T>;
    constexpr int kStages = Mma::Base::kStages, kGroups = Mma::Base::kWarpGemmIterations;
    static_assert(Types::kK == kGroups * Quads::kGroup && kGroups % 2 == 0, "two sets of registers in turn");
    const int thread = threadIdx.x, warp = __shfl_sync(0xffffffffu, thread / 32, 0), lane = thread % 32;
    const ConvFwdArgs& fwd = args.fwd;
    ConvCopies<Types> copies{{fwd.x_walk, fwd.size, static_cast<Element*>(fwd.x), thread,
                              cutlass::MatrixCoord(row_tile * Types::kM, 0)},
                             {fwd.weight_walk, fwd.size, static_cast<Element*>(fwd.weight), thread,
                              cutlass::MatrixCoord(0, column_tile * Types::kN)},
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
#pragma unroll 1
    for (int channel = thread; channel < fwd.steps * Types::kK; channel += Types::kThreads) {
        float scale, shift;
        conv_affine(args.input, channel, fwd.size.C, scale, shift);
        float* at = reinterpret_cast<float*>(table) + Quads::place(channel);
        at[0] = scale;
        at[2] = shift;
    }
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
    const float4* quads = table + lane % 4;
    int slot = 0;
#pragma unroll 1
    for (int step = 0; step < fwd.steps; ++step) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            read(group + 1);
            copies.issue((group + 1) % kGroups);
            Quads::template apply<Warp::MmaIterations::kRow>(a[group % 2], quads);
            quads += 4 * Quads::kOfLane;
            typename Warp::TransformedFragmentA left;
            typename Warp::TransformedFragmentB right;
            multiply.transform(left, right, a[group % 2], b[group % 2]);
            multiply(accumulators, left, right, accumulators);
            if (group == kGroups - 2) {  // the next read is of the next stage
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

/// Grid: the tiles, those of one row of pixels side by side. Behind Shared lies the table of scale and shift.
template <typename T, int kRows, int kColumns, int kStages>
__global__ void __launch_bounds__(128) conv_bn_act_prologue_kernel(ConvPrologueArgs args) {
    using Types = ConvTypes<T, kRows, kColumns, kStages>;
    extern __shared__ __align__(16) char memory[];
    auto& shared = *reinterpret_cast<typename Types::Shared*>(memory);
    static_assert(sizeof(typename Types::Shared) % 16 == 0, "the table is read 16 bytes at a time");
    const int thread = threadIdx.x;
    const int row_tile = blockIdx.x / args.fwd.column_tiles, column_tile = blockIdx.x % args.fwd.column_tiles;
    if (thread < Types::kN) {
        const int channel = column_tile * Types::kN + thread;
        const ConvAffine& a = args.fwd.affine;
        float scale = 1.0f, shift = 0.0f;
        if (a.mean.data != nullptr) {
            conv_affine(a, channel, args.fwd.output.columns, scale, shift);
        } else if (a.conv_bias.data != nullptr && channel < args.fwd.output.columns) {
            shift = load_channel<float>(a.conv_bias, channel);
        }
        shared.scale[thread] = scale;
        shared.shift[thread] = shift;
    }
    typename Types::Accumulators accumulators;
    conv_prologue_loop<T, Types>(shared, reinterpret_cast<float4*>(memory + sizeof(typename Types::Shared)),
                                 args, row_tile, column_tile, accumulators);
    conv_epilogue<T, Types>(shared, args.fwd.output, accumulators, row_tile, column_tile);
}

}  // namespace dl4ds
