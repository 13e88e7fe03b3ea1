// Builds the packed tree of a segment: boxes in spatial order, 16 a leaf, bounds over 16 children up to one
// root.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/nms/nms_segment.h"
#include "ops/nms/radix_sort.h"

namespace dl4ds::nms {

/// Cells of the spatial order. Range and usual size come from a sample without its extremes: an outlier must
/// not put all other boxes in one cell. The cells decide how fast the tree is, never what it finds.
struct Grid {
    static constexpr int kSizeClassBits = 2;
    float x0 = 0, y0 = 0, cells_per_unit = 0;
    float small = 0, large = 0, huge = 0;  // larger side, relative to the median: below 1/4, from 4, from 64
    int axis_bits = 2;

    int key_bits() const { return 2 * axis_bits + kSizeClassBits; }
    /// Size class, then Z-order of the centre: boxes far larger than the rest get leaves of their own.
    uint32_t key(float cx, float cy, float side) const {
        const uint32_t size_class = side < small ? 0 : side < large ? 1 : side < huge ? 2 : 3;
        return (size_class << (2 * axis_bits)) | (interleave(cell(cy, y0)) << 1) | interleave(cell(cx, x0));
    }

  private:
    uint32_t cell(float centre, float origin) const {
        const float limit = static_cast<float>((1 << axis_bits) - 1);
        const float position = (centre - origin) * cells_per_unit;
        return position > 0 ? static_cast<uint32_t>(position < limit ? position : limit) : 0;  // NaN: cell 0
    }
    static uint32_t interleave(uint32_t v) {  // bits abcd -> 0a0b0c0d
        v = (v | (v << 8)) & 0x00ff00ffu;
        v = (v | (v << 4)) & 0x0f0f0f0fu;
        v = (v | (v << 2)) & 0x33333333u;
        return (v | (v << 1)) & 0x55555555u;
    }
};

template <typename T>
Grid make_grid(const Segment<T>& segment) {
    constexpr int kSample = 128;
    float xs[kSample], ys[kSample], sides[kSample];
    int m = 0;
    for (int64_t i = 0, step = segment.n / kSample + 1; i < segment.n; i += step) {
        const T* b = segment.row(i);
        const T w = b[2] - b[0], h = b[3] - b[1];
        if (!is_inert(w, h, w * h)) {
            xs[m] = static_cast<float>(b[0] + b[2]);
            ys[m] = static_cast<float>(b[1] + b[3]);
            sides[m] = static_cast<float>(std::max(w, h));
            ++m;
        }
    }
    Grid grid;
    while ((int64_t{kFanout} << (2 * (grid.axis_bits - 2))) < segment.n && grid.axis_bits < 12) {
        ++grid.axis_bits;
    }
    if (m == 0) {
        return grid;
    }
    std::sort(xs, xs + m), std::sort(ys, ys + m), std::sort(sides, sides + m);
    const int low = m / 32, high = m - 1 - m / 32;
    const float range = std::max(xs[high] - xs[low], ys[high] - ys[low]) * 1.15f;
    grid.x0 = xs[low] - 0.065f * range;
    grid.y0 = ys[low] - 0.065f * range;
    grid.cells_per_unit = range > 0 ? static_cast<float>(1 << grid.axis_bits) / range : 0;
    const float median = sides[m / 2];
    grid.small = median / 4, grid.large = median * 4, grid.huge = median * 64;
    return grid;
}

/// Owns the memory of a Tree and of its construction; made once per thread and reused for segment after
/// segment.
template <typename T>
class TreeBuilder {
  public:
    /// Leaves in spatial order and bounds above them.
    Tree<T> build(const Segment<T>& segment) {
        const int64_t active = sort_spatially(segment);
        num_leaves_ = (active + kFanout - 1) / kFanout;
        leaves_.resize(num_leaves_);
        live_[0].assign(num_leaves_, kAllLive);
        int top = 1;
        for (int64_t children = num_leaves_; (children = size_level(top, children)) > 1;) {
            ++top;
        }
        const Margin<T> margin(segment.threshold);
        for (int64_t b = 0; b < num_leaves_; ++b) {
            fill_leaf(segment, margin, b, active);
        }
        for (int level = 1; level < top; ++level) {
            for (size_t node = 0; node < bounds_[level].size(); ++node) {
                merge(level, node);
            }
        }
        return view(top);
    }

    /// Leaves in score order, no bounds; slot is by rank.
    Tree<T> build_flat(const Segment<T>& segment) {
        num_leaves_ = (segment.n + kFanout - 1) / kFanout;
        leaves_.resize(num_leaves_);
        live_[0].assign(num_leaves_, 0);
        slot_.resize(segment.n);
        for (int64_t rank = 0; rank < segment.n; ++rank) {
            const int i = static_cast<int>(rank % kFanout);
            const T* b = segment.row(segment.local(rank));
            const T area = place(leaves_[rank / kFanout], i, b);
            const bool inert = is_inert(b[2] - b[0], b[3] - b[1], area);
            slot_[rank] = inert ? kNoSlot : static_cast<uint32_t>(rank);
            live_[0][rank / kFanout] |= static_cast<uint16_t>(inert ? 0 : 1u << i);
        }
        return view(0);
    }

  private:
    static T place(Leaf<T>& leaf, int i, const T* b) {
        leaf.x1[i] = b[0], leaf.y1[i] = b[1], leaf.x2[i] = b[2], leaf.y2[i] = b[3];
        return leaf.area[i] = (b[2] - b[0]) * (b[3] - b[1]);
    }

