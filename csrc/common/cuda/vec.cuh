// 16-byte memory accesses, conversions between storage and accumulator types, per-channel vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "common/dispatch.h"
#include "common/geometry.h"

namespace dl4ds {

template <typename T>
struct AccType {
    using type = float;
};
template <>
struct AccType<double> {
    using type = double;
};
template <typename T>
using acc_type = typename AccType<T>::type;

template <typename T>
__device__ __forceinline__ acc_type<T> to_acc(T v) {
    if constexpr (std::is_same_v<T, __half>) {
        return __half2float(v);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        // A shift on every architecture; the conversion instruction of sm_90 costs registers in packed code.
        return __uint_as_float(static_cast<uint32_t>(__bfloat16_as_ushort(v)) << 16);
    } else {
        return v;
    }
}

template <typename T>
__device__ __forceinline__ T from_acc(acc_type<T> v) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(v);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(v);
    } else {
        return v;
    }
}

/// kVec values that move with one memory instruction (kVec * sizeof(T) is 16, or kVec is 1).
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
    T v[kVec];
};

template <typename T, int kVec>
__device__ __forceinline__ Pack<T, kVec> load_pack(const T* p) {
    Pack<T, kVec> pack;
    if constexpr (kVec == 1) {
        pack.v[0] = *p;
    } else {
        static_assert(sizeof(pack) == 16, "a vector access moves 16 bytes");
        const uint4 raw = *reinterpret_cast<const uint4*>(p);
        memcpy(&pack, &raw, sizeof(raw));
    }
    return pack;
}

/// A pack as it was loaded. Several loads are under way at once only if nothing takes the values apart before
/// the last of them has been sent: kernels load raw packs first and unpack() them afterwards.
template <typename T, int kVec>
using RawPack = std::conditional_t<kVec == 1, Pack<T, 1>, uint4>;

template <typename T, int kVec>
__device__ __forceinline__ RawPack<T, kVec> load_raw(const T* p) {
    if constexpr (kVec == 1) {
        return load_pack<T, 1>(p);
    } else {
        return *reinterpret_cast<const uint4*>(p);
    }
}

template <typename T, int kVec>
__device__ __forceinline__ Pack<T, kVec> unpack(RawPack<T, kVec> raw) {
    if constexpr (kVec == 1) {
        return raw;
    } else {
        // Words up to here: the compiler would else take them apart where they are loaded.
        asm("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
        Pack<T, kVec> pack;
        memcpy(&pack, &raw, sizeof(raw));
        return pack;
    }
}

template <typename T, int kVec>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kVec>& pack) {
    if constexpr (kVec == 1) {
        *p = pack.v[0];
    } else {
        uint4 raw;
        memcpy(&raw, &pack, sizeof(raw));
        *reinterpret_cast<uint4*>(p) = raw;
    }
}

/// The first `count` values (the end of a tensor whose size is no multiple of kVec); the rest are zero.
template <typename T, int kVec>
__device__ __forceinline__ Pack<T, kVec> load_head(const T* p, int64_t count) {
    Pack<T, kVec> pack;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        pack.v[k] = k < count ? p[k] : from_acc<T>(0);
    }
    return pack;
}

template <typename T, int kVec>
__device__ __forceinline__ void store_head(T* p, const Pack<T, kVec>& pack, int64_t count) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        if (k < count) {
            p[k] = pack.v[k];
        }
    }
}

/// Whole vector, or what is left of it at the end of the tensor.
template <typename T, int kVec>
__device__ __forceinline__ Pack<T, kVec> load_upto(const T* p, int64_t left) {
    return left >= kVec ? load_pack<T, kVec>(p) : load_head<T, kVec>(p, left);
}

template <typename T, int kVec>
__device__ __forceinline__ RawPack<T, kVec> load_raw_upto(const T* p, int64_t left) {
    if constexpr (kVec == 1) {
        return load_upto<T, 1>(p, left);
    } else {
        uint4 raw;
        if (left >= kVec) {
            raw = load_raw<T, kVec>(p);
        } else {
            const Pack<T, kVec> head = load_head<T, kVec>(p, left);
            memcpy(&raw, &head, sizeof(raw));
        }
        return raw;
    }
}

template <typename T, int kVec>
__device__ __forceinline__ void store_upto(T* p, const Pack<T, kVec>& pack, int64_t left) {
    if (left >= kVec) {
        store_pack<T, kVec>(p, pack);
    } else {
        store_head<T, kVec>(p, pack, left);
    }
}

