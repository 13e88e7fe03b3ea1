// One convolution layer of inference in one kernel: CUTLASS' sm_80 implicit GEMM main loop (tensor cores,
// fp32 accumulators), then an epilogue of our own: act(acc * scale + shift [+ residual]) in fp32, one
// rounding, 16-byte stores. Rows of the GEMM are output pixels, columns output channels, and the reduction
// runs over the taps of the filter inside chunks of input channels.
//
// Few pixels fill few multiprocessors: then the channels are cut into slices, each block leaves its fp32
// accumulators in a workspace, and a second kernel adds them up in the order of the slices.
#pragma once

#include <cmath>

#include "common/cuda/launch.cuh"
#include "common/cuda/vec.cuh"
#include "ops/conv_bn_act/conv_bn_act.h"

// clang-format off: the order matters
#include "cutlass/cutlass.h"
#include "cutlass/conv/kernel/default_conv2d_fprop.h"
#include "cutlass/epilogue/thread/linear_combination.h"
// clang-format on

namespace dl4ds {

using ConvLayout = cutlass::layout::TensorNHWC;

template <typename T>
struct ConvElement;
template <>
struct ConvElement<__half> {
    using type = cutlass::half_t;
    using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
};
template <>
struct ConvElement<__nv_bfloat16> {
    using type = cutlass::bfloat16_t;
    using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
};
template <>
struct ConvElement<float> {  // rounded to TF32, to nearest with ties away from zero, when read from shared
                             // memory
    using type = float;
    using Instruction = cutlass::gemm::GemmShape<16, 8, 8>;
};

/// Scale and shift of a channel are worked out once a block: (bias_bn - mean * scale + conv_bias * scale).
struct ConvAffine {
    ChannelVector conv_bias, mean, var, weight, bias;
    bool eps_std = false;
    float eps = 0;
};

/// What the epilogue writes: a dense matrix of `rows` pixels by `columns` channels.
struct ConvOutput {
    int rows = 0, columns = 0;
    bool vectors = false;  // columns and addresses allow 16-byte accesses
    // act(z) = z below the limit, else the limit; below zero z * slope, or zero where that is asked for:
    // none, relu, leaky_relu and relu6 in one formula without a branch.
    bool zero_below = false;
    float slope = 1, limit = INFINITY;
    const void* residual = nullptr;
    void* out = nullptr;
};

/// The activation of one value; keeps NaN and -0.0 as common/activation.h does.
__device__ __forceinline__ float conv_activation(const ConvOutput& output, float z) {
    const float below = output.zero_below ? 0.0f : z * output.slope;
    z = z < 0.0f ? below : z;
    return z > output.limit ? output.limit : z;
}

struct ConvFwdArgs {
    cutlass::conv::Conv2dProblemSize size;
    cutlass::conv::threadblock::Conv2dFpropActivationIteratorOptimizedParams<ConvLayout> x_walk;
    cutlass::conv::threadblock::Conv2dFpropFilterIteratorOptimizedParams<ConvLayout> weight_walk;
    void* x = nullptr;
    void* weight = nullptr;
    int steps = 0, column_tiles = 1, tiles = 1;  // main-loop steps; tiles side by side, tiles in all
    ConvAffine affine;
    ConvOutput output;
    float* partial = nullptr;  // [slices][tiles][kM * kN], in the order of the threads' registers; null: none
};

struct ConvFinishArgs {
    int slices = 1, column_tiles = 1, tiles = 1;
    ConvAffine affine;
    ConvOutput output;
    const float* partial = nullptr;
};

/// The types that a tile is made of. 64 bytes of a pixel's channels a step (kK), warps two by two.
template <typename T, int kRows, int kColumns, int kStages>
struct ConvTypes {
    static constexpr int kM = kRows, kN = kColumns, kK = 64 / sizeof(T), kVec = 16 / sizeof(T);
    using Element = typename ConvElement<T>::type;
    using Kernel = typename cutlass::conv::kernel::DefaultConv2dFprop<
        Element, ConvLayout, Element, ConvLayout, Element, ConvLayout, float, cutlass::arch::OpClassTensorOp,
        cutlass::arch::Sm80, cutlass::gemm::GemmShape<kM, kN, kK>,
        cutlass::gemm::GemmShape<kM / 2, kN / 2, kK>, typename ConvElement<T>::Instruction,
        cutlass::epilogue::thread::LinearCombination<Element, kVec, float, float>,
        cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<1>, kStages, cutlass::arch::OpMultiplyAdd,
        cutlass::conv::IteratorAlgorithm::kOptimized, cutlass::conv::StrideSupport::kStrided, kVec,
        kVec>::Kernel;
    using Mma = typename Kernel::Mma;
    // CUTLASS' way from the registers of an mma through shared memory (fp32 there) to 16-byte accesses; of
    // its element type only the size matters, and for bf16 it has one buffer instead of two.
    using Staged = std::conditional_t<sizeof(T) == 2, cutlass::half_t, float>;
    using Staging = typename cutlass::epilogue::threadblock::DefaultEpilogueTensorOp<
        typename Mma::Shape, typename Mma::Policy::Operator, 1,
        cutlass::epilogue::thread::LinearCombination<Staged, kVec, float, float>, kVec>::Epilogue;
    using Map = typename Staging::OutputTileIterator::ThreadMap;
    using Accumulators = typename Mma::FragmentC;
    static constexpr int kThreads = Kernel::kThreadCount;
    static_assert(Staging::kPartitionsK == 1 && Staging::kFragmentsPerIteration == 2, "two buffers");
    static_assert(Map::Count::kCluster == 1 && Map::Count::kGroup == 1, "rows of a round are 8 apart");
    static_assert(kThreads == 128 && kN <= kThreads, "one thread a channel computes scale and shift");

