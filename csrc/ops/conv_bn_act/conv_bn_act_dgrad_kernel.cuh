// The input's gradient of a stride-1 convolution: CUTLASS' main loop (conv_bn_act_tile.cuh) over dout and the
// turned filter, then an epilogue that adds another gradient of the same tensor, stores the sum rounded once,
// and takes, of the values as stored, the sums that the gradient of the BatchNorm in front starts with: dz
// and dz * (y - mean) for every tile of pixels and every channel; where two BatchNorms were added, those of
// both. A finalize kernel (bn_act's, bn_act_pair's) adds the tiles in their order. No atomics: the same bits
// on every run.
#pragma once

#include "common/cuda/activation.cuh"
#include "common/cuda/reduce.cuh"
#include "ops/conv_bn_act/conv_bn_act_tile.cuh"

namespace dl4ds {

/// dz of a gradient by the bit that says on which side of the kink the activation's argument lies.
struct ConvKink {
    bool leaky = false;
    float slope = 0;
    // The argument's side: above is !(z <= lower || z >= upper), with NaN for a bound that is not there;
    // leaky_relu: z > 0.
    float lower = 0, upper = 0;

    __device__ __forceinline__ float gradient(float g, bool above) const {
        const float off = leaky ? g * slope : 0.0f;
        return above ? g : off;
    }
    __device__ __forceinline__ bool above(float z) const {
        const bool below = leaky ? !(z > 0.0f) : z <= lower;
        return !(below || z >= upper);
    }
};

struct ConvDgradArgs {
    ConvFwdArgs fwd;  // affine: mean, rstd (in var's place), weight, bias of the BatchNorm in front
    const void* y = nullptr;
    const uint8_t *mask = nullptr, *residual_mask = nullptr;
    ConvKink kink, residual_kink;
    float* partial = nullptr;  // [row tiles][2, with other 3][columns]; null: no sums
    // What another BatchNorm has normalised, whose output was added to that of the first: dz is the gradient
    // of both. Null: there is none.
    const void* other = nullptr;
    const float* other_mean = nullptr;
    int step = 1, step_height = 1, step_width = 1;  // residual's pixels, where step is more than 1
    cutlass::FastDivmod width{1}, height{1}, stride{1};
};

/// The sum over dz * (other - other_mean): the first BatchNorm's two are bn_act's Sums.
struct ConvOtherSum {
    static constexpr int kFields = 1;
    float v[kFields] = {0};

    __device__ __forceinline__ void merge(const ConvOtherSum& other) { v[0] += other.v[0]; }
};

/// Where the pixel `row` of the output lies in a residual that holds every step-th pixel of every step-th
/// line; -1 if it is not there.
__device__ __forceinline__ int64_t residual_row(const ConvDgradArgs& a, int row) {
    if (a.step == 1) {
        return row;
    }
    int line, w, n, h, h_at, h_rest, w_at, w_rest;
    a.width(line, w, row);
    a.height(n, h, line);
    a.stride(h_at, h_rest, h);
    a.stride(w_at, w_rest, w);
    return h_rest == 0 && w_rest == 0 ? (static_cast<int64_t>(n) * a.step_height + h_at) * a.step_width + w_at
                                      : -1;
}

/// The bits of kVec values from element `at` on, the first `left` of them.
template <int kVec>
__device__ __forceinline__ unsigned bits_at(const uint8_t* mask, int64_t at, int left, bool whole) {
    if (whole) {
        return left > 0 ? load_mask<kVec>(mask, at / kVec) : 0;
    }
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        if (k < left) {
            bits |= ((mask[(at + k) / 8] >> ((at + k) % 8)) & 1u) << k;
        }
    }
    return bits;
}

template <typename T, int kVec>
__device__ __forceinline__ Pack<T, kVec> load_values(const T* p, int left, bool whole) {
    if (whole) {
        return left > 0 ? load_pack<T, kVec>(p) : Pack<T, kVec>{};
    }
    return load_head<T, kVec>(p, left);
}

template <typename T, int kVec>
__device__ __forceinline__ void get_floats(const Pack<T, kVec>& pack, int first, float (&out)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        out[k] = to_acc(pack.v[first + k]);
    }
}

/// What the epilogue needs of the block's channels beside scale and shift.
template <typename Types>
struct ConvDgradShared : Types::Shared {
    alignas(16) float mean[Types::kN];
    alignas(16) float other_mean[Types::kN];
};

