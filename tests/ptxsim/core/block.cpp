// Runs one block: warps in turn (shuffled by seed), barriers when every warp waits.
#include <algorithm>
#include <cstring>

#include "launch.h"

namespace ptxsim {
namespace {

class BlockRunner {
  public:
    BlockRunner(Launch& launch, Block& block) : launch_(launch), block_(block), code_(block.kernel->code) {}

    void run() {
        start();
        std::vector<u32> order(block_.warps.size());
        for (u32 i = 0; i < order.size(); i++) order[i] = i;
        u32 random = launch_.options.schedule * 2654435761u + block_.index * 40503u;
        for (;;) {
            if (launch_.options.schedule) {
                for (u32 i = static_cast<u32>(order.size()) - 1; i > 0; i--) {
                    random = random * 1664525u + 1013904223u;
                    std::swap(order[i], order[(random >> 8) % (i + 1)]);
                }
            }
            for (u32 i : order) run_warp(launch_, block_.warps[i]);
            bool waiting = false;
            for (const Warp& w : block_.warps) waiting |= !w.fragments.empty();
            if (!waiting) break;
            release(complete_barrier());
        }
        finish();
    }

  private:
    void start() {
        Block& b = block_;
        std::memset(b.arrived, 0, sizeof b.arrived);
        for (auto& clock : b.arrived_clock) clock.clear();
        b.frames.clear();
        const size_t n = b.warps.size();
        b.clocks.assign(n * n, 0);
        for (Warp& w : b.warps) {
            b.clock(w.id, w.id) = 1;
            const u32 lanes = std::min<u32>(kLanes, b.threads - w.id * kLanes);
            w.alive = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
            w.passed_by = 0;
            w.fragments.clear();
            Fragment all;
            all.mask = w.alive;
            w.fragments.push_back(all);
            w.copies.clear();
            w.products.clear();
            w.product_group = 0;
            std::memset(w.groups, 0, sizeof w.groups);
            w.backward = 0;
            for (u32 d = 0; d < 3; d++)
                std::fill_n(w.reg<u32>(b.kernel->special[CtaidX + d]), kLanes, b.id[d]);
        }
        std::fill(b.shared.begin(), b.shared.end(), u8{0xCD});
        std::fill(b.local.begin(), b.local.end(), u8{0xCD});
    }

    template <class Visit>
    void waiters(u32 id, Visit visit) {
        for (Warp& w : block_.warps)
            for (Fragment& f : w.fragments)
                if (f.state == Fragment::AtBarrier && f.barrier == id) visit(w, f, code_[f.pc - 1]);
    }

    // the lowest barrier all of whose threads have come; everybody waits, so none is a deadlock
    u32 complete_barrier() {
        u32 live = 0, stuck = 16, got = 0, want = 0;
        for (const Warp& w : block_.warps) live += static_cast<u32>(__builtin_popcount(w.alive));
        for (u32 id = 0; id < 16; id++) {
            u32 came = block_.arrived[id], needed = live;
            bool any = false;
            waiters(id, [&](Warp& w, Fragment& f, const Instruction& in) {
                any = true;
                const bool counted =
                    in.slots.size() > 0;  // an explicit count is in threads, and whole warps arrive
                came += counted ? kLanes : static_cast<u32>(__builtin_popcount(f.mask));
                if (counted) needed = w.reg<u32>(in.slots[0])[lowest_lane(f.mask)];
            });
            if (any && came >= needed) return id;
            if (any && stuck == 16) stuck = id, got = came, want = needed;
        }
        std::string message = format("barrier %u: %u threads arrived of %u", stuck, got, want);
        bool reported = false;
        waiters(stuck, [&](Warp& w, Fragment& f, const Instruction& in) {
            if (!reported) launch_.report(w, in, lowest_lane(f.mask), "DEADLOCK", message);
            reported = true;
        });
        throw Error("deadlock at a barrier: " + message);
    }

    void release(u32 id) {
        const size_t n = block_.warps.size();
        std::vector<u32> joined = block_.arrived_clock[id];
        joined.resize(n, 0);
        u32 votes = 0;
        bool unanimous = true;
        waiters(id, [&](Warp& w, Fragment& f, const Instruction& in) {
            for (u32 v = 0; v < n; v++) joined[v] = std::max(joined[v], block_.clock(w.id, v));
            if (in.mode) {
                const Mask yes = w.predicate(in.c, in.negate_c) & f.mask;
                votes += static_cast<u32>(__builtin_popcount(yes));
                unanimous &= yes == f.mask;
            }
        });
        waiters(id, [&](Warp& w, Fragment& f, const Instruction& in) {
            for (u32 v = 0; v < n; v++) block_.clock(w.id, v) = joined[v];
            block_.clock(w.id, w.id)++;
            if (in.mode == kPopc) {
                for (int l = 0; l < kLanes; l++)
                    if (f.mask >> l & 1) w.reg<u32>(in.d)[l] = votes;
            } else if (in.mode) {
                w.set_predicate(in.d, (in.mode == kAnd ? unanimous : votes > 0) ? kAllLanes : 0, f.mask);
            }
        });
        waiters(id, [&](Warp&, Fragment& f, const Instruction&) { f.state = Fragment::Ready; });
        block_.arrived[id] = 0;
        block_.arrived_clock[id].clear();
    }

    void finish() {
        for (Warp& w : block_.warps) {
            if (!w.copies.empty())
                launch_.report(w, code_[w.copies[0].instruction], w.copies[0].lane, "ASYNC-LEAK",
                               "cp.async still under way when the block ended");
            if (!w.products.empty())
                launch_.report(w, *w.products[0].instruction, 0, "ASYNC-LEAK",
                               "wgmma still under way when the block ended");
        }
    }

    Launch& launch_;
    Block& block_;
    const std::vector<Instruction>& code_;
};

}  // namespace

void run_block(Launch& launch, Block& block) { BlockRunner(launch, block).run(); }

}  // namespace ptxsim