    struct Shared {
        union {
            typename Mma::SharedStorage main;
            typename Staging::SharedStorage staging;
        };
        float scale[kN], shift[kN];
    };
};

/// The block's channels: scale and shift to shared memory (visible after the next barrier).
__device__ __forceinline__ void conv_affine(const ConvAffine& a, int channel, int channels, float& scale,
                                            float& shift) {
    scale = shift = 0.0f;
    if (channel >= channels) {
        return;
    }
    const float var = load_channel<float>(a.var, channel);
    scale = a.eps_std ? 1.0f / (sqrtf(var) + a.eps) : 1.0f / sqrtf(var + a.eps);
    if (a.weight.data != nullptr) {
        scale *= load_channel<float>(a.weight, channel);
    }
    float center = -load_channel<float>(a.mean, channel);
    if (a.conv_bias.data != nullptr) {
        center += load_channel<float>(a.conv_bias, channel);
    }
    shift = fmaf(center, scale, a.bias.data != nullptr ? load_channel<float>(a.bias, channel) : 0.0f);
}

/// Whether the channels fill vectors of 16 bytes. Only the smallest tile is compiled for others too: eight
/// times as many accesses would double the code of the large ones.
template <typename Types>
__device__ __forceinline__ bool whole_vectors(const ConvOutput& output) {
    return Types::kM > 64 || output.vectors;
}

/// Turns the block's accumulators into output. Through shared memory, 8 rows of every warp a round: the
/// registers of an mma hold pairs of channels, a thread stores 16 bytes. Two buffers in turn, so that a round
/// needs one barrier: who writes a buffer has passed the barrier behind the reads of two rounds ago. A
/// barrier lies between whatever used the memory before and this.
template <typename T, typename Types>
__device__ __forceinline__ void conv_epilogue(typename Types::Shared& shared, const ConvOutput& output,
                                              const typename Types::Accumulators& accumulators, int row_tile,
                                              int column_tile) {
    using Map = typename Types::Map;
    using Staging = typename Types::Staging;
    constexpr int kVec = Types::kVec, kColumns = Map::Iterations::kColumn;
    constexpr int kAccesses = Map::Iterations::kCount, kBuffer = Staging::kSmemPointerOffset;
    static_assert(Map::kElementsPerAccess == kVec, "16-byte stores");
    const int thread = threadIdx.x, warp = thread / 32;
    using WarpCount = typename Staging::WarpCount;

    typename Staging::WarpTileIterator to_shared(shared.staging.reference(), thread % 32);
    to_shared.add_tile_offset({warp % WarpCount::kM, warp / WarpCount::kM});
    typename Staging::SharedLoadIterator from_shared(shared.staging.reference(), thread);
    typename Staging::AccumulatorFragmentIterator registers(accumulators);

    const cutlass::MatrixCoord place = Map::initial_offset(thread);
    const int first_row = row_tile * Types::kM + place.row();
    const int first_column = column_tile * Types::kN + place.column();
    float scale[kColumns][kVec], shift[kColumns][kVec];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            scale[c][k] = shared.scale[place.column() + c * Map::Delta::kColumn + k];
            shift[c][k] = shared.shift[place.column() + c * Map::Delta::kColumn + k];
        }
    }
    const T* residual = static_cast<const T*>(output.residual);
    T* out = static_cast<T*>(output.out);