/// Sums of the block's threads to the partial sums of its columns, `first` of the record on.
template <typename Types, typename Map, typename State, int kVec, int kColumns>
__device__ __forceinline__ void conv_dgrad_store(ConvDgradShared<Types>& shared, const ConvDgradArgs& args,
                                                 const State (&own)[kColumns][kVec], int row_tile,
                                                 int column_tile, int first) {
    constexpr int kWidth = Map::Detail::kAccessWidth, kHeight = Types::kThreads / kWidth;
    static_assert(State::kFields * kHeight * kWidth * kVec * sizeof(float) <=
                      sizeof(typename Types::Mma::SharedStorage),
                  "the merge takes the main loop's memory");
    const int64_t columns = args.fwd.output.columns, fields = args.other != nullptr ? 3 : 2;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        __syncthreads();  // the memory has been read
        const State merged =
            column_merge<State, float, kVec>(own[c], kWidth, kHeight, reinterpret_cast<float*>(&shared.main));
        const int column = column_tile * Types::kN + c * Map::Delta::kColumn + threadIdx.x;
        if (threadIdx.x < kWidth * kVec && column < columns) {
            float* partial = args.partial + (row_tile * fields + first) * columns + column;
#pragma unroll
            for (int k = 0; k < State::kFields; ++k) {
                partial[k * columns] = merged.v[k];
            }
        }
    }
}

template <typename T, typename Types>
__device__ __forceinline__ void conv_dgrad_epilogue(ConvDgradShared<Types>& shared, const ConvDgradArgs& args,
                                                    const typename Types::Accumulators& accumulators,
                                                    int row_tile, int column_tile) {
    using Map = typename Types::Map;
    constexpr int kVec = Types::kVec, kColumns = Map::Iterations::kColumn;
    constexpr int kAccesses = Map::Iterations::kCount;
    static_assert(Map::Detail::kAccessWidth * kVec * kColumns == Types::kN,
                  "a row of threads covers a row of the tile");
    const ConvOutput& output = args.fwd.output;
    const int thread = threadIdx.x;
    ConvRounds<Types> rounds(shared, accumulators, thread);
    const cutlass::MatrixCoord place = Map::initial_offset(thread);
    const int first_row = row_tile * Types::kM + place.row();
    const int first_column = column_tile * Types::kN + place.column();
    const bool whole = whole_vectors<Types>(output);
    const T* residual = static_cast<const T*>(output.residual);
    const T* y = static_cast<const T*>(args.y);
    const T* other = static_cast<const T*>(args.other);
    T* out = static_cast<T*>(output.out);
    Sums<float> own[kColumns][kVec];
    ConvOtherSum theirs[kColumns][kVec];

#pragma unroll
    for (int round = 0; round < ConvRounds<Types>::kCount; ++round) {
        Pack<T, kVec> added[kAccesses], value[kAccesses], second[kAccesses];
        unsigned added_bits[kAccesses], bits[kAccesses];
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {  // on their way while the accumulators change places
            const cutlass::MatrixCoord step = Map::iteration_offset(i);
            const int row = first_row + round * Map::Shape::kRow + step.row();
            const int left = row < output.rows ? output.columns - first_column - step.column() : 0;
            const int64_t at = static_cast<int64_t>(row) * output.columns + first_column + step.column();
            if (residual != nullptr) {
                const int64_t from = left > 0 ? residual_row(args, row) : -1;
                added[i] =
                    load_values<T, kVec>(residual + from * output.columns + first_column + step.column(),
                                         from < 0 ? 0 : left, whole);
                if (args.residual_mask != nullptr) {
                    added_bits[i] = bits_at<kVec>(args.residual_mask, at, left, whole);
                }
            }
            if (args.partial != nullptr) {
                value[i] = load_values<T, kVec>(y + at, left, whole);
                if (other != nullptr) {
                    second[i] = load_values<T, kVec>(other + at, left, whole);
                }
                if (args.mask != nullptr) {
                    bits[i] = bits_at<kVec>(args.mask, at, left, whole);
                }
            }
        }
        typename ConvRounds<Types>::Sums sums;
        rounds.next(round, sums);
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            const cutlass::MatrixCoord step = Map::iteration_offset(i);
            const int row = first_row + round * Map::Shape::kRow + step.row(), c = i % kColumns;
            const int left = row < output.rows ? output.columns - first_column - step.column() : 0;
            const int64_t at = static_cast<int64_t>(row) * output.columns + first_column + step.column();
            float z[kVec];
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                z[k] = sums[i * kVec + k];
                if (residual != nullptr) {
                    const float g = to_acc(added[i].v[k]);
                    z[k] += args.residual_mask != nullptr
                                ? args.residual_kink.gradient(g, (added_bits[i] >> k) & 1)
                                : g;
                }
            }
            const Pack<T, kVec> pack = round_pack<T, kVec>(z);
            if (!whole) {
                store_head<T, kVec>(out + at, pack, left);
            } else if (left > 0) {
                store_pack<T, kVec>(out + at, pack);
            }
            if (args.partial == nullptr || left <= 0) {
                continue;
            }
#pragma unroll
            for (int g = 0; g < kVec; g += 4) {
                const int channel = place.column() + step.column() + g;
                float mean[4], v[4];
                unsigned above = bits[i] >> g;
                get_floats<T, kVec>(value[i], g, v);
                if (args.mask == nullptr) {
                    float scale[4], shift[4], argument[4];
                    reload_shared(&shared.scale[channel], scale);
                    reload_shared(&shared.shift[channel], shift);
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        argument[k] = fmaf(v[k], scale[k], shift[k]);
                    }
                    // As bn_act's elementwise pass decides it: by the argument rounded to T.
                    const Pack<T, 4> rounded = round_pack<T, 4>(argument);
                    above = 0;
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        above |= static_cast<unsigned>(args.kink.above(to_acc(rounded.v[k]))) << k;
                    }
                }
                reload_shared(&shared.mean[channel], mean);
                float dz[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    dz[k] = args.kink.gradient(to_acc(pack.v[g + k]), (above >> k) & 1);
                    own[c][g + k].v[0] += dz[k];
                    own[c][g + k].v[1] = fmaf(dz[k], v[k] - mean[k], own[c][g + k].v[1]);
                }
                if (other == nullptr) {
                    continue;
                }
                get_floats<T, kVec>(second[i], g, v);
                reload_shared(&shared.other_mean[channel], mean);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    theirs[c][g + k].v[0] = fmaf(dz[k], v[k] - mean[k], theirs[c][g + k].v[0]);
                }
            }
        }
    }
    if (args.partial == nullptr) {
        return;
    }
    conv_dgrad_store<Types, Map>(shared, args, own, row_tile, column_tile, 0);
    if (other != nullptr) {
        conv_dgrad_store<Types, Map>(shared, args, theirs, row_tile, column_tile, 2);
    }
}

