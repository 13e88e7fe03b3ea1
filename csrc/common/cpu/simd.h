// Vectors for the CPU kernels, on the compilers' vector extensions. Included once per ISA by foreach_isa.h,
// so there is no include guard. Vec<T> is one native register of T (float or double); +, -, *, /, comparisons
// and `mask ? a : b` are the language's own. A comparison gives a vector of integers, all ones for true.
// 16-bit floats exist in memory only: load<half_t> gives Vec<float>.
namespace dl4ds {
namespace DL4DS_ISA {

#define DL4DS_INLINE inline __attribute__((always_inline))

template <typename T>
struct VecTypes;
template <>
struct VecTypes<float> {
    typedef float Float __attribute__((vector_size(DL4DS_VEC_BYTES)));
    typedef int32_t Int __attribute__((vector_size(DL4DS_VEC_BYTES)));
    typedef uint32_t Unsigned __attribute__((vector_size(DL4DS_VEC_BYTES)));
    typedef float HalfFloat __attribute__((vector_size(DL4DS_VEC_BYTES / 2)));
    typedef uint16_t Bits16 __attribute__((vector_size(DL4DS_VEC_BYTES / 2)));
    static constexpr int kMantissaBits = 23;
    static constexpr int32_t kExponentBias = 127;
};
template <>
struct VecTypes<double> {
    typedef double Float __attribute__((vector_size(DL4DS_VEC_BYTES)));
    typedef int64_t Int __attribute__((vector_size(DL4DS_VEC_BYTES)));
    typedef uint64_t Unsigned __attribute__((vector_size(DL4DS_VEC_BYTES)));
    static constexpr int kMantissaBits = 52;
    static constexpr int64_t kExponentBias = 1023;
};

template <typename T>
using Vec = typename VecTypes<T>::Float;
template <typename T>
using Mask = typename VecTypes<T>::Int;
template <typename T>
constexpr int kLanes = DL4DS_VEC_BYTES / static_cast<int>(sizeof(T));

template <typename To, typename From>
DL4DS_INLINE To bit_cast_vec(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <typename T>
DL4DS_INLINE Vec<T> broadcast(T value) {
    return value - Vec<T>{};  // x - 0 is x, also for -0: compilers fold it; they must keep 0 + x
}

/// a * b + c, one rounding where the ISA has fma.
template <typename T>
DL4DS_INLINE T multiply_add(T a, T b, T c) {
    return a * b + c;
}

// ---- 16-bit floats
using Bits16 = VecTypes<float>::Bits16;
using Bits32 = VecTypes<float>::Unsigned;

DL4DS_INLINE Vec<float> widen(Bits16 bits, bfloat16_t) {
    return bit_cast_vec<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
}

/// Round to nearest even; NaN becomes the quiet NaN 0x7fc0.
DL4DS_INLINE Bits16 narrow(Vec<float> value, bfloat16_t) {
    const Bits32 bits = bit_cast_vec<Bits32>(value);
    const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(value == value ? rounded : Bits32{} + 0x7fc0u, Bits16);
}

#if defined(__x86_64__) && DL4DS_VEC_BYTES == 64
DL4DS_INLINE Vec<float> widen(Bits16 bits, half_t) {
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
DL4DS_INLINE Bits16 narrow(Vec<float> value, half_t) {
    return (Bits16)_mm512_maskz_cvtps_ph(0xffff, (__m512)value,
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__x86_64__) && DL4DS_VEC_BYTES == 32
DL4DS_INLINE Vec<float> widen(Bits16 bits, half_t) { return (Vec<float>)_mm256_cvtph_ps((__m128i)bits); }
DL4DS_INLINE Bits16 narrow(Vec<float> value, half_t) {
    return (Bits16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__aarch64__)
typedef __fp16 HalfVec __attribute__((vector_size(DL4DS_VEC_BYTES / 2)));
DL4DS_INLINE Vec<float> widen(Bits16 bits, half_t) {
    return __builtin_convertvector(bit_cast_vec<HalfVec>(bits), Vec<float>);
}
DL4DS_INLINE Bits16 narrow(Vec<float> value, half_t) {
    return bit_cast_vec<Bits16>(__builtin_convertvector(value, HalfVec));
}
#else
DL4DS_INLINE Vec<float> widen(Bits16 bits16, half_t) {
    const Bits32 bits = __builtin_convertvector(bits16, Bits32);
    const Bits32 sign = (bits & 0x8000u) << 16;
    const Bits32 magnitude = bits & 0x7fffu;
    // Below 2^-14 a half is an integer multiple of 2^-24; above, the exponent is moved (twice for inf and
    // NaN).
    const Vec<float> subnormal =
        __builtin_convertvector(bit_cast_vec<Mask<float>>(magnitude), Vec<float>) * 0x1p-24f;
    const Bits32 shift = magnitude >= 0x7c00u ? Bits32{} + 0x70000000u : Bits32{} + 0x38000000u;
    const Bits32 result = magnitude < 0x0400u ? bit_cast_vec<Bits32>(subnormal) : (magnitude << 13) + shift;
    return bit_cast_vec<Vec<float>>(result | sign);
}
DL4DS_INLINE Bits16 narrow(Vec<float> value, half_t) {
    const Bits32 all = bit_cast_vec<Bits32>(value);
    const Bits32 sign = (all >> 16) & 0x8000u;
    const Bits32 bits = all & 0x7fffffffu;
    // Adding 0.5 rounds a value below 2^-14 to a multiple of 2^-24, in the low bits of the sum.
    const Bits32 subnormal = bit_cast_vec<Bits32>(bit_cast_vec<Vec<float>>(bits) + 0.5f) - 0x3f000000u;
    const Bits32 normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    const Bits32 overflow = bits > 0x7f800000u ? Bits32{} + 0x7e00u : Bits32{} + 0x7c00u;
    const Bits32 finite = bits < 0x38800000u ? subnormal : normal;
    return __builtin_convertvector((bits >= 0x477ff000u ? overflow : finite) | sign, Bits16);
}
#endif

// ---- memory
template <typename scalar_t>
DL4DS_INLINE Vec<acc_t<scalar_t>> load(const scalar_t* from) {
    if constexpr (sizeof(scalar_t) == 2) {
        Bits16 bits;
        __builtin_memcpy(&bits, from, sizeof(bits));
        return widen(bits, scalar_t{});
    } else {
        Vec<scalar_t> value;
        __builtin_memcpy(&value, from, sizeof(value));
        return value;
    }
}

/// The first n lanes from memory (0 < n < lanes), zeros behind.
template <typename scalar_t>
DL4DS_INLINE Vec<acc_t<scalar_t>> load_partial(const scalar_t* from, int64_t n) {
#if defined(__x86_64__) && DL4DS_VEC_BYTES == 64
    if constexpr (std::is_same_v<scalar_t, float>) {
        return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), from);
    }
#endif
    scalar_t buffer[kLanes<acc_t<scalar_t>>] = {};
    for (int64_t i = 0; i < n; ++i) {
        buffer[i] = from[i];
    }
    return load(buffer);
}

template <typename scalar_t>
DL4DS_INLINE void store(scalar_t* to, Vec<acc_t<scalar_t>> value) {
    if constexpr (sizeof(scalar_t) == 2) {
        const Bits16 bits = narrow(value, scalar_t{});
        __builtin_memcpy(to, &bits, sizeof(bits));
    } else {
        __builtin_memcpy(to, &value, sizeof(value));
    }
}

template <typename scalar_t>
DL4DS_INLINE void store_partial(scalar_t* to, Vec<acc_t<scalar_t>> value, int64_t n) {
#if defined(__x86_64__) && DL4DS_VEC_BYTES == 64
    if constexpr (std::is_same_v<scalar_t, float>) {
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1u), (__m512)value);
        return;
    }
#endif
    scalar_t buffer[kLanes<acc_t<scalar_t>>];
    store(buffer, value);
    for (int64_t i = 0; i < n; ++i) {
        to[i] = buffer[i];
    }
}

/// Alignment that stream() needs, in bytes.
template <typename scalar_t>
constexpr int64_t kStreamAlign = kLanes<acc_t<scalar_t>> * static_cast<int64_t>(sizeof(scalar_t));

/// A store past the caches, to an address aligned to kStreamAlign; an ordinary store where the ISA has none.
template <typename scalar_t>
DL4DS_INLINE void stream(scalar_t* to, Vec<acc_t<scalar_t>> value) {
#if defined(__x86_64__)
    if constexpr (sizeof(scalar_t) == 2) {
        const Bits16 bits = narrow(value, scalar_t{});
#if DL4DS_VEC_BYTES == 64
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)bits);
#elif DL4DS_VEC_BYTES == 32
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)bits);
#else
        __builtin_memcpy(to, &bits, sizeof(bits));