#pragma unroll
    for (int round = 0; round < Staging::OutputTileIterator::kIterations; ++round) {
        Pack<T, kVec> added[kAccesses];
        if (residual != nullptr) {  // on its way while the accumulators change places
#pragma unroll
            for (int i = 0; i < kAccesses; ++i) {
                const cutlass::MatrixCoord step = Map::iteration_offset(i);
                const int row = first_row + round * Map::Shape::kRow + step.row();
                const int left = row < output.rows ? output.columns - first_column - step.column() : 0;
                const int64_t at = static_cast<int64_t>(row) * output.columns + first_column + step.column();
                if (whole_vectors<Types>(output)) {
                    added[i] = left > 0 ? load_pack<T, kVec>(residual + at) : Pack<T, kVec>{};
                } else {
                    added[i] = load_head<T, kVec>(residual + at, left);
                }
            }
        }
        typename Staging::AccumulatorFragmentIterator::Fragment fragment;
        registers.load(fragment);
        ++registers;
        to_shared.store(fragment);
        __syncthreads();
        typename Staging::SharedLoadIterator::Fragment sums;
        from_shared.load(sums);
        const int other = round % 2 == 0 ? kBuffer : -kBuffer;
        to_shared.add_pointer_offset(other);
        from_shared.add_pointer_offset(other);
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            const cutlass::MatrixCoord step = Map::iteration_offset(i);
            const int row = first_row + round * Map::Shape::kRow + step.row();
            const int left = row < output.rows ? output.columns - first_column - step.column() : 0;
            float z[kVec];
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                z[k] = fmaf(sums[i * kVec + k], scale[i % kColumns][k], shift[i % kColumns][k]);
                z[k] = conv_activation(output, residual != nullptr ? z[k] + to_acc(added[i].v[k]) : z[k]);
            }
            const Pack<T, kVec> pack = round_pack<T, kVec>(z);
            const int64_t at = static_cast<int64_t>(row) * output.columns + first_column + step.column();
            if (!whole_vectors<Types>(output)) {
                store_head<T, kVec>(out + at, pack, left);
            } else if (left > 0) {
                store_pack<T, kVec>(out + at, pack);
            }
        }
    }
}

