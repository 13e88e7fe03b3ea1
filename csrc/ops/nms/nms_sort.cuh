// Stable radix sort of (key, value) pairs, one image at a time in every block: eight bits a pass, three
// kernels a pass (count, scan, scatter). No atomics, no block waits for another.
//
// A tile is what one block sorts: each of its warps takes kTile / 8 consecutive items, 32 at a time, and
// keeps counters of its own, so the order within a digit is the order of the items.
#pragma once

#include <cstdint>

#include "ops/nms/nms_iou.cuh"

namespace dl4ds::nms {

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / 32;
constexpr int kTile = 2048, kRounds = kTile / kSortThreads;
constexpr int kDigits = 256;
constexpr int kScanThreads = 1024;

/// Keys whose ascending order is torch's stable descending order of scores: NaN first (whatever its sign),
/// +inf down to -inf; the zeros tie. The largest key is free: it marks boxes that take no part.
template <typename T>
struct ScoreKey {
    using type = uint32_t;
    static constexpr int kPasses = 2;  // 16-bit floats

    __device__ __forceinline__ static uint32_t of(T score) {
        const uint32_t bits = reinterpret_cast<const uint16_t&>(score);
        if (widen(score) != widen(score) || (bits & 0x7fffu) == 0) {
            return bits & 0x7fffu ? 0 : 0x7fffu;
        }
        return bits & 0x8000u ? bits : 0x7fffu - bits;
    }
    static constexpr uint32_t kNone = 0xffffu;
};
template <>
struct ScoreKey<float> {
    using type = uint32_t;
    static constexpr int kPasses = 4;

    __device__ __forceinline__ static uint32_t of(float score) {
        const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.f));  // -0 becomes +0
        return score != score ? 0 : bits & 0x80000000u ? bits : 0x7fffffffu - bits;
    }
    static constexpr uint32_t kNone = 0xffffffffu;
};
template <>
struct ScoreKey<double> {
    using type = uint64_t;
    static constexpr int kPasses = 8;

    __device__ __forceinline__ static uint64_t of(double score) {
        const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(__dadd_rn(score, 0.)));
        return score != score ? 0 : bits >> 63 ? bits : 0x7fffffffffffffffull - bits;
    }
    static constexpr uint64_t kNone = ~uint64_t{0};
};

/// The lanes of a warp with the same digit, among those with an item.
__device__ __forceinline__ unsigned same_digit(uint32_t digit, bool valid) {
    return __match_any_sync(0xffffffffu, valid ? digit : kDigits) & (valid ? 0xffffffffu : 0u);
}

__device__ __forceinline__ unsigned lanes_below() { return (1u << (threadIdx.x % 32)) - 1; }

/// One pass over `count` items of each image. The images lie `count` apart, the counters kDigits * tiles.
template <typename Key>
struct SortPass {
    const Key* keys;
    const uint32_t* values;
    Key* keys_out;
    uint32_t* values_out;
    uint32_t* counters;  // [image][digit][tile]
    int64_t count;
    int tiles;
    int shift;
};

/// Items of this thread; `index` is within the image.
template <typename Key>
struct TileItems {
    Key key[kRounds];
    uint32_t first;

    __device__ __forceinline__ TileItems(const SortPass<Key>& p, int64_t image, int tile) {
        first = uint32_t(tile) * kTile + (threadIdx.x / 32) * (kTile / kSortWarps) + threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            key[r] = valid(p, r) ? p.keys[image * p.count + first + r * 32] : Key(0);
        }
    }
    __device__ __forceinline__ uint32_t digit(const SortPass<Key>& p, int r) const {
        return static_cast<uint32_t>(key[r] >> p.shift) & (kDigits - 1);
    }
    __device__ __forceinline__ bool valid(const SortPass<Key>& p, int r) const {
        return first + r * 32 < p.count;
    }
};