#endif
    } else {
#if DL4DS_VEC_BYTES == 64
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast_vec<__m512i>(value));
#elif DL4DS_VEC_BYTES == 32
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast_vec<__m256i>(value));
#else
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast_vec<__m128i>(value));
#endif
    }
#else
    store(to, value);
#endif
}

/// A vector's worth of elements, or the first n lanes of one.
template <bool kPartial, typename scalar_t>
DL4DS_INLINE Vec<acc_t<scalar_t>> load_lanes(const scalar_t* from, int64_t n) {
    if constexpr (kPartial) {
        return load_partial(from, n);
    } else {
        return load(from);
    }
}

template <bool kPartial, typename scalar_t>
DL4DS_INLINE void store_lanes(scalar_t* to, Vec<acc_t<scalar_t>> value, int64_t n, bool streaming) {
    if constexpr (kPartial) {
        store_partial(to, value, n);
    } else if (streaming) {
        stream(to, value);
    } else {
        store(to, value);
    }
}

/// Elements before the first address that stream() takes, at most n; all of them if there is none.
template <typename scalar_t>
DL4DS_INLINE int64_t elements_to_alignment(const scalar_t* to, int64_t n) {
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kStreamAlign<scalar_t>);
    const int64_t head =
        past == 0 ? 0 : (kStreamAlign<scalar_t> - past) / static_cast<int64_t>(sizeof(scalar_t));
    return head < n ? head : n;
}

