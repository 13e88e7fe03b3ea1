// Scalar number formats and roundings, exact on every host: no dependence on F16C, FMA contraction or libm's
// rounding.
#pragma once
#include <cmath>
#include <cstring>

#include "types.h"

namespace ptxsim {

enum class Round : u8 { Nearest, Zero, Down, Up, NearestAway };

template <class To, class From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// A binary interchange format described by its field widths.
struct Format {
    int exponent_bits, fraction_bits;
};
constexpr Format kHalf{5, 10}, kBFloat{8, 7}, kTF32{8, 10}, kFloat{8, 23};

// Encodes an exactly known value: any rounding, subnormals, overflow by direction, canonical NaN (all ones
// but the sign). saturate_finite turns an overflow into the largest finite number.
u32 encode(double value, Format format, Round round, bool saturate_finite = false);

extern const float* const kHalfTable;  // all 65536 values
inline float half_to_float(u16 h) { return kHalfTable[h]; }
inline float bfloat_to_float(u16 b) { return bits<float>(static_cast<u32>(b) << 16); }

// Fast paths of encode() for round-to-nearest-even.
inline u16 float_to_bfloat(float f) {
    u32 u = bits<u32>(f);
    return f != f ? 0x7fff : static_cast<u16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline u16 float_to_half(float f) {
    u32 u = bits<u32>(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude - 0x38800000u <
        0x477fe000u - 0x38800000u) {  // normal half range, no overflow after rounding
        u32 r = magnitude - 0x38000000u;
        return static_cast<u16>(sign | ((r + 0xfff + (r >> 13 & 1)) >> 13));
    }
    return static_cast<u16>(encode(f, kHalf, Round::Nearest));
}

// 16-bit floats as types, so that one template serves both.
struct half_t {
    u16 raw;
};
struct bfloat_t {
    u16 raw;
};
inline float to_float(half_t h) { return half_to_float(h.raw); }
inline float to_float(bfloat_t b) { return bfloat_to_float(b.raw); }
template <class T>
T from_float(float f);
template <>
inline half_t from_float(float f) {
    return {float_to_half(f)};
}
template <>
inline bfloat_t from_float(float f) {
    return {float_to_bfloat(f)};
}

template <class T>
struct Pair {
    T low, high;
};

// The double that keeps the sign of the rounding error (last bit odd): a second rounding to <= 51 bits is
// then exact.
double fma_to_odd(double a, double b, double c);  // a * b must be exact in double (24-bit factors)
double integer_to_odd(bool negative, u64 magnitude);

inline float canonical(float f) { return f == f ? f : bits<float>(0x7fffffffu); }
inline double canonical(double d) { return d; }  // fp64 keeps NaN payloads
inline float flush(float f) { return std::fabs(f) < 1.17549435e-38f ? std::copysign(0.0f, f) : f; }

// IEEE arithmetic in any direction (the slow path: switches the host's rounding mode).
float add_rounded(float a, float b, Round round);
float mul_rounded(float a, float b, Round round);
float fma_rounded(float a, float b, float c, Round round);
float div_rounded(float a, float b, Round round);
float sqrt_rounded(float a, Round round);
double add_rounded(double a, double b, Round round);
double mul_rounded(double a, double b, Round round);
double fma_rounded(double a, double b, double c, Round round);
double div_rounded(double a, double b, Round round);
double sqrt_rounded(double a, Round round);
double integer_to_double(bool negative, u64 magnitude, Round round);
double round_to_integer(double value, Round round);

}  // namespace ptxsim
