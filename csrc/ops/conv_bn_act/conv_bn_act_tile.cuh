// What the fused convolution's kernels share: the types of a tile, CUTLASS' sm_80 main loop (implicit GEMM on
// tensor cores, fp32 accumulators) of it, and the way of the accumulators to 16-byte stores. Rows of the GEMM
// are output pixels, columns output channels, and the reduction runs over the taps of the filter inside
// chunks of input channels.
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

/// The way of a block's accumulators to their pixels' memory: through shared memory, 8 rows of every warp a
/// round, since the registers of an mma hold pairs of channels and a thread stores 16 bytes. Two buffers in
/// turn, so that a round needs one barrier: who writes a buffer has passed the barrier behind the reads of
/// two rounds ago. A barrier lies between whatever used the memory before and this.
template <typename Types>
struct ConvRounds {
    using Staging = typename Types::Staging;
    using WarpCount = typename Staging::WarpCount;
    using Sums = typename Staging::SharedLoadIterator::Fragment;
    static constexpr int kCount = Staging::OutputTileIterator::kIterations;

    typename Staging::WarpTileIterator to_shared;
    typename Staging::SharedLoadIterator from_shared;
    typename Staging::AccumulatorFragmentIterator registers;

    __device__ __forceinline__ ConvRounds(typename Types::Shared& shared,
                                          const typename Types::Accumulators& accumulators, int thread)
        : to_shared(start(shared, thread)),
          from_shared(shared.staging.reference(), thread),
          registers(accumulators) {}

    static __device__ __forceinline__ typename Staging::WarpTileIterator start(typename Types::Shared& shared,
                                                                               int thread) {
        const int warp = thread / 32;
        typename Staging::WarpTileIterator place(shared.staging.reference(), thread % 32);
        place.add_tile_offset({warp % WarpCount::kM, warp / WarpCount::kM});
        return place;
    }

    /// This thread's sums of a round; the rounds in their order.
    __device__ __forceinline__ void next(int round, Sums& sums) {
        typename Staging::AccumulatorFragmentIterator::Fragment fragment;
        registers.load(fragment);
        ++registers;
        to_shared.store(fragment);
        __syncthreads();
        from_shared.load(sums);
        const int other = round % 2 == 0 ? Staging::kSmemPointerOffset : -Staging::kSmemPointerOffset;
        to_shared.add_pointer_offset(other);
        from_shared.add_pointer_offset(other);
    }
};

}  // namespace dl4ds
