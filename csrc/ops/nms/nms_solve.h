// Solves segments: chooses between the flat scan, the tree and the exhaustive rule, and spreads work over
// threads. Results do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "ops/nms/nms_exhaustive.h"
#include "ops/nms/nms_tree.h"

namespace dl4ds::nms {

// Speed only: none of these changes a result.
constexpr int64_t kFlatLimit = 512;        // up to here scanning all leaves is cheaper than building a tree
constexpr int64_t kParallelLimit = 16384;  // from here one segment is worth several threads
constexpr int64_t kChunk = 8192;  // candidates of one parallel region; few regions suit shared machines
constexpr int64_t kProbeGrain = 512;
constexpr int64_t kWindow = 1024;  // boxes between two decisions whether to look ahead
constexpr int64_t kPrefetchLimit = 1 << 16, kPrefetchDistance = 4;

/// The threshold in the dtype of the boxes, rounded down: no number of that dtype lies between the two.
template <typename T>
T round_down(double threshold) {
    const T nearest = static_cast<T>(threshold);
    return static_cast<double>(nearest) > threshold
               ? std::nextafter(nearest, -std::numeric_limits<T>::infinity())
               : nearest;
}

template <typename T>
class Solver {
  public:
    Solver(const Kernels<T>& kernels, double threshold)
        : kernels_(kernels), threshold_(threshold), rounded_(round_down<T>(threshold)) {}

