// Device memory of a call with more than kBlockLimit boxes an image, and how its kernels see it.
//
// Boxes are sorted by score (a box's place in that order is its rank), then, with classes, by a hash of the
// class, which keeps the order of ranks: a bin is what competes. Classes that share a bin (ids 0..4095 never
// do) are told apart where a pair overlaps enough. Positions are places in this second order.
#pragma once

#include <cstdint>

#include "common/cuda/launch.cuh"
#include "ops/nms/nms.h"
#include "ops/nms/nms_sort.cuh"

namespace dl4ds::nms {

constexpr int kBlockLimit = 1024;  // boxes that one block solves in its shared memory
constexpr int kChunk = 2048;       // boxes of a larger bin that are decided in one round
constexpr int kWords = kChunk / 64;
constexpr int kBins = 4096;
constexpr uint32_t kNoBin = 0xffffu;
constexpr int kClassPasses = 2;

/// Arrays of all images, one after another; sizes per image on the right.
template <typename acc_t>
struct Work {
    const int64_t* classes;  // count, the caller's; null: one class
    int64_t count;
    int bins;  // kBins, or 1 without classes
    int64_t max_output;
    int64_t mask_rows;  // kChunk without classes, else count: a row per position
    float threshold;
    Box<acc_t>* boxes;       // count, by position
    Box<acc_t>* kept_boxes;  // count: those a round kept, from the start of its chunk
    uint32_t* kept_at;       // count: their positions
    uint32_t* order;         // count: rank -> index
    uint32_t* rank;          // count: position -> rank; null without classes: the same
    int64_t* class_at;       // count: position -> class; null without classes
    uint32_t* bin_at;        // count: position -> bin or kNoBin; null without classes
    uint8_t* alive;          // count, padded to 8: by position, not suppressed so far
    uint8_t* keep;           // count, padded to 8: by rank
    uint32_t* bin_start;     // bins: first position
    uint32_t* bin_end;       // bins
    uint32_t* bin_kept;      // bins: kept so far
    uint32_t* round_kept;    // bins: kept in the current round
    uint32_t* large;         // 1 + bins with more than kBlockLimit boxes: their count, then the bins
    uint64_t* mask;          // kWords * mask_rows: [word][row], bit j: the row suppresses 64 * word + j

    __device__ __forceinline__ int64_t padded() const { return (count + 7) / 8 * 8; }
    __device__ __forceinline__ int64_t large_size() const { return 1 + count / kBlockLimit; }

    /// Moves the pointers to an image.
    __device__ __forceinline__ Work at(int64_t image) const {
        Work w = *this;
        const int64_t first = image * count, bin = image * bins;
        if (classes != nullptr) {
            w.classes += first, w.rank += first, w.class_at += first, w.bin_at += first;
        }
        w.boxes += first, w.kept_boxes += first, w.kept_at += first, w.order += first;
        w.alive += image * padded(), w.keep += image * padded();
        w.bin_start += bin, w.bin_end += bin, w.bin_kept += bin, w.round_kept += bin;
        w.large += image * large_size();
        w.mask += image * kWords * mask_rows;
        return w;
    }
    __device__ __forceinline__ uint32_t rank_of(uint32_t position) const {
        return classes != nullptr ? rank[position] : position;
    }
    __device__ __forceinline__ bool same_class(uint32_t a, uint32_t b) const {
        return classes == nullptr || class_at[a] == class_at[b];
    }
    /// The chunk of a bin in a round: from `first`, up to kChunk positions; 0 where nothing is left to do.
    __device__ __forceinline__ uint32_t chunk(uint32_t bin, uint32_t round, uint32_t& first) const {
        first = bin_start[bin] + round * kChunk;
        const uint32_t end = bin_end[bin];
        if (first >= end || bin_kept[bin] >= max_output) {
            return 0;
        }
        return end - first < kChunk ? end - first : kChunk;
    }
};

__device__ __forceinline__ uint32_t bin_of(int64_t class_id) {
    const uint64_t c = static_cast<uint64_t>(class_id);
    return static_cast<uint32_t>(c ^ (c >> 12) ^ (c >> 24) ^ (c >> 36) ^ (c >> 48) ^ (c >> 60)) & (kBins - 1);
}

/// The bits of a bin's boxes that survive, decided among at most 64 of them by one warp: `rows[i]`, in lane
/// i % 32, are the later ones that box i suppresses; `alive` those not suppressed from outside. A box that
/// no undecided one suppresses is kept; whom it suppresses is not; so at least the first undecided box is
/// decided in every step.
__device__ __forceinline__ uint64_t survivors(uint64_t alive, uint64_t row_low, uint64_t row_high) {
    const int lane = threadIdx.x % 32;
    const auto any_of = [&](uint64_t chosen) {
        uint64_t hit = 0;
        hit |= chosen >> lane & 1 ? row_low : 0;
        hit |= chosen >> (lane + 32) & 1 ? row_high : 0;
        const uint32_t low = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(hit));
        const uint32_t high = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(hit >> 32));
        return uint64_t{high} << 32 | low;
    };
    uint64_t kept = 0;
    while (alive != 0) {
        const uint64_t sure = alive & ~any_of(alive);
        kept |= sure;
        alive &= ~(sure | any_of(sure));
    }
    return kept;
}

}  // namespace dl4ds::nms
