// The transforms of one step of Strassen's algorithm for 1x1 convolutions: seven products of half the size
// instead of eight. A tile is two pixels that lie side by side (top and bottom half of A), the channels are
// split in two on both sides of the weight. Included once per ISA by conv_kernels_cpu.h.
//
// Strassen, "Gaussian elimination is not optimal", 1969; the sums of weights are made in conv_pack_cpu.cpp.
namespace dl4ds {
namespace DL4DS_ISA {

/// Sums of A for all seven products: V[product][chunk][tile][kChunk].
inline void strassen_in(const StrassenInArgs& args) {
    const StrassenInArgs p = args;
    for (int64_t c = 0; c < p.channels; c += kLanes<float>) {
        const Vec<float> a11 = load(p.top + c), a12 = load(p.top + p.channels + c);
        const Vec<float> a21 = load(p.bottom + c), a22 = load(p.bottom + p.channels + c);
        float* v = p.v + c / kChunk * p.v_chunk + c % kChunk;
        store(v, a11 + a22);
        store(v + p.v_product, a21 + a22);
        store(v + 2 * p.v_product, a11);
        store(v + 3 * p.v_product, a22);
        store(v + 4 * p.v_product, a11 + a12);
        store(v + 5 * p.v_product, a21 - a11);
        store(v + 6 * p.v_product, a12 - a22);
    }
}

/// Scale, shift, residual and clamp of one vector; returns NaN where the sum is not finite, else 0.
template <bool kResidual>
DL4DS_INLINE Vec<float> strassen_store(const StrassenOutArgs& p, const Clamp& limits, Vec<float> sum,
                                       Vec<float> scale, Vec<float> shift, int64_t at) {
    Vec<float> z = multiply_add(sum, scale, shift);
    if (kResidual) {
        z += load(p.finish.residual + at);
    }
    store(p.out + at, clamp(z, limits));
    return sum * Vec<float>{};
}

template <bool kResidual>
DL4DS_INLINE Vec<float> strassen_column(const StrassenOutArgs& p, const Clamp& limits, int j) {
    const Vec<float> scale_l = load(p.finish.scale + j), shift_l = load(p.finish.shift + j);
    const Vec<float> scale_r = load(p.finish.scale + p.half + j), shift_r = load(p.finish.shift + p.half + j);
    Vec<float> poison{};
    int64_t at = j;
    const float* from = p.m + j;
    for (int64_t pixel = 0; pixel < p.pixels; pixel += 2, from += 7 * kPanel, at += 2 * p.pitch) {
        Vec<float> m[7];
#pragma GCC unroll 8
        for (int i = 0; i < 7; ++i) {
            m[i] = load(from + i * kPanel);
        }
        poison += strassen_store<kResidual>(p, limits, (m[0] + m[3]) - (m[4] - m[6]), scale_l, shift_l, at);
        poison += strassen_store<kResidual>(p, limits, m[2] + m[4], scale_r, shift_r, at + p.half);
        if (pixel + 1 < p.pixels) {
            const int64_t next = at + p.pitch;
            poison += strassen_store<kResidual>(p, limits, m[1] + m[3], scale_l, shift_l, next);
            poison += strassen_store<kResidual>(p, limits, (m[0] - m[1]) + (m[2] + m[5]), scale_r, shift_r,
                                                next + p.half);
        }
    }
    return poison;
}

inline bool strassen_out(const StrassenOutArgs& args) {
    const StrassenOutArgs p = args;
    const Clamp limits = clamp_of(p.finish.activation);
    Vec<float> poison{};
#pragma GCC unroll 2
    for (int j = 0; j < kPanel; j += kLanes<float>) {
        poison += p.finish.residual != nullptr ? strassen_column<true>(p, limits, j)
                                               : strassen_column<false>(p, limits, j);
    }
    if (!is_clamp(p.finish.activation)) {
        for (int64_t i = 0; i < p.pixels; ++i) {
            finish_rest(p.out + i * p.pitch, p.finish);
            finish_rest(p.out + i * p.pitch + p.half, p.finish);
        }
    }
    return to_bits<float>(poison != poison) == 0;
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
