// f32 and f64 arithmetic. Approximations (.approx, .full) are computed as exactly as the format allows.
#include "arithmetic.h"

namespace ptxsim {
namespace {

// Instruction::mode of the general handlers
constexpr u32 kFlush = 8, kSaturate = 16, kPropagateNan = 32, kXorSign = 64,
              kAbsolute = 128;  // bits 0..2: Round

struct Add {
    template <class T>
    T operator()(T a, T b, T) const {
        return a + b;
    }
    template <class T>
    T operator()(T a, T b, T, Round r) const {
        return add_rounded(a, b, r);
    }
};
struct Sub {
    template <class T>
    T operator()(T a, T b, T) const {
        return a - b;
    }
    template <class T>
    T operator()(T a, T b, T, Round r) const {
        return add_rounded(a, -b, r);
    }
};
struct Mul {
    template <class T>
    T operator()(T a, T b, T) const {
        return a * b;
    }
    template <class T>
    T operator()(T a, T b, T, Round r) const {
        return mul_rounded(a, b, r);
    }
};
struct Fma {
    template <class T>
    T operator()(T a, T b, T c) const {
        return std::fma(a, b, c);
    }
    template <class T>
    T operator()(T a, T b, T c, Round r) const {
        return fma_rounded(a, b, c, r);
    }
};
struct Div {
    template <class T>
    T operator()(T a, T b, T) const {
        return a / b;
    }
    template <class T>
    T operator()(T a, T b, T, Round r) const {
        return div_rounded(a, b, r);
    }
};
struct Sqrt {
    template <class T>
    T operator()(T a, T, T) const {
        return std::sqrt(a);
    }
    template <class T>
    T operator()(T a, T, T, Round r) const {
        return sqrt_rounded(a, r);
    }
};
struct Rcp {
    template <class T>
    T operator()(T a, T, T) const {
        return T(1) / a;
    }
    template <class T>
    T operator()(T a, T, T, Round r) const {
        return div_rounded(T(1), a, r);
    }
};
// functions of one argument, through double
#define PTXSIM_FUNCTION(Name, expression)          \
    struct Name {                                  \
        template <class T>                         \
        T operator()(T a, T, T) const {            \
            const double x = a;                    \
            return static_cast<T>(expression);     \
        }                                          \
        template <class T>                         \
        T operator()(T a, T b, T c, Round) const { \
            return (*this)(a, b, c);               \
        }                                          \
    };
PTXSIM_FUNCTION(Rsqrt, 1.0 / std::sqrt(x))
PTXSIM_FUNCTION(Exp2, std::exp2(x))
PTXSIM_FUNCTION(Log2, std::log2(x))
PTXSIM_FUNCTION(Sine, std::sin(x))
PTXSIM_FUNCTION(Cosine, std::cos(x))
PTXSIM_FUNCTION(Tanh, std::tanh(x))
#undef PTXSIM_FUNCTION

float flushed(float f) { return flush(f); }
double flushed(double d) { return d; }

template <class Op, class T>
void plain(Warp& w, const Instruction& in, Mask mask) {
    T out[kLanes];
    const T *a = w.reg<T>(in.a), *b = w.reg<T>(in.b), *c = w.reg<T>(in.c);
    for (int l = 0; l < kLanes; l++) out[l] = canonical(Op()(a[l], b[l], c[l]));
    store_lanes(w, in.d, out, mask);
}

template <class Op, class T>
void general(Warp& w, const Instruction& in, Mask mask) {
    T out[kLanes];
    const T *a = w.reg<T>(in.a), *b = w.reg<T>(in.b), *c = w.reg<T>(in.c);
    const Round round = static_cast<Round>(in.mode & 7);
    for (int l = 0; l < kLanes; l++) {
        if (!(mask >> l & 1)) continue;
        T x = a[l], y = b[l], z = c[l];
        if (in.mode & kFlush) x = flushed(x), y = flushed(y), z = flushed(z);
        T r = round == Round::Nearest ? Op()(x, y, z) : Op()(x, y, z, round);
        if (in.mode & kFlush) r = flushed(r);
        if (in.mode & kSaturate) r = r > 0 ? (r > 1 ? T(1) : r) : T(0);  // NaN becomes +0
        out[l] = canonical(r);
    }
    store_lanes(w, in.d, out, mask);
}

template <class Op>
void arithmetic(Decode& d, int sources) {
    const Type t = d.last_type();
    if (t != Type::F32 && t != Type::F64) d.unsupported("type");
    d.expect_operands(static_cast<size_t>(sources) + 1, static_cast<size_t>(sources) + 1);
    d.ignore("approx", "full");
    u32 mode = static_cast<u32>(d.rounding());
    if (d.has("ftz")) mode |= kFlush;
    if (d.has("sat")) mode |= kSaturate;
    Instruction& in = d.in;
    in.d = d.destination(0, t);
    in.a = in.b = in.c = d.source(1, t);
    if (sources > 1) in.b = in.c = d.source(2, t);
    if (sources > 2) in.c = d.source(3, t);
    in.mode = mode;
    if (t == Type::F32)
        in.run = mode ? general<Op, float> : plain<Op, float>;
    else
        in.run = mode ? general<Op, double> : plain<Op, double>;
}

template <class T, bool Max>
void extreme(Warp& w, const Instruction& in, Mask mask) {
    T out[kLanes];
    const T *a = w.reg<T>(in.a), *b = w.reg<T>(in.b), *c = w.reg<T>(in.c);
    const bool flush_inputs = in.mode & kFlush, nan = in.mode & kPropagateNan, three = in.c != in.b;
    for (int l = 0; l < kLanes; l++) {
        T x = a[l], y = b[l], z = c[l];
        if (flush_inputs) x = flushed(x), y = flushed(y), z = flushed(z);
        const bool odd = in.mode & kXorSign && std::signbit(x) != std::signbit(y);
        if (in.mode & kAbsolute) x = std::fabs(x), y = std::fabs(y);
        T r = Max ? maximum(x, y, nan) : minimum(x, y, nan);
        if (three) r = Max ? maximum(r, z, nan) : minimum(r, z, nan);
        if (in.mode & kXorSign) r = odd ? -std::fabs(r) : std::fabs(r);
        out[l] = canonical(r);
    }
    store_lanes(w, in.d, out, mask);
}

template <bool Max>
void decode_extreme(Decode& d) {
    const Type t = d.last_type();
    Instruction& in = d.in;
    if (d.has("ftz")) in.mode |= kFlush;
    if (d.has("NaN")) in.mode |= kPropagateNan;
    if (d.has("xorsign")) in.mode |= kXorSign;
    if (d.has("abs")) in.mode |= kAbsolute;
    d.expect_operands(3, 4);
    in.d = d.destination(0, t);
    in.a = d.source(1, t);
    in.b = in.c = d.source(2, t);
    if (d.operands.size() > 3) in.c = d.source(3, t);
    in.run = t == Type::F32 ? extreme<float, Max> : extreme<double, Max>;
}

struct Negate {
    template <class U>
    U operator()(U a) const {
        return a ^ U(1) << (8 * sizeof(U) - 1);
    }
};
struct Absolute {
    template <class U>
    U operator()(U a) const {
        return a & ~(U(1) << (8 * sizeof(U) - 1));
    }
};
struct FlushThen {  // neg.ftz and abs.ftz
    template <class Op>
    static void run(Warp& w, const Instruction& in, Mask mask) {
        u32 out[kLanes];
        const float* a = w.reg<float>(in.a);
        for (int l = 0; l < kLanes; l++) out[l] = Op()(bits<u32>(flush(a[l])));
        store_lanes(w, in.d, out, mask);
    }
};

template <class Op>
void decode_sign(Decode& d) {
    const Type t = d.type();
    d.in.d = d.destination(0, t);
    d.in.a = d.source(1, t);
    if (d.has("ftz"))
        d.in.run = FlushThen::run<Op>;
    else
        d.in.run = t == Type::F32 ? unary<Op, u32, u32> : unary<Op, u64, u64>;
}

struct CopySign {  // the sign of a, the magnitude of b
    template <class T>
    T operator()(T a, T b) const {
        return std::copysign(b, a);
    }
};

void decode_copysign(Decode& d) {
    const Type t = d.type();
    d.in.d = d.destination(0, t);
    d.in.a = d.source(1, t);
    d.in.b = d.source(2, t);
    d.in.run = t == Type::F32 ? binary<CopySign, float, float> : binary<CopySign, double, double>;
}

enum TestKind : u32 { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };
template <class T>
void test_property(Warp& w, const Instruction& in, Mask mask) {
    const T* a = w.reg<T>(in.a);
    Mask result = 0;
    for (int l = 0; l < kLanes; l++) {
        const int c = std::fpclassify(a[l]);
        const bool answers[] = {c != FP_INFINITE && c != FP_NAN,
                                c == FP_INFINITE,
                                c != FP_NAN,
                                c == FP_NAN,
                                c == FP_NORMAL,
                                c == FP_SUBNORMAL};
        result |= static_cast<Mask>(answers[in.mode]) << l;
    }
    w.set_predicate(in.d, result, mask);
}

void decode_testp(Decode& d) {
    static const char* names[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    for (u32 i = 0; i < 6; i++)
        if (d.has(names[i])) d.in.mode = i;
    d.in.d = d.destination(0, Type::Pred);
    d.in.a = d.source(1, d.type());
    d.in.run = d.type() == Type::F32 ? test_property<float> : test_property<double>;
}

}  // namespace

namespace real {
void add(Decode& d) { arithmetic<Add>(d, 2); }
void sub(Decode& d) { arithmetic<Sub>(d, 2); }
void mul(Decode& d) { arithmetic<Mul>(d, 2); }
void fma(Decode& d) { arithmetic<Fma>(d, 3); }
void div(Decode& d) { arithmetic<Div>(d, 2); }
void min(Decode& d) { decode_extreme<false>(d); }
void max(Decode& d) { decode_extreme<true>(d); }
void neg(Decode& d) { decode_sign<Negate>(d); }
void abs(Decode& d) { decode_sign<Absolute>(d); }
void ex2(Decode& d) { arithmetic<Exp2>(d, 1); }
void tanh(Decode& d) { arithmetic<Tanh>(d, 1); }
}  // namespace real

void add_float_opcodes(OpcodeTable& t) {
    t["rcp"] = [](Decode& d) { arithmetic<Rcp>(d, 1); };
    t["sqrt"] = [](Decode& d) { arithmetic<Sqrt>(d, 1); };
    t["rsqrt"] = [](Decode& d) { arithmetic<Rsqrt>(d, 1); };
    t["lg2"] = [](Decode& d) { arithmetic<Log2>(d, 1); };
    t["sin"] = [](Decode& d) { arithmetic<Sine>(d, 1); };
    t["cos"] = [](Decode& d) { arithmetic<Cosine>(d, 1); };
    t["copysign"] = decode_copysign;
    t["testp"] = decode_testp;
}

}  // namespace ptxsim
