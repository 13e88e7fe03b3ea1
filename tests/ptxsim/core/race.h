// Happens-before checks on shadow memory.
#pragma once
#include "access.h"

namespace ptxsim {

struct Place {  // what is accessed, for the message
    const char* memory;
    u64 offset;
    bool shared;
};

// Records the access in the shadow and reports what it races with. `current` are the bytes now in memory.
void track(Warp& warp, const Instruction& in, int lane, Shadow& shadow, const Place& place,
           const Access& access, const u8* current);

}  // namespace ptxsim
