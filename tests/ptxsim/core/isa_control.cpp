// Branches, barriers, calls.
#include <cstring>

#include "lanes.h"

namespace ptxsim {
namespace {

void decode_bra(Decode& d) {
    d.ignore("uni");
    d.in.flow = Flow::Branch;
    d.builder.branch_to(d.operands.at(0), d.in);
}

void decode_brx(Decode& d) {
    d.ignore("uni");
    if (!d.has("idx")) d.unsupported();
    d.in.flow = Flow::Table;
    d.in.a = d.source(0, Type::U32);
    d.builder.branch_table(d.operands.at(1), d.in);
}

void sync_warp(Warp& w, const Instruction&, Mask) { w.block->clock(w.id, w.id)++; }

void arrive(Warp& w, const Instruction& in, Mask mask) {
    Block& b = *w.block;
    const u32 id = w.reg<u32>(in.a)[lowest_lane(mask)];
    b.arrived[id] += kLanes;
    std::vector<u32>& clock = b.arrived_clock[id];
    clock.resize(b.warps.size(), 0);
    for (u32 v = 0; v < clock.size(); v++) clock[v] = std::max(clock[v], b.clock(w.id, v));
    b.clock(w.id, w.id)++;
}

void decode_barrier(Decode& d) {
    Instruction& in = d.in;
    d.ignore("cta");
    if (d.has("warp")) {
        d.ignore("sync");
        d.expect_operands(1, 1);
        in.members = d.source(0, Type::B32);
        in.converge = Converge::Members;
        in.run = sync_warp;
        return;
    }
    in.flow = Flow::Barrier;
    const bool aligned = d.has("aligned") || d.statement.opcode == "bar";
    in.converge = aligned ? Converge::Live : Converge::None;
    auto id_and_count = [&](size_t first, bool counted) {
        in.a = d.source(first, Type::B32);
        if (counted) in.slots = {d.source(first + 1, Type::B32)};
    };
    if (d.has("red")) {
        in.mode = d.has("popc") ? kPopc : d.has("and") ? kAnd : d.has("or") ? kOr : kNone;
        if (!in.mode) d.unsupported();
        d.expect_operands(3, 4);
        in.d = d.destination(0, in.mode == kPopc ? Type::U32 : Type::Pred);
        id_and_count(1, d.operands.size() == 4);
        in.c = d.predicate(d.operands.size() - 1, in.negate_c);
    } else if (d.has("arrive")) {
        d.expect_operands(2, 2);
        id_and_count(0, true);
        in.run = arrive;
    } else if (d.has("sync")) {
        d.expect_operands(1, 2);
        id_and_count(0, d.operands.size() == 2);
    } else {
        d.unsupported();
    }
}

// Entering a function (lanes given) and leaving it (none): parameters and results are copied in per-thread
// memory.
void copy_arguments(Warp& w, const Instruction& in, Mask mask) {
    Block& b = *w.block;
    for (const auto& [from, to, bytes] : mask ? in.copies_in : in.copies_out)
        for (u32 l = 0; l < kLanes; l++) {
            u8* frame = &b.local[(w.id * kLanes + l) * b.local_stride];
            std::memmove(frame + to, frame + from, bytes);
        }
}

void stop_assert(Warp& w, const Instruction& in, Mask mask) {
    throw Error(format("device assertion failed: kernel %s line %d block (%u,%u,%u) thread %u",
                       shortened(w.block->kernel->name, 64).c_str(), in.at.line, w.block->id[0],
                       w.block->id[1], w.block->id[2], w.id * kLanes + static_cast<u32>(lowest_lane(mask))));
}

void skip_printf(Warp&, const Instruction&, Mask) {}

void decode_call(Decode& d) {
    Instruction& in = d.in;
    d.ignore("uni");
    in.flow = Flow::Call;
    for (const std::string& o : d.operands) {
        if (o == "__assertfail") {
            in.run = stop_assert;
            in.target = ~0u;
            return;
        }
        if (o == "vprintf") {
            in.run = skip_printf;
            in.target = ~0u;
            return;
        }
    }
    in.run = copy_arguments;
    d.builder.call(d.operands, in);
}

void decode_return(Decode& d, bool ends_thread) {
    d.ignore("uni");
    d.in.flow = Flow::Return;
    d.in.mode = ends_thread;
}

}  // namespace

void add_control_opcodes(OpcodeTable& t) {
    t["bra"] = decode_bra;
    t["brx"] = decode_brx;
    t["bar"] = decode_barrier;
    t["barrier"] = decode_barrier;
    t["call"] = decode_call;
    t["ret"] = [](Decode& d) { decode_return(d, false); };
    t["exit"] = [](Decode& d) { decode_return(d, true); };
    t["trap"] = [](Decode& d) { d.in.flow = Flow::Trap; };
}

}  // namespace ptxsim