    /// The local indices kept, in score order; valid until the next call. `sort` fills segment.order; it runs
    /// beside the construction of the tree where threads are free.
    template <typename Sort>
    const std::vector<uint32_t>& solve(Segment<T> segment, bool parallel, const Sort& sort) {
        segment.threshold = rounded_;
        parallel = parallel && segment.n >= kParallelLimit && torch::stable::get_num_threads() > 1;
        kept_.clear();
        if (!(threshold_ < 1)) {  // no quotient of two boxes exceeds 1, none compares with NaN
            sort();
            for (int64_t rank = 0; rank < std::min(segment.n, segment.max_keep); ++rank) {
                kept_.push_back(segment.local(rank));
            }
        } else if (threshold_ < 0) {
            sort();
            solve_exhaustively(segment, threshold_, kept_);
        } else if (segment.n <= kFlatLimit) {
            sort();
            kept_.resize(segment.n);
            kept_.resize(kernels_.solve_flat(segment, builder_.build_flat(segment), kept_.data()));
        } else {
            Tree<T> tree;
            if (parallel) {
                torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t task = begin; task < end; ++task) {
                        if (task == 0) {
                            tree = builder_.build(segment);
                        } else {
                            sort();
                        }
                    }
                });
            } else {
                sort();
                tree = builder_.build(segment);
            }
            walk(segment, tree, parallel);
        }
        return kept_;
    }

    const std::vector<uint32_t>& solve(const Segment<T>& segment, bool parallel) {
        return solve(segment, parallel, [] {});
    }

  private:
    static bool undecided(const Tree<T>& tree, uint32_t slot) {
        return slot == kNoSlot || ((tree.live[0][slot / kFanout] >> (slot % kFanout)) & 1);
    }
    static void decide(const Tree<T>& tree, uint32_t slot) {
        tree.live[0][slot / kFanout] &= static_cast<uint16_t>(~(1u << (slot % kFanout)));
    }

    void prefetch(const Segment<T>& segment, const Tree<T>& tree, int64_t rank) const {
        const uint32_t slot = tree.slot[segment.local(rank)];
        if (slot != kNoSlot && undecided(tree, slot)) {
            const char* leaf = reinterpret_cast<const char*>(&tree.leaves[slot / kFanout]);
            const char* node = reinterpret_cast<const char*>(&tree.bounds[1][slot / (kFanout * kFanout)]);
            for (size_t i = 0; i < sizeof(Leaf<T>); i += 64) {
                __builtin_prefetch(leaf + i);
            }
            for (size_t i = 0; i < sizeof(Bounds<T>); i += 64) {
                __builtin_prefetch(node + i);
            }
        }
    }

    /// Takes the boxes in score order. Where nearly all survive, the time goes into looking up
    /// neighbourhoods, so with threads that is done ahead for a chunk of candidates; otherwise most look-ups
    /// ahead would be for nothing.
    void walk(const Segment<T>& segment, const Tree<T>& tree, bool parallel) {
        for (int64_t rank = 0, room = segment.max_keep; rank < segment.n && room > 0;) {
            const int64_t begin = rank, before = static_cast<int64_t>(kept_.size());
            const bool ahead = parallel && dense_ && segment.n - rank >= kChunk;
            rank = ahead ? take_ahead(segment, tree, rank, room) : take(segment, tree, rank, room);
            const int64_t used = static_cast<int64_t>(kept_.size()) - before;
            dense_ = used >= (rank - begin) - (rank - begin) / 16;
            room -= used;
        }
        dense_ = false;
    }

    /// Takes the boxes of the next kWindow ranks, at most `room`; returns the rank to go on with.
    int64_t take(const Segment<T>& segment, const Tree<T>& tree, int64_t rank, int64_t room) {
        const bool large = segment.n >= kPrefetchLimit;
        const int64_t end = std::min(segment.n, rank + kWindow);
        for (; rank < end && room > 0; ++rank) {
            if (large && rank + kPrefetchDistance < segment.n) {
                prefetch(segment, tree, rank + kPrefetchDistance);
            }
            const uint32_t local = segment.local(rank), slot = tree.slot[local];
            if (undecided(tree, slot)) {
                keep(tree, local, slot);
                --room;
            }
        }
        return rank;
    }

    /// The same for kChunk candidates: threads look up whom each would suppress if it is kept, then one
    /// thread takes the candidates in order.
    int64_t take_ahead(const Segment<T>& segment, const Tree<T>& tree, int64_t rank, int64_t room) {
        candidates_.clear();
        slots_.clear();
        for (; rank < segment.n && static_cast<int64_t>(slots_.size()) < std::min(kChunk, room); ++rank) {
            const uint32_t local = segment.local(rank), slot = tree.slot[local];
            if (undecided(tree, slot)) {
                candidates_.push_back(local);
                slots_.push_back(slot);
            }
        }
        const int64_t taken = static_cast<int64_t>(slots_.size());
        probes_.resize(std::max(probes_.size(), slots_.size()));
        torch::stable::parallel_for(0, taken, kProbeGrain, [&](int64_t begin, int64_t end) {
            kernels_.probe(tree, slots_.data(), begin, end, rounded_, probes_.data());
        });
        for (int64_t i = 0; i < taken; ++i) {
            if (undecided(tree, slots_[i])) {
                commit(tree, candidates_[i], slots_[i], probes_[i]);
            }
        }
        return rank;
    }

    void keep(const Tree<T>& tree, uint32_t local, uint32_t slot) {
        kept_.push_back(local);
        if (slot != kNoSlot) {
            decide(tree, slot);
            kernels_.suppress(tree, slot, rounded_);
        }
    }

    void commit(const Tree<T>& tree, uint32_t local, uint32_t slot, const Probe& probe) {
        if (slot == kNoSlot || probe.size > Probe::kCapacity) {
            keep(tree, local, slot);
            return;
        }
        kept_.push_back(local);
        decide(tree, slot);
        drop_if_empty(tree, slot / kFanout);
        for (int i = 0; i < probe.size; ++i) {
            tree.live[0][probe.leaf[i]] &= static_cast<uint16_t>(~probe.hits[i]);
            drop_if_empty(tree, probe.leaf[i]);
        }
    }

    /// Clears the bit of a block without undecided boxes in its parent, and so on upwards.
    static void drop_if_empty(const Tree<T>& tree, uint32_t block) {
        for (int level = 0; level < tree.top && tree.live[level][block] == 0; ++level, block /= kFanout) {
            tree.live[level + 1][block / kFanout] &= static_cast<uint16_t>(~(1u << (block % kFanout)));
        }
    }

    const Kernels<T>& kernels_;
    double threshold_;
    T rounded_;
    TreeBuilder<T> builder_;
    std::vector<uint32_t> kept_, candidates_, slots_;
    std::vector<Probe> probes_;
    bool dense_ = false;  // nearly all boxes of the last window were kept
};

}  // namespace dl4ds::nms
