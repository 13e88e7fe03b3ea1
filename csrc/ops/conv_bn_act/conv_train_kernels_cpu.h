// Kernels of conv_train_cpu.h. Included once per ISA by foreach_isa.h (conv_train_kernels_cpu.cpp).
//
// Signs and points are those of WinogradF2 (conv_winograd_kernels_cpu.h) and of the filter transform beside
// it: G = (-1, 0, 0), (1, 1, 1) / 2, (1, -1, 1) / 2, (0, 0, 1).
namespace dl4ds {
namespace DL4DS_ISA {

constexpr int kTrainVecs = 2;  // of a panel, as in conv_kernels_cpu.h
constexpr int kTrainPanel = kTrainVecs * kLanes<float>;
// As many accumulators as the registers hold: loads then keep well behind the multiplications.
constexpr int kTrainRows = DL4DS_VEC_BYTES == 64 ? 8 : 6;

}  // namespace DL4DS_ISA
}  // namespace dl4ds

#include "ops/conv_bn_act/conv_lanes_kernels_cpu.h"

namespace dl4ds {
namespace DL4DS_ISA {

/// G w of one column of a filter.
DL4DS_INLINE void filter_column(const Vec<float>* w, Vec<float>* o) {
    const Vec<float> half = broadcast(0.5f), ends = half * (w[0] + w[2]), middle = half * w[1];
    o[0] = -w[0];
    o[1] = ends + middle;
    o[2] = ends - middle;
    o[3] = w[2];
}

template <bool kPartial>
DL4DS_INLINE void transform_filter(const float* from, int64_t tap, int64_t n, float* u, int64_t u_position) {
    Vec<float> half[3][4];  // [column][position in the column]
#pragma GCC unroll 4
    for (int q = 0; q < 3; ++q) {
        Vec<float> w[3];
#pragma GCC unroll 4
        for (int r = 0; r < 3; ++r) {
            w[r] = load_lanes<kPartial>(from + (r * 3 + q) * tap, n);
        }
        filter_column(w, half[q]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const Vec<float> w[3] = {half[0][i], half[1][i], half[2][i]};
        Vec<float> o[4];
        filter_column(w, o);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            store(u + (i * 4 + j) * u_position, o[j]);
        }
    }
}

inline void filter(const FilterArgs& args) {
    const FilterArgs p = args;
    const bool whole = p.lane == 1;
    for (int64_t first = 0; first < p.rows; first += kFilterRows) {
        const int64_t rows = p.rows - first < kFilterRows ? p.rows - first : kFilterRows;
        const float* from = p.weight + first * p.row;
        int64_t row = p.row, tap = p.tap, columns = p.columns;
        if (!whole) {  // scratch[row][tap][panel]
            for (int64_t j = 0; j < p.columns; ++j) {
                for (int64_t t = 0; t < 9; ++t) {
                    const float* w = from + j * p.lane + t * p.tap;
                    float* to = p.scratch + t * kTrainPanel + j;
                    for (int64_t c = 0; c < rows; ++c) {
                        to[c * 9 * kTrainPanel] = w[c * p.row];
                    }
                }
            }
            from = p.scratch, row = 9 * kTrainPanel, tap = kTrainPanel;
        }
        if (p.flipped) {
            from += 8 * tap, tap = -tap;
        }
        for (int64_t c = 0; c < rows; ++c) {
            float* u = p.u + (first + c) * kTrainPanel;
#pragma GCC unroll 2
            for (int v = 0; v < kTrainVecs; ++v) {
                const int64_t at = v * kLanes<float>, n = columns - at;
                if (n >= kLanes<float>) {
                    transform_filter<false>(from + c * row + at, tap, n, u + at, p.u_position);
                } else if (n > 0) {
                    transform_filter<true>(from + c * row + at, tap, n, u + at, p.u_position);
                } else {
                    for (int64_t i = 0; i < 16; ++i) {
                        store(u + at + i * p.u_position, Vec<float>{});
                    }
                }
            }
        }
    }
}

/// kLanes channels of one tile of dout: A e A^T.
template <bool kPartial>
DL4DS_INLINE void transform_dout(const WgradInArgs& p, int64_t c, int64_t n) {
    Vec<float> half[2][4];  // [column][position in the column]
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
        Vec<float> e[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const bool inside = i < p.rows && j < p.columns;
            e[i] =
                inside ? load_lanes<kPartial>(p.dout + i * p.stride_h + j * p.stride_w + c, n) : Vec<float>{};
        }
        half[j][0] = e[0], half[j][1] = e[0] + e[1], half[j][2] = e[0] - e[1], half[j][3] = e[1];
    }
    float* to = p.e + c / kChunk * p.e_chunk + c % kChunk;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const Vec<float> a = half[0][i], b = half[1][i];
        store(to + (i * 4 + 0) * p.e_position, a);
        store(to + (i * 4 + 1) * p.e_position, a + b);
        store(to + (i * 4 + 2) * p.e_position, a - b);
        store(to + (i * 4 + 3) * p.e_position, b);
    }
}

