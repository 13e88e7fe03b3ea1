// Loops on torch's own thread pool (so torch.set_num_threads, OMP_NUM_THREADS and nesting rules hold),
// through the C shim. A reduction must not depend on the number of threads: cut its range into blocks by
// shape alone (fixed_blocks), let parallel_for hand the blocks out, and merge the blocks' results in order.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <exception>

#include "common/checks.h"
#include "common/cpu/team.h"
#include "common/shim.h"

namespace dl4ds {

/// Below this many bytes of memory traffic a second thread costs more than it brings.
constexpr int64_t kSerialBytes = 128 << 10;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Calls fn(begin, end) on disjoint ranges that cover [0, items), in parallel unless the whole work moves
/// fewer than kSerialBytes. fn must not throw.
template <typename Fn>
void parallel_for(int64_t items, int64_t total_bytes, const Fn& fn) {
    if (items <= 0) {
        return;
    }
    if (items == 1 || total_bytes < kSerialBytes) {
        fn(int64_t{0}, items);
        return;
    }
    const auto call = [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Fn*>(context))(begin, end);
    };
    void* context = const_cast<void*>(static_cast<const void*>(&fn));
    if (Team* team = Team::current()) {
        team->loop(items, call, context);
        return;
    }
    const auto error = torch_parallel_for(0, items, /*grain_size=*/1, call, context);
    DL4DS_CHECK(error == 0, "dl4ds_kernels: torch_parallel_for failed");
}

/// torch.get_num_threads(), also inside with_team.
inline int64_t num_threads() {
    if (const Team* team = Team::current()) {
        return team->threads();
    }
    uint32_t threads = 1;
    shim_check(torch_get_num_threads(&threads), "get_num_threads");
    return threads;
}

/// Runs program() on this thread while `threads` - 1 others wait for its parallel_for loops. Inside, every
/// parallel loop of torch's own runs on this thread alone.
template <typename Program>
void with_team(int64_t threads, const Program& program) {
    if (threads < 2 || Team::current() != nullptr) {
        program();
        return;
    }
    Team team(threads);
    std::exception_ptr error;
    const auto lead = [&] {
        Team::current() = &team;
        try {
            program();
        } catch (...) {
            error = std::current_exception();
        }
        Team::current() = nullptr;
        team.finish();
    };
    // A thread that is given several indices takes them in order, so the leader never waits behind a helper.
    parallel_for(threads, kSerialBytes, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
            if (index == 0) {
                lead();
            } else {
                team.help(index);
            }
        }
    });
    if (error) {
        std::rethrow_exception(error);
    }
}

/// A range of `items` cut into `count` blocks of `size` (the last one shorter); depends on the shape only.
struct Blocks {
    int64_t items = 0, size = 0, count = 0;

    int64_t begin(int64_t block) const { return block * size; }
    int64_t end(int64_t block) const { return std::min(items, (block + 1) * size); }
};

/// Blocks of about target_bytes, a multiple of `multiple` items each, at most max_blocks of them.
inline Blocks fixed_blocks(int64_t items, int64_t bytes_per_item, int64_t target_bytes, int64_t multiple,
                           int64_t max_blocks) {
    Blocks blocks;
    blocks.items = items;
    const int64_t least = (items + max_blocks - 1) / max_blocks;
    const int64_t wanted = std::max<int64_t>(1, target_bytes / std::max<int64_t>(1, bytes_per_item));
    const int64_t size = std::max(least, wanted);
    blocks.size = (size + multiple - 1) / multiple * multiple;
    blocks.count = (items + blocks.size - 1) / blocks.size;
    return blocks;
}

}  // namespace dl4ds
