// f16, bf16 and packed pairs: every result is the correctly rounded one.
#include "arithmetic.h"

namespace ptxsim {
namespace {

constexpr u32 kRelu = 1, kSaturate = 2, kPropagateNan = 4, kXorSign = 8, kFlush = 16, kAbsolute = 32;

constexpr Format format_of(half_t) { return kHalf; }
constexpr Format format_of(bfloat_t) { return kBFloat; }

// d is exact, or carries its rounding error in the last bit
template <class T>
T round_to(double d) {
    const float f = static_cast<float>(d);
    if (static_cast<double>(f) == d || d != d) return from_float<T>(f);
    return {static_cast<u16>(encode(d, format_of(T()), Round::Nearest))};
}

struct Add {
    static double apply(float a, float b, float) { return fma_to_odd(1, a, b); }
};
struct Sub {
    static double apply(float a, float b, float) { return fma_to_odd(1, a, -b); }
};
struct Mul {
    static double apply(float a, float b, float) { return static_cast<double>(a) * b; }
};
struct Fma {
    static double apply(float a, float b, float c) { return fma_to_odd(a, b, c); }
};
struct Exp2 {
    static double apply(float a, float, float) { return std::exp2(static_cast<double>(a)); }
};
struct Tanh {
    static double apply(float a, float, float) { return std::tanh(static_cast<double>(a)); }
};

float half_flush(float f, Format format) {
    return format.fraction_bits == 10 && std::fabs(f) < 0x1p-14f ? std::copysign(0.0f, f) : f;
}

template <class Op, class T>
T one(T a, T b, T c, u32 mode) {
    float x = to_float(a), y = to_float(b), z = to_float(c);
    if (mode & kFlush)
        x = half_flush(x, format_of(T())), y = half_flush(y, format_of(T())),
        z = half_flush(z, format_of(T()));
    double r = Op::apply(x, y, z);
    if (mode & kRelu) r = r > 0 || r != r ? r : 0;
    if (mode & kSaturate) r = r > 0 ? (r > 1 ? 1 : r) : 0;
    T result = round_to<T>(r);
    if (mode & kFlush) result = from_float<T>(half_flush(to_float(result), format_of(T())));
    return result;
}
template <class Op, class T>
Pair<T> one(Pair<T> a, Pair<T> b, Pair<T> c, u32 mode) {
    return {one<Op, T>(a.low, b.low, c.low, mode), one<Op, T>(a.high, b.high, c.high, mode)};
}

template <bool Max, class T>
T extreme(T a, T b, u32 mode) {
    float x = to_float(a), y = to_float(b);
    const bool odd = std::signbit(x) != std::signbit(y), nan = mode & kPropagateNan;
    if (mode & kFlush) x = half_flush(x, format_of(T())), y = half_flush(y, format_of(T()));
    if (mode & kAbsolute) x = std::fabs(x), y = std::fabs(y);
    float r = Max ? maximum(x, y, nan) : minimum(x, y, nan);
    if (mode & kXorSign) r = odd ? -std::fabs(r) : std::fabs(r);
    return r == r ? from_float<T>(r) : T{0x7fff};
}
template <bool Max, class T>
Pair<T> extreme(Pair<T> a, Pair<T> b, u32 mode) {
    return {extreme<Max, T>(a.low, b.low, mode), extreme<Max, T>(a.high, b.high, mode)};
}

template <class Op, class T, class V>
void arithmetic_lanes(Warp& w, const Instruction& in, Mask mask) {
    V out[kLanes];
    const V *a = w.reg<V>(in.a), *b = w.reg<V>(in.b), *c = w.reg<V>(in.c);
    for (int l = 0; l < kLanes; l++)
        if (mask >> l & 1) out[l] = one<Op, T>(a[l], b[l], c[l], in.mode);
    store_lanes(w, in.d, out, mask);
}
template <bool Max, class V>
void extreme_lanes(Warp& w, const Instruction& in, Mask mask) {
    V out[kLanes];
    const V *a = w.reg<V>(in.a), *b = w.reg<V>(in.b);
    for (int l = 0; l < kLanes; l++)
        if (mask >> l & 1) out[l] = extreme<Max>(a[l], b[l], in.mode);
    store_lanes(w, in.d, out, mask);
}

void operands(Decode& d, Type t, int sources) {
    Instruction& in = d.in;
    d.expect_operands(static_cast<size_t>(sources) + 1, static_cast<size_t>(sources) + 1);
    in.d = d.destination(0, t);
    in.a = in.b = in.c = d.source(1, t);
    if (sources > 1) in.b = in.c = d.source(2, t);
    if (sources > 2) in.c = d.source(3, t);
}

template <class Op>
void arithmetic(Decode& d, int sources) {
    const Type t = d.last_type();
    d.ignore("rn", "approx");
    if (d.has("relu")) d.in.mode |= kRelu;
    if (d.has("sat")) d.in.mode |= kSaturate;
    if (d.has("ftz")) d.in.mode |= kFlush;
    operands(d, t, sources);
    switch (t) {
        case Type::F16:
            d.in.run = arithmetic_lanes<Op, half_t, half_t>;
            break;
        case Type::BF16:
            d.in.run = arithmetic_lanes<Op, bfloat_t, bfloat_t>;
            break;
        case Type::F16x2:
            d.in.run = arithmetic_lanes<Op, half_t, Pair<half_t>>;
            break;
        default:
            d.in.run = arithmetic_lanes<Op, bfloat_t, Pair<bfloat_t>>;
            break;
    }
}

template <bool Max>
void decode_extreme(Decode& d) {
    const Type t = d.last_type();
    if (d.has("NaN")) d.in.mode |= kPropagateNan;
    if (d.has("xorsign")) d.in.mode |= kXorSign;
    if (d.has("abs")) d.in.mode |= kAbsolute;
    if (d.has("ftz")) d.in.mode |= kFlush;
    operands(d, t, 2);
    switch (t) {
        case Type::F16:
            d.in.run = extreme_lanes<Max, half_t>;
            break;
        case Type::BF16:
            d.in.run = extreme_lanes<Max, bfloat_t>;
            break;
        case Type::F16x2:
            d.in.run = extreme_lanes<Max, Pair<half_t>>;
            break;
        default:
            d.in.run = extreme_lanes<Max, Pair<bfloat_t>>;
            break;
    }
}

struct Negate {
    u16 operator()(u16 a) const { return a ^ 0x8000; }
    u32 operator()(u32 a) const { return a ^ 0x80008000u; }
};
struct Absolute {
    u16 operator()(u16 a) const { return a & 0x7fff; }
    u32 operator()(u32 a) const { return a & 0x7fff7fffu; }
};

template <class Op>
void decode_sign(Decode& d) {
    if (d.has("ftz")) d.unsupported("ftz");
    operands(d, d.type(), 1);
    d.in.run = bytes_of(d.type()) == 2 ? unary<Op, u16, u16> : unary<Op, u32, u32>;
}

}  // namespace

namespace half {
void add(Decode& d) { arithmetic<Add>(d, 2); }
void sub(Decode& d) { arithmetic<Sub>(d, 2); }
void mul(Decode& d) { arithmetic<Mul>(d, 2); }
void fma(Decode& d) { arithmetic<Fma>(d, 3); }
void min(Decode& d) { decode_extreme<false>(d); }
void max(Decode& d) { decode_extreme<true>(d); }
void neg(Decode& d) { decode_sign<Negate>(d); }
void abs(Decode& d) { decode_sign<Absolute>(d); }
void ex2(Decode& d) { arithmetic<Exp2>(d, 1); }
void tanh(Decode& d) { arithmetic<Tanh>(d, 1); }
}  // namespace half

}  // namespace ptxsim