/// What E holds past the last channel feeds gradients that nobody reads.
inline void wgrad_in(const WgradInArgs& args) {
    const WgradInArgs p = args;
    int64_t c = 0;
    for (; c + kLanes<float> <= p.channels; c += kLanes<float>) {
        transform_dout<false>(p, c, kLanes<float>);
    }
    if (c < p.channels) {
        transform_dout<true>(p, c, p.channels - c);
    }
}

/// kRows x panel sums over `k` tiles, from zero.
template <int kRows>
DL4DS_INLINE void sum_tiles(const float* a, const float* const* b, int64_t k, const char* ahead,
                            Vec<float> (&acc)[kRows][kTrainVecs]) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kTrainVecs; ++j) {
            acc[i][j] = Vec<float>{};
        }
    }
#pragma GCC unroll 2
    for (int64_t at = 0; at < k * kChunk; at += kChunk) {
        Vec<float> vb[kTrainVecs];
#pragma GCC unroll 2
        for (int j = 0; j < kTrainVecs; ++j) {
            vb[j] = load(b[j] + at);
        }
        __builtin_prefetch(ahead + at * 4, 0, 2);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const Vec<float> va = broadcast(a[at + i]);
#pragma GCC unroll 2
            for (int j = 0; j < kTrainVecs; ++j) {
                acc[i][j] = multiply_add(va, vb[j], acc[i][j]);
            }
        }
    }
}

template <int kRows>
DL4DS_INLINE void put_sums(float* d, bool add, const Vec<float> (&acc)[kRows][kTrainVecs]) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kTrainVecs; ++j) {
            float* to = d + i * kTrainPanel + j * kLanes<float>;
            store(to, add ? load(to) + acc[i][j] : acc[i][j]);
        }
    }
}

template <int kRows>
void wgrad_gemm(const WgradGemmArgs& args) {
    const WgradGemmArgs p = args;
    const float* b[kTrainVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kTrainVecs; ++j) {
        const int64_t at = j * kLanes<float>;
        b[j] = p.b + at / kChunk * p.b_chunk + at % kChunk;
    }
    Vec<float> acc[kRows][kTrainVecs];
    if (p.k <= p.chain) {
        sum_tiles(p.a, b, p.k, p.prefetch, acc);
        put_sums(p.d, p.add, acc);
        return;
    }
    alignas(64) float sums[kRows * kTrainPanel] = {};
    for (int64_t k = 0; k < p.k; k += p.chain) {
        const float* from[kTrainVecs];
#pragma GCC unroll 2
        for (int j = 0; j < kTrainVecs; ++j) {
            from[j] = b[j] + k * kChunk;
        }
        sum_tiles(p.a + k * kChunk, from, p.k - k < p.chain ? p.k - k : p.chain, p.prefetch + k * 64, acc);
        put_sums(sums, k > 0, acc);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kTrainVecs; ++j) {
            acc[i][j] = load(sums + i * kTrainPanel + j * kLanes<float>);
        }
    }
    put_sums(p.d, p.add, acc);
}

/// G^T u of four positions.
DL4DS_INLINE void filter_gradient(const Vec<float>* u, Vec<float>* w) {
    const Vec<float> half = broadcast(0.5f), ends = half * (u[1] + u[2]);
    w[0] = ends - u[0];
    w[1] = half * (u[1] - u[2]);
    w[2] = ends + u[3];
}

inline bool wgrad_out(const WgradOutArgs& args) {
    const WgradOutArgs p = args;
    Vec<float> poison{};
    for (int64_t at = 0; at < p.columns; at += kLanes<float>) {
        Vec<float> half[4][3], w[9];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            Vec<float> u[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                u[i] = load(p.d + (i * 4 + j) * p.d_position + at);
            }
            filter_gradient(u, half[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 3; ++i) {
            const Vec<float> u[4] = {half[0][i], half[1][i], half[2][i], half[3][i]};
            filter_gradient(u, w + i * 3);
        }
        const int64_t n = p.columns - at < kLanes<float> ? p.columns - at : kLanes<float>;
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) {
            float* to = p.dweight + at * p.in + t * p.tap;
            if (n < kLanes<float>) {
                w[t] = keep_first<float>(w[t], n);
            }
            poison = multiply_add(w[t], Vec<float>{}, poison);
            if (p.in == 1 && n == kLanes<float>) {
                store(to, w[t]);
                continue;
            }
            float lanes[kLanes<float>];
            store(lanes, w[t]);
            for (int64_t c = 0; c < n; ++c) {
                to[c * p.in] = lanes[c];
            }
        }
    }
    return to_bits<float>(poison != poison) == 0;
}

#if DL4DS_VEC_BYTES == 64
void (*const kWgradGemm[])(const WgradGemmArgs&) = {nullptr, nullptr, nullptr, nullptr,       nullptr,
                                                    nullptr, nullptr, nullptr, &wgrad_gemm<8>};
#else
void (*const kWgradGemm[])(const WgradGemmArgs&) = {nullptr, nullptr,        nullptr,       nullptr,
                                                    nullptr, &wgrad_gemm<5>, &wgrad_gemm<6>};
#endif

const TrainKernels kTrainKernels = {kTrainRows, &pack_lanes, &filter, &wgrad_in, kWgradGemm, &wgrad_out};

}  // namespace DL4DS_ISA
}  // namespace dl4ds