/// One slice's sums of a tile.
template <typename Types>
__device__ __forceinline__ void conv_main_loop(typename Types::Shared& shared, const ConvFwdArgs& args,
                                               int row_tile, int column_tile, int slice,
                                               typename Types::Accumulators& accumulators) {
    using Mma = typename Types::Mma;
    using Element = typename Types::Element;
    const int thread = threadIdx.x;
    typename Mma::IteratorA x(args.x_walk, args.size, static_cast<Element*>(args.x), thread,
                              cutlass::MatrixCoord(row_tile * Types::kM, slice * Types::kK));
    typename Mma::IteratorB weight(args.weight_walk, args.size, static_cast<Element*>(args.weight), thread,
                                   cutlass::MatrixCoord(slice * Types::kK, column_tile * Types::kN));
    accumulators.clear();
    // The warp's number from one lane: what depends on it is then the same in all lanes for the compiler too.
    const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    Mma mma(shared.main, thread, warp, thread % 32);
    mma(args.steps, accumulators, x, weight, accumulators);
}

/// Grid: slices * tiles blocks, the tiles of one row of pixels side by side so that they share x in L2.
template <typename T, int kRows, int kColumns, int kStages>
__global__ void __launch_bounds__(128) conv_bn_act_fwd_kernel(ConvFwdArgs args) {
    using Types = ConvTypes<T, kRows, kColumns, kStages>;
    extern __shared__ __align__(16) char memory[];
    auto& shared = *reinterpret_cast<typename Types::Shared*>(memory);
    const int thread = threadIdx.x, slice = blockIdx.x / args.tiles, tile = blockIdx.x % args.tiles;
    const int row_tile = tile / args.column_tiles, column_tile = tile % args.column_tiles;
    if (thread < Types::kN) {
        conv_affine(args.affine, column_tile * Types::kN + thread, args.output.columns, shared.scale[thread],
                    shared.shift[thread]);
    }
    typename Types::Accumulators accumulators;
    conv_main_loop<Types>(shared, args, row_tile, column_tile, slice, accumulators);
    if (kRows == 64 && args.partial != nullptr) {  // (larger tiles are not cut into slices)
        float4* to = reinterpret_cast<float4*>(args.partial) +
                     static_cast<int64_t>(blockIdx.x) * (kRows * kColumns / 4) + thread;
#pragma unroll
        for (int i = 0; i < Types::Accumulators::kElements / 4; ++i) {
            to[i * Types::kThreads] = make_float4(accumulators[4 * i], accumulators[4 * i + 1],
                                                  accumulators[4 * i + 2], accumulators[4 * i + 3]);
        }
        return;
    }
    conv_epilogue<T, Types>(shared, args.output, accumulators, row_tile, column_tile);
}

/// Adds up the slices of a tile, in their order, and writes the output.
template <typename T, int kRows, int kColumns, int kStages>
__global__ void __launch_bounds__(128) conv_bn_act_finish_kernel(ConvFinishArgs args) {
    using Types = ConvTypes<T, kRows, kColumns, kStages>;
    extern __shared__ __align__(16) char memory[];
    auto& shared = *reinterpret_cast<typename Types::Shared*>(memory);
    const int thread = threadIdx.x;
    const int row_tile = blockIdx.x / args.column_tiles, column_tile = blockIdx.x % args.column_tiles;
    if (thread < Types::kN) {
        conv_affine(args.affine, column_tile * Types::kN + thread, args.output.columns, shared.scale[thread],
                    shared.shift[thread]);
    }
    typename Types::Accumulators sums;
    sums.clear();
    const float4* from = reinterpret_cast<const float4*>(args.partial) +
                         static_cast<int64_t>(blockIdx.x) * (kRows * kColumns / 4) + thread;
    for (int slice = 0; slice < args.slices; ++slice) {
#pragma unroll
        for (int i = 0; i < Types::Accumulators::kElements / 4; ++i) {
            const float4 v = from[i * Types::kThreads];
            sums[4 * i] += v.x;
            sums[4 * i + 1] += v.y;
            sums[4 * i + 2] += v.z;
            sums[4 * i + 3] += v.w;
        }
        from += static_cast<int64_t>(args.tiles) * (kRows * kColumns / 4);
    }
    __syncthreads();
    conv_epilogue<T, Types>(shared, args.output, sums, row_tile, column_tile);
}

}  // namespace dl4ds