    int64_t sort_spatially(const Segment<T>& segment) {
        const Grid grid = make_grid(segment);
        items_.resize(segment.n);
        spare_.resize(segment.n);
        slot_.resize(segment.n);
        int64_t active = 0;
        for (int64_t i = 0; i < segment.n; ++i) {
            const T* b = segment.row(i);
            const T w = b[2] - b[0], h = b[3] - b[1];
            if (is_inert(w, h, w * h)) {
                slot_[i] = kNoSlot;
                continue;
            }
            const float side = static_cast<float>(std::max(w, h));
            const uint32_t key =
                grid.key(static_cast<float>(b[0] + b[2]), static_cast<float>(b[1] + b[3]), side);
            items_[active++] = {key, static_cast<uint32_t>(i)};
        }
        sorted_ = radix_sort(items_.data(), spare_.data(), active, grid.key_bits());
        return active;
    }

    /// Makes room for the nodes above `children` blocks; returns their count. Absent children get bounds
    /// nothing meets.
    int64_t size_level(int level, int64_t children) {
        const int64_t nodes = std::max<int64_t>(1, (children + kFanout - 1) / kFanout);
        bounds_[level].resize(nodes);
        live_[level].assign(nodes, kAllLive);
        const int used = static_cast<int>(children - (nodes - 1) * kFanout);
        live_[level].back() = static_cast<uint16_t>((1u << used) - 1);
        for (int c = used; c < kFanout; ++c) {
            set_bounds(bounds_[level].back(), c, kInf, kInf, -kInf, -kInf, kInf, 0);
        }
        return nodes;
    }

    static void set_bounds(Bounds<T>& b, int c, T x1, T y1, T x2, T y2, T area_min, T area_max) {
        b.x_min[c] = x1, b.y_min[c] = y1, b.x_max[c] = x2, b.y_max[c] = y2;
        b.area_min[c] = area_min, b.area_max[c] = area_max;
    }

    void fill_leaf(const Segment<T>& segment, const Margin<T>& margin, int64_t index, int64_t active) {
        Leaf<T>& leaf = leaves_[index];
        const int used = static_cast<int>(std::min<int64_t>(kFanout, active - index * kFanout));
        T x1 = kInf, y1 = kInf, x2 = -kInf, y2 = -kInf, area_min = kInf, area_max = 0;
        for (int i = 0; i < used; ++i) {
            const uint32_t local = sorted_[index * kFanout + i].index;
            slot_[local] = static_cast<uint32_t>(index * kFanout + i);
            const T* b = segment.row(local);
            const T area = place(leaf, i, b);
            const bool safe = margin.is_safe(b[2] - b[0], b[3] - b[1], area);
            const Shrunk<T> shrunk(b[0], b[1], b[2], b[3], margin.shrink, safe);
            x1 = std::min(x1, shrunk.x_low), y1 = std::min(y1, shrunk.y_low);
            x2 = std::max(x2, shrunk.x_high), y2 = std::max(y2, shrunk.y_high);
            area_min = std::min(area_min, area), area_max = std::max(area_max, area);
        }
        for (int i = used; i < kFanout; ++i) {
            leaf.x1[i] = leaf.y1[i] = leaf.x2[i] = leaf.y2[i] = leaf.area[i] = 0;
        }
        if (used < kFanout) {
            live_[0][index] = static_cast<uint16_t>((1u << used) - 1);
        }
        set_bounds(bounds_[1][index / kFanout], static_cast<int>(index % kFanout), x1, y1, x2, y2, area_min,
                   area_max);
    }

    void merge(int level, size_t node) {
        const Bounds<T>& b = bounds_[level][node];
        T x1 = b.x_min[0], y1 = b.y_min[0], x2 = b.x_max[0], y2 = b.y_max[0];
        T area_min = b.area_min[0], area_max = b.area_max[0];
        for (int c = 1; c < kFanout; ++c) {
            x1 = std::min(x1, b.x_min[c]), y1 = std::min(y1, b.y_min[c]);
            x2 = std::max(x2, b.x_max[c]), y2 = std::max(y2, b.y_max[c]);
            area_min = std::min(area_min, b.area_min[c]), area_max = std::max(area_max, b.area_max[c]);
        }
        set_bounds(bounds_[level + 1][node / kFanout], static_cast<int>(node % kFanout), x1, y1, x2, y2,
                   area_min, area_max);
    }

    Tree<T> view(int top) {
        Tree<T> tree{};
        tree.leaves = leaves_.data();
        for (int level = 0; level <= top; ++level) {
            tree.bounds[level] = bounds_[level].data();
            tree.live[level] = live_[level].data();
        }
        tree.top = top;
        tree.num_leaves = num_leaves_;
        tree.slot = slot_.data();
        return tree;
    }

    static constexpr T kInf = std::numeric_limits<T>::infinity();
    int64_t num_leaves_ = 0;
    std::vector<Leaf<T>> leaves_;
    std::vector<Bounds<T>> bounds_[kMaxLevels];
    std::vector<uint16_t> live_[kMaxLevels];
    std::vector<uint32_t> slot_;
    std::vector<Keyed<uint32_t>> items_, spare_;
    const Keyed<uint32_t>* sorted_ = nullptr;
};

}  // namespace dl4ds::nms
