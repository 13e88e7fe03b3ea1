#include "access.h"

#include <algorithm>
#include <cstring>

#include "race.h"

namespace ptxsim {
namespace {

u8 scratch[kLanes * kWidest];

const char* noun(Touch touch) {
    return touch == Touch::Read ? "read" : touch == Touch::Write ? "write" : "atomic";
}

u8* scratch_lane(int lane) {
    u8* area = scratch + lane * kWidest;
    std::memset(area, 0, kWidest);
    return area;
}

void count_global(Warp& warp, const Instruction& in, const Access& access, const u64* address) {
    // distinct 32-byte sectors of the request, and the distinct bytes asked for
    u64 sector[2 * kLanes * kWidest / 32];
    u32 sectors = 0, ideal, lanes = static_cast<u32>(__builtin_popcount(access.mask));
    bool ascending = true;
    u64 previous_end = 0, first = 0;
    for (int l = 0; l < kLanes; l++) {
        if (!(access.mask >> l & 1)) continue;
        const u64 a = host_address(address[l]);
        if (previous_end == 0)
            first = a;
        else if (a != previous_end)
            ascending = false;
        previous_end = a + access.bytes;
        for (u64 s = a >> 5; s <= (a + access.bytes - 1) >> 5; s++) sector[sectors++] = s;
    }
    if (sectors == 0) return;
    if (ascending) {
        sectors = static_cast<u32>(((previous_end - 1) >> 5) - (first >> 5) + 1);
        ideal = (lanes * access.bytes + 31) / 32;
    } else {
        std::sort(sector, sector + sectors);
        sectors = static_cast<u32>(std::unique(sector, sector + sectors) - sector);
        u64 begin[kLanes];
        u32 n = 0, unique_bytes = 0;
        for (int l = 0; l < kLanes; l++)
            if (access.mask >> l & 1) begin[n++] = host_address(address[l]);
        std::sort(begin, begin + n);
        for (u32 i = 0; i < n; i++)
            unique_bytes += i + 1 < n ? static_cast<u32>(std::min<u64>(access.bytes, begin[i + 1] - begin[i]))
                                      : access.bytes;
        ideal = (unique_bytes + 31) / 32;
    }
    Counters& total = warp.launch().counters;
    LineCounters& line = warp.launch().lines[in.index];
    line.requests++;
    line.sectors += sectors;
    line.ideal_sectors += ideal;
    if (access.touch == Touch::Read) {
        total.load_requests++;
        total.load_sectors += sectors;
        total.load_ideal += ideal;
        total.load_bytes += lanes * access.bytes;
    } else {
        total.store_requests++;
        total.store_sectors += sectors;
        total.store_ideal += ideal;
        total.store_bytes += lanes * access.bytes;
    }
}

void check_initialised(Warp& warp, const Instruction& in, int lane, Region& region, u64 at,
                       const Access& access) {
    if (access.touch != Touch::Write) {
        for (u64 i = at; i < at + access.bytes; i++)
            if (!region.written[i])
                return warp.launch().report(
                    warp, in, lane, "UNINITIALISED",
                    format("%s of %s+%llu, which nothing has written", noun(access.touch),
                           region.name.c_str(), static_cast<unsigned long long>(i)));
    }
    if (access.touch != Touch::Read)
        for (u64 i = at; i < at + access.bytes; i++) region.written[i] = true;
}

}  // namespace

bool is_scratch(const u8* pointer) { return pointer >= scratch && pointer < scratch + sizeof scratch; }

void operand_addresses(Warp& warp, const Instruction& in, u64* address) {
    if (in.wide_address) {
        const u64* a = warp.reg<u64>(in.a);
        for (int l = 0; l < kLanes; l++) address[l] = a[l] + static_cast<u64>(in.offset);
    } else {
        const u32* a = warp.reg<u32>(in.a);
        for (int l = 0; l < kLanes; l++) address[l] = a[l] + static_cast<u32>(in.offset);
    }
}

void resolve_global(Warp& warp, const Instruction& in, const Access& access, const u64* address, u8** host) {
    Launch& launch = warp.launch();
    Memory& memory = *launch.memory;
    Mask inside = 0;
    for (int l = 0; l < kLanes; l++) {
        if (!(access.mask >> l & 1)) continue;
        const u64 tag = tag_of(address[l]), a = host_address(address[l]);
        Region* region = memory.find(tag, a, access.bytes);
        if (!region) {
            host[l] = scratch_lane(l);
            if (memory.is_stale(tag))
                launch.report(warp, in, l, "USE-AFTER-FREE",
                              format("%s of %u bytes of %s, no longer registered", noun(access.touch),
                                     access.bytes, memory.stale_name(tag).c_str()));
            else
                launch.report(warp, in, l, "OUT-OF-BOUNDS",
                              format("%s of %u bytes, %s", noun(access.touch), access.bytes,
                                     memory.describe_miss(tag, a, access.bytes).c_str()));
            continue;
        }
        if (access.touch != Touch::Read && !region->writable) {
            host[l] = scratch_lane(l);
            launch.report(
                warp, in, l, "WRITE-TO-READONLY",
                format("%s+%llu", region->name.c_str(), static_cast<unsigned long long>(a - region->low)));
            continue;
        }
        host[l] = reinterpret_cast<u8*>(a);
        inside |= 1u << l;
        if (a % access.bytes)
            launch.report(warp, in, l, "MISALIGNED",
                          format("%u-byte access to %s+%llu", access.bytes, region->name.c_str(),
                                 static_cast<unsigned long long>(a - region->low)));
        if (region->undefined) check_initialised(warp, in, l, *region, a - region->low, access);
        if (launch.options.races) {
            Region& root = memory.root(*region);
            if (root.shared_history) {
                Access lane_access = access;
                if (access.values) lane_access.values = access.values + l * kWidest;
                track(warp, in, l, root.shadow, {root.name.c_str(), a - root.low, false}, lane_access,
                      host[l]);
            }
        }
        if (launch.options.traffic)
            region->count_sectors(a >> 5, (a + access.bytes - 1) >> 5, access.touch != Touch::Read);
    }
    if (launch.options.traffic) {
        Access counted = access;
        counted.mask = inside;
        count_global(warp, in, counted, address);
    }
}

// Parameters and __constant__ variables lie at plain host addresses.
static void resolve_constant(Warp& warp, const Instruction& in, const Access& access, const u64* address,
                             u8** host) {
    const std::vector<u8>& parameters = warp.block->kernel->parameter_bytes;
    const u64 low = reinterpret_cast<u64>(parameters.data());
    for (int l = 0; l < kLanes; l++) {
        if (!(access.mask >> l & 1)) continue;
        const u64 a = address[l];
        const bool inside = in.space == Space::Param
                                ? a >= low && a - low + access.bytes <= parameters.size()
                                : warp.launch().memory->find(0, a, access.bytes) != nullptr;
        host[l] = inside ? reinterpret_cast<u8*>(a) : scratch_lane(l);
        if (!inside)
            warp.launch().report(
                warp, in, l, "OUT-OF-BOUNDS",
                format("%s of %u bytes outside the %s", noun(access.touch), access.bytes,
                       in.space == Space::Param ? "kernel's parameters" : "constants of the module"));
    }
}

u8* resolve_shared(Warp& warp, const Instruction& in, int lane, u32 address, const Access& access,
                   bool race_check) {
    Launch& launch = warp.launch();
    std::vector<u8>& shared = warp.block->shared;
    const u32 offset = address - kSharedBase;
    if (address < kSharedBase || static_cast<u64>(offset) + access.bytes > shared.size()) {
        launch.report(warp, in, lane, "SHARED-OUT-OF-BOUNDS",
                      format("%s of %u bytes at shared offset %d of %zu", noun(access.touch), access.bytes,
                             static_cast<int>(offset), shared.size()));
        return scratch_lane(lane);
    }
    if (offset % access.bytes)
        launch.report(warp, in, lane, "MISALIGNED",
                      format("%u-byte access to shared+%u", access.bytes, offset));
    if (launch.options.races && race_check)
        track(warp, in, lane, launch.shared_shadow, {"shared", offset, true}, access, &shared[offset]);
    return &shared[offset];
}

void count_banks(Warp& warp, const Instruction& in, Mask mask, const u32* address, u32 bytes) {
    Launch& launch = warp.launch();
    if (!launch.options.traffic || !mask) return;
    const int group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    const u32 words = (bytes + 3) / 4;
    u32 waves = 0, ideal = 0;
    for (int start = 0; start < kLanes; start += group) {
        u32 seen[32][kLanes], used[32] = {}, most = 0;
        for (int l = start; l < start + group; l++) {
            if (!(mask >> l & 1)) continue;
            for (u32 k = 0; k < words; k++) {
                const u32 word = address[l] / 4 + k, bank = word & 31;
                if (std::find(seen[bank], seen[bank] + used[bank], word) != seen[bank] + used[bank] ||
                    used[bank] == kLanes)
                    continue;
                seen[bank][used[bank]++] = word;
                most = std::max(most, used[bank]);
            }
        }
        waves += most;
        ideal += most > 0;
    }
    LineCounters& line = launch.lines[in.index];
    line.requests++;
    line.waves += waves;
    line.ideal_waves += ideal;
    launch.counters.shared_requests++;
    launch.counters.shared_waves += waves;
    launch.counters.shared_ideal += ideal;
}

void resolve(Warp& warp, const Instruction& in, const Access& access, u8** host) {
    u64 address[kLanes];
    operand_addresses(warp, in, address);
    warp.step++;
    Mask global = 0, shared = 0, local = 0;
    switch (in.space) {
        case Space::Global:
            global = access.mask;
            break;
        case Space::Shared:
            shared = access.mask;
            break;
        case Space::Local:
            local = access.mask;
            break;
        case Space::Param:
        case Space::Const:
            return resolve_constant(warp, in, access, address, host);
        case Space::Generic:
            for (int l = 0; l < kLanes; l++) {
                if (!(access.mask >> l & 1)) continue;
                const u64 window = address[l] >> 56 << 56;
                (window == kSharedWindow ? shared : window == kLocalWindow ? local : global) |= 1u << l;
            }
    }
    Access part = access;
    if (global) {
        part.mask = global;
        resolve_global(warp, in, part, address, host);
    }
    if (shared) {
        u32 offsets[kLanes];
        for (int l = 0; l < kLanes; l++) {
            offsets[l] = static_cast<u32>(address[l]);
            if (!(shared >> l & 1)) continue;
            if (access.values) part.values = access.values + l * kWidest;
            host[l] = resolve_shared(warp, in, l, offsets[l], part);
        }
        count_banks(warp, in, shared, offsets, access.bytes);
    }
    for (int l = 0; l < kLanes; l++) {
        if (!(local >> l & 1)) continue;
        const u64 offset = address[l] & 0xffffffffffull;
        Block& block = *warp.block;
        if (offset + access.bytes > block.local_stride) {
            warp.launch().report(warp, in, l, "LOCAL-OUT-OF-BOUNDS",
                                 format("%u bytes at local offset %lld of %u", access.bytes,
                                        static_cast<long long>(offset), block.local_stride));
            host[l] = scratch_lane(l);
        } else {
            host[l] = &block.local[(warp.id * kLanes + static_cast<u32>(l)) * block.local_stride + offset];
        }
    }
}

}  // namespace ptxsim
