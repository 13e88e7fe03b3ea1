// The end of a bottleneck block in one kernel: a convolution to 64 channels with BatchNorm and activation,
// and the 1x1 convolution behind it with BatchNorm, residual and activation. The 64 channels between them
// stay in shared memory, rounded once to the storage type, so that the bits are those of two kernels.
//
// Made for few pixels, where a launch costs more than the arithmetic: whatever is needed later is asked for
// early. Scale and shift of all channels are worked out while the first copies are under way, the 1x1's
// filters arrive beside the steps of the first main loop, and a chunk's residual while the one before is
// stored.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_tail_loop.cuh"

namespace dl4ds {

struct ConvTailArgs {
    ConvFwdArgs first;       // of its output only the activation counts
    void* weight = nullptr;  // of the 1x1: dense (output.columns, 64)
    ConvAffine affine;
    ConvOutput output;
    int parts = 1, chunks = 1;  // blocks of a tile of pixels; chunks of 64 output channels of a block
};

/// act(sum * scale + shift) of the first convolution, rounded, to where and as the second product reads it.
/// A thread holds two neighbouring channels of a row of each mma: 8 rows of 16 bytes are one wave of banks.
template <typename T, typename Types>
__device__ __forceinline__ void conv_tail_middle(typename Types::Shared& shared, const ConvOutput& output,
                                                 const typename Types::Accumulators& sums) {
    using Warp = typename Types::Warp;
    constexpr int kRows = Warp::MmaIterations::kRow, kColumns = Warp::MmaIterations::kColumn;
    static_assert(Types::Accumulators::kElements == 4 * kRows * kColumns, "16 x 8 sums an mma");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = warp % 2 * (Types::kM / 2) + lane / 4;
    const int first_column = warp / 2 * (Types::kN / 2) + lane % 4 * 2;
    const auto layout = Warp::LayoutA::packed({Types::kM, Types::kMiddle});
    T* middle = reinterpret_cast<T*>(shared.middle);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
        const int column = first_column + 8 * n;
        const float2 scale = *reinterpret_cast<const float2*>(shared.scale + column);
        const float2 shift = *reinterpret_cast<const float2*>(shared.shift + column);
#pragma unroll
        for (int i = 0; i < 2 * kRows; ++i) {  // rows 0-7 and 8-15 of each mma
            const int at = (i / 2 + n * kRows) * 4 + i % 2 * 2, row = first_row + 8 * i;
            const float z[2] = {conv_activation(output, fmaf(sums[at], scale.x, shift.x)),
                                conv_activation(output, fmaf(sums[at + 1], scale.y, shift.y))};
            if constexpr (sizeof(T) == 2) {
                const Pack<T, 2> pair = round_pack<T, 2>(z);
                uint32_t word;
                memcpy(&word, &pair, sizeof(word));
                *reinterpret_cast<uint32_t*>(middle + layout({row, column})) = word;
            } else {  // one at a time, in turns: neighbouring pairs of rows would meet in the same banks
                const int turn = lane / 8 % 2;
                middle[layout({row, column + turn})] = turn == 0 ? z[0] : z[1];
                middle[layout({row, column + 1 - turn})] = turn == 0 ? z[1] : z[0];
            }
        }
    }
}

/// Sums of a chunk of the second convolution.
template <typename Types>
__device__ __forceinline__ void conv_tail_multiply(typename Types::Element* middle,
                                                   typename Types::Element* filter,
                                                   typename Types::Accumulators& sums) {
    using Base = typename Types::Mma::Base;
    using Warp = typename Types::Warp;
    constexpr int kGroups = Base::kWarpGemmIterations, kAll = Types::kMiddle / Types::kK * kGroups;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    typename Warp::IteratorA a_tile({middle, Warp::LayoutA::packed({Types::kM, Types::kMiddle})}, lane);
    typename Warp::IteratorB b_tile({filter, Warp::LayoutB::packed({Types::kMiddle, Types::kChunk})}, lane);
    a_tile.add_tile_offset({warp % Base::WarpCount::kM, 0});
    b_tile.add_tile_offset({0, warp / Base::WarpCount::kM});
    sums.clear();
    Warp multiply;
#pragma unroll
    for (int group = 0; group < kAll; ++group) {
        typename Warp::FragmentA a;
        typename Warp::FragmentB b;
        a_tile.set_kgroup_index(group % kGroups);
        b_tile.set_kgroup_index(group % kGroups);
        a_tile.load(a);
        b_tile.load(b);
        ++a_tile;
        ++b_tile;
        typename Warp::TransformedFragmentA left;
        typename Warp::TransformedFragmentB right;
        multiply.transform(left, right, a, b);
        multiply(sums, left, right, sums);
    }
}

