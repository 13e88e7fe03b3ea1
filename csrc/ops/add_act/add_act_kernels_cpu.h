// The kernels of add_act on flat memory (see add_act_cpu.h), compiled once per ISA by foreach_isa.h.
#include "common/cpu/vec_activation.h"

namespace dl4ds {
namespace DL4DS_ISA {

template <typename scalar_t, Activation kAct, bool kPartial>
DL4DS_INLINE void add_act_lanes(const AddActArgs& p, int64_t i, int64_t n, bool streaming, BitWriter& bits) {
    using T = acc_t<scalar_t>;
    Vec<T> z = load_lanes<kPartial>(static_cast<const scalar_t*>(p.x) + i, n);
    if (p.residual != nullptr) {
        z += load_lanes<kPartial>(static_cast<const scalar_t*>(p.residual) + i, n);
    }
    if (p.third != nullptr) {
        z += load_lanes<kPartial>(static_cast<const scalar_t*>(p.third) + i, n);
    }
    z *= static_cast<T>(p.alpha);
    if constexpr (activation_has_mask(kAct)) {
        if (p.mask != nullptr) {
            const uint32_t positive = to_bits<T>(act_positive<kAct, T>(round_to<scalar_t>(z)));
            bits.put(kPartial ? positive & ((1u << n) - 1u) : positive, static_cast<int>(n));
        }
    }
    const Vec<T> out = act_fwd<kAct, T>(z, broadcast<T>(static_cast<T>(p.slope)));
    store_lanes<kPartial>(static_cast<scalar_t*>(p.out) + i, out, n, streaming);
}

template <typename scalar_t, Activation kAct>
void add_act_fwd(const AddActArgs& args) {
    const AddActArgs p = args;  // a copy that no store can alias stays in registers
    constexpr int W = kLanes<acc_t<scalar_t>>;
    BitWriter bits = p.mask != nullptr ? *p.mask : BitWriter{};
    int64_t i = 0;
    if (p.streaming) {
        i = elements_to_alignment(static_cast<scalar_t*>(p.out), p.n);
        if (i > 0) {
            add_act_lanes<scalar_t, kAct, true>(p, 0, i, false, bits);
        }
    }
    for (; i + W <= p.n; i += W) {
        add_act_lanes<scalar_t, kAct, false>(p, i, W, p.streaming, bits);
    }
    if (i < p.n) {
        add_act_lanes<scalar_t, kAct, true>(p, i, p.n - i, false, bits);
    }
    if (p.mask != nullptr) {
        *p.mask = bits;
    }
    if (p.streaming) {
        stream_fence();
    }
}

template <typename scalar_t, Activation kAct, bool kPartial>
DL4DS_INLINE void add_act_bwd_lanes(const AddActBwdArgs& p, int64_t i, int64_t n, bool streaming) {
    using T = acc_t<scalar_t>;
    const Vec<T> slope = broadcast<T>(static_cast<T>(p.slope));
    const T alpha = static_cast<T>(p.alpha);
    Vec<T> dz = load_lanes<kPartial>(static_cast<const scalar_t*>(p.dout) + i, n);
    bool done = kAct == Activation::kNone;
    if constexpr (activation_has_mask(kAct)) {
        if (p.mask != nullptr) {
            const uint32_t positive = read_bits(p.mask, p.mask_bit + i, static_cast<int>(n));
            dz = act_bwd_masked<kAct, T>(dz, from_bits<T>(positive), slope);
            done = true;
        }
    }
    if (!done) {
        const Vec<T> sum = load_lanes<kPartial>(static_cast<const scalar_t*>(p.x) + i, n) +
                           load_lanes<kPartial>(static_cast<const scalar_t*>(p.residual) + i, n);
        dz = act_bwd<kAct, T>(dz, round_to<scalar_t>(sum * alpha), slope);
    }
    store_lanes<kPartial>(static_cast<scalar_t*>(p.dx) + i, dz * alpha, n, streaming);
}

template <typename scalar_t, Activation kAct>
void add_act_bwd(const AddActBwdArgs& args) {
    const AddActBwdArgs p = args;  // see add_act_fwd()
    constexpr int W = kLanes<acc_t<scalar_t>>;
    int64_t i = 0;
    if (p.streaming) {
        i = elements_to_alignment(static_cast<scalar_t*>(p.dx), p.n);
        if (i > 0) {
            add_act_bwd_lanes<scalar_t, kAct, true>(p, 0, i, false);
        }
    }
    for (; i + W <= p.n; i += W) {
        add_act_bwd_lanes<scalar_t, kAct, false>(p, i, W, p.streaming);
    }
    if (i < p.n) {
        add_act_bwd_lanes<scalar_t, kAct, true>(p, i, p.n - i, false);
    }
    if (p.streaming) {
        stream_fence();
    }
}

#define DL4DS_ALL_ACTIVATIONS(kernel, scalar_t)                                        \
    {&kernel<scalar_t, Activation::kNone>,      &kernel<scalar_t, Activation::kRelu>,  \
     &kernel<scalar_t, Activation::kLeakyRelu>, &kernel<scalar_t, Activation::kRelu6>, \
     &kernel<scalar_t, Activation::kSilu>,      &kernel<scalar_t, Activation::kHardswish>}
#define DL4DS_ALL_DTYPES(kernel)                                                  \
    {DL4DS_ALL_ACTIVATIONS(kernel, float), DL4DS_ALL_ACTIVATIONS(kernel, double), \
     DL4DS_ALL_ACTIVATIONS(kernel, half_t), DL4DS_ALL_ACTIVATIONS(kernel, bfloat16_t)}

const AddActKernels kAddActKernels = {DL4DS_ALL_DTYPES(add_act_fwd), DL4DS_ALL_DTYPES(add_act_bwd)};

#undef DL4DS_ALL_ACTIVATIONS
#undef DL4DS_ALL_DTYPES

}  // namespace DL4DS_ISA
}  // namespace dl4ds
