// The SIMD part of NMS: IoU of one box with a leaf of 16, bounds tests of one box with a node of 16. Compiled
// once per instruction set by foreach_isa.h (no includes, no guard).
namespace dl4ds {
namespace DL4DS_ISA {
namespace nms_detail {

using nms::Bounds;
using nms::kFanout;
using nms::Leaf;
using nms::Probe;
using nms::Segment;
using nms::Tree;

/// One rounding here: keeps the compiler from contracting the product with what uses it into a fused
/// multiply-add.
template <typename T>
DL4DS_INLINE Vec<T> rounded(Vec<T> value) {
#if defined(__x86_64__) && DL4DS_VEC_BYTES == 64
    asm("" : "+v"(value));
#elif defined(__x86_64__)
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#else
    asm("" : "+m"(value));
#endif
    return value;
}

/// A kept box and what every box that it suppresses must meet.
template <typename T>
struct Query {
    Vec<T> x1, y1, x2, y2, area;
    Vec<T> x_low, x_high, y_low, y_high, area_low, area_high;
    Vec<T> ratio;  // I / U above the threshold implies I > ratio * U
    Vec<T> threshold;
};

template <typename T>
DL4DS_INLINE Query<T> make_query(const Leaf<T>& leaf, int i, T threshold) {
    const T x1 = leaf.x1[i], y1 = leaf.y1[i], x2 = leaf.x2[i], y2 = leaf.y2[i], area = leaf.area[i];
    const nms::Margin<T> margin(threshold);
    const bool safe = margin.is_safe(x2 - x1, y2 - y1, area);
    const T ratio = safe ? margin.ratio : T(0);
    const nms::Shrunk<T> shrunk(x1, y1, x2, y2, margin.shrink, safe);
    Query<T> q;
    q.x1 = broadcast<T>(x1), q.y1 = broadcast<T>(y1), q.x2 = broadcast<T>(x2), q.y2 = broadcast<T>(y2);
    q.area = broadcast<T>(area);
    q.x_low = broadcast<T>(shrunk.x_low), q.x_high = broadcast<T>(shrunk.x_high);
    q.y_low = broadcast<T>(shrunk.y_low), q.y_high = broadcast<T>(shrunk.y_high);
    q.area_low = broadcast<T>(ratio * area);
    q.area_high = broadcast<T>(safe ? area / ratio : T(__builtin_inf()));
    q.ratio = broadcast<T>(ratio);
    q.threshold = broadcast<T>(threshold);
    return q;
}

/// Bits of the undecided boxes in a leaf that the query suppresses.
template <typename T>
DL4DS_INLINE uint32_t leaf_hits(const Leaf<T>& leaf, uint32_t live, const Query<T>& q) {
    const Vec<T> zero{};
    uint32_t hits = 0;
    for (int k = 0; k < kFanout; k += kLanes<T>) {
        const Vec<T> x1 = load(leaf.x1 + k), y1 = load(leaf.y1 + k), x2 = load(leaf.x2 + k),
                     y2 = load(leaf.y2 + k);
        const Vec<T> w = (x2 < q.x2 ? x2 : q.x2) - (x1 > q.x1 ? x1 : q.x1);
        const Vec<T> h = (y2 < q.y2 ? y2 : q.y2) - (y1 > q.y1 ? y1 : q.y1);
        const Vec<T> inter = rounded<T>((w > zero ? w : zero) * (h > zero ? h : zero));
        const Vec<T> uni = (q.area + load(leaf.area + k)) - inter;
        uint32_t found = to_bits<T>(inter > q.ratio * uni) & (live >> k);
        if (found) {  // the division is rare: nearly all pairs are decided above
            found &= to_bits<T>(inter / uni > q.threshold);
        }
        hits |= found << k;
    }
    return hits;
}

/// Bits of the children that may hold a box which the query suppresses.
template <typename T>
DL4DS_INLINE uint32_t node_hits(const Bounds<T>& b, const Query<T>& q) {
    uint32_t hits = 0;
    for (int k = 0; k < kFanout; k += kLanes<T>) {
        const Mask<T> x = (load(b.x_max + k) > q.x_low) & (load(b.x_min + k) < q.x_high);
        const Mask<T> y = (load(b.y_max + k) > q.y_low) & (load(b.y_min + k) < q.y_high);
        const Mask<T> area = (load(b.area_max + k) > q.area_low) & (load(b.area_min + k) < q.area_high);
        hits |= to_bits<T>(x & y & area) << k;
    }
    return hits;
}

template <typename T>
void suppress_below(const Tree<T>& tree, int level, uint32_t node, const Query<T>& q) {
    uint16_t& live = tree.live[level][node];
    for (uint32_t hits = node_hits(tree.bounds[level][node], q) & live; hits; hits &= hits - 1) {
        const int child = __builtin_ctz(hits);
        const uint32_t below = node * kFanout + static_cast<uint32_t>(child);
        uint16_t& live_below = tree.live[level - 1][below];
        if (level == 1) {
            live_below &= static_cast<uint16_t>(~leaf_hits(tree.leaves[below], live_below, q));
        } else {
            suppress_below(tree, level - 1, below, q);
        }
        if (live_below == 0) {
            live &= static_cast<uint16_t>(~(1u << child));
        }
    }
}

template <typename T>
void probe_below(const Tree<T>& tree, int level, uint32_t node, const Query<T>& q, Probe& probe) {
    for (uint32_t hits = node_hits(tree.bounds[level][node], q) & tree.live[level][node]; hits;
         hits &= hits - 1) {
        const uint32_t below = node * kFanout + static_cast<uint32_t>(__builtin_ctz(hits));
        if (level > 1) {
            probe_below(tree, level - 1, below, q, probe);
            continue;
        }
        const uint32_t found = leaf_hits(tree.leaves[below], tree.live[0][below], q);
        if (found) {
            if (probe.size < Probe::kCapacity) {
                probe.leaf[probe.size] = below;
                probe.hits[probe.size] = static_cast<uint16_t>(found);
            }
            ++probe.size;
        }
    }
}

template <typename T>
void suppress(const Tree<T>& tree, uint32_t slot, T threshold) {
    suppress_below(tree, tree.top, 0, make_query(tree.leaves[slot / kFanout], slot % kFanout, threshold));
}

template <typename T>
void probe(const Tree<T>& tree, const uint32_t* slots, int64_t begin, int64_t end, T threshold,
           Probe* probes) {
    for (int64_t i = begin; i < end; ++i) {
        probes[i].size = 0;
        if (slots[i] != nms::kNoSlot) {
            const Query<T> q = make_query(tree.leaves[slots[i] / kFanout], slots[i] % kFanout, threshold);
            probe_below(tree, tree.top, 0, q, probes[i]);
        }
    }
}

template <typename T>
int64_t solve_flat(const Segment<T>& segment, const Tree<T>& tree, uint32_t* kept) {
    int64_t count = 0;
    for (int64_t rank = 0; rank < segment.n && count < segment.max_keep; ++rank) {
        const int64_t leaf = rank / kFanout;
        const int i = static_cast<int>(rank % kFanout);
        if (tree.slot[rank] == nms::kNoSlot) {
            kept[count++] = segment.local(rank);
            continue;
        }
        if (((tree.live[0][leaf] >> i) & 1) == 0) {
            continue;
        }
        kept[count++] = segment.local(rank);
        tree.live[0][leaf] &= static_cast<uint16_t>(~(1u << i));
        const Query<T> q = make_query(tree.leaves[leaf], i, segment.threshold);
        for (int64_t other = leaf; other < tree.num_leaves; ++other) {
            uint16_t& live = tree.live[0][other];
            if (live != 0) {
                live &= static_cast<uint16_t>(~leaf_hits(tree.leaves[other], live, q));
            }
        }
    }
    return count;
}

}  // namespace nms_detail

template <typename T>
inline constexpr nms::Kernels<T> kNmsKernels{nms_detail::solve_flat<T>, nms_detail::suppress<T>,
                                             nms_detail::probe<T>};

}  // namespace DL4DS_ISA
}  // namespace dl4ds
