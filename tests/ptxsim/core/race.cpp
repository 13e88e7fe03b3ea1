#include "race.h"

#include <cstring>
#include <iterator>

namespace ptxsim {
namespace {

enum Order { Ordered, SameWarp, OtherWarp, OtherBlock };

Order order(const Epoch& past, Warp& warp, u32 thread) {
    Block& block = *warp.block;
    if (past.block == 0) return Ordered;
    if (past.block != block.index + 1) return OtherBlock;
    const u32 other = past.thread / kLanes;
    if (other != warp.id) return past.clock <= block.clock(warp.id, other) ? Ordered : OtherWarp;
    if (past.thread == thread || past.step == warp.step) return Ordered;
    return past.clock < block.clock(warp.id, warp.id) ? Ordered : SameWarp;
}

const char* race_kind(Order order, bool shared) {
    if (order == SameWarp) return "WARP-RACE";
    return shared ? "SHARED-RACE" : "GLOBAL-RACE";
}

std::string culprit(Order order, const Epoch& past, const char* verb) {
    if (order == OtherBlock) return format("%s by block %u thread %u", verb, past.block - 1, past.thread);
    if (order == SameWarp)
        return format("%s by lane %u of the same warp with no __syncwarp between", verb,
                      past.thread % kLanes);
    return format("%s by thread %u with no barrier between", verb, past.thread);
}

}  // namespace

void track(Warp& warp, const Instruction& in, int lane, Shadow& shadow, const Place& place,
           const Access& access, const u8* current) {
    Launch& launch = warp.launch();
    Block& block = *warp.block;
    const u32 thread = warp.id * kLanes + static_cast<u32>(lane), me = block.index + 1;
    const bool writes = access.touch != Touch::Read, reads = access.touch != Touch::Write;
    const bool strong = access.touch == Touch::Atomic || in.strong;
    const char* verb = writes ? "write to" : "read of";
    auto where = [&] {
        return format("%s %s+%llu, ", verb, place.memory, static_cast<unsigned long long>(place.offset));
    };
    u32 count;
    Cell* cell = shadow.cells(place.offset, access.bytes, count);
    for (u32 i = 0; i < count; i++, cell++) {
        if (place.shared) {
            if (cell->async_block == me && cell->async_pending)
                launch.report(warp, in, lane, "ASYNC-RACE",
                              where() + "while a cp.async to it has not been waited for");
            if (reads && cell->writer.block != me)
                launch.report(warp, in, lane, "UNINITIALISED", where() + "never written by this block");
            if (cell->writer.block != me) cell->writer = Epoch();
        }
        const Order after_write = order(cell->writer, warp, thread);
        if (after_write != Ordered && !(strong && cell->writer.strong)) {
            const u32 piece =
                access.bytes /
                count;  // an equal value written twice is harmless within a block (Triton does it)
            const bool equal = access.touch == Touch::Write && access.values && after_write != OtherBlock &&
                               current &&
                               std::memcmp(current + i * piece, access.values + i * piece, piece) == 0;
            if (!equal)
                launch.report(warp, in, lane, race_kind(after_write, place.shared),
                              where() + culprit(after_write, cell->writer, "written"));
        }
        Epoch now;
        now.block = me;
        now.clock = block.clock(warp.id, warp.id);
        now.step = warp.step;
        now.thread = static_cast<u16>(thread);
        now.strong = strong;
        if (writes) {
            for (const Epoch& reader : cell->reader) {
                if (place.shared && reader.block != me) continue;
                const Order after_read = order(reader, warp, thread);
                if (after_read > SameWarp && !(strong && reader.strong))
                    launch.report(warp, in, lane, race_kind(after_read, place.shared),
                                  where() + culprit(after_read, reader, "read"));
            }
            cell->writer = now;
        } else {
            // the latest first; this warp's own earlier read, or the oldest of the others, makes room
            size_t from = std::size(cell->reader) - 1;
            for (size_t r = 0; r < from; r++)
                if (cell->reader[r].block == me && cell->reader[r].thread / kLanes == warp.id) from = r;
            for (; from > 0; from--) cell->reader[from] = cell->reader[from - 1];
            cell->reader[0] = now;
        }
    }
}

}  // namespace ptxsim