/// Scale and shift of a chunk's output channels as the threads read them, four at a time: the first four of
/// each thread's side by side, then the next, so that lanes side by side find them in different banks.
template <typename Types>
struct TailTable {
    static constexpr int kQuads = Types::kVec / 4;
    float4 scale[kQuads], shift[kQuads];

    static __device__ __forceinline__ int place(int channel) {
        constexpr int kVec = Types::kVec, kChunk = Types::kChunk;
        const int own = channel % kChunk;
        return channel - own + own % kVec / 4 * (kChunk / kQuads) + own / kVec * 4 + own % 4;
    }

    /// column: of the thread's first channel within the chunk.
    __device__ __forceinline__ TailTable(const float* scales, const float* shifts, int column) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            scale[q] = *reinterpret_cast<const float4*>(scales + place(column + 4 * q));
            shift[q] = *reinterpret_cast<const float4*>(shifts + place(column + 4 * q));
        }
    }
};

/// The second convolution, chunk by chunk, and its epilogue: as conv_epilogue's, but that a thread keeps a
/// chunk's residual in registers, asked for a chunk ahead.
template <typename T, typename Types>
struct TailColumns {
    using Map = typename Types::Map;
    static constexpr int kVec = Types::kVec;
    static constexpr int kAccesses = Map::Iterations::kCount, kRounds = ConvRounds<Types>::kCount;
    static_assert(Map::kElementsPerAccess == kVec && Map::Iterations::kColumn == 1, "16 bytes of a row");

    const ConvOutput& output;
    const cutlass::MatrixCoord place = Map::initial_offset(threadIdx.x);
    int row_tile, channel;  // the block's tile of pixels and first output channel
    Pack<T, kVec> added[kRounds * kAccesses];

    /// Where an access lies in the output; -1: nowhere.
    __device__ __forceinline__ int64_t at(int chunk, int round, int i) const {
        const cutlass::MatrixCoord step = Map::iteration_offset(i);
        const int row = row_tile * Types::kM + place.row() + round * Map::Shape::kRow + step.row();
        const int column = channel + chunk * Types::kChunk + place.column() + step.column();
        return row < output.rows && column < output.columns
                   ? static_cast<int64_t>(row) * output.columns + column
                   : -1;
    }

    __device__ __forceinline__ void fetch(int chunk, int round) {
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            const int64_t from = at(chunk, round, i);
            added[round * kAccesses + i] =
                from >= 0 ? load_pack<T, kVec>(static_cast<const T*>(output.residual) + from)
                          : Pack<T, kVec>{};
        }
    }

    __device__ __forceinline__ void store(int chunk, int round, const typename ConvRounds<Types>::Sums& sums,
                                          const TailTable<Types>& table) const {
        const float* scale = reinterpret_cast<const float*>(table.scale);
        const float* shift = reinterpret_cast<const float*>(table.shift);
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            float z[kVec];
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                z[k] = fmaf(sums[i * kVec + k], scale[k], shift[k]);
                z[k] = output.residual != nullptr ? z[k] + to_acc(added[round * kAccesses + i].v[k]) : z[k];
                z[k] = conv_activation(output, z[k]);
            }
            const int64_t to = at(chunk, round, i);
            if (to >= 0) {
                store_pack<T, kVec>(static_cast<T*>(output.out) + to, round_pack<T, kVec>(z));
            }
        }
    }
};