/// Adds a warp's items to its counters; one lane per digit writes.
template <typename Key>
__device__ __forceinline__ void count_digits(const TileItems<Key>& items, const SortPass<Key>& p,
                                             uint32_t (&counters)[kSortWarps][kDigits]) {
    uint32_t* const mine = counters[threadIdx.x / 32];
    for (int d = threadIdx.x % 32; d < kDigits; d += 32) {
        mine[d] = 0;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const unsigned peers = same_digit(items.digit(p, r), items.valid(p, r));
        if (peers != 0 && (peers & lanes_below()) == 0) {
            mine[items.digit(p, r)] += __popc(peers);
        }
        __syncwarp();
    }
    __syncthreads();
}

template <typename Key>
__global__ void __launch_bounds__(kSortThreads) nms_count_kernel(const SortPass<Key> p) {
    __shared__ uint32_t counters[kSortWarps][kDigits];
    const int64_t image = blockIdx.x / p.tiles;
    const int tile = blockIdx.x % p.tiles;
    count_digits(TileItems<Key>(p, image, tile), p, counters);
    uint32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kSortWarps; ++w) {
        sum += counters[w][threadIdx.x];
    }
    p.counters[(image * kDigits + threadIdx.x) * p.tiles + tile] = sum;
}

/// Inclusive sum over a block of kScanThreads; `sums` has a place per warp. `total` is the block's sum.
__device__ __forceinline__ uint32_t block_sum(uint32_t value, uint32_t* sums, uint32_t& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(0xffffffffu, value, step);
        value += lane >= step ? below : 0;
    }
    __syncthreads();  // the sums of the previous call have been read
    if (lane == 31) {
        sums[warp] = value;
    }
    __syncthreads();
    uint32_t before = 0;
    total = 0;
    for (int w = 0; w < warps; ++w) {
        const uint32_t sum = sums[w];
        before += w < warp ? sum : 0;
        total += sum;
    }
    return before + value;
}

/// Counters of an image to first places: exclusive sums, digit by digit and tile by tile.
__global__ void __launch_bounds__(kScanThreads) nms_scan_kernel(uint32_t* counters, int64_t per_image) {
    __shared__ uint32_t sums[kScanThreads / 32];
    uint32_t* const mine = counters + blockIdx.x * per_image;
    uint32_t carry = 0;
    for (int64_t base = 0; base < per_image; base += kScanThreads) {
        const int64_t i = base + threadIdx.x;
        const uint32_t value = i < per_image ? mine[i] : 0;
        uint32_t total;
        const uint32_t sum = block_sum(value, sums, total);
        if (i < per_image) {
            mine[i] = carry + sum - value;
        }
        carry += total;
    }
}

template <typename Key>
__global__ void __launch_bounds__(kSortThreads) nms_scatter_kernel(const SortPass<Key> p) {
    __shared__ uint32_t counters[kSortWarps][kDigits];
    const int64_t image = blockIdx.x / p.tiles;
    const int tile = blockIdx.x % p.tiles;
    const TileItems<Key> items(p, image, tile);
    count_digits(items, p, counters);
    uint32_t place = p.counters[(image * kDigits + threadIdx.x) * p.tiles + tile];
#pragma unroll
    for (int w = 0; w < kSortWarps; ++w) {
        const uint32_t own = counters[w][threadIdx.x];
        counters[w][threadIdx.x] = place;
        place += own;
    }
    __syncthreads();
    uint32_t* const mine = counters[threadIdx.x / 32];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
        const bool valid = items.valid(p, r);
        const unsigned peers = same_digit(items.digit(p, r), valid);
        const uint32_t first = valid ? mine[items.digit(p, r)] : 0;
        __syncwarp();
        if (peers != 0 && (peers & lanes_below()) == 0) {
            mine[items.digit(p, r)] = first + __popc(peers);
        }
        __syncwarp();
        if (valid) {
            const int64_t to = image * p.count + first + __popc(peers & lanes_below());
            p.keys_out[to] = items.key[r];
            p.values_out[to] = p.values[image * p.count + items.first + r * 32];
        }
    }
}

}  // namespace dl4ds::nms
