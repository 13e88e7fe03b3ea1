// Integer arithmetic: add sub mul mad div rem min max neg abs sad, carries, counts, dot products.
#include <limits>

#include "lanes.h"

namespace ptxsim {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

struct Add {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(static_cast<u64>(a) + static_cast<u64>(b));
    }
};
struct Sub {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(static_cast<u64>(a) - static_cast<u64>(b));
    }
};
struct MulLow {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b));
    }
};
struct MulHigh {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (sizeof(T) < 8) {
            using Wide = std::conditional_t<std::is_signed_v<T>, i64, u64>;
            return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
        } else {
            // 64x64 -> 128 by halves; a signed factor below zero adds a correction
            const u64 x = static_cast<u64>(a), y = static_cast<u64>(b);
            const u64 xl = x & 0xffffffffu, xh = x >> 32, yl = y & 0xffffffffu, yh = y >> 32;
            const u64 middle = xh * yl + (xl * yl >> 32), other = xl * yh + (middle & 0xffffffffu);
            u64 high = xh * yh + (middle >> 32) + (other >> 32);
            if (std::is_signed_v<T>) high -= (a < 0 ? y : 0) + (b < 0 ? x : 0);
            return static_cast<T>(high);
        }
    }
};
template <class Product>
struct MulAdd {
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add()(Product()(a, b), c);
    }
};
struct MulWide {
    template <class T>
    auto operator()(T a, T b) const {
        using Wide = std::conditional_t<std::is_signed_v<T>, i64, u64>;
        return static_cast<Wide>(a) * static_cast<Wide>(b);
    }
};
struct MadWide {
    template <class T, class W>
    W operator()(T a, T b, W c) const {
        return static_cast<W>(static_cast<u64>(MulWide()(a, b)) + static_cast<u64>(c));
    }
};
struct Divide {  // by zero: all ones, as the hardware does
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) return static_cast<T>(~T(0));
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub()(T(0), a);
        return static_cast<T>(a / b);
    }
};
struct Remainder {
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
        return static_cast<T>(a % b);
    }
};
struct Min {
    template <class T>
    T operator()(T a, T b) const {
        return a < b ? a : b;
    }
};
struct Max {
    template <class T>
    T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};
struct Negate {
    template <class T>
    T operator()(T a) const {
        return Sub()(T(0), a);
    }
};
struct Absolute {
    template <class T>
    T operator()(T a) const {
        return a < 0 ? Sub()(T(0), a) : a;
    }
};
struct Sad {  // c + |a - b|
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add()(c, a < b ? Sub()(b, a) : Sub()(a, b));
    }
};
i32 saturated(i64 value) {
    return static_cast<i32>(std::min<i64>(std::max<i64>(value, std::numeric_limits<i32>::min()),
                                          std::numeric_limits<i32>::max()));
}
struct AddSaturated {
    i32 operator()(i32 a, i32 b) const { return saturated(static_cast<i64>(a) + b); }
};
struct SubSaturated {
    i32 operator()(i32 a, i32 b) const { return saturated(static_cast<i64>(a) - b); }
};
struct MadHighSaturated {
    i32 operator()(i32 a, i32 b, i32 c) const { return saturated(static_cast<i64>(MulHigh()(a, b)) + c); }
};

struct CountOnes {
    template <class T>
    u32 operator()(T a) const {
        return static_cast<u32>(__builtin_popcountll(a));
    }
};
struct LeadingZeros {
    template <class T>
    u32 operator()(T a) const {
        return a ? static_cast<u32>(__builtin_clzll(a)) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
    }
};
struct FindHigh {  // bfind: most significant bit that differs from the sign
    template <class T>
    u32 operator()(T a) const {
        Unsigned<T> x = static_cast<Unsigned<T>>(std::is_signed_v<T> && a < 0 ? ~a : a);
        return x ? 8 * sizeof(T) - 1 - LeadingZeros()(x) : ~0u;
    }
};
struct FindHighShift {
    template <class T>
    u32 operator()(T a) const {
        const u32 position = FindHigh()(a);
        return position == ~0u ? position : 8 * sizeof(T) - 1 - position;
    }
};
struct Reverse {
    template <class T>
    T operator()(T a) const {
        T r = 0;
        for (size_t i = 0; i < 8 * sizeof(T); i++) r = static_cast<T>(r << 1 | (a >> i & 1));
        return r;
    }
};

