// Per-channel reductions with a fixed order: the same bits on every run.
#pragma once

#include <cstdint>

namespace dl4ds {

/// Count, mean and sum of squared deviations; merged by Chan's formula.
template <typename acc_t>
struct Moments {
    static constexpr int kFields = 3;
    acc_t v[kFields] = {0, 0, 0};

    /// From `count` values summed relative to `shift`.
    __device__ __forceinline__ static Moments from_shifted(acc_t count, acc_t shift, acc_t sum,
                                                           acc_t squares) {
        Moments m;
        if (count > 0) {
            const acc_t offset = sum / count;
            const acc_t m2 = squares - sum * offset;
            m.v[0] = count;
            m.v[1] = shift + offset;
            m.v[2] = m2 < 0 ? acc_t(0) : m2;  // NaN stays NaN
        }
        return m;
    }
    __device__ __forceinline__ void merge(const Moments& other) {
        const acc_t total = v[0] + other.v[0];
        if (other.v[0] > 0) {
            const acc_t delta = other.v[1] - v[1], share = other.v[0] / total;
            v[1] += delta * share;
            v[2] += other.v[2] + delta * v[0] * share * delta;
            v[0] = total;
        }
    }
};

template <typename acc_t>
struct Sums {
    static constexpr int kFields = 2;
    acc_t v[kFields] = {0, 0};

    __device__ __forceinline__ void merge(const Sums& other) {
        v[0] += other.v[0];
        v[1] += other.v[1];
    }
};

/// Merges the states of all threads of a block (a multiple of 32 threads); the result is thread 0's.
/// `shared` holds one state per warp.
template <typename State>
__device__ __forceinline__ State block_merge(State state, State* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        State other;
#pragma unroll
        for (int k = 0; k < State::kFields; ++k) {
            other.v[k] = __shfl_down_sync(0xffffffffu, state.v[k], lanes);
        }
        state.merge(other);
    }
    if (lane == 0) {
        shared[warp] = state;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < warps; ++w) {
            state.merge(shared[w]);
        }
    }
    return state;
}

/// A block as a grid of `height` rows of threads, each owning kVec of the tile's width * kVec channels
/// (at most blockDim.x of them). Merges over the rows; thread j < width * kVec gets channel j's state.
/// `shared` holds State::kFields * height * width * kVec values, 16-byte aligned.
template <typename State, typename acc_t, int kVec>
__device__ __forceinline__ State column_merge(const State (&own)[kVec], int width, int height,
                                              acc_t* shared) {
    const int channels = width * kVec, plane = height * channels;
    const int tx = threadIdx.x % width, ty = threadIdx.x / width;
    const auto at = [&](int field, int row, int channel) -> acc_t& {
        return shared[field * plane + row * channels + channel];
    };
    const auto read = [&](int row, int channel) {
        State s;
#pragma unroll
        for (int k = 0; k < State::kFields; ++k) {
            s.v[k] = at(k, row, channel);
        }
        return s;
    };
    const auto write = [&](int row, int channel, const State& s) {
#pragma unroll
        for (int k = 0; k < State::kFields; ++k) {
            at(k, row, channel) = s.v[k];
        }
    };
    // First every thread merges a few rows of one channel, then a tree over the groups of rows.
    int groups = static_cast<int>(blockDim.x) / channels;
    groups = groups < height ? groups : height;
    const int channel = threadIdx.x % channels, group = threadIdx.x / channels;
    State state;
    if constexpr (kVec == 1) {
        state = own[0];  // a group is a row
    } else {
        if (ty < height) {
            if constexpr (kVec % 4 == 0 && sizeof(acc_t) == 4) {
                // 16 bytes at a time: single values of one thread lie in the same banks as those of the next.
#pragma unroll
                for (int f = 0; f < State::kFields; ++f) {
#pragma unroll
                    for (int k = 0; k < kVec; k += 4) {
                        *reinterpret_cast<float4*>(&at(f, ty, tx * kVec + k)) =
                            make_float4(own[k].v[f], own[k + 1].v[f], own[k + 2].v[f], own[k + 3].v[f]);
                    }
                }
            } else {
#pragma unroll
                for (int k = 0; k < kVec; ++k) {
                    write(ty, tx * kVec + k, own[k]);
                }
            }
        }
        __syncthreads();
        if (group < groups) {
            state = read(group, channel);
            for (int row = group + groups; row < height; row += groups) {
                state.merge(read(row, channel));
            }
        }
    }
    // A thread writes to the row that it alone has read so far, and no row is written twice: one barrier a
    // level.
    while (groups > 1) {
        const int half = (groups + 1) / 2;
        if (group >= half && group < groups) {
            write(group, channel, state);
        }
        __syncthreads();
        if (group + half < groups) {
            state.merge(read(group + half, channel));
        }
        groups = half;
    }
    return state;
}

}  // namespace dl4ds
