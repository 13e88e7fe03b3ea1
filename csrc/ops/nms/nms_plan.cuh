// The workspace of a call: one allocation, cut into arrays.
#pragma once

#include "ops/nms/nms_work.cuh"

namespace dl4ds::nms {

inline bool solved_by_one_block(const NmsFwdParams& p) { return p.count <= kBlockLimit; }
inline bool has_small_bins(const NmsFwdParams& p) { return p.classes != nullptr || p.filter; }
inline int64_t rounds(const NmsFwdParams& p) { return ceil_div(p.count, kChunk); }
inline int64_t tiles(const NmsFwdParams& p) { return ceil_div(p.count, kTile); }

/// What the sorts need besides Work; each buffer is used by both.
template <typename Key>
struct SortBuffers {
    Key* keys[2];
    uint32_t* values;  // the other one of the score sort is Work::order
    uint32_t* bins;    // the other ones of the class sort are Work::bin_at and Work::rank
    uint32_t* counters;
};

template <typename T>
struct Plan {
    using acc_t = typename rule_of<T>::acc_t;
    using Key = typename ScoreKey<T>::type;
    Work<acc_t> work{};
    SortBuffers<Key> sort{};
    int64_t bytes = 0;

    explicit Plan(const NmsFwdParams& p) : next_(static_cast<char*>(p.workspace)) {
        const int64_t items = p.batch * p.count, padded = p.batch * round_up(p.count, 8);
        Work<acc_t>& w = work;
        w.classes = p.classes;
        w.count = p.count;
        w.bins = p.classes != nullptr ? kBins : 1;
        w.max_output = p.max_output;
        w.mask_rows = p.classes != nullptr ? p.count : kChunk;
        w.threshold = static_cast<float>(p.iou_threshold);
        take(w.boxes, items);
        take(w.kept_boxes, items);
        take(w.mask, p.batch * kWords * w.mask_rows);
        if (p.classes != nullptr) {
            take(w.class_at, items);
            take(w.rank, items);
            take(w.bin_at, items);
            take(sort.bins, items);
        }
        take(sort.keys[0], items);
        take(sort.keys[1], items);
        take(w.order, items);
        take(sort.values, items);
        take(w.kept_at, items);
        take(w.alive, padded);
        take(w.keep, padded);
        for (uint32_t** array : {&w.bin_start, &w.bin_end, &w.bin_kept, &w.round_kept}) {
            take(*array, p.batch * w.bins);
        }
        take(w.large, p.batch * (1 + p.count / kBlockLimit));
        take(sort.counters, p.batch * kDigits * tiles(p));
    }

  private:
    template <typename U>
    void take(U*& array, int64_t size) {
        array = reinterpret_cast<U*>(next_);
        const int64_t used = round_up(size * static_cast<int64_t>(sizeof(U)), 256);
        next_ += used;
        bytes += used;
    }
    char* next_;
};

}  // namespace dl4ds::nms