/// Grid: the tiles, those of one row of pixels side by side.
template <typename T, int kRows, int kColumns, int kStages>
__global__ void __launch_bounds__(128) conv_bn_act_dgrad_kernel(ConvDgradArgs args) {
    using Types = ConvTypes<T, kRows, kColumns, kStages>;
    extern __shared__ __align__(16) char memory[];
    auto& shared = *reinterpret_cast<ConvDgradShared<Types>*>(memory);
    const int thread = threadIdx.x;
    const int row_tile = blockIdx.x / args.fwd.column_tiles, column_tile = blockIdx.x % args.fwd.column_tiles;
    const int channel = column_tile * Types::kN + thread;
    if (thread < Types::kN) {
        const bool known = args.partial != nullptr && channel < args.fwd.output.columns;
        const ConvAffine& a = args.fwd.affine;
        // The very products of bn_act's table (load_affine), so that both decide alike.
        float scale = known ? load_channel<float>(a.var, channel) : 0.0f;
        if (known && a.weight.data != nullptr) {
            scale *= load_channel<float>(a.weight, channel);
        }
        const float mean = known ? load_channel<float>(a.mean, channel) : 0.0f;
        const bool biased = known && a.bias.data != nullptr;
        shared.mean[thread] = mean;
        shared.other_mean[thread] = known && args.other != nullptr ? args.other_mean[channel] : 0.0f;
        shared.scale[thread] = scale;
        shared.shift[thread] = fmaf(-mean, scale, biased ? load_channel<float>(a.bias, channel) : 0.0f);
    }
    typename Types::Accumulators accumulators;
    conv_main_loop<Types>(shared, args.fwd, row_tile, column_tile, 0, accumulators);
    conv_dgrad_epilogue<T, Types>(shared, args, accumulators, row_tile, column_tile);
}

}  // namespace dl4ds
