// The kernels of pool2d (see pool2d_cpu.h), compiled once per ISA by foreach_isa.h. A window is reduced row
// by row, as stock torch does it, so that maxima and averages are the same to the last bit.
namespace dl4ds {
namespace DL4DS_ISA {

/// Largest value; the first of equal ones, and a NaN beats what came before it.
struct Largest {
    static DL4DS_INLINE Vec<float> start() { return broadcast(-__builtin_inff()); }
    static DL4DS_INLINE Vec<float> join(Vec<float> best, Vec<float> v) {
        const Vec<float> larger = v > best ? v : best;
        return v == v ? larger : v;
    }
};

struct Sum {
    static DL4DS_INLINE Vec<float> start() { return Vec<float>{}; }
    static DL4DS_INLINE Vec<float> join(Vec<float> sum, Vec<float> v) { return sum + v; }
};

/// kRows x kColumns taps side by side; 0: as the arguments say.
template <typename Reduce, int kRows, int kColumns, bool kPartial>
DL4DS_INLINE Vec<float> window(const float* x, int64_t row_step, int64_t rows, int64_t tap_step, int64_t taps,
                               int64_t n) {
    Vec<float> acc = Reduce::start();
    if constexpr (kRows > 0) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int q = 0; q < kColumns; ++q) {
                acc = Reduce::join(acc, load_lanes<kPartial>(x + r * row_step + q * tap_step, n));
            }
        }
    } else {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t q = 0; q < taps; ++q) {
                acc = Reduce::join(acc, load_lanes<kPartial>(x + r * row_step + q * tap_step, n));
            }
        }
    }
    return acc;
}

enum class Last { kNothing, kDivide, kMultiply };

template <Last kLast>
DL4DS_INLINE Vec<float> apply_last(Vec<float> v, float factor) {
    return kLast == Last::kDivide ? v / factor : kLast == Last::kMultiply ? v * factor : v;
}

/// One output pixel, all channels.
template <typename Reduce, int kRows, int kColumns, Last kLast>
DL4DS_INLINE void pool_pixel(const PoolRowArgs& p, const float* x, int64_t tap_step, int64_t taps,
                             float factor, float* out) {
    int64_t c = 0;
    for (; c + kLanes<float> <= p.channels; c += kLanes<float>) {
        const Vec<float> v =
            window<Reduce, kRows, kColumns, false>(x + c, p.row_step, p.rows, tap_step, taps, kLanes<float>);
        store(out + c, apply_last<kLast>(v, factor));
    }
    if (c < p.channels) {
        const int64_t n = p.channels - c;
        const Vec<float> v =
            window<Reduce, kRows, kColumns, true>(x + c, p.row_step, p.rows, tap_step, taps, n);
        store_partial(out + c, apply_last<kLast>(v, factor), n);
    }
}

template <typename Reduce, Last kLast>
DL4DS_INLINE void pool_any_pixel(const PoolRowArgs& p, const float* x, int64_t tap_step, int64_t taps,
                                 float factor, float* out) {
    if (p.rows == 2 && taps == 2) {
        pool_pixel<Reduce, 2, 2, kLast>(p, x, tap_step, taps, factor, out);
    } else if (p.rows == 3 && taps == 3) {
        pool_pixel<Reduce, 3, 3, kLast>(p, x, tap_step, taps, factor, out);
    } else {
        pool_pixel<Reduce, 0, 0, kLast>(p, x, tap_step, taps, factor, out);
    }
}

/// Output pixel o's first tap inside the map (column 0 where there is none), and the number of taps.
DL4DS_INLINE const float* first_tap(const PoolRowArgs& p, const PoolAxis& axis, int64_t o, int64_t& taps) {
    const int64_t first = o * axis.stride - axis.padding;
    const int64_t begin = first >= 0 ? 0 : (axis.dilation - 1 - first) / axis.dilation;
    int64_t end = first >= axis.size ? 0 : (axis.size - first + axis.dilation - 1) / axis.dilation;
    end = end < axis.kernel ? end : axis.kernel;
    taps = end > begin ? end - begin : 0;
    return taps > 0 ? p.x + (first + begin * axis.dilation) * p.column_step : p.x;
}

inline void max_row(const PoolRowArgs& args) {
    const PoolRowArgs p = args;
    const PoolAxis axis = *p.columns;
    for (int64_t o = 0; o < axis.out; ++o) {
        int64_t taps;
        const float* x = first_tap(p, axis, o, taps);
        pool_any_pixel<Largest, Last::kNothing>(p, x, axis.dilation * p.column_step, taps, 1.0f,
                                                p.out + o * p.channels);
    }
}

/// A vector of channels of one window: finds the first of the largest values (the last NaN, if there is one),
/// as stock torch does, and adds the gradient there.
template <int kRows, int kColumns, bool kPartial>
DL4DS_INLINE void max_back_lanes(const MaxPoolBackArgs& p, const float* x, float* dx, Vec<float> d,
                                 int64_t tap_step, int64_t taps, int64_t n) {
    const int64_t rows = kRows > 0 ? kRows : p.row.rows, columns = kRows > 0 ? kColumns : taps;
    Vec<float> best = broadcast(-__builtin_inff());
    Mask<float> place{};
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int64_t q = 0; q < columns; ++q) {
            const Vec<float> v = load_lanes<kPartial>(x + r * p.row.row_step + q * tap_step, n);
            const Mask<float> larger = (v > best) | (v != v);
            best = larger ? v : best;
            place = larger ? Mask<float>{} + static_cast<int>(r * columns + q) : place;
        }
    }
    for (int64_t r = p.begin; r < p.end; ++r) {
#pragma GCC unroll 4
        for (int64_t q = 0; q < columns; ++q) {
            float* const to = dx + r * p.row.row_step + q * tap_step;
            const Mask<float> here = place == Mask<float>{} + static_cast<int>(r * columns + q);
            const Vec<float> sum = load_lanes<kPartial>(to, n) + (here ? d : Vec<float>{});
            store_lanes<kPartial>(to, sum, n, false);
        }
    }
}

