// Packing of a weight's taps for the direct algorithm of a training step. Included once per ISA by
// conv_train_kernels_cpu.h.
namespace dl4ds {
namespace DL4DS_ISA {

#if defined(__clang__)
template <int... kIndex>
struct LaneList {};
template <int kCount, int... kIndex>
struct LanesTo : LanesTo<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct LanesTo<0, kIndex...> {
    using List = LaneList<kIndex...>;
};

template <int kStep, int... kIndex>
DL4DS_INLINE void exchange(Vec<float>& a, Vec<float>& b, LaneList<kIndex...>) {
    constexpr int kAll = kLanes<float>;
    const Vec<float> low =
        __builtin_shufflevector(a, b, ((kIndex & kStep) ? kIndex - kStep + kAll : kIndex)...);
    b = __builtin_shufflevector(a, b, ((kIndex & kStep) ? kIndex + kAll : kIndex + kStep)...);
    a = low;
}
#endif

/// Lanes of `a` that have bit kStep in their number change places with those of `b` that have not.
template <int kStep>
DL4DS_INLINE void exchange(Vec<float>& a, Vec<float>& b) {
#if defined(__clang__)
    exchange<kStep>(a, b, typename LanesTo<kLanes<float>>::List{});
#else
    const Mask<float> lane = lane_index<float>(), has = (lane & kStep) != 0;
    const Vec<float> low = __builtin_shuffle(a, b, has ? lane - kStep + kLanes<float> : lane);
    b = __builtin_shuffle(a, b, has ? lane + kLanes<float> : lane + kStep);
    a = low;
#endif
}

/// One bit of the row's number for the same bit of the lane's.
template <int kStep>
DL4DS_INLINE void transpose_bit(Vec<float>* square) {
    if constexpr (kStep < kLanes<float>) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<float>; ++i) {
            if ((i & kStep) == 0) {
                exchange<kStep>(square[i], square[i + kStep]);
            }
        }
        transpose_bit<2 * kStep>(square);
    }
}

/// kLanes rows from `first` on of the n (at most kLanes) channels at `from`, which lie `lane` apart.
template <bool kPartial>
DL4DS_INLINE Vec<float> turn_rows(const float* from, int64_t lane, int64_t n, int64_t rows, float* to) {
    Vec<float> square[kLanes<float>], poison{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<float>; ++i) {
        square[i] = i < n ? load_lanes<kPartial>(from + i * lane, rows) : Vec<float>{};
        poison = multiply_add(square[i], Vec<float>{}, poison);
    }
    transpose_bit<1>(square);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<float>; ++i) {
        if (!kPartial || i < rows) {
            store(to + i * kTrainPanel, square[i]);
        }
    }
    return poison;
}

inline bool pack_lanes(const PackLanesArgs& args) {
    const PackLanesArgs p = args;
    Vec<float> poison{};
    const Vec<float> zero{};
    if (p.row == 1 && p.lane != 1) {  // channels of a row of the panel lie apart
        for (int64_t r = 0; r < p.rows; r += kLanes<float>) {
            const int64_t left = p.rows - r;
            for (int v = 0; v < kTrainVecs; ++v) {
                const int64_t at = v * kLanes<float>, n = p.columns - at;
                const float* from = p.weight + at * p.lane + r;
                float* to = p.packed + r * kTrainPanel + at;
                poison += left >= kLanes<float> ? turn_rows<false>(from, p.lane, n, kLanes<float>, to)
                                                : turn_rows<true>(from, p.lane, n, left, to);
            }
        }
        return to_bits<float>(poison != poison) == 0;
    }
    for (int64_t r = 0; r < p.rows; ++r) {
        const float* from = p.weight + r * p.row;
        float* to = p.packed + r * kTrainPanel;
        for (int v = 0; v < kTrainVecs; ++v) {
            const int64_t at = v * kLanes<float>, n = p.columns - at;
            Vec<float> value = zero;
            if (p.lane != 1) {
                float lanes[kLanes<float>] = {};
                for (int64_t i = 0; i < n && i < kLanes<float>; ++i) {
                    lanes[i] = from[(at + i) * p.lane];
                }
                value = load(lanes);
            } else if (n >= kLanes<float>) {
                value = load(from + at);
            } else if (n > 0) {
                value = load_partial(from + at, n);
            }
            poison = multiply_add(value, zero, poison);
            store(to + at, value);
        }
    }
    return to_bits<float>(poison != poison) == 0;
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
