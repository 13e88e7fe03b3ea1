// Instructions in which lanes look at each other: shfl, vote, match, redux, activemask, elect, bar.warp.
#include <algorithm>

#include "lanes.h"

namespace ptxsim {
namespace {

enum ShuffleMode : u32 { kUp, kDown, kButterfly, kIndex };

void shuffle(Warp& w, const Instruction& in, Mask mask) {
    u32 out[kLanes] = {};
    Mask valid = 0;
    const u32 *a = w.reg<u32>(in.a), *b = w.reg<u32>(in.b), *c = w.reg<u32>(in.c);
    for (int l = 0; l < kLanes; l++) {
        if (!(mask >> l & 1)) continue;
        const int clamp = static_cast<int>(c[l] & 31), segment = static_cast<int>(c[l] >> 8 & 31),
                  step = static_cast<int>(b[l] & 31);
        const int last = (l & segment) | (clamp & ~segment), first = l & segment;
        int from;
        bool in_range;
        switch (in.mode) {
            case kUp:
                from = l - step, in_range = from >= last;
                break;
            case kDown:
                from = l + step, in_range = from <= last;
                break;
            case kButterfly:
                from = l ^ step, in_range = from <= last;
                break;
            default:
                from = first | (step & ~segment), in_range = from <= last;
                break;
        }
        if (!in_range) from = l;
        if (!(mask >> from & 1))
            w.launch().report(w, in, l, "SHFL-INACTIVE",
                              format("reads lane %d, which does not take part", from));
        out[l] = a[from];
        valid |= static_cast<Mask>(in_range) << l;
    }
    store_lanes(w, in.d, out, mask);
    w.set_predicate(in.e, valid, mask);
}

// every .sync instruction names its members; the warp gathers them first (warp.cpp)
void members(Decode& d, size_t operand) {
    d.expect_operands(operand + 1, operand + 1);
    d.in.members = d.source(operand, Type::B32);
    d.in.converge = Converge::Members;
}

void decode_shfl(Decode& d) {
    if (!d.has("sync")) d.unsupported("shfl without .sync");
    static const char* modes[] = {"up", "down", "bfly", "idx"};
    for (u32 i = 0; i < 4; i++)
        if (d.has(modes[i])) d.in.mode = i;
    d.pair(0, Type::B32, Type::Pred);
    d.in.a = d.source(1, Type::B32);
    d.in.b = d.source(2, Type::B32);
    d.in.c = d.source(3, Type::B32);
    members(d, 4);
    d.in.run = shuffle;
}

enum VoteMode : u32 { kBallot, kAny, kAll, kUniform };

void vote(Warp& w, const Instruction& in, Mask mask) {
    const Mask yes = w.predicate(in.a, in.negate_a) & mask;
    if (in.mode == kBallot) {
        u32 out[kLanes];
        std::fill_n(out, kLanes, yes);
        return store_lanes(w, in.d, out, mask);
    }
    const bool answer = in.mode == kAny ? yes != 0 : in.mode == kAll ? yes == mask : yes == mask || yes == 0;
    w.set_predicate(in.d, answer ? kAllLanes : 0, mask);
}

void decode_vote(Decode& d) {
    if (!d.has("sync")) d.unsupported("vote without .sync");
    static const char* modes[] = {"ballot", "any", "all", "uni"};
    for (u32 i = 0; i < 4; i++)
        if (d.has(modes[i])) d.in.mode = i;
    d.in.d = d.destination(0, d.in.mode == kBallot ? Type::B32 : Type::Pred);
    d.in.a = d.predicate(1, d.in.negate_a);
    members(d, 2);
    d.in.run = vote;
}

template <class T, bool All>
void match(Warp& w, const Instruction& in, Mask mask) {
    u32 out[kLanes] = {};
    const T* a = w.reg<T>(in.a);
    bool same = true;
    for (int l = 0; l < kLanes; l++) {
        if (!(mask >> l & 1)) continue;
        for (int k = 0; k < kLanes; k++)
            if ((mask >> k & 1) && a[k] == a[l]) out[l] |= 1u << k;
        same &= out[l] == mask;
    }
    if (All) {
        std::fill_n(out, kLanes, same ? mask : 0);
        w.set_predicate(in.e, same ? kAllLanes : 0, mask);
    }
    store_lanes(w, in.d, out, mask);
}

void decode_match(Decode& d) {
    if (!d.has("sync")) d.unsupported("match without .sync");
    const bool all = d.has("all"), wide = bytes_of(d.type()) == 8;
    d.ignore("any");
    d.pair(0, Type::B32, Type::Pred);
    d.in.a = d.source(1, d.type());
    members(d, 2);
    d.in.run =
        all ? (wide ? match<u64, true> : match<u32, true>) : (wide ? match<u64, false> : match<u32, false>);
}

enum ReduceMode : u32 { kAdd, kMin, kMax, kAnd_, kOr_, kXor_ };

template <class T>
void reduce(Warp& w, const Instruction& in, Mask mask) {
    const T* a = w.reg<T>(in.a);
    const int first = lowest_lane(mask);
    T r = a[first];
    for (int l = first + 1; l < kLanes; l++) {
        if (!(mask >> l & 1)) continue;
        switch (in.mode) {
            case kAdd:
                r = static_cast<T>(static_cast<u32>(r) + static_cast<u32>(a[l]));
                break;
            case kMin:
                r = std::min(r, a[l]);
                break;
            case kMax:
                r = std::max(r, a[l]);
                break;
            case kAnd_:
                r &= a[l];
                break;
            case kOr_:
                r |= a[l];
                break;
            default:
                r ^= a[l];
                break;
        }
    }
    T out[kLanes];
    std::fill_n(out, kLanes, r);
    store_lanes(w, in.d, out, mask);
}

void decode_redux(Decode& d) {
    static const char* modes[] = {"add", "min", "max", "and", "or", "xor"};
    d.ignore("sync");
    for (u32 i = 0; i < 6; i++)
        if (d.has(modes[i])) d.in.mode = i;
    if (is_float(d.type())) d.unsupported("type");
    d.in.d = d.destination(0, d.type());
    d.in.a = d.source(1, d.type());
    members(d, 2);
    d.in.run = is_signed(d.type()) ? reduce<i32> : reduce<u32>;
}

void active_mask(Warp& w, const Instruction& in, Mask mask) {
    u32 out[kLanes];
    std::fill_n(out, kLanes, mask);
    store_lanes(w, in.d, out, mask);
}

void decode_activemask(Decode& d) {
    d.in.d = d.destination(0, Type::B32);
    d.in.run = active_mask;
}

void elect(Warp& w, const Instruction& in, Mask mask) {
    u32 out[kLanes];
    std::fill_n(out, kLanes, static_cast<u32>(lowest_lane(mask)));
    store_lanes(w, in.d, out, mask);
    w.set_predicate(in.e, 1u << lowest_lane(mask), mask);
}

void decode_elect(Decode& d) {
    d.ignore("sync");
    d.pair(0, Type::B32, Type::Pred);
    members(d, 1);
    d.in.run = elect;
}

}  // namespace

void add_warp_opcodes(OpcodeTable& t) {
    t["shfl"] = decode_shfl;
    t["vote"] = decode_vote;
    t["match"] = decode_match;
    t["redux"] = decode_redux;
    t["activemask"] = decode_activemask;
    t["elect"] = decode_elect;
}

}  // namespace ptxsim
