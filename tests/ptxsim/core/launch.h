// One kernel launch: options, findings, counters, and the loop over blocks.
#pragma once
#include <mutex>
#include <unordered_map>

#include "machine.h"
#include "memory.h"

namespace ptxsim {

struct Options {
    bool races = true, traffic = true;
    bool lazy_copies = true;  // cp.async delivers at the wait that completes it; false: when it is issued
    u32 schedule = 0;         // seed of the warp and block order; 0: in order
    u32 max_reports = 20;
    u64 budget = 1ull << 33;  // instructions one warp may spend in loops
    u64 limit = ~0ull;        // instructions that all warps of the launch may execute
};

struct Finding {
    std::string kind, message, file, instruction, kernel;
    int line = 0;
    u32 block[3] = {}, thread = 0;
    u64 times = 1;
};

struct LineCounters {  // per PTX instruction
    u64 warps = 0, lanes = 0, sectors = 0, ideal_sectors = 0, waves = 0, ideal_waves = 0, requests = 0;
};

struct Counters {
    u64 warp_instructions = 0, thread_instructions = 0, blocks = 0, barriers = 0, mma = 0, atomics = 0;
    u64 load_requests = 0, load_sectors = 0, load_ideal = 0, load_bytes = 0;
    u64 store_requests = 0, store_sectors = 0, store_ideal = 0, store_bytes = 0;
    u64 shared_requests = 0, shared_waves = 0, shared_ideal = 0, async_copies = 0;
};

struct Launch {
    Options options;
    Counters counters;
    std::vector<LineCounters> lines;  // by instruction index
    std::vector<Finding> findings;
    std::unordered_map<u64, size_t> finding_of;  // instruction and kind: later ones only count
    Memory* memory = nullptr;
    Shadow shared_shadow;

    void report(Warp& warp, const Instruction& instruction, int lane, const char* kind,
                const std::string& message);
    // Runs the whole grid; throws Error where execution can't go on.
    void run(Kernel& kernel, const u32 grid[3], const u32 block[3], u32 dynamic_shared);
};

void run_block(Launch& launch, Block& block);  // block.cpp
void run_warp(Launch& launch, Warp& warp);     // warp.cpp
int lowest_lane(Mask mask);

constexpr u32 kMaxShared = 232448;  // sm_90's opt-in limit

}  // namespace ptxsim
