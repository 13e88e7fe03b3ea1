// ld st atom red, address conversions, and the hints that change nothing here.
#include <algorithm>
#include <cctype>
#include <cstring>

#include "access.h"
#include "arithmetic.h"

namespace ptxsim {
namespace {

template <size_t N>
void load_element(Warp& w, u32 slot, u8* const* host, Mask mask, u32 offset) {
    u8* out = w.registers + slot;
    for (u32 l = 0; l < kLanes; l++)
        if (mask >> l & 1) std::memcpy(out + l * N, host[l] + offset, N);
}

void extend(u8* out, u32 width, const u8* from, u32 bytes, bool sign) {
    std::memcpy(out, from, bytes);
    if (width > bytes) std::memset(out + bytes, sign && from[bytes - 1] & 0x80 ? 0xff : 0, width - bytes);
}

void load(Warp& w, const Instruction& in, Mask mask) {
    u8* host[kLanes];
    resolve(w, in, {mask, static_cast<u32>(in.bytes) * in.vector, Touch::Read}, host);
    for (u32 k = 0; k < in.vector; k++) {
        const u32 width = in.widths[k], slot = in.slots[k], offset = k * in.bytes;
        if (width == 0) continue;
        if (width != in.bytes) {
            for (u32 l = 0; l < kLanes; l++)
                if (mask >> l & 1)
                    extend(w.registers + slot + l * width, width, host[l] + offset, in.bytes,
                           is_signed(in.type));
            continue;
        }
        switch (width) {
            case 1:
                load_element<1>(w, slot, host, mask, offset);
                break;
            case 2:
                load_element<2>(w, slot, host, mask, offset);
                break;
            case 4:
                load_element<4>(w, slot, host, mask, offset);
                break;
            case 8:
                load_element<8>(w, slot, host, mask, offset);
                break;
            default:
                load_element<16>(w, slot, host, mask, offset);
                break;
        }
    }
}

void store(Warp& w, const Instruction& in, Mask mask) {
    u8* host[kLanes];
    u8 values[kLanes][kWidest];
    const u32 bytes = static_cast<u32>(in.bytes) * in.vector;
    for (u32 k = 0; k < in.vector; k++)
        for (u32 l = 0; l < kLanes; l++)
            if (mask >> l & 1)
                std::memcpy(values[l] + k * in.bytes, w.registers + in.slots[k] + l * in.widths[k], in.bytes);
    resolve(w, in, {mask, bytes, Touch::Write, values[0]}, host);
    for (u32 l = 0; l < kLanes; l++)
        if (mask >> l & 1) std::memcpy(host[l], values[l], bytes);
    if (!w.launch().options.races) return;
    for (u32 l = 0; l < kLanes; l++)
        if ((mask >> l & 1) && std::memcmp(host[l], values[l], bytes) != 0 && !is_scratch(host[l])) {
            w.launch().report(w, in, static_cast<int>(l), "WRITE-COLLISION",
                              "lanes of one store write different values to one address");
            return;
        }
}

void decode_access(Decode& d, bool loads) {
    Instruction& in = d.in;
    const Type t = d.last_type();
    d.space();
    const size_t pointer = loads ? 1 : 0, data = loads ? 0 : 1;
    in.strong = d.any("volatile", "relaxed", "acquire", "release", "mmio");
    // where a line is cached changes no value
    d.ignore("weak", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "cta", "cluster", "gpu", "sys",
             "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
             "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last",
             "L2::evict_normal");
    const bool hint = d.has("L2::cache_hint");
    d.expect_operands(2, hint ? 3 : 2);
    d.address(pointer);
    in.bytes = static_cast<u8>(bytes_of(t));
    in.vector = static_cast<u8>(std::max(d.number_after("v"), 1u));
    if (static_cast<u32>(in.bytes) * in.vector > kWidest || (in.vector & (in.vector - 1)))
        d.unsupported("width");
    in.type = t;
    d.vector_operand(data, t, loads, true);
    if (in.slots.size() != in.vector) d.unsupported("vector width");
    in.run = loads ? load : store;
}

enum AtomicOperation : u32 {
    AtomAdd,
    AtomMin,
    AtomMax,
    AtomAnd,
    AtomOr,
    AtomXor,
    AtomExch,
    AtomCas,
    AtomInc,
    AtomDec,
    kAtomics
};
const char* const kAtomicNames[kAtomics] = {"add", "min",  "max", "and", "or",
                                            "xor", "exch", "cas", "inc", "dec"};

template <class T>
T combine(u32 operation, T old, T b, T c) {
    if constexpr (std::is_same_v<T, half_t> || std::is_same_v<T, bfloat_t>) {
        return from_float<T>(to_float(old) + to_float(b));
    } else {
        switch (operation) {
            case AtomAdd:
                if constexpr (std::is_floating_point_v<T>)
                    return canonical(old + b);
                else
                    return static_cast<T>(static_cast<u64>(old) + static_cast<u64>(b));
            case AtomMin:
                return std::min(old, b);
            case AtomMax:
                return std::max(old, b);
            case AtomExch:
                return b;
            case AtomCas:
                return bits<std::array<u8, sizeof(T)>>(old) == bits<std::array<u8, sizeof(T)>>(b) ? c : old;
            default:
                break;
        }
        if constexpr (std::is_integral_v<T>) {
            switch (operation) {
                case AtomAnd:
                    return old & b;
                case AtomOr:
                    return old | b;
                case AtomXor:
                    return old ^ b;
                case AtomInc:
                    return old >= b ? T(0) : static_cast<T>(old + 1);
                case AtomDec:
                    return old == 0 || old > b ? b : static_cast<T>(old - 1);
                default:
                    break;
            }
        }
        return old;
    }
}
template <class T>
Pair<T> combine(u32 operation, Pair<T> old, Pair<T> b, Pair<T> c) {
    return {combine(operation, old.low, b.low, c.low), combine(operation, old.high, b.high, c.high)};
}

template <class T>
void atomic(Warp& w, const Instruction& in, Mask mask) {
    u8* host[kLanes];
    resolve(w, in, {mask, sizeof(T), in.mode == AtomExch ? Touch::Write : Touch::Atomic}, host);
    w.launch().counters.atomics += static_cast<u64>(__builtin_popcount(mask));
    T before[kLanes], b[kLanes], c[kLanes];
    std::memcpy(b, w.reg<T>(in.b), sizeof b);
    std::memcpy(c, w.reg<T>(in.c), sizeof c);
    for (int l = 0; l < kLanes; l++) {
        if (!(mask >> l & 1)) continue;
        std::memcpy(&before[l], host[l], sizeof(T));
        const T after = combine(in.mode, before[l], b[l], c[l]);
        std::memcpy(host[l], &after, sizeof(T));
    }
    if (in.result) store_lanes(w, in.d, before, mask);
}

void decode_atomic(Decode& d, bool result) {
    Instruction& in = d.in;
    const Type t = d.last_type();
    d.space();
    d.ignore("relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys", "noftz", "rn");
    if (d.has("L2::cache_hint")) d.unsupported("cache hint");
    in.mode = kAtomics;
    for (u32 i = 0; i < kAtomics; i++)
        if (d.has(kAtomicNames[i])) in.mode = i;
    if (in.mode == kAtomics) d.unsupported("operation");
    in.strong = true;
    const size_t pointer = result ? 1 : 0;
    in.result = result && d.operands.at(0) != "_";
    if (in.result) in.d = d.destination(0, t);
    d.address(pointer);
    in.b = in.c = d.source(pointer + 1, t);
    if (in.mode == AtomCas) in.c = d.source(pointer + 2, t);
    switch (t) {
        case Type::F32:
            in.run = atomic<float>;
            break;
        case Type::F64:
            in.run = atomic<double>;
            break;
        case Type::F16:
            in.run = atomic<half_t>;
            break;
        case Type::BF16:
            in.run = atomic<bfloat_t>;
            break;
        case Type::F16x2:
            in.run = atomic<Pair<half_t>>;
            break;
        case Type::BF16x2:
            in.run = atomic<Pair<bfloat_t>>;
            break;
        default:
            in.run = for_integer(t, [](auto tag) -> Handler { return atomic<PTXSIM_TYPE(tag)>; });
    }
}

struct Shift {  // cvta: between a state space and its window of the generic space
    u64 operator()(const Instruction& in, u64 a, u64, u64) const { return a + static_cast<u64>(in.offset); }
};

void decode_cvta(Decode& d) {
    Instruction& in = d.in;
    if (bytes_of(d.type()) != 8) d.unsupported("32-bit addresses");
    const bool to_space = d.has("to");
    const Space space = d.space();
    const u64 window = space == Space::Shared ? kSharedWindow : space == Space::Local ? kLocalWindow : 0;
    if (space == Space::Param) d.unsupported("param");
    in.offset = static_cast<i64>(to_space ? 0 - window : window);
    in.d = d.destination(0, d.type());
    in.a = in.b = in.c = d.source(1, d.type());
    in.run = with_mode<Shift, u64, u64>;
}

void is_space(Warp& w, const Instruction& in, Mask mask) {
    const u64* a = w.reg<u64>(in.a);
    Mask result = 0;
    for (int l = 0; l < kLanes; l++) {
        const u64 window = a[l] >> 56 << 56;
        const Space space = window == kSharedWindow  ? Space::Shared
                            : window == kLocalWindow ? Space::Local
                                                     : Space::Global;
        result |= static_cast<Mask>(space == in.space) << l;
    }
    w.set_predicate(in.d, result, mask);
}

void decode_isspacep(Decode& d) {
    d.space();
    d.in.d = d.destination(0, Type::Pred);
    d.in.a = d.source(1, Type::U64);
    d.in.run = is_space;
}

void no_operation(Warp&, const Instruction&, Mask) {}

// hints and fences: blocks run one after another and every warp's accesses in order, so nothing is left to do
template <class... Names>
void decode_hint(Decode& d, Names... names) {
    d.ignore(names...);
    d.in.run = no_operation;
}

}  // namespace

void add_memory_opcodes(OpcodeTable& t) {
    t["ld"] = [](Decode& d) { decode_access(d, true); };
    t["ldu"] = t["ld"];
    t["st"] = [](Decode& d) { decode_access(d, false); };
    t["atom"] = [](Decode& d) { decode_atomic(d, true); };
    t["red"] = [](Decode& d) { decode_atomic(d, false); };
    t["cvta"] = decode_cvta;
    t["isspacep"] = decode_isspacep;
    t["membar"] = [](Decode& d) { decode_hint(d, "cta", "gl", "sys"); };
    t["fence"] = [](Decode& d) {
        decode_hint(d, "sc", "acq_rel", "cta", "gpu", "sys", "proxy", "async", "shared::cta", "global");
    };
    t["prefetch"] = [](Decode& d) {
        decode_hint(d, "global", "L1", "L2", "local", "L2::evict_last", "L2::evict_normal");
    };
    t["createpolicy"] = [](Decode& d) {
        decode_hint(d, "fractional", "L2::evict_first", "L2::evict_last", "L2::evict_normal");
    };
    t["nanosleep"] = [](Decode& d) { decode_hint(d); };
    t["griddepcontrol"] = [](Decode& d) { decode_hint(d, "wait", "launch_dependents"); };
}

}  // namespace ptxsim
