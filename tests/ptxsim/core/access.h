// A warp's memory access: addresses to host pointers, with every check and count on the way.
#pragma once
#include "launch.h"

namespace ptxsim {

enum class Touch : u8 { Read, Write, Atomic };

constexpr u32 kWidest = 32;  // bytes of the widest access of one lane

struct Access {
    Mask mask;
    u32 bytes;  // per lane
    Touch touch;
    const u8* values = nullptr;  // writes: kWidest bytes per lane, to recognise harmless equal writes
};

// Addresses of the operand [register + offset] for all lanes.
void operand_addresses(Warp& warp, const Instruction& in, u64* address);
// Fills host[lane] for the lanes of the mask; a lane that may not access memory gets a scratch area instead.
void resolve(Warp& warp, const Instruction& in, const Access& access, u8** host);
void resolve_global(Warp& warp, const Instruction& in, const Access& access, const u64* address, u8** host);
u8* resolve_shared(Warp& warp, const Instruction& in, int lane, u32 address, const Access& access,
                   bool track = true);
bool is_scratch(const u8* pointer);

// Wavefronts of one shared-memory request: 4-, 8- and 16-byte accesses go by full, half and quarter warps.
void count_banks(Warp& warp, const Instruction& in, Mask mask, const u32* address, u32 bytes);

}  // namespace ptxsim