/// Rounds to the storage type, two values an instruction where there is one.
template <typename T, int kVec>
__device__ __forceinline__ Pack<T, kVec> round_pack(const acc_type<T> (&v)[kVec]) {
    Pack<T, kVec> pack;
    if constexpr (kVec % 2 == 0 && std::is_same_v<T, __half>) {
#pragma unroll
        for (int k = 0; k < kVec; k += 2) {
            const __half2 pair = __floats2half2_rn(v[k], v[k + 1]);
            pack.v[k] = __low2half(pair);
            pack.v[k + 1] = __high2half(pair);
        }
    } else if constexpr (kVec % 2 == 0 && std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
        for (int k = 0; k < kVec; k += 2) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(v[k], v[k + 1]);
            pack.v[k] = __low2bfloat16(pair);
            pack.v[k + 1] = __high2bfloat16(pair);
        }
    } else {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            pack.v[k] = from_acc<T>(v[k]);
        }
    }
    return pack;
}

/// Puts kCount rounded values into a pack from place `first` on.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ void set_values(Pack<T, kVec>& pack, int first, const acc_type<T> (&v)[kCount]) {
    const Pack<T, kCount> rounded = round_pack<T, kCount>(v);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        pack.v[first + k] = rounded.v[k];
    }
}

template <typename acc_t>
__device__ __forceinline__ acc_t load_channel(const ChannelVector& v, int64_t c) {
    switch (v.dtype) {
        case DType::kFloat64:
            return static_cast<acc_t>(static_cast<const double*>(v.data)[c]);
        case DType::kFloat16:
            return __half2float(static_cast<const __half*>(v.data)[c]);
        case DType::kBFloat16:
            return __bfloat162float(static_cast<const __nv_bfloat16*>(v.data)[c]);
        default:
            return static_cast<const float*>(v.data)[c];
    }
}

template <typename S, typename acc_t, int kVec>
__device__ __forceinline__ void load_channels_as(const S* p, acc_t (&out)[kVec]) {
    constexpr int kPack = 16 / sizeof(S) < kVec ? 16 / sizeof(S) : kVec;
    if constexpr (kPack * sizeof(S) == 16) {
        if (reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
            for (int k = 0; k < kVec; k += kPack) {
                const Pack<S, kPack> pack = load_pack<S, kPack>(p + k);
#pragma unroll
                for (int i = 0; i < kPack; ++i) {
                    out[k + i] = to_acc(pack.v[i]);
                }
            }
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
        out[k] = to_acc(p[k]);
    }
}

/// Values of a table in global or shared memory that the compiler must not keep in registers across a loop:
/// it would rather spill than read them again. (Single values it may keep.)
template <int kCount>
__device__ __forceinline__ void reload_global(const float* p, float (&out)[kCount]) {
    if constexpr (kCount == 4) {
        asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
                     : "l"(__cvta_generic_to_global(p)));
    } else {
        static_assert(kCount == 1, "one value or four");
        out[0] = p[0];
    }
}
template <int kCount>
__device__ __forceinline__ void reload_shared(const float* p, float (&out)[kCount]) {
    if constexpr (kCount == 4) {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
                     : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))));
    } else {
        static_assert(kCount == 1, "one value or four");
        out[0] = p[0];
    }
}
__device__ __forceinline__ void reload_global(const double* p, double (&out)[1]) { out[0] = p[0]; }
__device__ __forceinline__ void reload_shared(const double* p, double (&out)[1]) { out[0] = p[0]; }

/// kVec neighbouring channels, by 16-byte loads where the address allows.
template <typename acc_t, int kVec>
__device__ __forceinline__ void load_channels(const ChannelVector& v, int64_t c, acc_t (&out)[kVec]) {
    if constexpr (kVec == 1) {
        out[0] = load_channel<acc_t>(v, c);
    } else if (v.dtype == DType::kFloat16) {
        load_channels_as(static_cast<const __half*>(v.data) + c, out);
    } else if (v.dtype == DType::kBFloat16) {
        load_channels_as(static_cast<const __nv_bfloat16*>(v.data) + c, out);
    } else {
        load_channels_as(static_cast<const float*>(v.data) + c, out);
    }
}

__device__ __forceinline__ void store_channel(void* data, DType dtype, int64_t c, double value) {
    switch (dtype) {
        case DType::kFloat64:
            static_cast<double*>(data)[c] = value;
            break;
        case DType::kFloat16:
            static_cast<__half*>(data)[c] = __float2half_rn(static_cast<float>(value));
            break;
        case DType::kBFloat16:
            static_cast<__nv_bfloat16*>(data)[c] = __float2bfloat16_rn(static_cast<float>(value));
            break;
        default:
            static_cast<float*>(data)[c] = static_cast<float>(value);
    }
}

}  // namespace dl4ds
