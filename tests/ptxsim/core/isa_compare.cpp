// setp and set.
#include "lanes.h"

namespace ptxsim {
namespace {

enum Comparison : u32 { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan, kComparisons };
const char* const kNames[kComparisons] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                          "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

// Instruction::mode: comparison, then how it joins the third operand, then flags
enum Join : u32 { JoinNone, JoinAnd, JoinOr, JoinXor };
constexpr u32 kJoinShift = 4, kFlush = 64, kFloatResult = 128;

template <Comparison C, class T>
bool holds(T a, T b) {
    // an unordered comparison (…u) is true when an operand is NaN, an ordered one false
    switch (C) {
        case Eq:
            return a == b;
        case Ne:
            return a < b || a > b;
        case Lt:
            return a < b;
        case Le:
            return a <= b;
        case Gt:
            return a > b;
        case Ge:
            return a >= b;
        case Equ:
            return !(a < b || a > b);
        case Neu:
            return !(a == b);
        case Ltu:
            return !(a >= b);
        case Leu:
            return !(a > b);
        case Gtu:
            return !(a <= b);
        case Geu:
            return !(a < b);
        case Num:
            return a == a && b == b;
        default:
            return a != a || b != b;
    }
}

inline float value(float v, bool flush_it) { return flush_it ? flush(v) : v; }
inline float value(half_t v, bool) { return to_float(v); }
inline float value(bfloat_t v, bool) { return to_float(v); }
template <class T>
inline T value(T v, bool) {
    return v;
}

template <Comparison C, class T>
Mask compare(Warp& w, const Instruction& in) {
    const T *a = w.reg<T>(in.a), *b = w.reg<T>(in.b);
    const bool flush_it = in.mode & kFlush;
    u8 answer[kLanes];
    for (int l = 0; l < kLanes; l++) answer[l] = holds<C>(value(a[l], flush_it), value(b[l], flush_it));
    Mask result = 0;
    for (int l = 0; l < kLanes; l++) result |= static_cast<Mask>(answer[l]) << l;
    return result;
}

Mask joined(Warp& w, const Instruction& in, Mask result) {
    switch (in.mode >> kJoinShift & 3) {
        case JoinAnd:
            return result & w.predicate(in.c, in.negate_c);
        case JoinOr:
            return result | w.predicate(in.c, in.negate_c);
        case JoinXor:
            return result ^ w.predicate(in.c, in.negate_c);
        default:
            return result;
    }
}

template <Comparison C, class T>
void set_predicates(Warp& w, const Instruction& in, Mask mask) {
    const Mask result = compare<C, T>(w, in);
    const Mask first = joined(w, in, result), second = joined(w, in, ~result);
    w.set_predicate(in.d, first, mask);
    w.set_predicate(in.e, second, mask);
}

template <Comparison C, class T>
void set_values(Warp& w, const Instruction& in, Mask mask) {
    const Mask result = joined(w, in, compare<C, T>(w, in));
    u32 out[kLanes];
    for (int l = 0; l < kLanes; l++)
        out[l] = !(result >> l & 1) ? 0 : in.mode & kFloatResult ? bits<u32>(1.0f) : ~0u;
    store_lanes(w, in.d, out, mask);
}

template <class T>
Handler handler(u32 comparison, bool predicates) {
#define PTXSIM_CASE(C) \
    case C:            \
        return predicates ? set_predicates<C, T> : set_values<C, T>
    switch (comparison) {
        PTXSIM_CASE(Eq);
        PTXSIM_CASE(Ne);
        PTXSIM_CASE(Lt);
        PTXSIM_CASE(Le);
        PTXSIM_CASE(Gt);
        PTXSIM_CASE(Ge);
        PTXSIM_CASE(Equ);
        PTXSIM_CASE(Neu);
        PTXSIM_CASE(Ltu);
        PTXSIM_CASE(Leu);
        PTXSIM_CASE(Gtu);
        PTXSIM_CASE(Geu);
        PTXSIM_CASE(Num);
        PTXSIM_CASE(Nan);
    }
#undef PTXSIM_CASE
    return nullptr;
}

void decode_compare(Decode& d, bool predicates) {
    Instruction& in = d.in;
    const Type t = d.last_type();
    u32 comparison = kComparisons;
    for (u32 i = 0; i < kComparisons; i++)
        if (d.has(kNames[i])) comparison = i;
    static const std::pair<const char*, u32> unsigned_names[] = {
        {"lo", Lt}, {"ls", Le}, {"hi", Gt}, {"hs", Ge}};
    for (auto& [name, same] : unsigned_names)
        if (d.has(name)) comparison = same;
    if (comparison == kComparisons) d.unsupported("comparison");
    if (d.has("and")) in.mode |= JoinAnd << kJoinShift;
    if (d.has("or")) in.mode |= JoinOr << kJoinShift;
    if (d.has("xor")) in.mode |= JoinXor << kJoinShift;
    if (d.has("ftz")) in.mode |= kFlush;
    if (predicates) {
        d.pair(0, Type::Pred, Type::Pred);
    } else {
        in.d = d.destination(0, d.type(0));
        if (d.type(0) == Type::F32) in.mode |= kFloatResult;
        if (bytes_of(d.type(0)) != 4) d.unsupported("result type");
    }
    in.a = d.source(1, t);
    in.b = d.source(2, t);
    d.expect_operands(3, in.mode >> kJoinShift & 3 ? 4 : 3);
    if (in.mode >> kJoinShift & 3) in.c = d.predicate(3, in.negate_c);
    switch (t) {
        case Type::F32:
            in.run = handler<float>(comparison, predicates);
            break;
        case Type::F64:
            in.run = handler<double>(comparison, predicates);
            break;
        case Type::F16:
            in.run = handler<half_t>(comparison, predicates);
            break;
        case Type::BF16:
            in.run = handler<bfloat_t>(comparison, predicates);
            break;
        default:
            in.run = for_integer(
                t, [&](auto tag) -> Handler { return handler<PTXSIM_TYPE(tag)>(comparison, predicates); });
    }
}

// setp.cc.f16x2 p|q, a, b: one predicate per half
template <class T>
void set_halves(Warp& w, const Instruction& in, Mask mask) {
    const Pair<T>*a = w.reg<Pair<T>>(in.a), *b = w.reg<Pair<T>>(in.b);
    Mask low = 0, high = 0;
    auto test = [&](T x, T y) {
        const float f = to_float(x), g = to_float(y);
        switch (in.mode & 15) {
            case Eq:
                return holds<Eq>(f, g);
            case Ne:
                return holds<Ne>(f, g);
            case Lt:
                return holds<Lt>(f, g);
            case Le:
                return holds<Le>(f, g);
            case Gt:
                return holds<Gt>(f, g);
            case Ge:
                return holds<Ge>(f, g);
            case Equ:
                return holds<Equ>(f, g);
            case Neu:
                return holds<Neu>(f, g);
            case Ltu:
                return holds<Ltu>(f, g);
            case Leu:
                return holds<Leu>(f, g);
            case Gtu:
                return holds<Gtu>(f, g);
            case Geu:
                return holds<Geu>(f, g);
            case Num:
                return holds<Num>(f, g);
            default:
                return holds<Nan>(f, g);
        }
    };
    for (int l = 0; l < kLanes; l++) {
        low |= static_cast<Mask>(test(a[l].low, b[l].low)) << l;
        high |= static_cast<Mask>(test(a[l].high, b[l].high)) << l;
    }
    w.set_predicate(in.d, low, mask);
    w.set_predicate(in.e, high, mask);
}

void decode_setp(Decode& d) {
    const Type t = d.last_type();
    if (t != Type::F16x2 && t != Type::BF16x2) return decode_compare(d, true);
    for (u32 i = 0; i < kComparisons; i++)
        if (d.has(kNames[i])) d.in.mode = i;
    d.expect_operands(3, 3);
    d.pair(0, Type::Pred, Type::Pred);
    d.in.a = d.source(1, t);
    d.in.b = d.source(2, t);
    d.in.run = t == Type::F16x2 ? set_halves<half_t> : set_halves<bfloat_t>;
}

}  // namespace

void add_compare_opcodes(OpcodeTable& t) {
    t["setp"] = decode_setp;
    t["set"] = [](Decode& d) { decode_compare(d, false); };
}

}  // namespace ptxsim
