// The kernels of local_response_norm (see local_response_norm_cpu.h), compiled once per ISA by foreach_isa.h.
// Sums run over the channels in ascending order, in fp32 (fp64 for fp64), and are rounded once.
namespace dl4ds {
namespace DL4DS_ISA {

template <typename T>
DL4DS_INLINE Vec<T> sqrt_vec(Vec<T> v) {
#if defined(__x86_64__)
    if constexpr (sizeof(T) == 4) {
#if DL4DS_VEC_BYTES == 64
        return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif DL4DS_VEC_BYTES == 32
        return (Vec<T>)_mm256_sqrt_ps((__m256)v);
#else
        return (Vec<T>)_mm_sqrt_ps((__m128)v);
#endif
    } else {
#if DL4DS_VEC_BYTES == 64
        return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif DL4DS_VEC_BYTES == 32
        return (Vec<T>)_mm256_sqrt_pd((__m256d)v);
#else
        return (Vec<T>)_mm_sqrt_pd((__m128d)v);
#endif
    }
#else
    for (int i = 0; i < kLanes<T>; ++i) {
        v[i] = sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(v[i])))
                              : static_cast<T>(__builtin_sqrt(static_cast<double>(v[i])));
    }
    return v;
#endif
}

/// s^beta.
template <typename T>
DL4DS_INLINE Vec<T> power_of(Vec<T> s, LrnPower power, T beta) {
    if (power == LrnPower::kThreeQuarters) {
        const Vec<T> root = sqrt_vec<T>(s);
        return root * sqrt_vec<T>(root);
    }
    if (power == LrnPower::kHalf) {
        return sqrt_vec<T>(s);
    }
    if (power == LrnPower::kOne) {
        return s;
    }
    T lanes[kLanes<T>];
    __builtin_memcpy(lanes, &s, sizeof(s));
    for (int i = 0; i < kLanes<T>; ++i) {
        lanes[i] =
            sizeof(T) == 4
                ? static_cast<T>(__builtin_powf(static_cast<float>(lanes[i]), static_cast<float>(beta)))
                : static_cast<T>(__builtin_pow(lanes[i], beta));
    }
    __builtin_memcpy(&s, lanes, sizeof(s));
    return s;
}

/// The constants of a call in the accumulator type.
template <typename T>
struct Lrn {
    T scale, beta, k, slope;
    LrnPower power;

    explicit DL4DS_INLINE Lrn(const LrnArgs& p)
        : scale(static_cast<T>(p.scale)),
          beta(static_cast<T>(p.beta)),
          k(static_cast<T>(p.k)),
          slope(static_cast<T>(2 * p.scale * p.beta)),
          power(p.power) {}

    DL4DS_INLINE Vec<T> denominator(Vec<T> sum) const { return power_of<T>(sum * scale + k, power, beta); }

    /// dout / s^beta, and dout * x / s^(beta + 1), from the sum of squares.
    DL4DS_INLINE void ratios(Vec<T> x, Vec<T> dout, Vec<T> sum, Vec<T>& direct, Vec<T>& through) const {
        const Vec<T> s = sum * scale + k;
        direct = dout / power_of<T>(s, power, beta);
        through = direct * x / s;
    }
    /// dx: a channel's own part, minus what it did to the sums of its neighbours.
    DL4DS_INLINE Vec<T> gradient(Vec<T> x, Vec<T> direct, Vec<T> through) const {
        return direct - slope * x * through;
    }
};

// ---- pixels: the row of a pixel's squares, with zeros on both sides, is summed at `size` offsets
template <typename T>
DL4DS_INLINE Vec<T> window_sum(const T* row, int64_t size) {
    Vec<T> sum = load(row);
    for (int64_t d = 1; d < size; ++d) {
        sum += load(row + d);
    }
    return sum;
}

template <typename T>
DL4DS_INLINE void clear(T* row, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        row[i] = T(0);
    }
}

/// The squares of a pixel's channels. Lanes beyond the last are zero.
template <typename scalar_t, typename T>
DL4DS_INLINE void square_row(const scalar_t* x, T* row, int64_t channels) {
    constexpr int W = kLanes<T>;
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
        const Vec<T> v = load_lanes<false>(x + c, W);
        store(row + c, v * v);
    }
    if (c < channels) {
        const Vec<T> v = load_lanes<true>(x + c, channels - c);
        store(row + c, v * v);
    }
}

template <typename scalar_t, bool kPartial, typename T>
DL4DS_INLINE void lrn_lanes(const Lrn<T>& f, const T* row, int64_t size, const scalar_t* x, scalar_t* out,
                            int64_t c, int64_t n) {
    const Vec<T> denominator = f.denominator(window_sum<T>(row + c, size));
    store_lanes<kPartial>(out + c, load_lanes<kPartial>(x + c, n) / denominator, n, false);
}

