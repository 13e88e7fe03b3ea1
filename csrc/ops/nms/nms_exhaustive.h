// NMS for negative thresholds, by torchvision's rule pair by pair: there a box can suppress others that it
// does not touch (0 > threshold), inverted and infinite boxes take part, and the order of the operands
// matters.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/nms/nms_segment.h"

namespace dl4ds::nms {

/// One rounding here: no contraction with the operation that uses the value.
template <typename T>
inline T rounded_scalar(T value) {
#if defined(__aarch64__)
    asm("" : "+w"(value));
#elif !defined(__x86_64__)
    asm("" : "+m"(value));
#endif
    return value;
}

/// Appends the local indices kept to `kept`, in score order. The threshold is the caller's double, not
/// segment.threshold.
template <typename T>
void solve_exhaustively(const Segment<T>& segment, double threshold, std::vector<uint32_t>& kept) {
    std::vector<T> x1, y1, x2, y2, area;
    std::vector<uint32_t> local;
    for (int64_t rank = 0; rank < segment.n; ++rank) {
        const T* b = segment.row(segment.local(rank));
        x1.push_back(b[0]), y1.push_back(b[1]), x2.push_back(b[2]), y2.push_back(b[3]);
        area.push_back((b[2] - b[0]) * (b[3] - b[1]));
        local.push_back(segment.local(rank));
    }
    std::vector<uint8_t> suppressed(segment.n, 0);
    // std::max(a, b) and std::min(a, b) give a where they cannot compare: written out, since NaN coordinates
    // meet them.
    const auto larger = [](T a, T b) { return a < b ? b : a; };
    const auto smaller = [](T a, T b) { return b < a ? b : a; };
    const int64_t end = static_cast<int64_t>(kept.size()) + segment.max_keep;
    for (int64_t i = 0; i < segment.n && static_cast<int64_t>(kept.size()) < end; ++i) {
        if (suppressed[i]) {
            continue;
        }
        kept.push_back(local[i]);
        if (area[i] != area[i]) {
            continue;  // the union is NaN with every other box, and NaN suppresses nothing
        }
        for (int64_t j = i + 1; j < segment.n; ++j) {
            const T w = larger(T(0), smaller(x2[i], x2[j]) - larger(x1[i], x1[j]));
            const T h = larger(T(0), smaller(y2[i], y2[j]) - larger(y1[i], y1[j]));
            const T inter = rounded_scalar(w * h);
            suppressed[j] |= static_cast<double>(inter / ((area[i] + area[j]) - inter)) > threshold;
        }
    }
}

}  // namespace dl4ds::nms
