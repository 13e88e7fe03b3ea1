// cvt: between all integer and floating types.
#include <algorithm>
#include <cstring>

#include "lanes.h"

namespace ptxsim {
namespace {

constexpr u32 kToInteger = 8, kSaturate = 16, kRelu = 32, kFlush = 64, kFinite = 128;  // bits 0..2: Round

struct Number {  // a converted operand: real, or a sign and a magnitude
    bool is_real, negative;
    double real;
    u64 magnitude;
};

Number read(Type type, u64 raw) {
    switch (type) {
        case Type::F16:
            return {true, false, half_to_float(static_cast<u16>(raw)), 0};
        case Type::BF16:
            return {true, false, bfloat_to_float(static_cast<u16>(raw)), 0};
        case Type::F32:
            return {true, false, bits<float>(static_cast<u32>(raw)), 0};
        case Type::F64:
            return {true, false, bits<double>(raw), 0};
        default:
            break;
    }
    const u32 unused = 64 - 8 * bytes_of(type);
    raw <<= unused;
    const bool negative = is_signed(type) && raw >> 63;
    const u64 value = negative ? static_cast<u64>(static_cast<i64>(raw) >> unused) : raw >> unused;
    return {false, negative, 0, negative ? 0 - value : value};
}

Format format_of(Type t) {
    return t == Type::F16 ? kHalf : t == Type::BF16 ? kBFloat : t == Type::TF32 ? kTF32 : kFloat;
}

u64 to_real(Type type, Number n, u32 mode) {
    const Round round = static_cast<Round>(mode & 7);
    if (!n.is_real) {
        if (type == Type::F64) return bits<u64>(integer_to_double(n.negative, n.magnitude, round));
        return encode(integer_to_odd(n.negative, n.magnitude), format_of(type), round, mode & kFinite);
    }
    double v = n.real;
    if (mode & kToInteger) v = round_to_integer(v, round);
    if (mode & kSaturate) v = v > 0 ? std::min(v, 1.0) : 0.0;  // NaN becomes +0
    if (mode & kRelu) v = v > 0 || v != v ? v : 0.0;
    if (type == Type::F64) return bits<u64>(v);
    u32 raw = encode(v, format_of(type), mode & kToInteger ? Round::Nearest : round, mode & kFinite);
    if (mode & kFlush && type == Type::F32) raw = bits<u32>(flush(bits<float>(raw)));
    return raw;
}

u64 to_integer(Type type, Type from, Number n, u32 mode) {
    const u32 width = 8 * bytes_of(type);
    const u64 top = 1ull << (width - 1), all = width == 64 ? ~0ull : (1ull << width) - 1;
    const u64 most = is_signed(type) ? top - 1 : all,
              least = is_signed(type) ? top : 0;  // least: magnitude of the minimum
    if (!n.is_real) {
        if (mode & kSaturate) n.magnitude = std::min(n.magnitude, n.negative ? least : most);
        return (n.negative ? 0 - n.magnitude : n.magnitude) & all;
    }
    if (n.real != n.real) return from == Type::F64 || width == 64 ? top : 0;
    const double v = round_to_integer(n.real, static_cast<Round>(mode & 7));
    if (v < 0)
        return (0 - (v <= -std::ldexp(1.0, static_cast<int>(width) - 1) || !is_signed(type)
                         ? least
                         : static_cast<u64>(-v))) &
               all;
    const double limit = std::ldexp(1.0, static_cast<int>(width) - (is_signed(type) ? 1 : 0));
    return v >= limit ? most : static_cast<u64>(v);
}

// any pair of types; registers may be wider than the types (widths), the rest is sign- or zero-filled
void convert(Warp& w, const Instruction& in, Mask mask) {
    const Type to = in.type, from = static_cast<Type>(in.vector);
    const u32 to_bytes = bytes_of(to), to_width = in.widths[0], from_width = in.widths[1];
    const u8* a = w.registers + in.a;
    u8 source[kLanes * 8];
    std::memcpy(source, a, kLanes * from_width);
    for (u32 l = 0; l < kLanes; l++) {
        if (!(mask >> l & 1)) continue;
        u64 raw = 0;
        std::memcpy(&raw, source + l * from_width, from_width);
        if (in.mode & kFlush && from == Type::F32) raw = bits<u32>(flush(bits<float>(static_cast<u32>(raw))));
        const Number n = read(from, raw);
        u64 out = is_float(to) ? to_real(to, n, in.mode) : to_integer(to, from, n, in.mode);
        if (to_bytes < 8 && is_signed(to) && !is_float(to) && out >> (8 * to_bytes - 1) & 1)
            out |= ~0ull << 8 * to_bytes;
        std::memcpy(w.registers + in.d + l * to_width, &out, to_width);
    }
}

struct Cast {
    template <class T>
    T operator()(T a) const {
        return a;
    }
};
struct HalfToFloat {
    float operator()(u16 a) const { return half_to_float(a); }
};
struct BFloatToFloat {
    float operator()(u16 a) const { return bfloat_to_float(a); }
};
struct FloatToHalf {
    u16 operator()(float a) const { return float_to_half(a); }
};
struct FloatToBFloat {
    u16 operator()(float a) const { return float_to_bfloat(a); }
};

template <class From>
Handler integer_cast(Type to) {
    switch (bytes_of(to)) {
        case 2:
            return unary<Cast, u16, From>;
        case 4:
            return unary<Cast, u32, From>;
        case 8:
            return unary<Cast, u64, From>;
        default:
            return nullptr;
    }
}

// handlers for the conversions that fill kernels; registers have exactly the types' widths
Handler fast(Type to, Type from, u32 mode) {
    if (mode) return nullptr;
    if (!is_float(to) && !is_float(from))
        return for_integer(from, [&](auto tag) -> Handler { return integer_cast<PTXSIM_TYPE(tag)>(to); });
    if (to == Type::F32 && from == Type::F16) return unary<HalfToFloat, float, u16>;
    if (to == Type::F32 && from == Type::BF16) return unary<BFloatToFloat, float, u16>;
    if (to == Type::F16 && from == Type::F32) return unary<FloatToHalf, u16, float>;
    if (to == Type::BF16 && from == Type::F32) return unary<FloatToBFloat, u16, float>;
    if (to == Type::F32 && from == Type::S32) return unary<Cast, float, i32>;
    if (to == Type::F32 && from == Type::U32) return unary<Cast, float, u32>;
    return nullptr;
}

template <class T>
void pack_pair(Warp& w, const Instruction& in, Mask mask) {  // the first source goes to the high half
    Pair<T> out[kLanes];
    const float *a = w.reg<float>(in.a), *b = w.reg<float>(in.b);
    for (int l = 0; l < kLanes; l++) out[l] = {from_float<T>(b[l]), from_float<T>(a[l])};
    store_lanes(w, in.d, out, mask);
}

struct PackPairSlowly {
    u32 operator()(const Instruction& in, float a, float b, float) const {
        const Type half = in.type == Type::F16x2 ? Type::F16 : Type::BF16;
        const u64 low = to_real(half, {true, false, b, 0}, in.mode),
                  high = to_real(half, {true, false, a, 0}, in.mode);
        return static_cast<u32>(high << 16 | low);
    }
};

void decode_cvt(Decode& d) {
    Instruction& in = d.in;
    const Type to = d.type(0), from = d.types() > 1 ? d.type(1) : to;
    if (d.types() > 2) d.unsupported("three types");
    in.type = to;
    if (d.has("pack")) d.unsupported("pack");
    // asked before rounding() understands them all
    const bool integral = d.any("rni", "rzi", "rmi", "rpi");
    in.mode = static_cast<u32>(d.rounding());
    if (integral) in.mode |= kToInteger;
    if (d.has("sat")) in.mode |= kSaturate;
    if (d.has("relu")) in.mode |= kRelu;
    if (d.has("ftz")) in.mode |= kFlush;
    if (d.has("satfinite")) in.mode |= kFinite;
    if (to == Type::F16x2 || to == Type::BF16x2) {
        if (from != Type::F32) d.unsupported("types");
        d.expect_operands(3, 3);
        in.d = d.destination(0, to);
        in.a = d.source(1, from);
        in.b = in.c = d.source(2, from);
        if (in.mode)
            in.run = with_mode<PackPairSlowly, u32, float>;
        else
            in.run = to == Type::F16x2 ? pack_pair<half_t> : pack_pair<bfloat_t>;
        return;
    }
    d.expect_operands(2, 2);
    u8 to_width, from_width;
    in.d = d.loose(d.operands[0], to, true, to_width);
    in.a = d.loose(d.operands[1], from, false, from_width);
    if (to_width == bytes_of(to) && from_width == bytes_of(from)) in.run = fast(to, from, in.mode);
    if (in.run) return;
    if (from == Type::TF32 || from == Type::F16x2 || from == Type::BF16x2) d.unsupported("types");
    in.vector = static_cast<u8>(from);
    in.widths = {to_width, from_width};
    in.run = convert;
}

}  // namespace

void add_convert_opcodes(OpcodeTable& t) { t["cvt"] = decode_cvt; }

}  // namespace ptxsim
