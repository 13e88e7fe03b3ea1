// The transforms of Winograd's F(m x m, 3x3). Included once per ISA by conv_kernels_cpu.h.
//
// Toom-Cook with the points 0, +-1 and infinity (m = 2), 0, +-5/8, +-3/2 and infinity (m = 4: about 3.5
// times less error than 0, +-1, +-2 for the same number of operations) or 0, +-9/16, +-1, +-2 and infinity
// (m = 6: half the error of the usual 0, +-1/2, +-1, +-2). All divisors are in the filter
// transform (conv_pack_cpu.cpp). Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
namespace dl4ds {
namespace DL4DS_ISA {

struct WinogradF2 {
    static constexpr int kOut = 2, kIn = 4;
    DL4DS_INLINE static void in(const Vec<float>* d, Vec<float>* o) {
        o[0] = d[2] - d[0];
        o[1] = d[2] + d[1];
        o[2] = d[2] - d[1];
        o[3] = d[3] - d[1];
    }
    DL4DS_INLINE static void out(const Vec<float>* z, Vec<float>* y) {
        y[0] = z[0] + (z[1] + z[2]);
        y[1] = (z[1] - z[2]) + z[3];
    }
};

struct WinogradF4 {
    static constexpr int kOut = 4, kIn = 6;
    static constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
    DL4DS_INLINE static Vec<float> fma(float a, Vec<float> b, Vec<float> c) {
        return multiply_add(broadcast(a), b, c);
    }
    DL4DS_INLINE static void in(const Vec<float>* d, Vec<float>* o) {
        const Vec<float> even_a = fma(-kB2, d[2], d[4]), odd_a = fma(-kB2, d[1], d[3]);
        const Vec<float> even_b = fma(-kA2, d[2], d[4]), odd_b = fma(-kA2, d[1], d[3]);
        o[0] = fma(-kA2, fma(-kB2, d[0], d[2]), even_a);
        o[1] = fma(kA, odd_a, even_a);
        o[2] = fma(-kA, odd_a, even_a);
        o[3] = fma(kB, odd_b, even_b);
        o[4] = fma(-kB, odd_b, even_b);
        o[5] = fma(-kA2, odd_a, fma(-kB2, d[3], d[5]));
    }
    DL4DS_INLINE static void out(const Vec<float>* z, Vec<float>* y) {
        const Vec<float> s = z[1] + z[2], r = z[1] - z[2], t = z[3] + z[4], u = z[3] - z[4];
        y[0] = z[0] + (s + t);
        y[1] = fma(kB, u, broadcast(kA) * r);
        y[2] = fma(kB2, t, broadcast(kA2) * s);
        y[3] = fma(kB2 * kB, u, fma(kA2 * kA, r, z[5]));
    }
};

struct WinogradF6 {
    static constexpr int kOut = 6, kIn = 8;
    static constexpr float kA = 0.5625f, kB = 1.0f, kC = 2.0f;
    DL4DS_INLINE static Vec<float> fma(float a, Vec<float> b, Vec<float> c) {
        return multiply_add(broadcast(a), b, c);
    }
    /// (t^2 - p^2)(t^2 - q^2) on three values that are two places apart.
    DL4DS_INLINE static Vec<float> without(float p, float q, const Vec<float>* d) {
        return fma(p * p * q * q, d[0], fma(-(p * p + q * q), d[2], d[4]));
    }
    DL4DS_INLINE static void in(const Vec<float>* d, Vec<float>* o) {
        const Vec<float> even_a = without(kB, kC, d + 2), odd_a = without(kB, kC, d + 1);
        const Vec<float> even_b = without(kA, kC, d + 2), odd_b = without(kA, kC, d + 1);
        const Vec<float> even_c = without(kA, kB, d + 2), odd_c = without(kA, kB, d + 1);
        o[0] = fma(-kA * kA, without(kB, kC, d), even_a);
        o[1] = fma(kA, odd_a, even_a);
        o[2] = fma(-kA, odd_a, even_a);
        o[3] = even_b + odd_b;
        o[4] = even_b - odd_b;
        o[5] = fma(kC, odd_c, even_c);
        o[6] = fma(-kC, odd_c, even_c);
        o[7] = fma(-kA * kA, odd_a, without(kB, kC, d + 3));
    }
    DL4DS_INLINE static void out(const Vec<float>* z, Vec<float>* y) {
        constexpr float kA2 = kA * kA, kC2 = kC * kC;
        const Vec<float> s = z[1] + z[2], r = z[1] - z[2], t = z[3] + z[4], u = z[3] - z[4];
        const Vec<float> v = z[5] + z[6], w = z[5] - z[6];
        y[0] = z[0] + (s + (t + v));
        y[1] = fma(kC, w, fma(kA, r, u));
        y[2] = fma(kC2, v, fma(kA2, s, t));
        y[3] = fma(kC2 * kC, w, fma(kA2 * kA, r, u));
        y[4] = fma(kC2 * kC2, v, fma(kA2 * kA2, s, t));
        y[5] = fma(kC2 * kC2 * kC, w, fma(kA2 * kA2 * kA, r, u + z[7]));
    }
};

/// kLanes channels of one tile; from[row][column] are the tile's pixels at these channels.
template <class F, bool kPartial, class Pixel>
DL4DS_INLINE void transform_in(const Pixel& pixel, int64_t n, float* v, int64_t v_position) {
    constexpr int kIn = F::kIn;
    Vec<float> half[kIn][kIn];  // [column][position in the column]
#pragma GCC unroll 8
    for (int j = 0; j < kIn; ++j) {
        Vec<float> d[kIn];
#pragma GCC unroll 8
        for (int i = 0; i < kIn; ++i) {
            d[i] = load_lanes<kPartial>(pixel.at(i, j), n);
        }
        F::in(d, half[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kIn; ++i) {
        Vec<float> d[kIn], o[kIn];
#pragma GCC unroll 8
        for (int j = 0; j < kIn; ++j) {
            d[j] = half[j][i];
        }
        F::in(d, o);
#pragma GCC unroll 8
        for (int j = 0; j < kIn; ++j) {
            store(v + (i * kIn + j) * v_position, o[j]);
        }
    }
}

/// Pixels of a tile that lies inside the image, at one channel.
struct InsideTile {
    const float* corner;
    int64_t stride_h, stride_w, channel;
    DL4DS_INLINE const float* at(int i, int j) const {
        return corner + i * stride_h + j * stride_w + channel;
    }
};

/// Pixels of a tile of which some are padding, at one channel.
template <int kIn>
struct BorderTile {
    const float* pixel[kIn][kIn];
    int64_t channel;
    DL4DS_INLINE const float* at(int i, int j) const { return pixel[i][j] + channel; }
};

/// All channels of a tile. What V holds past the last channel is never read.
template <class F, class Tile>
DL4DS_INLINE void transform_channels(const WinogradInArgs& p, Tile& tile) {
    int64_t c = 0;
    for (; c + kLanes<float> <= p.channels; c += kLanes<float>) {
        tile.channel = c;
        transform_in<F, false>(tile, kLanes<float>, p.v + c / kChunk * p.v_chunk + c % kChunk, p.v_position);
    }
    if (c < p.channels) {
        tile.channel = c;
        transform_in<F, true>(tile, p.channels - c, p.v + c / kChunk * p.v_chunk + c % kChunk, p.v_position);
    }
}

template <class F>
void winograd_in(const WinogradInArgs& args) {
    constexpr int kIn = F::kIn;
    const WinogradInArgs p = args;
    if (p.y0 >= 0 && p.x0 >= 0 && p.y0 + kIn <= p.height && p.x0 + kIn <= p.width) {
        InsideTile tile{p.x + p.y0 * p.stride_h + p.x0 * p.stride_w, p.stride_h, p.stride_w, 0};
        transform_channels<F>(p, tile);
        return;
    }
    BorderTile<kIn> tile;
    for (int i = 0; i < kIn; ++i) {
        for (int j = 0; j < kIn; ++j) {
            const int64_t y = p.y0 + i, x = p.x0 + j;
            const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
            tile.pixel[i][j] = inside ? p.x + y * p.stride_h + x * p.stride_w : p.zeros;
        }
    }
    transform_channels<F>(p, tile);
}

/// kLanes channels of one output tile. Returns 0 in every lane whose sums are all finite, else NaN.
template <class F, bool kPartial>
DL4DS_INLINE Vec<float> transform_out(const WinogradOutArgs& p, const Clamp& limits, int64_t at, int64_t n) {
    constexpr int kIn = F::kIn, kOut = F::kOut;
    Vec<float> half[kIn][kOut];  // [column][row]
#pragma GCC unroll 8
    for (int j = 0; j < kIn; ++j) {
        Vec<float> d[kIn];
#pragma GCC unroll 8
        for (int i = 0; i < kIn; ++i) {
            d[i] = load(p.m + (i * kIn + j) * kPanel + at);
        }
        F::out(d, half[j]);
    }
    const Vec<float> scale = load(p.finish.scale + at), shift = load(p.finish.shift + at);
    Vec<float> poison{};
#pragma GCC unroll 8
    for (int i = 0; i < kOut; ++i) {
        Vec<float> d[kIn], y[kOut];
#pragma GCC unroll 8
        for (int j = 0; j < kIn; ++j) {
            d[j] = half[j][i];
        }
        F::out(d, y);
        if (i >= p.rows) {
            break;
        }
#pragma GCC unroll 8
        for (int j = 0; j < kOut; ++j) {
            if (j >= p.columns) {
                break;
            }
            poison = multiply_add(y[j], Vec<float>{}, poison);
            Vec<float> z = multiply_add(y[j], scale, shift);
            const int64_t offset = i * p.stride_h + j * p.stride_w + at;
            if (p.finish.residual != nullptr) {
                z += load_lanes<kPartial>(p.finish.residual + offset, n);
            }
            store_lanes<kPartial>(p.out + offset, clamp(z, limits), n, false);
        }
    }
    return poison;
}

template <class F>
bool winograd_out(const WinogradOutArgs& args) {
    const WinogradOutArgs p = args;
    const Clamp limits = clamp_of(p.finish.activation);
    Vec<float> poison{};
    int64_t at = 0;
    for (; at + kLanes<float> <= p.finish.columns; at += kLanes<float>) {
        poison += transform_out<F, false>(p, limits, at, kLanes<float>);
    }
    if (at < p.finish.columns) {
        // Lanes past the last channel are products of zeros of the packed weight.
        poison += transform_out<F, true>(p, limits, at, p.finish.columns - at);
    }
    if (!is_clamp(p.finish.activation)) {
        for (int64_t i = 0; i < p.rows; ++i) {
            for (int64_t j = 0; j < p.columns; ++j) {
                finish_rest(p.out + i * p.stride_h + j * p.stride_w, p.finish);
            }
        }
    }
    return to_bits<float>(poison != poison) == 0;
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
