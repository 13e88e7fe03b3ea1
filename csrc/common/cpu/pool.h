// A caching pool for op outputs and scratch. Fresh pages from the operating system cost more than an
// elementwise kernel does (every page faults and is zeroed), so freed memory is kept and handed out again.
//
// Blocks are cut from one range of addresses, the lowest that fits, and melt with free neighbours when they
// come back: a pass whose layers need other sizes than those before finds room in what is there. (Whole
// blocks kept by size held up to half as much again, and DenseNet's sizes never fitted: docs/cpu-engine.md.)
//
// Memory: the pool never holds more than 3/2 of what was in use at once at some time (and a huge page), and
// idle bytes never exceed the limit (DL4DS_POOL_MB, default a quarter of the machine's memory; 0 turns the
// pool off). The highest addresses go back first. DL4DS_POOL_POISON=1 fills every block with 0xFF bytes (NaN)
// at hand-out, so that a test sees an element that a kernel forgot to write. Thread-safe; survives fork and
// interpreter exit (nothing is freed at exit; a block may be released from any thread).
#pragma once

#include <cstddef>
#include <cstdint>

namespace dl4ds {

/// Outputs below this size come from torch's allocator: small blocks are reused by malloc itself.
constexpr int64_t kPoolMinBytes = 64 << 10;

struct PoolBlock {
    void* data;    // at the start of a page
    size_t bytes;  // whole pages, at least what was asked for
    bool apart;    // of pool_acquire_apart: not counted, never idle
};

/// A block of at least `bytes`, never null (throws). Contents are undefined.
PoolBlock* pool_acquire(size_t bytes);

/// A block for what stays (packed weights): not one of the pool's, so that it neither takes part in the peak,
/// of which idle memory may be a share, nor lies idle when it is released, but goes back to the system.
PoolBlock* pool_acquire_apart(size_t bytes);

/// Gives a block back. Never throws.
void pool_release(PoolBlock* block) noexcept;

struct PoolStats {
    int64_t limit_bytes, used_bytes, idle_bytes, peak_used_bytes;
    int64_t hits, misses, evictions;  // blocks from free memory and from new; ranges given back
};

PoolStats pool_stats();

/// Gives idle memory back to the operating system and forgets the peak; returns the bytes.
int64_t pool_trim();

/// Largest number of idle bytes; 0 turns the pool off. Blocks in use are not touched.
void pool_set_limit(int64_t bytes);

/// False where the limit is 0: outputs then come from torch's allocator.
bool pool_enabled();

}  // namespace dl4ds
