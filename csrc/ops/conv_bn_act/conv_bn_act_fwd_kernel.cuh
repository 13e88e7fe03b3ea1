// One convolution layer of inference in one kernel: CUTLASS' main loop (conv_bn_act_tile.cuh), then an
// epilogue of our own: act(acc * scale + shift [+ residual]) in fp32, one rounding, 16-byte stores.
//
// Few pixels fill few multiprocessors: then the channels are cut into slices, each block leaves its fp32
// accumulators in a workspace, and a second kernel adds them up in the order of the slices.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_tile.cuh"

namespace dl4ds {

/// Turns the block's accumulators into output.
template <typename T, typename Types>
__device__ __forceinline__ void conv_epilogue(typename Types::Shared& shared, const ConvOutput& output,
                                              const typename Types::Accumulators& accumulators, int row_tile,
                                              int column_tile) {
    using Map = typename Types::Map;
    constexpr int kVec = Types::kVec, kColumns = Map::Iterations::kColumn;
    constexpr int kAccesses = Map::Iterations::kCount;
    static_assert(Map::kElementsPerAccess == kVec, "16-byte stores");
    const int thread = threadIdx.x;
    ConvRounds<Types> rounds(shared, accumulators, thread);
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
    for (int round = 0; round < ConvRounds<Types>::kCount; ++round) {
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
        typename ConvRounds<Types>::Sums sums;
        rounds.next(round, sums);
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