/// Makes streamed stores visible before another thread is told of them.
DL4DS_INLINE void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/// value as a tensor of scalar_t would hold it.
template <typename scalar_t>
DL4DS_INLINE Vec<acc_t<scalar_t>> round_to(Vec<acc_t<scalar_t>> value) {
    if constexpr (sizeof(scalar_t) == 2) {
        return widen(narrow(value, scalar_t{}), scalar_t{});
    } else {
        return value;
    }
}

// ---- lanes and bits
template <typename T>
struct LaneTables {
    alignas(DL4DS_VEC_BYTES) typename std::conditional_t<sizeof(T) == 4, int32_t, int64_t> index[kLanes<T>];
    constexpr LaneTables() : index() {
        for (int i = 0; i < kLanes<T>; ++i) {
            index[i] = i;
        }
    }
};
template <typename T>
inline constexpr LaneTables<T> kLaneTables{};

template <typename T>
DL4DS_INLINE Mask<T> lane_index() {
    Mask<T> index;
    __builtin_memcpy(&index, kLaneTables<T>.index, sizeof(index));
    return index;
}

/// value in the first n lanes, zero behind.
template <typename T>
DL4DS_INLINE Vec<T> keep_first(Vec<T> value, int64_t n) {
    return lane_index<T>() < (Mask<T>{} + static_cast<decltype(Mask<T>{}[0] + 0)>(n)) ? value : Vec<T>{};
}

/// One bit per lane, lane 0 lowest.
template <typename T>
DL4DS_INLINE uint32_t to_bits(Mask<T> mask) {
#if defined(__x86_64__) && DL4DS_VEC_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        return _mm512_movepi32_mask((__m512i)mask);
    } else {
        return _mm512_movepi64_mask((__m512i)mask);
    }
#elif defined(__x86_64__) && DL4DS_VEC_BYTES == 32
    if constexpr (sizeof(T) == 4) {
        return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
    } else {
        return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
    }
#elif defined(__x86_64__)
    if constexpr (sizeof(T) == 4) {
        return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
    } else {
        return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
    }
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes<T>; ++i) {
        bits |= (mask[i] ? 1u : 0u) << i;
    }
    return bits;
#endif
}

template <typename T>
DL4DS_INLINE Mask<T> from_bits(uint32_t bits) {
#if defined(__x86_64__) && DL4DS_VEC_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        return (Mask<T>)_mm512_movm_epi32(static_cast<__mmask16>(bits));
    } else {
        return (Mask<T>)_mm512_movm_epi64(static_cast<__mmask8>(bits));
    }
#else
    const Mask<T> lane_bit = (Mask<T>{} + 1) << lane_index<T>();
    return ((Mask<T>{} + static_cast<int>(bits)) & lane_bit) != 0;
#endif
}

/// Adds a float vector to an array of doubles, lane by lane (a double vector likewise).
template <typename T>
DL4DS_INLINE void add_to_doubles(double* sums, Vec<T> value) {
    if constexpr (std::is_same_v<T, double>) {
        store(sums, load(sums) + value);
    } else {
        using HalfFloat = VecTypes<float>::HalfFloat;
        HalfFloat low, high;
        __builtin_memcpy(&low, &value, sizeof(low));
        __builtin_memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof(low), sizeof(high));
        store(sums, load(sums) + __builtin_convertvector(low, Vec<double>));
        double* upper = sums + kLanes<double>;
        store(upper, load(upper) + __builtin_convertvector(high, Vec<double>));
    }
}

/// Sum of all lanes, halves first: in one order for all callers.
DL4DS_INLINE float sum_lanes(Vec<float> v) {
    float lane[kLanes<float>];
    store(lane, v);
#pragma GCC unroll 8
    for (int width = kLanes<float> / 2; width > 0; width /= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
            lane[i] += lane[i + width];
        }
    }
    return lane[0];
}

}  // namespace DL4DS_ISA
}  // namespace dl4ds