// add.cc, addc, sub.cc, subc, mad.cc, madc: the carry is one bit per lane in a hidden predicate
enum CarryMode : u32 { kTakesCarry = 1, kSetsCarry = 2, kSubtract = 4, kMulLow = 8, kMulHigh = 16 };
template <class U>
void carry(Warp& w, const Instruction& in, Mask mask) {
    U out[kLanes];
    Mask flags = *w.reg<Mask>(in.e), next = 0;
    const U *a = w.reg<U>(in.a), *b = w.reg<U>(in.b), *c = w.reg<U>(in.c);
    for (int l = 0; l < kLanes; l++) {
        U x = a[l], y = b[l];
        if (in.mode & kMulLow) x = MulLow()(a[l], b[l]), y = c[l];
        if (in.mode & kMulHigh) x = MulHigh()(a[l], b[l]), y = c[l];
        const U carry_in = in.mode & kTakesCarry ? flags >> l & 1 : 0;
        bool carry_out;
        if (in.mode & kSubtract) {
            out[l] = x - y - carry_in;
            carry_out = x < y || (x == y && carry_in);
        } else {
            out[l] = x + y + carry_in;
            carry_out = out[l] < x || (carry_in && out[l] == x);
        }
        next |= static_cast<Mask>(carry_out) << l;
    }
    store_lanes(w, in.d, out, mask);
    if (in.mode & kSetsCarry) w.set_predicate(in.e, next, mask);
}

// dp4a: four 8-bit products; dp2a: two 16-bit by 8-bit products, bytes from the low or high half of b
enum DotMode : u32 { kFour = 1, kSignedA = 2, kSignedB = 4, kHigh = 8 };
struct Dot {
    u32 operator()(const Instruction& in, u32 a, u32 b, u32 c) const {
        const u32 m = in.mode;
        for (u32 k = 0; k < (m & kFour ? 4u : 2u); k++) {
            const u32 ra = m & kFour ? a >> 8 * k : a >> 16 * k, rb = b >> (8 * k + (m & kHigh ? 16 : 0));
            const i32 x = m & kFour ? (m & kSignedA ? static_cast<i8>(ra) : static_cast<u8>(ra))
                                    : (m & kSignedA ? static_cast<i16>(ra) : static_cast<u16>(ra));
            const i32 y = m & kSignedB ? static_cast<i8>(rb) : static_cast<u8>(rb);
            c += static_cast<u32>(x * y);
        }
        return c;
    }
};

void three(Decode& d, Type t) {
    d.in.d = d.destination(0, t);
    d.in.a = d.source(1, t);
    d.in.b = d.source(2, t);
}

void decode_carry(Decode& d, u32 mode) {
    const Type t = d.type();
    if (d.has("cc")) mode |= kSetsCarry;
    three(d, t);
    if (mode & (kMulLow | kMulHigh))
        d.in.c = d.source(3, t);
    else
        d.in.c = d.in.b;
    d.in.e = d.builder.kernel().special[Carry];
    d.in.mode = mode;
    d.in.run = bytes_of(t) == 4 ? carry<u32> : carry<u64>;
}

template <class Op>
void decode_binary(Decode& d) {
    three(d, d.type());
    d.in.run = for_integer(
        d.type(), [](auto tag) -> Handler { return binary<Op, PTXSIM_TYPE(tag), PTXSIM_TYPE(tag)>; });
}

template <class Op>
void decode_unary(Decode& d) {
    d.in.d = d.destination(0, d.type());
    d.in.a = d.source(1, d.type());
    d.in.run = for_integer(d.type(),
                           [](auto tag) -> Handler { return unary<Op, PTXSIM_TYPE(tag), PTXSIM_TYPE(tag)>; });
}

template <class Op>
void decode_count(Decode& d) {
    d.in.d = d.destination(0, Type::U32);
    d.in.a = d.source(1, d.type());
    d.in.run = bytes_of(d.type()) == 4 ? unary<Op, u32, u32> : unary<Op, u32, u64>;
}

void decode_bfind(Decode& d) {
    const bool shift = d.has("shiftamt");
    d.in.d = d.destination(0, Type::U32);
    d.in.a = d.source(1, d.type());
    d.in.run = for_integer(d.type(), [&](auto tag) -> Handler {
        using T = PTXSIM_TYPE(tag);
        return shift ? unary<FindHighShift, u32, T> : unary<FindHigh, u32, T>;
    });
}

void decode_sad(Decode& d) {
    three(d, d.type());
    d.in.c = d.source(3, d.type());
    d.in.run = for_integer(
        d.type(), [](auto tag) -> Handler { return ternary<Sad, PTXSIM_TYPE(tag), PTXSIM_TYPE(tag)>; });
}

