// The kernel of linear_act (see linear_act_cpu.h), compiled once per ISA by foreach_isa.h. Every weight is
// used for a few rows only, so the time is that of reading the weight from memory: it is read where it lies,
// front to back, without a packed copy, and asked for well ahead.
#include "common/cpu/vec_activation.h"

namespace dl4ds {
namespace DL4DS_ISA {

constexpr int64_t kAhead = 1024;  // floats from a weight that is used to the one that is asked for
// Partial sums start anew after 64 vectors: the rounding error grows with the length of a piece and the
// number of pieces, not with k. Eight rows of x of this length stay in the first two caches.
constexpr int64_t kPiece = 64 * kLanes<float>;

/// Adds [from, to) of the products of kRows rows of x with kOutputs rows of the weight. Each sum has one
/// accumulator, so that its order does not depend on how rows are grouped.
template <int kRows, int kOutputs>
DL4DS_INLINE void add_piece(const float* x, const float* w, int64_t k, int64_t from, int64_t to,
                            Vec<float> (&total)[kRows][kOutputs]) {
    Vec<float> acc[kRows][kOutputs] = {};
    int64_t at = from;
    for (; at + kLanes<float> <= to; at += kLanes<float>) {
        Vec<float> vw[kOutputs];
#pragma GCC unroll 4
        for (int j = 0; j < kOutputs; ++j) {
            vw[j] = load(w + j * k + at);
            __builtin_prefetch(w + j * k + at + kAhead, 0, 3);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const Vec<float> vx = load(x + i * k + at);
#pragma GCC unroll 4
            for (int j = 0; j < kOutputs; ++j) {
                acc[i][j] = multiply_add(vx, vw[j], acc[i][j]);
            }
        }
    }
    if (at < to) {
        for (int i = 0; i < kRows; ++i) {
            for (int j = 0; j < kOutputs; ++j) {
                acc[i][j] = multiply_add(load_partial(x + i * k + at, to - at),
                                         load_partial(w + j * k + at, to - at), acc[i][j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kOutputs; ++j) {
            total[i][j] += acc[i][j];
        }
    }
}

template <int kRows, int kOutputs>
void dots(const LinearArgs& p, int64_t first) {
    Vec<float> total[kRows][kOutputs] = {};
    const float* w = p.weight + first * p.k;
    for (int64_t from = 0; from < p.k; from += kPiece) {
        add_piece<kRows, kOutputs>(p.x, w, p.k, from, from + kPiece < p.k ? from + kPiece : p.k, total);
    }
    for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kOutputs; ++j) {
            const float sum = sum_lanes(total[i][j]);
            p.out[i * p.pitch + first + j] = p.bias == nullptr ? sum : sum + p.bias[first + j];
        }
    }
}

template <Activation kAct>
void activate(float* out, int64_t n, float slope) {
    int64_t i = 0;
    for (; i + kLanes<float> <= n; i += kLanes<float>) {
        store(out + i, act_fwd<kAct, float>(load(out + i), broadcast(slope)));
    }
    if (i < n) {
        store_partial(out + i, act_fwd<kAct, float>(load_partial(out + i, n - i), broadcast(slope)), n - i);
    }
}

inline void activate_any(Activation activation, float* out, int64_t n, float slope) {
    switch (activation) {
        case Activation::kRelu:
            return activate<Activation::kRelu>(out, n, slope);
        case Activation::kLeakyRelu:
            return activate<Activation::kLeakyRelu>(out, n, slope);
        case Activation::kRelu6:
            return activate<Activation::kRelu6>(out, n, slope);
        case Activation::kSilu:
            return activate<Activation::kSilu>(out, n, slope);
        case Activation::kHardswish:
            return activate<Activation::kHardswish>(out, n, slope);
        default:
            return;
    }
}

/// As many rows of the weight at once as leave accumulators in registers: 16 of them, 32 on AVX-512.
template <int kRows>
void run_rows(const LinearArgs& args) {
    const LinearArgs p = args;
    constexpr int kRoom = DL4DS_VEC_BYTES == 64 ? 24 : 12;
    constexpr int kOutputs = kRows * 4 <= kRoom ? 4 : kRows * 2 <= kRoom ? 2 : 1;
    int64_t j = 0;
    for (; j + kOutputs <= p.outputs; j += kOutputs) {
        dots<kRows, kOutputs>(p, j);
    }
    for (; j < p.outputs; ++j) {
        dots<kRows, 1>(p, j);
    }
    for (int i = 0; i < kRows; ++i) {
        activate_any(p.activation, p.out + i * p.pitch, p.outputs, p.slope);
    }
}

inline void linear_run(const LinearArgs& p) {
    static constexpr void (*kRun[])(const LinearArgs&) = {nullptr,      &run_rows<1>, &run_rows<2>,
                                                          &run_rows<3>, &run_rows<4>, &run_rows<5>,
                                                          &run_rows<6>, &run_rows<7>, &run_rows<8>};
    static_assert(sizeof(kRun) / sizeof(kRun[0]) == kLinearMostRows + 1);
    kRun[p.rows](p);
}

const LinearKernels kLinearKernels = {&linear_run};

}  // namespace DL4DS_ISA
}  // namespace dl4ds
