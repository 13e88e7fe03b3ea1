#include "numeric.h"

#include <algorithm>

namespace ptxsim {

u32 encode(double value, Format format, Round round, bool saturate_finite) {
    const int fraction = format.fraction_bits, bias = (1 << (format.exponent_bits - 1)) - 1;
    const int shift_to_layout = fraction == kTF32.fraction_bits && format.exponent_bits == 8 ? 13 : 0;
    const u32 sign_bit = 1u << (format.exponent_bits + fraction), infinity = sign_bit - (1u << fraction);
    if (value != value) return (sign_bit - 1) << shift_to_layout | ((1u << shift_to_layout) - 1);
    const bool negative = std::signbit(value);
    const u32 sign = negative ? sign_bit : 0;
    u32 magnitude = 0;
    bool overflow = std::isinf(value);
    if (overflow && !saturate_finite) return (sign | infinity) << shift_to_layout;
    if (value != 0 && !overflow) {
        int exponent;
        const u64 mantissa =
            static_cast<u64>(std::ldexp(std::frexp(std::fabs(value), &exponent), 53));  // 53 bits
        const int leading = exponent - 1, smallest = 1 - bias;
        const int quantum = std::max(leading, smallest) - fraction;
        const int shift = std::min(quantum - (exponent - 53), 63);
        u64 kept = mantissa >> shift, rest = mantissa & ((1ull << shift) - 1),
            half = shift ? 1ull << (shift - 1) : 0;
        bool up = false;
        switch (round) {
            case Round::Nearest:
                up = rest > half || (rest == half && rest && (kept & 1));
                break;
            case Round::NearestAway:
                up = rest && rest >= half;
                break;
            case Round::Zero:
                break;
            case Round::Down:
                up = rest && negative;
                break;
            case Round::Up:
                up = rest && !negative;
                break;
        }
        kept += up;
        const u64 encoded = (static_cast<u64>(std::max(leading, smallest) - smallest) << fraction) + kept;
        overflow = encoded >= infinity;
        magnitude = static_cast<u32>(std::min<u64>(encoded, infinity));
    }
    if (overflow) {
        bool finite = saturate_finite || round == Round::Zero || (round == Round::Down && !negative) ||
                      (round == Round::Up && negative);
        magnitude = finite ? infinity - 1 : infinity;
    }
    return (sign | magnitude) << shift_to_layout;
}

static float decode_half(u16 h) {
    const u32 sign = static_cast<u32>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return bits<float>(sign | 0x7f800000u | fraction << 13);
    if (exponent) return bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
    return std::copysign(static_cast<float>(fraction) * 0x1p-24f, bits<float>(sign | 0x3f800000u));
}

static const float* make_half_table() {
    static float table[65536];
    for (u32 h = 0; h < 65536; h++) table[h] = decode_half(static_cast<u16>(h));
    return table;
}
const float* const kHalfTable = make_half_table();

static double mark_inexact(double rounded, double error) {
    if (error == 0 || !std::isfinite(rounded)) return rounded;
    u64 raw = bits<u64>(rounded);
    if (raw & 1) return rounded;
    const bool away = (error > 0) == (rounded > 0);  // the true value lies further from zero
    return bits<double>(away ? raw | 1 : raw - 1);
}

double fma_to_odd(double a, double b, double c) {
    const double product = a * b, sum = product + c, part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    return mark_inexact(sum, error);
}

double integer_to_odd(bool negative, u64 magnitude) {
    int drop = 0;
    while (magnitude >> drop >> 53) drop++;
    u64 kept = magnitude >> drop;
    if (magnitude & ((1ull << drop) - 1)) kept |= 1;
    const double value = std::ldexp(static_cast<double>(kept), drop);
    return negative ? -value : value;
}

}  // namespace ptxsim
