// Bits and data movement: and or xor not, shifts, lop3, prmt, bit fields, mov, selp, slct.
#include <algorithm>
#include <cstring>

#include "lanes.h"

namespace ptxsim {
namespace {

struct And {
    template <class T>
    T operator()(T a, T b) const {
        return a & b;
    }
};
struct Or {
    template <class T>
    T operator()(T a, T b) const {
        return a | b;
    }
};
struct Xor {
    template <class T>
    T operator()(T a, T b) const {
        return a ^ b;
    }
};
struct Not {
    template <class T>
    T operator()(T a) const {
        return static_cast<T>(~a);
    }
};
struct LogicalNot {
    template <class T>
    T operator()(T a) const {
        return a == 0;
    }
};
struct Copy {
    template <class T>
    T operator()(T a) const {
        return a;
    }
};
// amounts past the width give 0 or the sign
struct ShiftLeft {
    template <class T>
    T operator()(T a, u32 n) const {
        return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(static_cast<u64>(a) << n);
    }
};
struct ShiftRight {
    template <class T>
    T operator()(T a, u32 n) const {
        return n >= 8 * sizeof(T) ? static_cast<T>(std::is_signed_v<T> && a < 0 ? -1 : 0)
                                  : static_cast<T>(a >> n);
    }
};
enum FunnelMode : u32 { kLeft = 1, kClamp = 2 };
struct Funnel {
    u32 operator()(const Instruction& in, u32 a, u32 b, u32 c) const {
        const u64 both = static_cast<u64>(b) << 32 | a;
        const u32 n = in.mode & kClamp ? std::min(c, 32u) : c & 31;
        return static_cast<u32>(in.mode & kLeft ? both << n >> 32 : both >> n);
    }
};
struct LookUp {  // lop3: mode is the truth table
    u32 operator()(const Instruction& in, u32 a, u32 b, u32 c) const {
        u32 r = 0;
        for (u32 i = 0; i < 8; i++)
            if (in.mode >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        return r;
    }
};
enum PermuteMode : u32 { kIndex, kForward4, kBackward4, kReplicate8, kEdgeLeft, kEdgeRight, kReplicate16 };
struct Permute {
    u32 operator()(const Instruction& in, u32 a, u32 b, u32 c) const {
        const u64 bytes = static_cast<u64>(b) << 32 | a;
        const u32 s = c & 3;
        u32 r = 0;
        for (u32 i = 0; i < 4; i++) {
            u32 pick = 0;
            switch (in.mode) {
                case kIndex:
                    pick = c >> 4 * i & 15;
                    break;
                case kForward4:
                    pick = (s + i) & 7;
                    break;
                case kBackward4:
                    pick = (s + 8 - i) & 7;
                    break;
                case kReplicate8:
                    pick = s;
                    break;
                case kEdgeLeft:
                    pick = std::max(s, i);
                    break;
                case kEdgeRight:
                    pick = std::min(s, i);
                    break;
                default:
                    pick = (s & 1) * 2 + (i & 1);
                    break;
            }
            u32 byte = static_cast<u8>(bytes >> 8 * (pick & 7));
            if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
            r |= byte << 8 * i;
        }
        return r;
    }
};
struct Extract {  // bfe
    template <class T>
    T operator()(T a, u32 position, u32 length) const {
        using U = std::make_unsigned_t<T>;
        constexpr u32 width = 8 * sizeof(T);
        position &= 255, length &= 255;
        if (length == 0) return 0;
        U r = position >= width ? 0 : static_cast<U>(static_cast<U>(a) >> position);
        if (length < width) r &= (U(1) << length) - 1;
        if (std::is_signed_v<T>) {
            const bool negative = static_cast<U>(a) >> std::min(position + length - 1, width - 1) & 1;
            const u32 have = std::min(length, position >= width ? 0 : width - position);
            if (negative && have < width) r |= static_cast<U>(~((U(1) << have) - 1));
        }
        return static_cast<T>(r);
    }
};
template <class U>
void insert_bits(Warp& w, const Instruction& in, Mask mask) {  // bfi
    U out[kLanes];
    const U *a = w.reg<U>(in.a), *b = w.reg<U>(in.b);
    const u32 *position = w.reg<u32>(in.c), *length = w.reg<u32>(in.x);
    for (int l = 0; l < kLanes; l++) {
        const u32 p = position[l] & 255, n = length[l] & 255, width = 8 * sizeof(U);
        U field = 0;
        if (p < width && n) field = static_cast<U>((n >= width ? ~U(0) : (U(1) << n) - 1) << p);
        out[l] = (b[l] & ~field) | (p < width ? (a[l] << p) & field : 0);
    }
    store_lanes(w, in.d, out, mask);
}
struct MakeMask {  // bmsk
    u32 operator()(const Instruction& in, u32 position, u32 length, u32) const {
        if (in.mode) position &= 31, length &= 31;
        const u64 field = ((length >= 32 ? 1ull << 32 : 1ull << length) - 1);
        return position >= 32 ? 0 : static_cast<u32>(field << position);
    }
};

template <class Op>
void predicate_logic(Warp& w, const Instruction& in, Mask mask) {
    w.set_predicate(in.d, Op()(w.predicate(in.a, in.negate_a), w.predicate(in.b, in.negate_b)), mask);
}
void predicate_copy(Warp& w, const Instruction& in, Mask mask) {
    w.set_predicate(in.d, w.predicate(in.a, in.negate_a), mask);
}

template <class Op>
void decode_logic(Decode& d) {
    const Type t = d.type();
    if (t == Type::Pred) {
        d.in.d = d.destination(0, t);
        d.in.a = d.predicate(1, d.in.negate_a);
        d.in.b = d.predicate(2, d.in.negate_b);
        d.in.run = predicate_logic<Op>;
        return;
    }
    d.in.d = d.destination(0, t);
    d.in.a = d.source(1, t);
    d.in.b = d.source(2, t);
    d.in.run =
        for_width(t, [](auto tag) -> Handler { return binary<Op, PTXSIM_TYPE(tag), PTXSIM_TYPE(tag)>; });
}

void decode_not(Decode& d) {
    const Type t = d.type();
    d.in.d = d.destination(0, t);
    if (t == Type::Pred) {
        d.in.a = d.predicate(1, d.in.negate_a);
        d.in.negate_a = !d.in.negate_a;
        d.in.run = predicate_copy;
        return;
    }
    d.in.a = d.source(1, t);
    d.in.run =
        for_width(t, [](auto tag) -> Handler { return unary<Not, PTXSIM_TYPE(tag), PTXSIM_TYPE(tag)>; });
}

void decode_cnot(Decode& d) {
    d.in.d = d.destination(0, d.type());
    d.in.a = d.source(1, d.type());
    d.in.run = for_width(
        d.type(), [](auto tag) -> Handler { return unary<LogicalNot, PTXSIM_TYPE(tag), PTXSIM_TYPE(tag)>; });
}

template <class Op>
void decode_shift(Decode& d) {
    d.in.d = d.destination(0, d.type());
    d.in.a = d.source(1, d.type());
    d.in.b = d.source(2, Type::U32);
    d.in.run = for_integer(
        d.type(), [](auto tag) -> Handler { return binary<Op, PTXSIM_TYPE(tag), PTXSIM_TYPE(tag), u32>; });
}

template <class Op>
void decode_three(Decode& d) {
    d.in.d = d.destination(0, Type::B32);
    d.in.a = d.source(1, Type::B32);
    d.in.b = d.source(2, Type::B32);
    d.in.c = d.operands.size() > 3 ? d.source(3, Type::B32) : d.in.b;
    d.in.run = with_mode<Op, u32, u32>;
}

void decode_funnel(Decode& d) {
    if (d.has("l"))
        d.in.mode |= kLeft;
    else if (!d.has("r"))
        d.unsupported("direction");
    if (d.has("clamp"))
        d.in.mode |= kClamp;
    else if (!d.has("wrap"))
        d.unsupported("mode");
    decode_three<Funnel>(d);
}

void decode_lop3(Decode& d) {
    d.expect_operands(5, 5);
    d.in.mode = static_cast<u32>(d.immediate(4, Type::U32));
    decode_three<LookUp>(d);
}

void decode_prmt(Decode& d) {
    static const char* modes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
    for (u32 i = 1; i < 7; i++)
        if (d.has(modes[i])) d.in.mode = i;
    decode_three<Permute>(d);
}

void decode_bmsk(Decode& d) {
    d.in.mode = d.has("wrap");
    d.ignore("clamp");
    decode_three<MakeMask>(d);
}

void decode_bfe(Decode& d) {
    d.in.d = d.destination(0, d.type());
    d.in.a = d.source(1, d.type());
    d.in.b = d.source(2, Type::U32);
    d.in.c = d.source(3, Type::U32);
    d.in.run = for_integer(d.type(), [](auto tag) -> Handler {
        return ternary<Extract, PTXSIM_TYPE(tag), PTXSIM_TYPE(tag), u32, u32>;
    });
}

void decode_bfi(Decode& d) {
    d.in.d = d.destination(0, d.type());
    d.in.a = d.source(1, d.type());
    d.in.b = d.source(2, d.type());
    d.in.c = d.source(3, Type::U32);
    d.in.x = d.source(4, Type::U32);
    d.in.run = bytes_of(d.type()) == 4 ? insert_bits<u32> : insert_bits<u64>;
}

void unpack(Warp& w, const Instruction& in, Mask mask) {  // mov.b32 {lo, hi}, x
    const u32 whole = in.bytes * in.vector;
    u8 copy[kLanes * 16];
    std::memcpy(copy, w.registers + in.a, kLanes * whole);
    for (u32 k = 0; k < in.vector; k++)
        for (u32 l = 0; l < kLanes; l++)
            if (mask >> l & 1)
                std::memcpy(w.registers + in.slots[k] + l * in.bytes, copy + l * whole + k * in.bytes,
                            in.bytes);
}

void pack(Warp& w, const Instruction& in, Mask mask) {  // mov.b32 x, {lo, hi}
    const u32 whole = in.bytes * in.vector;
    u8 copy[kLanes * 16];
    for (u32 k = 0; k < in.vector; k++)
        for (u32 l = 0; l < kLanes; l++)
            std::memcpy(copy + l * whole + k * in.bytes, w.registers + in.slots[k] + l * in.bytes, in.bytes);
    for (u32 l = 0; l < kLanes; l++)
        if (mask >> l & 1) std::memcpy(w.registers + in.d + l * whole, copy + l * whole, whole);
}

Type piece(u32 bytes) {
    return bytes == 1 ? Type::B8 : bytes == 2 ? Type::B16 : bytes == 4 ? Type::B32 : Type::B64;
}

void decode_mov(Decode& d) {
    const Type t = d.type();
    Instruction& in = d.in;
    d.expect_operands(2, 2);
    if (t == Type::Pred) {
        in.d = d.destination(0, t);
        in.a = d.predicate(1, in.negate_a);
        in.run = predicate_copy;
        return;
    }
    const bool unpacks = d.operands[0][0] == '{', packs = d.operands[1][0] == '{';
    if (unpacks || packs) {
        const std::string& list = d.operands[unpacks ? 0 : 1];
        in.vector = static_cast<u8>(split(list.substr(1, list.size() - 2), ',').size());
        in.bytes = static_cast<u8>(bytes_of(t) / in.vector);
        if (in.bytes * in.vector != static_cast<int>(bytes_of(t))) d.unsupported("vector width");
        d.vector_operand(unpacks ? 0 : 1, piece(in.bytes), unpacks, false);
        if (unpacks)
            in.a = d.source(1, t);
        else
            in.d = d.destination(0, t);
        in.run = unpacks ? unpack : pack;
        return;
    }
    in.d = d.destination(0, t);
    in.a = d.source(1, t);
    if (t == Type::B128) {
        in.vector = 1, in.bytes = 16;
        in.slots = {in.d};
        in.run = unpack;
        return;
    }
    in.run =
        for_width(t, [](auto tag) -> Handler { return unary<Copy, PTXSIM_TYPE(tag), PTXSIM_TYPE(tag)>; });
}

template <class T>
void select(Warp& w, const Instruction& in, Mask mask) {
    T out[kLanes];
    const T *a = w.reg<T>(in.a), *b = w.reg<T>(in.b);
    const Mask first = w.predicate(in.c, in.negate_c);
    for (int l = 0; l < kLanes; l++) out[l] = first >> l & 1 ? a[l] : b[l];
    store_lanes(w, in.d, out, mask);
}

void decode_selp(Decode& d) {
    d.in.d = d.destination(0, d.type());
    d.in.a = d.source(1, d.type());
    d.in.b = d.source(2, d.type());
    d.in.c = d.predicate(3, d.in.negate_c);
    d.in.run = for_width(d.type(), [](auto tag) -> Handler { return select<PTXSIM_TYPE(tag)>; });
}

struct SelectBySign {  // slct: a where c >= 0
    template <class T, class C>
    T operator()(T a, T b, C c) const {
        return c >= 0 ? a : b;
    }
};

void decode_slct(Decode& d) {
    const bool real = d.type(1) == Type::F32;
    if (d.has("ftz")) d.unsupported("ftz");
    d.in.d = d.destination(0, d.type(0));
    d.in.a = d.source(1, d.type(0));
    d.in.b = d.source(2, d.type(0));
    d.in.c = d.source(3, d.type(1));
    d.in.run = for_width(d.type(0), [&](auto tag) -> Handler {
        using T = PTXSIM_TYPE(tag);
        return real ? ternary<SelectBySign, T, T, T, float> : ternary<SelectBySign, T, T, T, i32>;
    });
}

}  // namespace

void add_logic_opcodes(OpcodeTable& t) {
    t["and"] = decode_logic<And>;
    t["or"] = decode_logic<Or>;
    t["xor"] = decode_logic<Xor>;
    t["not"] = decode_not;
    t["cnot"] = decode_cnot;
    t["shl"] = decode_shift<ShiftLeft>;
    t["shr"] = decode_shift<ShiftRight>;
    t["shf"] = decode_funnel;
    t["lop3"] = decode_lop3;
    t["prmt"] = decode_prmt;
    t["bmsk"] = decode_bmsk;
    t["bfe"] = decode_bfe;
    t["bfi"] = decode_bfi;
    t["mov"] = decode_mov;
    t["selp"] = decode_selp;
    t["slct"] = decode_slct;
}

}  // namespace ptxsim
