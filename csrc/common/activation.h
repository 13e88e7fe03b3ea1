// Activation codes and their scalar definitions, shared by every C++ backend.
//
// The codes equal dl4ds_kernels/_activation.py. The formulas follow torch's own kernels, including what they
// do with NaN, infinities and -0.0: relu and relu6 keep NaN and -0.0, leaky_relu sends NaN to the slope
// branch. No torch and no CUDA header is needed here: host code and __device__ code include the same file.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define DL4DS_HOST_DEVICE __host__ __device__
#else
#define DL4DS_HOST_DEVICE
#endif

namespace dl4ds {

enum class Activation : int {
    kNone = 0,
    kRelu = 1,
    kLeakyRelu = 2,
    kRelu6 = 3,
    kSilu = 4,
    kHardswish = 5,
};

constexpr int kNumActivations = 6;

/// True where the derivative is one of two constants, so that one bit per element is enough for the backward
/// pass.
DL4DS_HOST_DEVICE constexpr bool activation_has_mask(Activation act) {
    return act == Activation::kRelu || act == Activation::kLeakyRelu || act == Activation::kRelu6;
}

/// The lower-case name used in messages and in Python ("relu", "leaky_relu", ...).
inline const char* activation_name(Activation act) {
    switch (act) {
        case Activation::kNone:
            return "none";
        case Activation::kRelu:
            return "relu";
        case Activation::kLeakyRelu:
            return "leaky_relu";
        case Activation::kRelu6:
            return "relu6";
        case Activation::kSilu:
            return "silu";
        case Activation::kHardswish:
            return "hardswish";
    }
    return "unknown";
}

DL4DS_HOST_DEVICE inline float activation_exp(float x) { return ::expf(x); }
DL4DS_HOST_DEVICE inline double activation_exp(double x) { return ::exp(x); }

/// act(z). T is float or double (the accumulator type); slope is used by leaky_relu only.
template <Activation kAct, typename T>
DL4DS_HOST_DEVICE inline T activation_fwd(T z, [[maybe_unused]] T slope) {
    if constexpr (kAct == Activation::kRelu) {
        return z < T(0) ? T(0) : z;
    } else if constexpr (kAct == Activation::kLeakyRelu) {
        return z > T(0) ? z : z * slope;
    } else if constexpr (kAct == Activation::kRelu6) {
        return z < T(0) ? T(0) : (z > T(6) ? T(6) : z);
    } else if constexpr (kAct == Activation::kSilu) {
        return z / (T(1) + activation_exp(-z));
    } else if constexpr (kAct == Activation::kHardswish) {
        const T shifted = z + T(3);
        const T clamped = shifted < T(0) ? T(0) : (shifted > T(6) ? T(6) : shifted);
        return z * clamped / T(6);
    } else {
        return z;
    }
}

/// The mask bit of one element: true on the side where the derivative is 1 (NaN: true for relu and relu6,
/// false for leaky_relu, as in torch's backward kernels). Only for activations with activation_has_mask.
template <Activation kAct, typename T>
DL4DS_HOST_DEVICE inline bool activation_positive(T z) {
    static_assert(activation_has_mask(kAct), "this activation has no mask");
    if constexpr (kAct == Activation::kLeakyRelu) {
        return z > T(0);
    } else if constexpr (kAct == Activation::kRelu6) {
        return !(z <= T(0) || z >= T(6));
    } else {
        return !(z <= T(0));
    }
}

/// dout * act'(z), given the mask bit instead of z. Selects rather than multiplies where torch selects, so
/// that a NaN or infinite dout is dropped on the zero side.
template <Activation kAct, typename T>
DL4DS_HOST_DEVICE inline T activation_bwd_masked(T dout, bool positive, [[maybe_unused]] T slope) {
    static_assert(activation_has_mask(kAct), "this activation has no mask");
    if constexpr (kAct == Activation::kLeakyRelu) {
        return positive ? dout : dout * slope;
    } else {
        return positive ? dout : T(0);
    }
}

/// dout * act'(z); z is the activation's argument after rounding to the tensor's dtype.
template <Activation kAct, typename T>
DL4DS_HOST_DEVICE inline T activation_bwd(T dout, [[maybe_unused]] T z, [[maybe_unused]] T slope) {
    if constexpr (kAct == Activation::kNone) {
        return dout;
    } else if constexpr (kAct == Activation::kSilu) {
        const T sigmoid = T(1) / (T(1) + activation_exp(-z));
        return dout * sigmoid * (T(1) + z * (T(1) - sigmoid));
    } else if constexpr (kAct == Activation::kHardswish) {
        if (z <= T(-3)) {
            return T(0);
        }
        return z >= T(3) ? dout : dout * (z / T(3) + T(0.5));
    } else {
        return activation_bwd_masked<kAct>(dout, activation_positive<kAct>(z), slope);
    }
}

}  // namespace dl4ds
