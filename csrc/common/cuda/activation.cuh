// Activations and their gradients on whole vectors, and the bit mask that replaces the activation's argument.
#pragma once

#include "common/cuda/vec.cuh"

namespace dl4ds {

/// act(z) and dout * act'(z) of common/activation.h without its fp32 divisions, whose IEEE slow paths would
/// cost every kernel registers: a reciprocal within 2 ulp in the sigmoid, constants for the sixth and the
/// third.
__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + expf(-z)); }

template <Activation kAct, typename acc_t>
__device__ __forceinline__ acc_t device_activation(acc_t z, acc_t slope) {
    if constexpr (kAct == Activation::kSilu && sizeof(acc_t) == 4) {
        return z * sigmoid(z);
    } else if constexpr (kAct == Activation::kHardswish && sizeof(acc_t) == 4) {
        const float shifted = z + 3.0f;
        const float clamped = shifted < 0.0f ? 0.0f : (shifted > 6.0f ? 6.0f : shifted);
        return z * clamped * (1.0f / 6.0f);
    } else {
        return activation_fwd<kAct>(z, slope);
    }
}

template <Activation kAct, typename acc_t>
__device__ __forceinline__ acc_t device_activation_gradient(acc_t dout, acc_t z, acc_t slope) {
    if constexpr (kAct == Activation::kSilu && sizeof(acc_t) == 4) {
        const float s = sigmoid(z);
        return dout * s * (1.0f + z * (1.0f - s));
    } else if constexpr (kAct == Activation::kHardswish && sizeof(acc_t) == 4) {
        const float inner = dout * (z * (1.0f / 3.0f) + 0.5f);
        return z <= -3.0f ? 0.0f : (z >= 3.0f ? dout : inner);
    } else {
        return activation_bwd<kAct>(dout, z, slope);
    }
}

/// Calls fn(ActivationConstant<act>{}): the switch is uniform over the grid and stays outside element loops.
template <typename Fn>
__device__ __forceinline__ void switch_activation(Activation act, Fn&& fn) {
    switch (act) {
        DL4DS_NONLINEAR_CASES
        default:
            return fn(ActivationConstant<Activation::kNone>{});
    }
}

template <typename acc_t, int kVec>
__device__ __forceinline__ void activate(acc_t (&z)[kVec], Activation act, acc_t slope) {
    switch_activation(act, [&](auto code) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            z[k] = device_activation<decltype(code)::value>(z[k], slope);
        }
    });
}

/// Bit k is set where the derivative at z[k], rounded to T as torch sees it, is on the positive side.
template <typename T, int kVec>
__device__ __forceinline__ unsigned mask_bits(const acc_type<T> (&z)[kVec], Activation act) {
    const Pack<T, kVec> rounded = round_pack<T, kVec>(z);
    unsigned bits = 0;
    switch_activation(act, [&](auto code) {
        if constexpr (activation_has_mask(decltype(code)::value)) {
#pragma unroll
            for (int k = 0; k < kVec; ++k) {
                const bool positive = activation_positive<decltype(code)::value>(to_acc(rounded.v[k]));
                bits |= static_cast<unsigned>(positive) << k;
            }
        }
    });
    return bits;
}

/// dz = dout * act'(z) with the mask bits in place of z.
template <typename acc_t, int kVec>
__device__ __forceinline__ void masked_gradient(acc_t (&dz)[kVec], unsigned bits, Activation act,
                                                acc_t slope) {
    const bool leaky = act == Activation::kLeakyRelu;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        const acc_t off = leaky ? dz[k] * slope : acc_t(0);
        dz[k] = (bits >> k) & 1 ? dz[k] : off;
    }
}

/// dz = dout * act'(z), z rounded to T first.
template <typename T, int kVec>
__device__ __forceinline__ void activation_gradient(acc_type<T> (&dz)[kVec], const acc_type<T> (&z)[kVec],
                                                    Activation act, acc_type<T> slope) {
    const Pack<T, kVec> rounded = round_pack<T, kVec>(z);
    switch_activation(act, [&](auto code) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            dz[k] = device_activation_gradient<decltype(code)::value>(dz[k], to_acc(rounded.v[k]), slope);
        }
    });
}

/// Joins the bits of neighbouring lanes into bytes of the mask. All 32 lanes call it together; lane 0's
/// vector index `f` is a multiple of 32, and a lane without a vector passes bits = 0 and valid = false.
template <int kVec>
__device__ __forceinline__ void store_mask(uint8_t* mask, int64_t f, unsigned bits, bool valid) {
    constexpr int kLanes = 8 / kVec;
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        bits |= __shfl_down_sync(0xffffffffu, bits, lanes) << (lanes * kVec);
    }
    if (valid && f % kLanes == 0) {
        mask[f / kLanes] = static_cast<uint8_t>(bits);
    }
}

/// The kVec mask bits that belong to vector f.
template <int kVec>
__device__ __forceinline__ unsigned load_mask(const uint8_t* mask, int64_t f) {
    constexpr int kLanes = 8 / kVec;
    return mask[f / kLanes] >> (kVec * static_cast<int>(f % kLanes));
}

}  // namespace dl4ds
