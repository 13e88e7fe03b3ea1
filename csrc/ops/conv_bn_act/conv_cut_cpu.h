// How the work of a convolution is cut into blocks and handed out. The cut never changes a result (see
// conv_engine_cpu.h), so blocks are handed out as threads ask for them.
#pragma once

#include <algorithm>
#include <atomic>

#include "common/cpu/isa.h"
#include "common/cpu/output.h"
#include "common/cpu/parallel.h"
#include "ops/conv_bn_act/conv_ahead_cpu.h"
#include "ops/conv_bn_act/conv_engine_cpu.h"

namespace dl4ds {

/// Rows (pixels or tiles) by panels of output channels; an item is one block of rows and a share of the
/// panels.
struct Cut {
    int64_t rows, block;  // all rows, rows of a block at most
    int64_t panels;
    int64_t blocks, shares;

    int64_t items() const { return blocks * shares; }
    int64_t row(int64_t b) const { return rows * b / blocks; }
    int64_t panel(int64_t s) const { return panels * s / shares; }
};

/// Blocks of about `wanted` rows. Where there are too few rows to keep every thread busy, panels are shared
/// out too: each share then packs its rows again, which costs less than a barrier.
inline Cut make_cut(int64_t rows, int64_t panels, int64_t wanted, int64_t max_rows, int64_t threads) {
    Cut cut{rows, 0, panels, 0, 0};
    cut.blocks = ceil_div(rows, wanted);
    cut.shares = 1;
    if (threads > 1 && cut.blocks < 4 * threads) {
        if (rows >= 2 * max_rows * threads) {
            // Equal blocks, a multiple of the threads.
            cut.blocks = ceil_div(cut.blocks, threads) * threads;
        } else {
            cut.shares = std::min(panels, ceil_div(2 * threads, cut.blocks));
        }
    }
    cut.block = ceil_div(rows, cut.blocks);
    return cut;
}

/// The same with blocks that do not depend on the threads: sums over their rows are merged in order.
inline Cut make_fixed_cut(int64_t rows, int64_t panels, int64_t wanted, int64_t max_rows, int64_t threads) {
    constexpr int64_t kCutFor = 4;  // threads; more share the panels out
    Cut cut = make_cut(rows, panels, wanted, max_rows, kCutFor);
    cut.shares = std::min(panels, ceil_div(threads, cut.blocks));
    return cut;
}

/// Rows of a block in A panels of nearly equal height.
struct Groups {
    int64_t rows, count;
    Groups(int64_t rows_, int64_t max_rows) : rows(rows_), count(ceil_div(rows_, max_rows)) {}
    int64_t begin(int64_t g) const { return rows * g / count; }
    int64_t height(int64_t g) const { return begin(g + 1) - begin(g); }
};

constexpr int64_t kMaxWorkers = 256;

/// Runs fn(item, worker's scratch) for every item. A worker first takes its own contiguous share of the
/// items, so that a layer finds the rows which the layer before left in this core's cache, and then helps the
/// others.
template <typename Fn>
void for_each_item(int64_t items, int64_t workers, float* scratch, int64_t scratch_floats, const Fn& fn) {
    std::atomic<int64_t> next[kMaxWorkers];
    for (int64_t w = 0; w < workers; ++w) {
        next[w].store(items * w / workers, std::memory_order_relaxed);
    }
    parallel_for(workers, kSerialBytes, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) {
            for (int64_t turn = 0; turn < workers; ++turn) {
                const int64_t owner = (worker + turn) % workers, last = items * (owner + 1) / workers;
                for (int64_t item; (item = next[owner].fetch_add(1, std::memory_order_relaxed)) < last;) {
                    fn(item, scratch + worker * scratch_floats);
                }
            }
        }
    });
}

inline int64_t workers_for(int64_t items, int64_t threads) { return std::min({items, threads, kMaxWorkers}); }

/// A power-of-two distance between rows would put them into the same cache sets.
constexpr int64_t kSkew = 16;

inline GemmFinish finish_at(const ConvArgs& args, int64_t channel, int64_t columns) {
    const ConvEpilogue& e = args.epilogue;
    return {e.scale + channel, e.shift + channel, nullptr, columns, e.activation, e.slope};
}

/// The algorithms that multiply transformed tiles: conv_transformed_cpu.cpp. False: see conv_run.
bool conv_run_transformed(ConvAlgorithm algorithm, const ConvArgs& args);

}  // namespace dl4ds
