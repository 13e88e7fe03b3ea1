// The element types of CPU tensors. The 16-bit floats are plain bits here; simd.h converts them to float
// vectors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"

namespace dl4ds {

struct half_t {
    uint16_t bits;
};

struct bfloat16_t {
    uint16_t bits;
};

/// The type arithmetic is done in: double for double, float for the rest.
template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <DType kDType>
using storage_t =
    std::conditional_t<kDType == DType::kFloat64, double,
                       std::conditional_t<kDType == DType::kFloat16, half_t,
                                          std::conditional_t<kDType == DType::kBFloat16, bfloat16_t, float>>>;

/// A 16-bit float as a float; other types as they are. For the few scalar reads outside the vector kernels.
inline float to_float(bfloat16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof(result));
    return result;
}

inline float to_float(half_t value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    float result;
    if (magnitude < 0x0400u) {  // zero and subnormals: an integer multiple of 2^-24
        result = static_cast<float>(magnitude) * 0x1p-24f;
        return sign ? -result : result;
    }
    const uint32_t exponent_shift = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
    const uint32_t bits = sign | ((magnitude << 13) + exponent_shift);
    __builtin_memcpy(&result, &bits, sizeof(result));
    return result;
}

/// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
inline bfloat16_t to_bfloat16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    if (value != value) {
        return {uint16_t{0x7fc0}};
    }
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

/// Rounds to the nearest float16, ties to even; NaN stays NaN, overflow gives infinity.
inline half_t to_half(float value) {
    uint32_t all;
    __builtin_memcpy(&all, &value, sizeof(all));
    const uint32_t sign = (all >> 16) & 0x8000u, bits = all & 0x7fffffffu;
    uint32_t result;
    if (bits >= 0x477ff000u) {
        result = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (bits < 0x38800000u) {  // adding 0.5 rounds to a multiple of 2^-24, in the low bits of the sum
        float magnitude;
        __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
        magnitude += 0.5f;
        __builtin_memcpy(&result, &magnitude, sizeof(result));
        result -= 0x3f000000u;
    } else {
        result = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(sign | result)};
}

}  // namespace dl4ds
