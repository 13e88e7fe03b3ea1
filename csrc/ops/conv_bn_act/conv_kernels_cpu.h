// The kernels of the convolution engine (see conv_engine_cpu.h), compiled once per ISA by foreach_isa.h.
#include "common/cpu/vec_activation.h"

namespace dl4ds {
namespace DL4DS_ISA {

// Registers decide the micro-kernel: rows * 2 accumulators, 2 vectors of B and a broadcast. AVX-512 has 32 of
// them, AVX2 and SSE2 have 16.
constexpr int kPanelVecs = 2;
constexpr int kPanel = kPanelVecs * kLanes<float>;
#if DL4DS_VEC_BYTES == 64
constexpr int kMaxRows = 14;
#else
constexpr int kMaxRows = 6;
#endif

/// act(z) for the activations that are a clamp; the others are applied to what was stored (finish_rest).
struct Clamp {
    Vec<float> low, high;
};

DL4DS_INLINE Clamp clamp_of(Activation activation) {
    const bool cut = activation == Activation::kRelu || activation == Activation::kRelu6;
    return {broadcast(cut ? 0.0f : -__builtin_inff()),
            broadcast(activation == Activation::kRelu6 ? 6.0f : __builtin_inff())};
}

DL4DS_INLINE bool is_clamp(Activation activation) {
    return activation == Activation::kNone || activation == Activation::kRelu ||
           activation == Activation::kRelu6;
}

/// Keeps NaN: a comparison with it is false.
DL4DS_INLINE Vec<float> clamp(Vec<float> z, const Clamp& c) {
    z = z < c.low ? c.low : z;
    return z > c.high ? c.high : z;
}

template <Activation kAct>
void activate_row(float* out, int64_t n, float slope) {
    int64_t i = 0;
    for (; i + kLanes<float> <= n; i += kLanes<float>) {
        store(out + i, act_fwd<kAct, float>(load(out + i), broadcast(slope)));
    }
    if (i < n) {
        store_partial(out + i, act_fwd<kAct, float>(load_partial(out + i, n - i), broadcast(slope)), n - i);
    }
}

/// An activation that is no clamp, in place on `columns` stored values.
inline void finish_rest(float* out, const GemmFinish& f) {
    switch (f.activation) {
        case Activation::kLeakyRelu:
            return activate_row<Activation::kLeakyRelu>(out, f.columns, f.slope);
        case Activation::kSilu:
            return activate_row<Activation::kSilu>(out, f.columns, f.slope);
        case Activation::kHardswish:
            return activate_row<Activation::kHardswish>(out, f.columns, f.slope);
        default:
            return;
    }
}

/// 1 / sqrt(var + eps) or 1 / (sqrt(var) + eps) of n channels. The loops of this function and the next are
/// left to the compiler's vectorizer: there is no portable vector square root.
inline void reciprocal_std(const float* var, int64_t n, double eps, bool eps_std, double* out) {
    if (eps_std) {
        for (int64_t i = 0; i < n; ++i) {
            out[i] = 1.0 / (__builtin_sqrt(static_cast<double>(var[i])) + eps);
        }
    } else {
        for (int64_t i = 0; i < n; ++i) {
            out[i] = 1.0 / __builtin_sqrt(static_cast<double>(var[i]) + eps);
        }
    }
}

inline void scale_shift(const ScaleShiftArgs& args) {
    const ScaleShiftArgs p = args;
    constexpr int64_t kBlock = 64;
    double a[kBlock], b[kBlock];
    for (int64_t first = 0; first < p.channels; first += kBlock) {
        const int64_t n = p.channels - first < kBlock ? p.channels - first : kBlock;
        for (int64_t i = 0; i < n; ++i) {
            a[i] = 1.0, b[i] = 0.0;
        }
        if (p.var != nullptr) {
            reciprocal_std(p.var + first, n, p.eps, p.eps_std, a);
        }
        for (int64_t i = 0; p.weight != nullptr && i < n; ++i) {
            a[i] *= static_cast<double>(p.weight[first + i]);
        }
        for (int64_t i = 0; p.conv_bias != nullptr && i < n; ++i) {
            b[i] = static_cast<double>(p.conv_bias[first + i]);
        }
        for (int64_t i = 0; p.mean != nullptr && i < n; ++i) {
            b[i] -= static_cast<double>(p.mean[first + i]);
        }
        for (int64_t i = 0; i < n; ++i) {
            b[i] *= a[i];
        }
        for (int64_t i = 0; p.bias != nullptr && i < n; ++i) {
            b[i] += static_cast<double>(p.bias[first + i]);
        }
        for (int64_t i = 0; i < n; ++i) {
            p.scale[first + i] = static_cast<float>(a[i]);
            p.shift[first + i] = static_cast<float>(b[i]);
        }
    }
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds

#include "ops/conv_bn_act/conv_depthwise_kernels_cpu.h"
#include "ops/conv_bn_act/conv_gemm_kernels_cpu.h"
#include "ops/conv_bn_act/conv_narrow_kernels_cpu.h"
#include "ops/conv_bn_act/conv_strassen_kernels_cpu.h"
#include "ops/conv_bn_act/conv_winograd_kernels_cpu.h"

// After the GEMM, and after the packing that it falls back to.
#include "ops/conv_bn_act/conv_back_kernels_cpu.h"
#include "ops/conv_bn_act/conv_fields_kernels_cpu.h"

namespace dl4ds {
namespace DL4DS_ISA {

const ConvKernels kConvKernels = {
    kPanel,
    kMaxRows,
    kGemm,
    kGemmFinish,
    kGemmBack,
    &pack_fields,
    &pack_sources,
    {&winograd_in<WinogradF2>, &winograd_in<WinogradF4>, &winograd_in<WinogradF6>},
    {&winograd_out<WinogradF2>, &winograd_out<WinogradF4>, &winograd_out<WinogradF6>},
    &strassen_in,
    &strassen_out,
    &scale_shift,
    &depthwise_row,
    kNarrow,
};

}  // namespace DL4DS_ISA
}  // namespace dl4ds