template <typename scalar_t>
void lrn_fwd_pixels(const LrnArgs& args) {
    using T = acc_t<scalar_t>;
    const LrnArgs p = args;  // a copy that no store can alias stays in registers
    constexpr int W = kLanes<T>;
    const Lrn<T> f(p);
    const int64_t size = p.before + 1 + p.after, C = p.channels;
    T* const row = static_cast<T*>(p.scratch);
    clear(row, C + size + 2 * kLrnPad);
    for (int64_t i = 0; i < p.count; ++i) {
        const scalar_t* x = static_cast<const scalar_t*>(p.x) + i * C;
        scalar_t* out = static_cast<scalar_t*>(p.out) + i * C;
        square_row(x, row + p.before, C);
        int64_t c = 0;
        for (; c + W <= C; c += W) {
            lrn_lanes<scalar_t, false, T>(f, row, size, x, out, c, W);
        }
        if (c < C) {
            lrn_lanes<scalar_t, true, T>(f, row, size, x, out, c, C - c);
        }
    }
}

template <typename scalar_t, bool kPartial, typename T>
DL4DS_INLINE void lrn_ratio_lanes(const Lrn<T>& f, const T* row, int64_t size, const scalar_t* x,
                                  const scalar_t* dout, T* direct, T* through, int64_t c, int64_t n) {
    Vec<T> a, b;
    f.ratios(load_lanes<kPartial>(x + c, n), load_lanes<kPartial>(dout + c, n), window_sum<T>(row + c, size),
             a, b);
    store(direct + c, a);
    store_lanes<kPartial>(through + c, b, n, false);  // zeros stay behind the last channel
}

template <typename scalar_t, bool kPartial, typename T>
DL4DS_INLINE void lrn_gradient_lanes(const Lrn<T>& f, const T* direct, const T* through, int64_t size,
                                     const scalar_t* x, scalar_t* dx, int64_t c, int64_t n) {
    const Vec<T> sum = window_sum<T>(through + c, size);
    store_lanes<kPartial>(dx + c, f.gradient(load_lanes<kPartial>(x + c, n), load(direct + c), sum), n,
                          false);
}

template <typename scalar_t>
void lrn_bwd_pixels(const LrnArgs& args) {
    using T = acc_t<scalar_t>;
    const LrnArgs p = args;
    constexpr int W = kLanes<T>;
    const Lrn<T> f(p);
    const int64_t size = p.before + 1 + p.after, C = p.channels, pitch = C + size + 2 * kLrnPad;
    T* const row = static_cast<T*>(p.scratch);
    T* const direct = row + pitch;
    T* const through = direct + pitch;
    clear(row, 3 * pitch);
    for (int64_t i = 0; i < p.count; ++i) {
        const scalar_t* x = static_cast<const scalar_t*>(p.x) + i * C;
        const scalar_t* dout = static_cast<const scalar_t*>(p.dout) + i * C;
        scalar_t* dx = static_cast<scalar_t*>(p.out) + i * C;
        square_row(x, row + p.before, C);
        int64_t c = 0;
        for (; c + W <= C; c += W) {
            lrn_ratio_lanes<scalar_t, false, T>(f, row, size, x, dout, direct, through + p.after, c, W);
        }
        if (c < C) {
            lrn_ratio_lanes<scalar_t, true, T>(f, row, size, x, dout, direct, through + p.after, c, C - c);
        }
        for (c = 0; c + W <= C; c += W) {
            lrn_gradient_lanes<scalar_t, false, T>(f, direct, through, size, x, dx, c, W);
        }
        if (c < C) {
            lrn_gradient_lanes<scalar_t, true, T>(f, direct, through, size, x, dx, c, C - c);
        }
    }
}

// ---- columns: positions side by side, the sum runs over the rows of the channels
template <typename scalar_t, bool kPartial, typename T>
DL4DS_INLINE Vec<T> column_sum(const LrnArgs& p, int64_t c, int64_t j, int64_t n) {
    const int64_t first = c < p.before ? 0 : c - p.before;
    const int64_t end = c + p.after < p.channels ? c + p.after + 1 : p.channels;
    const scalar_t* x = static_cast<const scalar_t*>(p.x) + j;
    Vec<T> sum{};
    for (int64_t q = first; q < end; ++q) {
        const Vec<T> v = load_lanes<kPartial>(x + q * p.pitch, n);
        sum += v * v;
    }
    return sum;
}