template <int kRows, int kColumns>
DL4DS_INLINE void max_back_pixel(const MaxPoolBackArgs& p, const float* x, float* dx, const float* dout,
                                 int64_t tap_step, int64_t taps) {
    int64_t c = 0;
    for (; c + kLanes<float> <= p.row.channels; c += kLanes<float>) {
        max_back_lanes<kRows, kColumns, false>(p, x + c, dx + c, load(dout + c), tap_step, taps,
                                               kLanes<float>);
    }
    if (c < p.row.channels) {
        const int64_t n = p.row.channels - c;
        max_back_lanes<kRows, kColumns, true>(p, x + c, dx + c, load_lanes<true>(dout + c, n), tap_step, taps,
                                              n);
    }
}

inline void max_row_back(const MaxPoolBackArgs& args) {
    const MaxPoolBackArgs p = args;
    const PoolAxis axis = *p.row.columns;
    const int64_t tap_step = axis.dilation * p.row.column_step;
    for (int64_t o = 0; o < axis.out; ++o) {
        int64_t taps;
        const float* x = first_tap(p.row, axis, o, taps);
        float* const dx = p.dx + (x - p.row.x);
        const float* dout = p.dout + o * p.row.channels;
        if (p.row.rows == 2 && taps == 2) {
            max_back_pixel<2, 2>(p, x, dx, dout, tap_step, taps);
        } else if (p.row.rows == 3 && taps == 3) {
            max_back_pixel<3, 3>(p, x, dx, dout, tap_step, taps);
        } else {
            max_back_pixel<0, 0>(p, x, dx, dout, tap_step, taps);
        }
    }
}

inline void average_row(const AveragePoolArgs& args) {
    const AveragePoolArgs a = args;
    const PoolRowArgs p = a.row;
    const PoolAxis axis = *p.columns;
    for (int64_t o = 0; o < axis.out; ++o) {
        int64_t taps;
        const float* x = first_tap(p, axis, o, taps);
        const int64_t first = o * axis.stride - axis.padding, past = axis.size + axis.padding - first;
        const int64_t padded = past < axis.kernel ? past : axis.kernel;
        const int64_t divisor = a.divisor != 0        ? a.divisor
                                : a.count_include_pad ? a.padded_rows * padded
                                                      : p.rows * taps;
        const int64_t step = axis.dilation * p.column_step;
        float* out = p.out + o * p.channels;
        if (p.rows * taps == 0) {
            pool_any_pixel<Sum, Last::kNothing>(p, x, step, 0, 1.0f, out);  // in the padding alone: zero
        } else if ((divisor & (divisor - 1)) == 0) {
            // The reciprocal of a power of two is exact, and a division costs ten multiplications.
            pool_any_pixel<Sum, Last::kMultiply>(p, x, step, taps, 1.0f / static_cast<float>(divisor), out);
        } else {
            pool_any_pixel<Sum, Last::kDivide>(p, x, step, taps, static_cast<float>(divisor), out);
        }
    }
}

/// Sums of kBlock pixels, then the sum of those: the order depends on the number of pixels alone.
template <int kVecs, bool kPartial>
DL4DS_INLINE void mean_lanes(const GlobalPoolArgs& p, int64_t c, int64_t n) {
    constexpr int64_t kBlock = 32;
    Vec<float> total[kVecs] = {};
    for (int64_t first = 0; first < p.pixels; first += kBlock) {
        const int64_t last = first + kBlock < p.pixels ? first + kBlock : p.pixels;
        Vec<float> sum[kVecs] = {};
        for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) {
                sum[j] += load_lanes<kPartial>(p.x + i * p.step + c + j * kLanes<float>, n);
            }
        }
        for (int j = 0; j < kVecs; ++j) {
            total[j] += sum[j];
        }
    }
    for (int j = 0; j < kVecs; ++j) {
        store_lanes<kPartial>(p.out + c + j * kLanes<float>, total[j] / static_cast<float>(p.pixels), n,
                              false);
    }
}

inline void global_average(const GlobalPoolArgs& args) {
    const GlobalPoolArgs p = args;
    int64_t c = 0;
    for (; c + 4 * kLanes<float> <= p.channels; c += 4 * kLanes<float>) {
        mean_lanes<4, false>(p, c, kLanes<float>);
    }
    for (; c + kLanes<float> <= p.channels; c += kLanes<float>) {
        mean_lanes<1, false>(p, c, kLanes<float>);
    }
    if (c < p.channels) {
        mean_lanes<1, true>(p, c, p.channels - c);
    }
}

const PoolKernels kPoolKernels = {&max_row, &max_row_back, &average_row, &global_average};

}  // namespace DL4DS_ISA
}  // namespace dl4ds
