// The kernels of max_pool_indices (see max_pool_indices_cpu.h), compiled once per ISA by foreach_isa.h.
namespace dl4ds {
namespace DL4DS_ISA {

// ---- the four pixels of W neighbouring windows: upper left, upper right, lower left, lower right
/// A pixel is a run of channels: `left` and `right` are the offsets of the window's two columns.
template <typename scalar_t, bool kPartial>
DL4DS_INLINE void load_pixels(const scalar_t* const (&rows)[2], int64_t left, int64_t right, int64_t n,
                              Vec<acc_t<scalar_t>> (&v)[4]) {
    v[0] = load_lanes<kPartial>(rows[0] + left, n);
    v[1] = load_lanes<kPartial>(rows[0] + right, n);
    v[2] = load_lanes<kPartial>(rows[1] + left, n);
    v[3] = load_lanes<kPartial>(rows[1] + right, n);
}

template <typename scalar_t, bool kPartial>
DL4DS_INLINE void store_pixels(scalar_t* const (&rows)[2], int64_t left, int64_t right, int64_t n,
                               const Vec<acc_t<scalar_t>> (&v)[4]) {
    store_lanes<kPartial>(rows[0] + left, v[0], n, false);
    store_lanes<kPartial>(rows[0] + right, v[1], n, false);
    store_lanes<kPartial>(rows[1] + left, v[2], n, false);
    store_lanes<kPartial>(rows[1] + right, v[3], n, false);
}

/// A pixel is one element: 2 n elements of each row, even ones left, odd ones right.
template <typename scalar_t>
DL4DS_INLINE void load_plane(const scalar_t* const (&rows)[2], int64_t n, Vec<acc_t<scalar_t>> (&v)[4]) {
    using T = acc_t<scalar_t>;
    constexpr int64_t W = kLanes<T>;
    for (int y = 0; y < 2; ++y) {
        Vec<T> both[2] = {};
        for (int half = 0; half < 2; ++half) {
            const int64_t left = 2 * n - half * W;
            if (left >= W) {
                both[half] = load_lanes<false>(rows[y] + half * W, W);
            } else if (left > 0) {
                both[half] = load_lanes<true>(rows[y] + half * W, left);
            }
        }
        T from[2 * W], even[W], odd[W];
        __builtin_memcpy(from, both, sizeof(from));
        for (int k = 0; k < W; ++k) {
            even[k] = from[2 * k];
            odd[k] = from[2 * k + 1];
        }
        __builtin_memcpy(&v[2 * y], even, sizeof(even));
        __builtin_memcpy(&v[2 * y + 1], odd, sizeof(odd));
    }
}

template <typename scalar_t>
DL4DS_INLINE void store_plane(scalar_t* const (&rows)[2], int64_t n, const Vec<acc_t<scalar_t>> (&v)[4]) {
    using T = acc_t<scalar_t>;
    constexpr int64_t W = kLanes<T>;
    for (int y = 0; y < 2; ++y) {
        T even[W], odd[W], to[2 * W];
        __builtin_memcpy(even, &v[2 * y], sizeof(even));
        __builtin_memcpy(odd, &v[2 * y + 1], sizeof(odd));
        for (int k = 0; k < W; ++k) {
            to[2 * k] = even[k];
            to[2 * k + 1] = odd[k];
        }
        Vec<T> both[2];
        __builtin_memcpy(both, to, sizeof(both));
        for (int half = 0; half < 2; ++half) {
            const int64_t left = 2 * n - half * W;
            if (left >= W) {
                store_lanes<false>(rows[y] + half * W, both[half], W, false);
            } else if (left > 0) {
                store_lanes<true>(rows[y] + half * W, both[half], left, false);
            }
        }
    }
}

// ---- places: one byte each in memory, one integer a lane in registers
template <typename T>
DL4DS_INLINE Mask<T> load_where(const uint8_t* where, int64_t n) {
    Mask<T> places = {};
    std::remove_reference_t<decltype(places[0])> buffer[kLanes<T>] = {};
    for (int64_t k = 0; k < n; ++k) {
        buffer[k] = where[k];
    }
    __builtin_memcpy(&places, buffer, sizeof(places));
    return places;
}

template <typename T>
DL4DS_INLINE void store_where(uint8_t* where, const Mask<T>& places, int64_t n) {
    std::remove_const_t<std::remove_reference_t<decltype(places[0])>> buffer[kLanes<T>];
    __builtin_memcpy(buffer, &places, sizeof(places));
    for (int64_t k = 0; k < n; ++k) {
        where[k] = static_cast<uint8_t>(buffer[k]);
    }
}

// ---- the three operations on registers
/// The first of equal values; a NaN beats what came before it, as in torch.
template <typename T>
DL4DS_INLINE Mask<T> take_largest(Vec<T> (&v)[4]) {
    Mask<T> place = {};
    for (int i = 1; i < 4; ++i) {
        const Mask<T> take = (v[i] > v[0]) | (v[i] != v[i]);
        v[0] = take ? v[i] : v[0];
        place = take ? Mask<T>{} + i : place;
    }
    return place;
}

template <typename T>
DL4DS_INLINE void spread(Vec<T> value, const Mask<T>& place, Vec<T> (&v)[4]) {
    for (int i = 0; i < 4; ++i) {
        v[i] = place == i ? value : Vec<T>{};
    }
}

template <typename T>
DL4DS_INLINE Vec<T> pick(const Vec<T> (&v)[4], const Mask<T>& place) {
    Vec<T> value = v[0];
    for (int i = 1; i < 4; ++i) {
        value = place == i ? v[i] : value;
    }
    return value;
}

// ---- one row of windows
template <typename scalar_t, bool kPlane, bool kPartial>
DL4DS_INLINE void pool_lanes(const MaxPoolArgs& p, int64_t j, int64_t c, int64_t n) {
    using T = acc_t<scalar_t>;
    const int64_t at = j * p.channels + c, left = 2 * j * p.channels + c;
    const scalar_t* rows[2] = {static_cast<const scalar_t*>(p.x[0]), static_cast<const scalar_t*>(p.x[1])};
    Vec<T> v[4];
    if constexpr (kPlane) {
        const scalar_t* here[2] = {rows[0] + left, rows[1] + left};
        load_plane<scalar_t>(here, n, v);
    } else {
        load_pixels<scalar_t, kPartial>(rows, left, left + p.channels, n, v);
    }
    const Mask<T> place = take_largest<T>(v);
    store_lanes<kPartial>(static_cast<scalar_t*>(p.out) + at, v[0], n, false);
    store_where<T>(p.where + at, place, n);
}

template <typename scalar_t, bool kPlane, bool kPartial>
DL4DS_INLINE void unpool_lanes(const MaxUnpoolArgs& p, int64_t j, int64_t c, int64_t n) {
    using T = acc_t<scalar_t>;
    const int64_t at = j * p.channels + c, left = 2 * j * p.channels + c;
    scalar_t* rows[2] = {static_cast<scalar_t*>(p.out[0]), static_cast<scalar_t*>(p.out[1])};
    Vec<T> v[4];
    spread<T>(load_lanes<kPartial>(static_cast<const scalar_t*>(p.y) + at, n), load_where<T>(p.where + at, n),
              v);
    if constexpr (kPlane) {
        scalar_t* here[2] = {rows[0] + left, rows[1] + left};
        store_plane<scalar_t>(here, n, v);
    } else {
        store_pixels<scalar_t, kPartial>(rows, left, left + p.channels, n, v);
    }
}

template <typename scalar_t, bool kPlane, bool kPartial>
DL4DS_INLINE void gather_lanes(const MaxGatherArgs& p, int64_t j, int64_t c, int64_t n) {
    using T = acc_t<scalar_t>;
    const int64_t at = j * p.channels + c, left = 2 * j * p.channels + c;
    const scalar_t* rows[2] = {static_cast<const scalar_t*>(p.dout[0]),
                               static_cast<const scalar_t*>(p.dout[1])};
    Vec<T> v[4];
    if constexpr (kPlane) {
        const scalar_t* here[2] = {rows[0] + left, rows[1] + left};
        load_plane<scalar_t>(here, n, v);
    } else {
        load_pixels<scalar_t, kPartial>(rows, left, left + p.channels, n, v);
    }
    store_lanes<kPartial>(static_cast<scalar_t*>(p.dy) + at, pick<T>(v, load_where<T>(p.where + at, n)), n,
                          false);
}

// Pixels: for every window, its channels. Plane: W windows at a time.
#define DL4DS_ROW(name, Args)                                                        \
    template <typename scalar_t>                                                     \
    void name##_pixels(const Args& args) {                                           \
        const Args p = args; /* a copy that no store can alias stays in registers */ \
        constexpr int W = kLanes<acc_t<scalar_t>>;                                   \
        for (int64_t j = 0; j < p.width; ++j) {                                      \
            int64_t c = 0;                                                           \
            for (; c + W <= p.channels; c += W) {                                    \
                name##_lanes<scalar_t, false, false>(p, j, c, W);                    \
            }                                                                        \
            if (c < p.channels) {                                                    \
                name##_lanes<scalar_t, false, true>(p, j, c, p.channels - c);        \
            }                                                                        \
        }                                                                            \
    }                                                                                \
    template <typename scalar_t>                                                     \
    void name##_plane(const Args& args) {                                            \
        const Args p = args;                                                         \
        constexpr int W = kLanes<acc_t<scalar_t>>;                                   \
        int64_t j = 0;                                                               \
        for (; j + W <= p.width; j += W) {                                           \
            name##_lanes<scalar_t, true, false>(p, j, 0, W);                         \
        }                                                                            \
        if (j < p.width) {                                                           \
            name##_lanes<scalar_t, true, true>(p, j, 0, p.width - j);                \
        }                                                                            \
    }

DL4DS_ROW(pool, MaxPoolArgs)
DL4DS_ROW(unpool, MaxUnpoolArgs)
DL4DS_ROW(gather, MaxGatherArgs)

#define DL4DS_BOTH(name, scalar_t) {&name##_pixels<scalar_t>, &name##_plane<scalar_t>}
#define DL4DS_ALL_DTYPES(name)                                                    \
    {DL4DS_BOTH(name, float), DL4DS_BOTH(name, double), DL4DS_BOTH(name, half_t), \
     DL4DS_BOTH(name, bfloat16_t)}

const MaxPoolKernels kMaxPoolKernels = {DL4DS_ALL_DTYPES(pool), DL4DS_ALL_DTYPES(unpool),
                                        DL4DS_ALL_DTYPES(gather)};

#undef DL4DS_ALL_DTYPES
#undef DL4DS_BOTH
#undef DL4DS_ROW

}  // namespace DL4DS_ISA
}  // namespace dl4ds
