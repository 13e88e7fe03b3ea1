// Data shared by the parts of CPU non-maximum suppression. A segment is the boxes that compete with each
// other: one image, one class. No torch include.
//
// How a segment is solved. Boxes are taken in score order. A box that is still undecided is kept and
// suppresses every undecided box whose IoU with it exceeds the threshold. Those are found in a packed tree
// over all boxes of the segment (16 boxes a leaf, 16 children a node, decided boxes masked out), so a kept
// box looks at its neighbourhood only and a suppressed box costs one bit test. IoU does not depend on the
// order of its operands for the boxes in the tree, so no ranks are compared. Short segments skip the tree and
// scan their leaves, which then lie in score order.
//
// Why it is exact. What is compared is torchvision's value: I = w * h, U = (area_a + area_b) - I, I / U >
// threshold, every operation rounded once. A quotient above a threshold >= 0 needs I > 0, so a box with w <=
// 0, h <= 0, or an area that is zero or not finite (NaN and infinite coordinates lead there) neither
// suppresses nor is suppressed: "inert" boxes are kept without entering the tree. A quotient is never above 1
// and never above NaN, so such thresholds keep all. Negative thresholds are served by nms_exhaustive.h.
//
// The tests before the division use t, the threshold less kSlack, which is far more than the rounding of the
// few operations involved. I > t * U is (1 + t) * I > t * (area_a + area_b). With I <= overlap_w * min(h)
// that gives overlap_w > s * (w_a + w_b), s = t / (1 + t): the two boxes still overlap when both are shrunk
// by s times their width at the left and at the right (heights likewise). That is what the bounds of the tree
// test. Where under- or overflow could void these steps (not Margin::is_safe) they become plain overlap,
// which involves no rounding.
#pragma once

#include <cstdint>
#include <limits>

namespace dl4ds::nms {

constexpr int kFanout = 16;
constexpr int kMaxLevels = 9;  // 16^9 slots: more than an index can name
constexpr uint32_t kNoSlot = 0xffffffffu;
constexpr uint16_t kAllLive = 0xffffu;

/// The boxes to solve, named by local indices 0..n-1.
template <typename T>
struct Segment {
    const T* boxes;           // rows (x1, y1, x2, y2)
    const uint32_t* members;  // local index -> row; null: the same
    const uint32_t* order;    // rank by score -> local index; null: the same
    int64_t n;
    T threshold;       // in [0, 1), rounded towards -inf from double
    int64_t max_keep;  // stop after so many kept boxes

    const T* row(int64_t local) const {
        return boxes + 4 * static_cast<int64_t>(members ? members[local] : local);
    }
    uint32_t local(int64_t rank) const { return order ? order[rank] : static_cast<uint32_t>(rank); }
};

template <typename T>
struct alignas(64) Leaf {
    T x1[kFanout], y1[kFanout], x2[kFanout], y2[kFanout], area[kFanout];
};

/// What the shrunk boxes below each child of a node span, and their areas before shrinking.
template <typename T>
struct alignas(64) Bounds {
    T x_min[kFanout], y_min[kFanout], x_max[kFanout], y_max[kFanout], area_min[kFanout], area_max[kFanout];
};

/// Level 0 are the leaves; a node of level l has up to 16 children on level l - 1. live[0][leaf] has a bit
/// per undecided box, live[l][node] a bit per child that may have any.
template <typename T>
struct Tree {
    Leaf<T>* leaves;
    Bounds<T>* bounds[kMaxLevels];
    uint16_t* live[kMaxLevels];
    int top;  // the level of the root; 0: no node, or a tree that is scanned
    int64_t num_leaves;
    const uint32_t* slot;  // local index -> 16 * leaf + position, kNoSlot for an inert box
};

template <typename T>
bool is_inert(T w, T h, T area) {
    return !(w > 0 && h > 0 && area > 0 && area <= std::numeric_limits<T>::max());
}

constexpr double kSlack = 1e-5;

/// What the tests before the division use for a threshold.
template <typename T>
struct Margin {
    T ratio;   // t
    T shrink;  // s = t / (1 + t)

    explicit Margin(T threshold) : ratio(threshold * T(1 - kSlack)), shrink(ratio / (1 + ratio)) {}

    /// Whether the tests may go beyond plain overlap for a box of this size. It is enough that one of two
    /// boxes is in the safe range: the area of the other is then within a factor t of it.
    bool is_safe(T w, T h, T area) const {
        const T least = T(1e-30);
        return ratio >= T(1e-4) && w > least && h > least && area > least && area < 1 / least;
    }
};

/// A box shrunk by s times its width and height at each side, with room for the rounding of its coordinates.
/// x_low > x_high is possible.
template <typename T>
struct Shrunk {
    T x_low, y_low, x_high, y_high;

    Shrunk(T x1, T y1, T x2, T y2, T s, bool safe) : x_low(x1), y_low(y1), x_high(x2), y_high(y2) {
        constexpr T ulps = 4 * std::numeric_limits<T>::epsilon();
        const T dx = safe ? s * (x2 - x1) - ulps * (magnitude(x1) + magnitude(x2)) : T(0);
        const T dy = safe ? s * (y2 - y1) - ulps * (magnitude(y1) + magnitude(y2)) : T(0);
        x_low += dx, x_high -= dx, y_low += dy, y_high -= dy;
    }

  private:
    static T magnitude(T value) { return value < 0 ? -value : value; }
};

/// The undecided boxes that one candidate would suppress, found before it is known whether the candidate is
/// kept.
struct Probe {
    static constexpr int kCapacity = 6;
    uint32_t leaf[kCapacity];
    uint16_t hits[kCapacity];
    int32_t size;  // > kCapacity: too many to note, search again
};

/// The functions compiled once per instruction set (nms_kernels_cpu.h).
template <typename T>
struct Kernels {
    /// Scan without bounds: tree.slot is by rank here. Writes the local indices kept, in score order; returns
    /// their count.
    int64_t (*solve_flat)(const Segment<T>&, const Tree<T>&, uint32_t* kept);
    /// Removes what the box in `slot` suppresses from tree.live.
    void (*suppress)(const Tree<T>&, uint32_t slot, T threshold);
    /// Notes what each box in slots[begin, end) would suppress; reads the tree only.
    void (*probe)(const Tree<T>&, const uint32_t* slots, int64_t begin, int64_t end, T threshold,
                  Probe* probes);
};

}  // namespace dl4ds::nms
