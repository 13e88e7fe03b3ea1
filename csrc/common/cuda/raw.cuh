// Vectors as words: loaded and stored as they lie in memory, taken apart and rounded two 16-bit values at a
// time.
#pragma once

#include "common/cuda/activation.cuh"

namespace dl4ds {

/// Keeps the words together up to here: the compiler would else take them apart where they are loaded, and
/// the second load would wait for the first.
template <typename T, int kVec>
__device__ __forceinline__ void pin(RawPack<T, kVec>& raw) {
    if constexpr (kVec > 1) {
        asm("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
    }
}

/// Zero, once `value` is known, by a shift of `width` = 32 places that the compiler knows nothing of: what is
/// read from an address with this added is not read before, when there is no room for it in registers yet.
__device__ __forceinline__ uint32_t zero_after(uint32_t value, uint32_t width) {
    uint32_t zero;
    asm("shr.u32 %0, %1, %2;" : "=r"(zero) : "r"(value), "r"(width));
    return zero;
}

template <typename T, int kVec>
__device__ __forceinline__ void store_raw(T* p, const RawPack<T, kVec>& raw) {
    if constexpr (kVec == 1) {
        *p = raw.v[0];
    } else {
        *reinterpret_cast<uint4*>(p) = raw;
    }
}

template <typename T, int kVec>
__device__ __forceinline__ void store_raw_upto(T* p, const RawPack<T, kVec>& raw, int64_t left) {
    if (left >= kVec) {
        store_raw<T, kVec>(p, raw);
    } else if constexpr (kVec > 1) {
        store_head<T, kVec>(p, unpack<T, kVec>(raw), left);
    }
}

/// Word `i` of a vector of four; i is a constant wherever this is called.
__device__ __forceinline__ uint32_t word(const uint4& raw, int i) {
    return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
}
__device__ __forceinline__ void set_word(uint4& raw, int i, uint32_t value) {
    (i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w) = value;
}

/// Values first .. first + kCount - 1 of a vector in the accumulator type.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ void get_values(const RawPack<T, kVec>& raw, int first,
                                           acc_type<T> (&out)[kCount]) {
    if constexpr (kVec == 1) {
        out[0] = to_acc(raw.v[0]);
    } else if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int k = 0; k < kCount; k += 2) {
            const uint32_t pair = word(raw, (first + k) / 2);
            if constexpr (std::is_same_v<T, __half>) {
                __half2 halves;
                memcpy(&halves, &pair, sizeof(pair));
                out[k] = __low2float(halves);
                out[k + 1] = __high2float(halves);
            } else {
                out[k] = __uint_as_float(pair << 16);
                out[k + 1] = __uint_as_float(pair & 0xffff0000u);
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            out[k] = __uint_as_float(word(raw, first + k));
        }
    }
}

/// Rounds kCount values into a vector's places from `first` on.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ void put_values(RawPack<T, kVec>& raw, int first, const acc_type<T> (&v)[kCount]) {
    if constexpr (kVec == 1) {
        raw.v[0] = from_acc<T>(v[0]);
    } else if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int k = 0; k < kCount; k += 2) {
            uint32_t pair;
            if constexpr (std::is_same_v<T, __half>) {
                const __half2 rounded = __floats2half2_rn(v[k], v[k + 1]);
                memcpy(&pair, &rounded, sizeof(pair));
            } else {
                const __nv_bfloat162 rounded = __floats2bfloat162_rn(v[k], v[k + 1]);
                memcpy(&pair, &rounded, sizeof(pair));
            }
            set_word(raw, (first + k) / 2, pair);
        }
    } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            set_word(raw, first + k, __float_as_uint(v[k]));
        }
    }
}

/// The largest z that T's rounding (to nearest, ties to even) makes 0: half of the smallest subnormal.
template <typename T>
__device__ __forceinline__ constexpr acc_type<T> rounds_to_zero() {
    return std::is_same_v<T, __half>
               ? acc_type<T>(0x1p-25)
               : (std::is_same_v<T, __nv_bfloat16> ? acc_type<T>(0x1p-134) : acc_type<T>(0));
}

/// The smallest z that T's rounding makes 6 or more: half-way to the value below 6, whose significand is odd.
template <typename T>
__device__ __forceinline__ constexpr acc_type<T> rounds_to_six() {
    return std::is_same_v<T, __half>
               ? acc_type<T>(6 - 0x1p-9)
               : (std::is_same_v<T, __nv_bfloat16> ? acc_type<T>(6 - 0x1p-6) : acc_type<T>(6));
}

/// activation_positive() of z rounded to T, without rounding it.
template <Activation kAct, typename T>
__device__ __forceinline__ bool rounded_positive(acc_type<T> z) {
    if constexpr (kAct == Activation::kLeakyRelu) {
        return z > rounds_to_zero<T>();
    } else if constexpr (kAct == Activation::kRelu6) {
        return !(z <= rounds_to_zero<T>() || z >= rounds_to_six<T>());
    } else {
        return !(z <= rounds_to_zero<T>());
    }
}

/// mask_bits() without rounding z.
template <typename T, int kCount>
__device__ __forceinline__ unsigned positive_bits(const acc_type<T> (&z)[kCount], Activation act) {
    unsigned bits = 0;
    switch_activation(act, [&](auto code) {
        if constexpr (activation_has_mask(decltype(code)::value)) {
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                bits |= rounded_positive<decltype(code)::value, T>(z[k]) ? 1u << k : 0u;
            }
        }
    });
    return bits;
}

/// activation_gradient() that rounds z only where the derivative is more than its sign: the switch is uniform
/// over the grid.
template <typename T, int kCount>
__device__ __forceinline__ void rounded_gradient(acc_type<T> (&dz)[kCount], const acc_type<T> (&z)[kCount],
                                                 Activation act, acc_type<T> slope) {
    switch_activation(act, [&](auto code) {
        constexpr Activation kAct = decltype(code)::value;
        if constexpr (activation_has_mask(kAct)) {
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                dz[k] = activation_bwd_masked<kAct>(dz[k], rounded_positive<kAct, T>(z[k]), slope);
            }
        } else if constexpr (kAct != Activation::kNone) {
            const Pack<T, kCount> rounded = round_pack<T, kCount>(z);
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                dz[k] = device_activation_gradient<kAct>(dz[k], to_acc(rounded.v[k]), slope);
            }
        }
    });
}

}  // namespace dl4ds
