// The GEMM micro-kernel and the packing of receptive fields. Included once per ISA by conv_kernels_cpu.h.
namespace dl4ds {
namespace DL4DS_ISA {

/// acc = A * B over `steps` values of k from zero; a, b and the address to ask for move on behind them.
template <int kRows>
DL4DS_INLINE void chain(const float*& a, const float*& b, const char*& ahead, int64_t steps,
                        Vec<float> (&acc)[kRows][kPanelVecs]) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVecs; ++j) {
            acc[i][j] = Vec<float>{};
        }
    }
    for (int64_t left = steps; left > 0; left -= kChunk, a += (kRows - 1) * kChunk) {
        const int64_t part = left < kChunk ? left : kChunk;
#pragma GCC unroll 2
        for (int64_t k = 0; k < part; ++k, ++a, b += kPanel, ahead += 64) {
            Vec<float> vb[kPanelVecs];
#pragma GCC unroll 2
            for (int j = 0; j < kPanelVecs; ++j) {
                vb[j] = load(b + j * kLanes<float>);
            }
            __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                const Vec<float> va = broadcast(a[i * kChunk]);
#pragma GCC unroll 2
                for (int j = 0; j < kPanelVecs; ++j) {
                    acc[i][j] = multiply_add(va, vb[j], acc[i][j]);
                }
            }
        }
    }
}

template <int kRows>
DL4DS_INLINE void put_sums(const Vec<float> (&acc)[kRows][kPanelVecs], float* sums) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVecs; ++j) {
            store(sums + i * kPanel + j * kLanes<float>, acc[i][j]);
        }
    }
}

template <int kRows>
DL4DS_INLINE void add_sums(const float* sums, Vec<float> (&acc)[kRows][kPanelVecs]) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVecs; ++j) {
            acc[i][j] += load(sums + i * kPanel + j * kLanes<float>);
        }
    }
}

/// acc = A * B over all of k, in chains of kLongestChain whose sums are added one after the other: the
/// rounding error grows with the length of a chain and the number of chains, not with their product.
template <int kRows>
DL4DS_INLINE void accumulate(const GemmArgs& p, Vec<float> (&acc)[kRows][kPanelVecs]) {
    static_assert(kLongestChain % kChunk == 0);
    const float* a = p.a;
    const float* b = p.b;
    const char* ahead = p.prefetch;
    // The accumulators fill the registers: the sum so far waits in the first cache.
    alignas(DL4DS_VEC_BYTES) float sums[kRows * kPanel];
    for (int64_t left = p.k;;) {
        chain<kRows>(a, b, ahead, left < kLongestChain ? left : kLongestChain, acc);
        if (left < p.k) {
            add_sums<kRows>(sums, acc);
        }
        left -= kLongestChain;
        if (left <= 0) {
            return;
        }
        put_sums<kRows>(acc, sums);
    }
}

template <int kRows>
void gemm(const GemmArgs& args) {
    const GemmArgs p = args;
    Vec<float> acc[kRows][kPanelVecs];
    accumulate<kRows>(p, acc);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVecs; ++j) {
            store(p.d + i * p.pitch + j * kLanes<float>, acc[i][j]);
        }
    }
}

/// Column vector j of every row: scale, shift, residual, clamp, store.
template <int kRows, bool kPartial>
DL4DS_INLINE void finish_column(const GemmArgs& p, const GemmFinish& f, const Clamp& limits,
                                const Vec<float> (&acc)[kRows][kPanelVecs], int j, int64_t n) {
    const int64_t at = j * kLanes<float>;
    const Vec<float> scale = load(f.scale + at), shift = load(f.shift + at);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
        Vec<float> z = multiply_add(acc[i][j], scale, shift);
        if (f.residual != nullptr) {
            z += load_lanes<kPartial>(f.residual + i * p.pitch + at, n);
        }
        store_lanes<kPartial>(p.d + i * p.pitch + at, clamp(z, limits), n, false);
    }
}

template <int kRows>
void gemm_finish(const GemmArgs& args, const GemmFinish& finish) {
    const GemmArgs p = args;
    const GemmFinish f = finish;
    // Rows of the output and the residual are far apart, where no hardware prefetcher follows.
    for (int i = 0; i < kRows; ++i) {
        const int64_t at = i * p.pitch;
        __builtin_prefetch(p.d + at, 1, 3);
        __builtin_prefetch(p.d + at + kPanel - 1, 1, 3);
        if (f.residual != nullptr) {
            __builtin_prefetch(f.residual + at, 0, 3);
            __builtin_prefetch(f.residual + at + kPanel - 1, 0, 3);
        }
    }
    Vec<float> acc[kRows][kPanelVecs];
    accumulate<kRows>(p, acc);
    const Clamp limits = clamp_of(f.activation);
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVecs; ++j) {
        const int64_t n = f.columns - j * kLanes<float>;
        if (n >= kLanes<float>) {
            finish_column<kRows, false>(p, f, limits, acc, j, kLanes<float>);
        } else if (n > 0) {
            finish_column<kRows, true>(p, f, limits, acc, j, n);
        }
    }
    if (!is_clamp(f.activation)) {
        for (int i = 0; i < kRows; ++i) {
            finish_rest(p.d + i * p.pitch, f);
        }
    }
}

