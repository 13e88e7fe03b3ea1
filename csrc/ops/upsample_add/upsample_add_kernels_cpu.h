// The kernels of upsample_add (see upsample_add_cpu.h), compiled once per ISA by foreach_isa.h. Sums are in
// fp32 (fp64 for fp64) and rounded once.
namespace dl4ds {
namespace DL4DS_ISA {

// ---- a pixel is a run of channels (channels_last)
template <typename scalar_t, bool kPartial>
DL4DS_INLINE void upsample_lanes(const scalar_t* low, const scalar_t* const (&skip)[4],
                                 scalar_t* const (&out)[4], int64_t c, int64_t n) {
    const Vec<acc_t<scalar_t>> value = load_lanes<kPartial>(low + c, n);
    for (int i = 0; i < 4; ++i) {
        store_lanes<kPartial>(out[i] + c, value + load_lanes<kPartial>(skip[i] + c, n), n, false);
    }
}

template <typename scalar_t>
void upsample_add_fwd_pixels(const UpsampleAddArgs& args) {
    const UpsampleAddArgs p = args;  // a copy that no store can alias stays in registers
    constexpr int W = kLanes<acc_t<scalar_t>>;
    const scalar_t* low = static_cast<const scalar_t*>(p.low);
    for (int64_t j = 0; j < p.width; ++j, low += p.channels) {
        const scalar_t* skip[4];
        scalar_t* out[4];
        for (int i = 0; i < 4; ++i) {
            const int64_t pixel = (2 * j + i % 2) * p.channels;
            skip[i] = static_cast<const scalar_t*>(p.skip[i / 2]) + pixel;
            out[i] = static_cast<scalar_t*>(p.out[i / 2]) + pixel;
        }
        int64_t c = 0;
        for (; c + W <= p.channels; c += W) {
            upsample_lanes<scalar_t, false>(low, skip, out, c, W);
        }
        if (c < p.channels) {
            upsample_lanes<scalar_t, true>(low, skip, out, c, p.channels - c);
        }
    }
}

template <typename scalar_t, bool kPartial>
DL4DS_INLINE void downsum_lanes(const scalar_t* const (&dout)[4], scalar_t* dlow, int64_t c, int64_t n) {
    const Vec<acc_t<scalar_t>> left =
        load_lanes<kPartial>(dout[0] + c, n) + load_lanes<kPartial>(dout[2] + c, n);
    const Vec<acc_t<scalar_t>> right =
        load_lanes<kPartial>(dout[1] + c, n) + load_lanes<kPartial>(dout[3] + c, n);
    store_lanes<kPartial>(dlow + c, left + right, n, false);
}

template <typename scalar_t>
void upsample_add_bwd_pixels(const UpsampleAddBwdArgs& args) {
    const UpsampleAddBwdArgs p = args;
    constexpr int W = kLanes<acc_t<scalar_t>>;
    scalar_t* dlow = static_cast<scalar_t*>(p.dlow);
    for (int64_t j = 0; j < p.width; ++j, dlow += p.channels) {
        const scalar_t* dout[4];
        for (int i = 0; i < 4; ++i) {
            dout[i] = static_cast<const scalar_t*>(p.dout[i / 2]) + (2 * j + i % 2) * p.channels;
        }
        int64_t c = 0;
        for (; c + W <= p.channels; c += W) {
            downsum_lanes<scalar_t, false>(dout, dlow, c, W);
        }
        if (c < p.channels) {
            downsum_lanes<scalar_t, true>(dout, dlow, c, p.channels - c);
        }
    }
}

// ---- a pixel is one element (contiguous): neighbours in a register are doubled, or summed in pairs
template <typename T>
DL4DS_INLINE void double_lanes(Vec<T> value, Vec<T> (&twice)[2]) {
    constexpr int W = kLanes<T>;
    T from[W], to[2 * W];
    __builtin_memcpy(from, &value, sizeof(value));
    for (int k = 0; k < W; ++k) {
        to[2 * k] = from[k];
        to[2 * k + 1] = from[k];
    }
    __builtin_memcpy(twice, to, sizeof(to));
}

template <typename T>
DL4DS_INLINE Vec<T> sum_pairs(const Vec<T> (&twice)[2]) {
    constexpr int W = kLanes<T>;
    T from[2 * W], to[W];
    __builtin_memcpy(from, twice, sizeof(from));
    for (int k = 0; k < W; ++k) {
        to[k] = from[2 * k] + from[2 * k + 1];
    }
    Vec<T> value;
    __builtin_memcpy(&value, to, sizeof(value));
    return value;
}

template <typename scalar_t, bool kPartial>
DL4DS_INLINE void upsample_plane_lanes(const UpsampleAddArgs& p, int64_t j, int64_t n) {
    using T = acc_t<scalar_t>;
    constexpr int64_t W = kLanes<T>;
    Vec<T> twice[2];
    double_lanes<T>(load_lanes<kPartial>(static_cast<const scalar_t*>(p.low) + j, n), twice);
    for (int y = 0; y < 2; ++y) {
        const scalar_t* skip = static_cast<const scalar_t*>(p.skip[y]) + 2 * j;
        scalar_t* out = static_cast<scalar_t*>(p.out[y]) + 2 * j;
        for (int half = 0; half < 2; ++half) {
            const int64_t left = 2 * n - half * W, m = left < W ? left : W;
            if (m == W) {
                store_lanes<false>(out + half * W, twice[half] + load_lanes<false>(skip + half * W, W), W,
                                   false);
            } else if (m > 0) {
                store_lanes<true>(out + half * W, twice[half] + load_lanes<true>(skip + half * W, m), m,
                                  false);
            }
        }
    }
}

template <typename scalar_t>
void upsample_add_fwd_plane(const UpsampleAddArgs& args) {
    const UpsampleAddArgs p = args;
    constexpr int W = kLanes<acc_t<scalar_t>>;
    int64_t j = 0;
    for (; j + W <= p.width; j += W) {
        upsample_plane_lanes<scalar_t, false>(p, j, W);
    }
    if (j < p.width) {
        upsample_plane_lanes<scalar_t, true>(p, j, p.width - j);
    }
}

template <typename scalar_t, bool kPartial>
DL4DS_INLINE void downsum_plane_lanes(const UpsampleAddBwdArgs& p, int64_t j, int64_t n) {
    using T = acc_t<scalar_t>;
    constexpr int64_t W = kLanes<T>;
    const scalar_t* upper = static_cast<const scalar_t*>(p.dout[0]) + 2 * j;
    const scalar_t* lower = static_cast<const scalar_t*>(p.dout[1]) + 2 * j;
    Vec<T> rows[2] = {};
    for (int half = 0; half < 2; ++half) {
        const int64_t left = 2 * n - half * W, m = left < W ? left : W;
        if (m == W) {
            rows[half] = load_lanes<false>(upper + half * W, W) + load_lanes<false>(lower + half * W, W);
        } else if (m > 0) {
            rows[half] = load_lanes<true>(upper + half * W, m) + load_lanes<true>(lower + half * W, m);
        }
    }
    store_lanes<kPartial>(static_cast<scalar_t*>(p.dlow) + j, sum_pairs<T>(rows), n, false);
}

template <typename scalar_t>
void upsample_add_bwd_plane(const UpsampleAddBwdArgs& args) {
    const UpsampleAddBwdArgs p = args;
    constexpr int W = kLanes<acc_t<scalar_t>>;
    int64_t j = 0;
    for (; j + W <= p.width; j += W) {
        downsum_plane_lanes<scalar_t, false>(p, j, W);
    }
    if (j < p.width) {
        downsum_plane_lanes<scalar_t, true>(p, j, p.width - j);
    }
}

#define DL4DS_BOTH(name, scalar_t) {&name##_pixels<scalar_t>, &name##_plane<scalar_t>}
#define DL4DS_ALL_DTYPES(name)                                                    \
    {DL4DS_BOTH(name, float), DL4DS_BOTH(name, double), DL4DS_BOTH(name, half_t), \
     DL4DS_BOTH(name, bfloat16_t)}

const UpsampleAddKernels kUpsampleAddKernels = {DL4DS_ALL_DTYPES(upsample_add_fwd),
                                                DL4DS_ALL_DTYPES(upsample_add_bwd)};

#undef DL4DS_ALL_DTYPES
#undef DL4DS_BOTH

}  // namespace DL4DS_ISA
}  // namespace dl4ds