template <typename scalar_t, bool kPartial, typename T>
DL4DS_INLINE void lrn_column_lanes(const Lrn<T>& f, const LrnArgs& p, int64_t c, int64_t j, int64_t n) {
    const int64_t at = c * p.pitch + j;
    const Vec<T> denominator = f.denominator(column_sum<scalar_t, kPartial, T>(p, c, j, n));
    const Vec<T> x = load_lanes<kPartial>(static_cast<const scalar_t*>(p.x) + at, n);
    store_lanes<kPartial>(static_cast<scalar_t*>(p.out) + at, x / denominator, n, false);
}

template <typename scalar_t>
void lrn_fwd_columns(const LrnArgs& args) {
    using T = acc_t<scalar_t>;
    const LrnArgs p = args;
    constexpr int W = kLanes<T>;
    const Lrn<T> f(p);
    for (int64_t c = 0; c < p.channels; ++c) {
        int64_t j = 0;
        for (; j + W <= p.count; j += W) {
            lrn_column_lanes<scalar_t, false, T>(f, p, c, j, W);
        }
        if (j < p.count) {
            lrn_column_lanes<scalar_t, true, T>(f, p, c, j, p.count - j);
        }
    }
}

template <typename scalar_t, bool kPartial, typename T>
DL4DS_INLINE void lrn_column_ratio_lanes(const Lrn<T>& f, const LrnArgs& p, T* direct, T* through, int64_t c,
                                         int64_t j, int64_t n) {
    const int64_t at = c * p.pitch + j;
    Vec<T> a, b;
    f.ratios(load_lanes<kPartial>(static_cast<const scalar_t*>(p.x) + at, n),
             load_lanes<kPartial>(static_cast<const scalar_t*>(p.dout) + at, n),
             column_sum<scalar_t, kPartial, T>(p, c, j, n), a, b);
    store_lanes<kPartial>(direct + c * p.count + j, a, n, false);
    store_lanes<kPartial>(through + c * p.count + j, b, n, false);
}

/// The channels whose sums hold channel c: those from c - after to c + before.
template <typename scalar_t, bool kPartial, typename T>
DL4DS_INLINE void lrn_column_gradient_lanes(const Lrn<T>& f, const LrnArgs& p, const T* direct,
                                            const T* through, int64_t c, int64_t j, int64_t n) {
    const int64_t first = c < p.after ? 0 : c - p.after;
    const int64_t end = c + p.before < p.channels ? c + p.before + 1 : p.channels;
    Vec<T> sum{};
    for (int64_t q = first; q < end; ++q) {
        sum += load_lanes<kPartial>(through + q * p.count + j, n);
    }
    const int64_t at = c * p.pitch + j;
    const Vec<T> x = load_lanes<kPartial>(static_cast<const scalar_t*>(p.x) + at, n);
    const Vec<T> own = load_lanes<kPartial>(direct + c * p.count + j, n);
    store_lanes<kPartial>(static_cast<scalar_t*>(p.out) + at, f.gradient(x, own, sum), n, false);
}

template <typename scalar_t>
void lrn_bwd_columns(const LrnArgs& args) {
    using T = acc_t<scalar_t>;
    const LrnArgs p = args;
    constexpr int W = kLanes<T>;
    const Lrn<T> f(p);
    T* const direct = static_cast<T*>(p.scratch);
    T* const through = direct + p.channels * p.count;
    for (int64_t c = 0; c < p.channels; ++c) {
        int64_t j = 0;
        for (; j + W <= p.count; j += W) {
            lrn_column_ratio_lanes<scalar_t, false, T>(f, p, direct, through, c, j, W);
        }
        if (j < p.count) {
            lrn_column_ratio_lanes<scalar_t, true, T>(f, p, direct, through, c, j, p.count - j);
        }
    }
    for (int64_t c = 0; c < p.channels; ++c) {
        int64_t j = 0;
        for (; j + W <= p.count; j += W) {
            lrn_column_gradient_lanes<scalar_t, false, T>(f, p, direct, through, c, j, W);
        }
        if (j < p.count) {
            lrn_column_gradient_lanes<scalar_t, true, T>(f, p, direct, through, c, j, p.count - j);
        }
    }
}

#define DL4DS_BOTH(name, scalar_t) {&name##_pixels<scalar_t>, &name##_columns<scalar_t>}
#define DL4DS_ALL_DTYPES(name)                                                    \
    {DL4DS_BOTH(name, float), DL4DS_BOTH(name, double), DL4DS_BOTH(name, half_t), \
     DL4DS_BOTH(name, bfloat16_t)}

const LrnKernels kLrnKernels = {DL4DS_ALL_DTYPES(lrn_fwd), DL4DS_ALL_DTYPES(lrn_bwd)};

#undef DL4DS_ALL_DTYPES
#undef DL4DS_BOTH

}  // namespace DL4DS_ISA
}  // namespace dl4ds