#define DL4DS_SIX(f) nullptr, &f<1>, &f<2>, &f<3>, &f<4>, &f<5>, &f<6>
#if DL4DS_VEC_BYTES == 64
#define DL4DS_ROWS(f) {DL4DS_SIX(f), &f<7>, &f<8>, &f<9>, &f<10>, &f<11>, &f<12>, &f<13>, &f<14>}
#else
#define DL4DS_ROWS(f) {DL4DS_SIX(f)}
#endif
void (*const kGemm[])(const GemmArgs&) = DL4DS_ROWS(gemm);
void (*const kGemmFinish[])(const GemmArgs&, const GemmFinish&) = DL4DS_ROWS(gemm_finish);

/// n floats of one row into its places of an A panel, zeros up to the next whole chunk.
DL4DS_INLINE void spread(const float* from, int64_t n, float* to, int64_t rows) {
    for (; n >= kChunk; n -= kChunk, from += kChunk, to += rows * kChunk) {
#pragma GCC unroll 4
        for (int i = 0; i < kChunk; i += kLanes<float>) {
            store(to + i, load(from + i));
        }
    }
    if (n > 0) {
        for (int64_t i = 0; i < kChunk; ++i) {
            to[i] = i < n ? from[i] : 0.0f;
        }
    }
}

DL4DS_INLINE void spread_zeros(int64_t n, float* to, int64_t rows) {
    for (; n > 0; n -= kChunk, to += rows * kChunk) {
#pragma GCC unroll 4
        for (int i = 0; i < kChunk; i += kLanes<float>) {
            store(to + i, Vec<float>{});
        }
    }
}

/// n floats (or zeros, from = null) to `to`; what lies behind them, up to a vector, may be overwritten.
DL4DS_INLINE void copy_over(const float* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + kLanes<float> <= n; i += kLanes<float>) {
        store(to + i, from == nullptr ? Vec<float>{} : load(from + i));
    }
    if (i < n) {
        store(to + i, from == nullptr ? Vec<float>{} : load_partial(from + i, n - i));
    }
}

/// The receptive field of the output pixel with this corner, as one line; x is pixel (0, 0) of the image.
inline void gather_line(const PackArgs& p, const float* x, int64_t y0, int64_t x0) {
    const ConvShape& s = *p.shape;
    const int64_t channels = s.group_channels();
    // Taps of one row that lie side by side are copied as one piece.
    const bool dense = s.dilation_w == 1 && p.stride_w == channels;
    const int64_t inside = x0 < 0 ? -x0 : 0;  // first tap inside the image, dense case
    const int64_t past = s.width - x0 < s.kernel_w ? s.width - x0 : s.kernel_w;
    float* to = p.line;
    for (int64_t r = 0; r < s.kernel_h; ++r, to += s.kernel_w * channels) {
        const int64_t y = y0 + r * s.dilation_h;
        const float* row = x + y * p.stride_h;
        if (y < 0 || y >= s.height) {
            copy_over(nullptr, s.kernel_w * channels, to);
        } else if (dense) {
            if (inside > 0) {
                copy_over(nullptr, (inside < s.kernel_w ? inside : s.kernel_w) * channels, to);
            }
            if (past > inside) {
                copy_over(row + (x0 + inside) * channels, (past - inside) * channels, to + inside * channels);
            }
            if (past < s.kernel_w) {
                const int64_t from = past > 0 ? past : 0;
                copy_over(nullptr, (s.kernel_w - from) * channels, to + from * channels);
            }
        } else {
            for (int64_t q = 0; q < s.kernel_w; ++q) {
                const int64_t col = x0 + q * s.dilation_w;
                const bool valid = col >= 0 && col < s.width;
                copy_over(valid ? row + col * p.stride_w : nullptr, channels, to + q * channels);
            }
        }
    }
}

