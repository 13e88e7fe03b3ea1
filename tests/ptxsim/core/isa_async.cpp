// cp.async: copies from global to shared memory that are delivered at the wait that completes them (lazy, the
// default) or when issued (eager); in both cases nobody may touch the destination in between.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "lanes.h"

namespace ptxsim {
namespace {

void deliver(Block& block, const AsyncCopy& copy) {
    u8* to = &block.shared[copy.shared_offset];
    std::memcpy(to, copy.source, copy.source_bytes);
    std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

void mark(Warp& w, const AsyncCopy& copy, bool begins) {
    Launch& launch = w.launch();
    if (!launch.options.races) return;
    const u32 me = w.block->index + 1;
    u32 count;
    Cell* cell = launch.shared_shadow.cells(copy.shared_offset, copy.bytes, count);
    for (u32 i = 0; i < count; i++, cell++) {
        if (cell->async_block != me) cell->async_block = me, cell->async_pending = 0;
        if (begins) {
            cell->async_pending++;
        } else {
            cell->async_pending--;
            cell->writer.block = me;
            cell->writer.clock = w.block->clock(w.id, w.id);
            cell->writer.step = w.step;
            cell->writer.thread = static_cast<u16>(w.id * kLanes + copy.lane);
            cell->writer.strong = false;
        }
    }
}

void issue(Warp& w, const Instruction& in, Mask mask) {
    Launch& launch = w.launch();
    u64 address[kLanes];
    u32 shared[kLanes], source_bytes[kLanes];
    u8* host[kLanes] = {};
    operand_addresses(w, in, address);
    w.step++;
    const u32* base = w.reg<u32>(in.d);
    Mask reads = 0;
    for (int l = 0; l < kLanes; l++) {
        shared[l] = base[l] + in.mode;
        source_bytes[l] = in.b ? std::min<u32>(w.reg<u32>(in.b)[l], in.bytes) : in.bytes;
        if (in.c && w.predicate(in.c, in.negate_c) >> l & 1) source_bytes[l] = 0;  // ignore-src
        if ((mask >> l & 1) && source_bytes[l]) reads |= 1u << l;
    }
    if (reads) resolve_global(w, in, {reads, in.bytes, Touch::Read}, address, host);
    for (int l = 0; l < kLanes; l++) {
        if (!(mask >> l & 1)) continue;
        u8* to = resolve_shared(w, in, l, shared[l], {mask, in.bytes, Touch::Write});
        if (is_scratch(to)) continue;
        AsyncCopy copy;
        copy.shared_offset = shared[l] - kSharedBase;
        copy.group = w.groups[l];
        copy.source = host[l];
        copy.instruction = in.index;
        copy.bytes = in.bytes;
        copy.source_bytes = static_cast<u8>(reads >> l & 1 ? source_bytes[l] : 0);
        copy.lane = static_cast<u8>(l);
        mark(w, copy, true);
        if (!launch.options.lazy_copies) deliver(*w.block, copy);
        w.copies.push_back(copy);
        launch.counters.async_copies++;
    }
    count_banks(w, in, mask, shared, in.bytes);
}

void commit(Warp& w, const Instruction&, Mask mask) {
    for (int l = 0; l < kLanes; l++) w.groups[l] += mask >> l & 1;
}

// completes all but the newest `keep` groups of each lane
void wait(Warp& w, Mask mask, u32 keep) {
    auto done = [&](const AsyncCopy& copy) {
        if (!(mask >> copy.lane & 1) || copy.group + keep >= w.groups[copy.lane]) return false;
        if (w.launch().options.lazy_copies) deliver(*w.block, copy);
        mark(w, copy, false);
        return true;
    };
    w.step++;
    w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), done), w.copies.end());
}

void wait_group(Warp& w, const Instruction& in, Mask mask) { wait(w, mask, in.mode); }

void wait_all(Warp& w, const Instruction& in, Mask mask) {
    commit(w, in, mask);
    wait(w, mask, 0);
}

void decode_cp(Decode& d) {
    Instruction& in = d.in;
    if (!d.has("async") || d.any("bulk", "mbarrier", "reduce"))
        d.unsupported("only cp.async of 4, 8 or 16 bytes");
    if (d.has("commit_group")) {
        in.run = commit;
        return;
    }
    if (d.has("wait_group")) {
        in.mode = static_cast<u32>(d.immediate(0, Type::U32));
        in.run = wait_group;
        return;
    }
    if (d.has("wait_all")) {
        in.run = wait_all;
        return;
    }
    d.ignore("ca", "cg", "shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B");
    const bool hint = d.has("L2::cache_hint");
    d.expect_operands(3, hint ? 5 : 4);
    in.space = Space::Shared;
    d.address(0);
    if (in.wide_address) d.unsupported("64-bit shared address");
    in.d = in.a;
    in.mode = static_cast<u32>(in.offset);
    in.space = Space::Global;
    d.address(1);
    in.bytes = static_cast<u8>(d.immediate(2, Type::U32));
    if (d.operands.size() > (hint ? 4u : 3u)) {
        const Register* last =
            d.builder.find_register(d.operands[3][0] == '!' ? d.operands[3].substr(1) : d.operands[3]);
        if (last && last->type == Type::Pred)
            in.c = d.predicate(3, in.negate_c);
        else
            in.b = d.source(3, Type::U32);
    }
    in.run = issue;
}

}  // namespace

void add_async_opcodes(OpcodeTable& t) { t["cp"] = decode_cp; }

}  // namespace ptxsim
