// The convolution in front of a BatchNorm in training: CUTLASS' main loop (conv_bn_act_tile.cuh),
// then an epilogue that stores the sums as they are, rounded once, and what batch statistics are made of: for
// every tile of pixels and every channel the mean and the sum of squared deviations, of the values as stored.
// bn_act's finalize kernel merges the tiles in their order. No atomics: the same bits on every run.
#pragma once

#include "common/cuda/reduce.cuh"
#include "ops/conv_bn_act/conv_bn_act_tile.cuh"

namespace dl4ds {

struct ConvStatsArgs {
    ConvFwdArgs fwd;
    float* partial = nullptr;  // [row tiles][2][columns]: mean, sum of squared deviations
    float* counts = nullptr;   // [row tiles]
};

/// A thread meets the same kVec (or twice kVec) channels in every round: it sums what lies above its first
/// value, which loses nothing where the mean is large beside the spread, and the threads of a channel merge
/// by Chan's formula.
template <typename T, typename Types>
__device__ __forceinline__ void conv_stats_epilogue(typename Types::Shared& shared, const ConvStatsArgs& args,
                                                    const typename Types::Accumulators& accumulators,
                                                    int row_tile, int column_tile) {
    using Map = typename Types::Map;
    constexpr int kVec = Types::kVec, kColumns = Map::Iterations::kColumn;
    constexpr int kAccesses = Map::Iterations::kCount;
    // Threads side by side in a row; all others with the same remainder hold the same channels.
    constexpr int kWidth = Map::Detail::kAccessWidth, kHeight = Types::kThreads / kWidth;
    static_assert(kWidth * kVec * kColumns == Types::kN, "a row of threads covers a row of the tile");
    static_assert(Moments<float>::kFields * kHeight * kWidth * kVec * sizeof(float) <=
                      sizeof(typename Types::Mma::SharedStorage),
                  "the merge takes the main loop's memory");
    const ConvOutput& output = args.fwd.output;
    const int thread = threadIdx.x;
    ConvRounds<Types> rounds(shared, accumulators, thread);
    const cutlass::MatrixCoord place = Map::initial_offset(thread);
    const int first_row = row_tile * Types::kM + place.row();
    const int first_column = column_tile * Types::kN + place.column();
    T* out = static_cast<T*>(output.out);
    float origin[kColumns][kVec], sum[kColumns][kVec], squares[kColumns][kVec];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            origin[c][k] = sum[c][k] = squares[c][k] = 0.0f;
        }
    }
    int count = 0;  // rows of this thread

#pragma unroll
    for (int round = 0; round < ConvRounds<Types>::kCount; ++round) {
        typename ConvRounds<Types>::Sums sums;
        rounds.next(round, sums);
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            const cutlass::MatrixCoord step = Map::iteration_offset(i);
            const int row = first_row + round * Map::Shape::kRow + step.row();
            if (row >= output.rows) {
                continue;
            }
            const int left = output.columns - first_column - step.column(), c = i % kColumns;
            float z[kVec];
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                z[k] = sums[i * kVec + k] + shared.shift[place.column() + step.column() + k];
            }
            const Pack<T, kVec> pack = round_pack<T, kVec>(z);
            const int64_t at = static_cast<int64_t>(row) * output.columns + first_column + step.column();
            if (!whole_vectors<Types>(output)) {
                store_head<T, kVec>(out + at, pack, left);
            } else if (left > 0) {
                store_pack<T, kVec>(out + at, pack);
            }
            if (count == 0) {
#pragma unroll
                for (int k = 0; k < kVec; ++k) {
                    origin[c][k] = to_acc(pack.v[k]);
                }
            }
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                const float d = to_acc(pack.v[k]) - origin[c][k];
                sum[c][k] += d;
                squares[c][k] = fmaf(d, d, squares[c][k]);
            }
            count += c == kColumns - 1 ? 1 : 0;
        }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        Moments<float> own[kVec];
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            own[k] = Moments<float>::from_shifted(static_cast<float>(count), origin[c][k], sum[c][k],
                                                  squares[c][k]);
        }
        __syncthreads();  // the memory has been read
        const Moments<float> merged = column_merge<Moments<float>, float, kVec>(
            own, kWidth, kHeight, reinterpret_cast<float*>(&shared.main));
        const int column = column_tile * Types::kN + c * Map::Delta::kColumn + thread;
        if (thread < kWidth * kVec && column < output.columns) {
            float* partial = args.partial + static_cast<int64_t>(row_tile) * 2 * output.columns + column;
            partial[0] = merged.v[1];
            partial[output.columns] = merged.v[2];
            if (column == 0) {
                args.counts[row_tile] = merged.v[0];
            }
        }
    }
}

/// Grid: the tiles, those of one row of pixels side by side.
template <typename T, int kRows, int kColumns, int kStages>
__global__ void __launch_bounds__(128) conv_bn_act_stats_kernel(ConvStatsArgs args) {
    using Types = ConvTypes<T, kRows, kColumns, kStages>;
    extern __shared__ __align__(16) char memory[];
    auto& shared = *reinterpret_cast<typename Types::Shared*>(memory);
    const int thread = threadIdx.x;
    const int row_tile = blockIdx.x / args.fwd.column_tiles, column_tile = blockIdx.x % args.fwd.column_tiles;
    if (thread < Types::kN) {
        const int channel = column_tile * Types::kN + thread;
        const bool biased = args.fwd.affine.conv_bias.data != nullptr && channel < args.fwd.output.columns;
        shared.shift[thread] = biased ? load_channel<float>(args.fwd.affine.conv_bias, channel) : 0.0f;
    }
    typename Types::Accumulators accumulators;
    conv_main_loop<Types>(shared, args.fwd, row_tile, column_tile, 0, accumulators);
    conv_stats_epilogue<T, Types>(shared, args, accumulators, row_tile, column_tile);
}

}  // namespace dl4ds