inline void pack(const PackArgs& args) {
    const PackArgs p = args;
    const ConvShape s = *p.shape;
    const int64_t channels = s.group_channels(), wo = s.out_width(), ho = s.out_height();
    const int64_t k = channels * s.taps(), pitch = p.pitch > 0 ? p.pitch : p.rows;
    // Whole chunks of channels go straight to their places; otherwise a field is first written as one line.
    const bool straight = channels % kChunk == 0 || s.taps() == 1;
    for (int64_t i = 0; i < p.rows; ++i) {
        const int64_t pixel = p.first + i;
        const int64_t n = pixel / (wo * ho), rest = pixel % (wo * ho);
        const float* x = p.x + n * p.stride_n;
        const int64_t y0 = rest / wo * s.stride_h - s.pad_h, x0 = rest % wo * s.stride_w - s.pad_w;
        float* to = p.a + i * kChunk;
        if (!straight) {
            gather_line(p, x, y0, x0);
            spread(p.line, k, to, pitch);
            continue;
        }
        const int64_t step = chunks_of(channels) * pitch * kChunk;
        for (int64_t r = 0; r < s.kernel_h; ++r) {
            const int64_t y = y0 + r * s.dilation_h;
            for (int64_t q = 0; q < s.kernel_w; ++q, to += step) {
                const int64_t col = x0 + q * s.dilation_w;
                if (y >= 0 && y < s.height && col >= 0 && col < s.width) {
                    spread(x + y * p.stride_h + col * p.stride_w, channels, to, pitch);
                } else {
                    spread_zeros(channels, to, pitch);
                }
            }
        }
    }
}

/// One vector of a source through the prologue: the mean over the pixels of a window.
template <int kPool, bool kCentered, bool kPartial>
DL4DS_INLINE Vec<float> prologue_at(const float* from, const ConvSource& source, int64_t n, Vec<float> mean,
                                    Vec<float> scale, Vec<float> shift, const Clamp& limits) {
    Vec<float> sum{};
#pragma GCC unroll 2
    for (int y = 0; y < kPool; ++y) {
#pragma GCC unroll 2
        for (int x = 0; x < kPool; ++x) {
            const float* at = from + y * source.stride_h + x * source.stride_w;
            Vec<float> value = load_lanes<kPartial>(at, n);
            if constexpr (kCentered) {
                value -= mean;
            }
            const Vec<float> z = clamp(multiply_add(value, scale, shift), limits);
            sum = x + y == 0 ? z : sum + z;
        }
    }
    return kPool == 1 ? sum : sum * broadcast(1.0f / (kPool * kPool));
}

template <int kPool, bool kCentered>
inline void pack_sources_of(const PackSourcesArgs& p) {
    const ConvPrologue prologue = *p.prologue;
    const Clamp limits = clamp_of(prologue.activation);
    const int64_t width = p.shape->width, plane = p.shape->height * width;
    const int64_t step = (p.pitch > 0 ? p.pitch : p.rows) * kChunk;
    for (int64_t i = 0; i < p.rows; ++i) {
        const int64_t pixel = p.first + i, n = pixel / plane, y = pixel % plane / width, x = pixel % width;
        const float *scale = prologue.scale, *shift = prologue.shift, *mean = prologue.mean;
        float* to = p.a + i * kChunk;
        for (int64_t k = 0; k < prologue.count; ++k) {
            const ConvSource source = prologue.sources[k];
            const float* from =
                source.x + n * source.stride_n + kPool * (y * source.stride_h + x * source.stride_w);
            for (int64_t left = source.channels; left > 0; left -= kChunk, to += step) {
#pragma GCC unroll 4
                for (int j = 0; j < kChunk; j += kLanes<float>, from += kLanes<float>, scale += kLanes<float>,
                         shift += kLanes<float>) {
                    const int64_t n_left = left - j;
                    const Vec<float> a = load(scale), b = load(shift);
                    Vec<float> value{}, m{};
                    if constexpr (kCentered) {
                        m = load(mean), mean += kLanes<float>;
                    }
                    if (n_left >= kLanes<float>) {
                        value = prologue_at<kPool, kCentered, false>(from, source, kLanes<float>, m, a, b,
                                                                     limits);
                    } else if (n_left > 0) {
                        value = prologue_at<kPool, kCentered, true>(from, source, n_left, m, a, b, limits);
                    }
                    store(to + j, value);
                }
            }
        }
    }
}

/// The channels of `rows` pixels from all sources, through the prologue, into one A panel.
inline void pack_sources(const PackSourcesArgs& args) {
    const PackSourcesArgs p = args;
    if (p.prologue->mean != nullptr) {
        pack_sources_of<1, true>(p);
    } else if (p.prologue->pool == 2) {
        pack_sources_of<2, false>(p);
    } else {
        pack_sources_of<1, false>(p);
    }
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