/// Scale and shift of the middle and of the block's output channels, several channels of a thread at a time.
template <typename Types>
__device__ __forceinline__ void conv_tail_tables(typename Types::Shared& shared, const ConvTailArgs& args,
                                                 int channel, int width, float* scale, float* shift) {
    constexpr int kAtOnce = 3;  // of a thread: the middle and 256 output channels take no second turn
    const int all = Types::kMiddle + width;
#pragma unroll 1
    for (int from = threadIdx.x; from < all; from += kAtOnce * Types::kThreads) {
        TailAffine found[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int c = from + i * Types::kThreads, own = c - Types::kMiddle;
            if (c < Types::kMiddle) {
                found[i].load(args.first.affine, c);
            } else if (own < width && channel + own < args.output.columns) {
                found[i].load(args.affine, channel + own);
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int c = from + i * Types::kThreads, own = c - Types::kMiddle;
            const int at = TailTable<Types>::place(max(own, 0));
            if (c < Types::kMiddle) {
                found[i].work_out(args.first.affine, shared.scale[c], shared.shift[c]);
            } else if (own < width && channel + own < args.output.columns) {
                found[i].work_out(args.affine, scale[at], shift[at]);
            } else if (own < width) {  // behind the last channel: sums that nothing stores
                scale[at] = shift[at] = 0.0f;
            }
        }
    }
}

/// Grid: the parts of each tile of pixels side by side. Behind Shared lie scale and shift of the block's
/// output channels.
template <typename T>
__global__ void __launch_bounds__(128) conv_bn_act_tail_kernel(ConvTailArgs args) {
    using Types = TailTypes<T>;
    using Element = typename Types::Element;
    extern __shared__ __align__(16) char memory[];
    auto& shared = *reinterpret_cast<typename Types::Shared*>(memory);
    static_assert(sizeof(typename Types::Shared) % 16 == 0, "the tables are read 16 bytes at a time");
    const int row_tile = blockIdx.x / args.parts, width = args.chunks * Types::kChunk;
    const int channel = blockIdx.x % args.parts * width;
    float* scale = reinterpret_cast<float*>(memory + sizeof(typename Types::Shared));
    float* shift = scale + width;
    const TailFilters<Types> filters{static_cast<Element*>(args.weight) + channel * Types::kMiddle,
                                     shared.filter[0], args.output.columns - channel};
    constexpr int kParts = TailFilters<Types>::kParts;
    const int ahead = min(args.chunks, Types::kSlots) * kParts;  // copies of a thread
    TailColumns<T, Types> columns{args.output};
    columns.row_tile = row_tile;
    columns.channel = channel;
    typename Types::Accumulators sums;
    conv_tail_loop<Types>(
        shared, args.first, row_tile,
        [&] {
            if (args.output.residual != nullptr) {
#pragma unroll
                for (int round = 0; round < columns.kRounds; ++round) {
                    columns.fetch(0, round);
                }
            }
            conv_tail_tables<Types>(shared, args, channel, width, scale, shift);
        },
        [&](int step) {
            // What a short loop leaves is copied by its last step.
            for (int i = step; i < (step == args.first.steps - 1 ? ahead : min(step + 1, ahead)); ++i) {
                filters.copy(i / kParts, i % kParts);
            }
        },
        sums);
    conv_tail_middle<T, Types>(shared, args.first.output, sums);
#pragma unroll 1
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
        // Every chunk behind the first ones closes a group of copies, as far as there are any.
        cutlass::arch::cp_async_wait<Types::kSlots - 1>();
        __syncthreads();
        conv_tail_multiply<Types>(shared.middle, shared.filter[chunk % Types::kSlots], sums);
        const int first = chunk * Types::kChunk;
        const TailTable<Types> table(scale + first, shift + first, columns.place.column());
        ConvRounds<Types> rounds(shared, sums, threadIdx.x);
#pragma unroll
        for (int round = 0; round < columns.kRounds; ++round) {
            typename ConvRounds<Types>::Sums part;
            rounds.next(round, part);
            if (round == 0) {  // behind its barrier all warps have read their filters
                if (chunk + Types::kSlots < args.chunks) {
#pragma unroll
                    for (int i = 0; i < kParts; ++i) {
                        filters.copy(chunk + Types::kSlots, i);
                    }
                }
                cutlass::arch::cp_async_fence();
            }
            columns.store(chunk, round, part, table);
            if (args.output.residual != nullptr && chunk + 1 < args.chunks) {
                columns.fetch(chunk + 1, round);
            }
        }
    }
}

}  // namespace dl4ds
