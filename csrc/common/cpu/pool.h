// A caching pool for op outputs. Fresh pages from the operating system cost more than an elementwise kernel
// does (every page faults and is zeroed), so blocks of freed outputs are kept and handed out again.
//
// Memory: the pool never holds more than 19/16 of what was in use at once at some time, and idle blocks never
// exceed the limit (DL4DS_POOL_MB, default a quarter of the machine's memory; 0 turns the pool off). Oldest
// idle blocks go first. DL4DS_POOL_POISON=1 fills every block with 0xFF bytes (NaN) at hand-out, so that a
// test sees an element that a kernel forgot to write. Thread-safe; survives fork and interpreter exit
// (nothing is freed at exit; a block may be released from any thread).
#pragma once

#include <cstddef>
#include <cstdint>

namespace dl4ds {

/// Outputs below this size come from torch's allocator: small blocks are reused by malloc itself.
constexpr int64_t kPoolMinBytes = 64 << 10;

struct PoolBlock {
    void* data;     // at least 64-byte aligned
    size_t bytes;   // the block's size, at least what was asked for
    void* mapping;  // what the operating system gave
    size_t mapped_bytes;
    uint64_t released;  // order of release, while idle
    bool apart;         // of pool_acquire_apart: not counted, never idle
};

/// A block of at least `bytes`, never null (throws std::bad_alloc). Contents are undefined. `lasting`: for
/// what a training step keeps for backward and gradients of weights: never a block of more than twice the
/// size, which would be missing for as long.
PoolBlock* pool_acquire(size_t bytes, bool lasting = false);

/// A block for what stays (packed weights): not one of the pool's, so that it neither takes part in the peak,
/// of which idle blocks may be a share, nor lies idle when it is released, but goes back to the system.
PoolBlock* pool_acquire_apart(size_t bytes);

/// Gives a block back. Never throws.
void pool_release(PoolBlock* block) noexcept;

struct PoolStats {
    int64_t limit_bytes, used_bytes, idle_bytes, peak_used_bytes;
    int64_t hits, misses, evictions;
};

PoolStats pool_stats();

/// Frees the idle blocks and forgets the peak; returns the bytes given back to the operating system.
int64_t pool_trim();

/// Largest number of idle bytes; 0 turns the pool off. Blocks in use are not touched.
void pool_set_limit(int64_t bytes);

/// False where the limit is 0: outputs then come from torch's allocator.
bool pool_enabled();

}  // namespace dl4ds