void decode_dot(Decode& d, u32 mode) {
    if (is_signed(d.type(0))) mode |= kSignedA;
    if (is_signed(d.type(1))) mode |= kSignedB;
    if (!(mode & kFour) && !d.has("lo")) mode |= d.has("hi") ? static_cast<u32>(kHigh) : 0;
    three(d, Type::B32);
    d.in.c = d.source(3, Type::B32);
    d.in.mode = mode;
    d.in.run = with_mode<Dot, u32, u32>;
}

template <class Op, class Saturated>
void decode_sum(Decode& d, u32 carry_mode) {
    for (const std::string& m : d.statement.modifiers)
        if (m == "cc") return decode_carry(d, carry_mode);
    if (d.has("sat")) {
        if (d.type() != Type::S32) d.unsupported("saturation of this type");
        three(d, d.type());
        d.in.run = binary<Saturated, i32, i32>;
        return;
    }
    decode_binary<Op>(d);
}

void decode_mul(Decode& d) {
    const Type t = d.type();
    if (d.has("wide")) {
        d.in.a = d.source(1, t);
        d.in.b = d.source(2, t);
        d.in.d = d.destination(0, bytes_of(t) == 4 ? Type::B64 : Type::B32);
        d.in.run = t == Type::S32   ? binary<MulWide, i64, i32>
                   : t == Type::U32 ? binary<MulWide, u64, u32>
                   : t == Type::S16 ? binary<MulWide, i32, i16>
                                    : binary<MulWide, u32, u16>;
        return;
    }
    if (d.has("hi")) return decode_binary<MulHigh>(d);
    d.ignore("lo");
    decode_binary<MulLow>(d);
}

void decode_mad(Decode& d) {
    const Type t = d.type();
    const bool high = d.has("hi");
    for (const std::string& m : d.statement.modifiers)
        if (m == "cc") return d.ignore("lo"), decode_carry(d, high ? kMulHigh : kMulLow);
    if (d.has("wide")) {
        const Type wide = bytes_of(t) == 4 ? Type::B64 : Type::B32;
        d.in.d = d.destination(0, wide);
        d.in.a = d.source(1, t);
        d.in.b = d.source(2, t);
        d.in.c = d.source(3, wide);
        d.in.run = t == Type::S32   ? ternary<MadWide, u64, i32, i32, u64>
                   : t == Type::U32 ? ternary<MadWide, u64, u32, u32, u64>
                   : t == Type::S16 ? ternary<MadWide, u32, i16, i16, u32>
                                    : ternary<MadWide, u32, u16, u16, u32>;
        return;
    }
    three(d, t);
    d.in.c = d.source(3, t);
    if (d.has("sat")) {
        if (!high || t != Type::S32) d.unsupported("saturation of this type");
        d.in.run = ternary<MadHighSaturated, i32, i32>;
        return;
    }
    d.ignore("lo");
    d.in.run = for_integer(t, [&](auto tag) -> Handler {
        using T = PTXSIM_TYPE(tag);
        return high ? ternary<MulAdd<MulHigh>, T, T> : ternary<MulAdd<MulLow>, T, T>;
    });
}

}  // namespace

namespace integer {  // called by isa_arithmetic.cpp when the type is an integer
void add(Decode& d) { decode_sum<Add, AddSaturated>(d, 0); }
void sub(Decode& d) { decode_sum<Sub, SubSaturated>(d, kSubtract); }
void mul(Decode& d) { decode_mul(d); }
void mad(Decode& d) { decode_mad(d); }
void div(Decode& d) { decode_binary<Divide>(d); }
void min(Decode& d) { decode_binary<Min>(d); }
void max(Decode& d) { decode_binary<Max>(d); }
void neg(Decode& d) { decode_unary<Negate>(d); }
void abs(Decode& d) { decode_unary<Absolute>(d); }
}  // namespace integer

void add_integer_opcodes(OpcodeTable& t) {
    t["addc"] = [](Decode& d) { decode_carry(d, kTakesCarry); };
    t["subc"] = [](Decode& d) { decode_carry(d, kTakesCarry | kSubtract); };
    t["madc"] = [](Decode& d) {
        const u32 product = d.has("hi") ? kMulHigh : kMulLow;
        d.ignore("lo");
        decode_carry(d, kTakesCarry | product);
    };
    t["rem"] = decode_binary<Remainder>;
    t["sad"] = decode_sad;
    t["popc"] = decode_count<CountOnes>;
    t["clz"] = decode_count<LeadingZeros>;
    t["bfind"] = decode_bfind;
    t["brev"] = decode_unary<Reverse>;
    t["dp4a"] = [](Decode& d) { decode_dot(d, kFour); };
    t["dp2a"] = [](Decode& d) { decode_dot(d, 0); };
}

}  // namespace ptxsim
