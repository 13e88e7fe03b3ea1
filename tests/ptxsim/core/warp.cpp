// Executes one warp until all its lanes wait at a block barrier or have ended. Diverged lanes are fragments
// with their own program counters; the fragment with the lowest one runs, and fragments that meet are merged.
#include <algorithm>

#include "launch.h"

namespace ptxsim {

int lowest_lane(Mask mask) { return __builtin_ctz(mask); }

namespace {

class Runner {
  public:
    Runner(Launch& launch, Warp& warp)
        : launch_(launch), warp_(warp), code_(warp.block->kernel->code), fragments_(warp.fragments) {}

    void run() {
        for (;;) {
            int next = lowest(Fragment::Ready);
            bool forced = false;
            if (next < 0) {  // lanes that others never joined
                next = lowest(Fragment::Converging);
                forced = true;
            }
            if (next < 0) break;
            fragments_[static_cast<size_t>(next)].state = Fragment::Ready;
            next = merge(next);
            step(static_cast<size_t>(next), forced);
        }
        launch_.counters.warp_instructions += instructions_;
        launch_.counters.thread_instructions += lanes_;
    }

  private:
    int lowest(Fragment::State state) const {
        int best = -1;
        for (size_t i = 0; i < fragments_.size(); i++)
            if (fragments_[i].state == state &&
                (best < 0 || fragments_[i].pc < fragments_[static_cast<size_t>(best)].pc))
                best = static_cast<int>(i);
        return best;
    }

    int merge(int chosen) {
        for (int i = 0; i < static_cast<int>(fragments_.size());) {
            Fragment &mine = fragments_[static_cast<size_t>(chosen)],
                     &other = fragments_[static_cast<size_t>(i)];
            if (i != chosen && other.state != Fragment::AtBarrier && other.pc == mine.pc &&
                other.frame == mine.frame) {
                mine.mask |= other.mask;
                mine.worked |= other.worked;
                fragments_.erase(fragments_.begin() + i);
                if (i < chosen) chosen--;
            } else {
                i++;
            }
        }
        return chosen;
    }

    Mask required(const Instruction& in, Mask mask) {
        switch (in.converge) {
            case Converge::Full:
                return kAllLanes;
            case Converge::Members:
                return warp_.reg<Mask>(in.members)[lowest_lane(mask)] & warp_.alive;
            default:
                return warp_.alive;
        }
    }

    // Lanes that an instruction names but that went past it and ended. Leaving at once, as in `if (i >= n)
    // return;`, is fine.
    Mask absent(const Instruction& in, Mask active) {
        if (!warp_.passed_by || in.converge != Converge::Members) return 0;
        const Mask named = warp_.reg<Mask>(in.members)[lowest_lane(active)] & warp_.passed_by;
        warp_.passed_by = 0;
        return named;
    }

    // Runs fragment f until it ends, waits, branches apart, or reaches the next fragment's position.
    void step(size_t f, bool forced) {
        u32 pc = fragments_[f].pc, limit = ~0u;
        Mask mask = fragments_[f].mask;
        for (size_t i = 0; i < fragments_.size(); i++)
            if (fragments_[i].state != Fragment::AtBarrier && fragments_[i].pc > pc)
                limit = std::min(limit, fragments_[i].pc);
        auto park = [&](Fragment::State state) {
            fragments_[f].pc = pc;
            fragments_[f].mask = mask;
            fragments_[f].state = state;
        };
        while (pc < limit) {
            const Instruction& in = code_[pc];
            Mask active = mask;
            if (in.guard >= 0) {
                active &= warp_.predicate(static_cast<u32>(in.guard), in.guard_negated);
                if (!active) {
                    pc++, instructions_++;
                    continue;
                }
            }
            if (in.converge != Converge::None) {
                Mask all = required(in, active);
                if (!forced && (mask & all) != all) {
                    for (Fragment& other : fragments_) other.worked = false;
                    return park(Fragment::Converging);
                }
                if (in.converge == Converge::Members) {
                    const Mask named = warp_.reg<Mask>(in.members)[lowest_lane(active)];
                    if (active & ~named)
                        launch_.report(warp_, in, lowest_lane(active & ~named), "DIVERGENT",
                                       format("lanes %08x execute it, but it names %08x", active, named));
                }
                all |= absent(in, active);
                if ((active & all) != all) {
                    launch_.report(warp_, in, lowest_lane(active),
                                   in.flow == Flow::Barrier ? "DIVERGED-BARRIER" : "DIVERGENT",
                                   format("needs lanes %08x together, but only %08x are here", all, active));
                }
                forced = false;
            }
            instructions_++;
            lanes_ += static_cast<u64>(__builtin_popcount(active));
            LineCounters& line = launch_.lines[pc];
            line.warps++;
            line.lanes += static_cast<u64>(__builtin_popcount(active));
            if (in.flow == Flow::Next) {
                in.run(warp_, in, active);
                fragments_[f].worked = true;
                pc++;
                continue;
            }
            switch (in.flow) {
                case Flow::Branch:
                    if (in.target <= pc) spend(pc - in.target + 1);
                    if (active != mask) return split(f, in.target, active, pc + 1, mask & ~active);
                    pc = in.target;
                    if (fragments_.size() > 1) return park(Fragment::Ready);
                    break;
                case Flow::Table:
                    return jump(f, in, active, pc, mask);
                case Flow::Call:
                    if (active != mask) throw Error("predicated call: " + in.text);
                    in.run(warp_, in, active);
                    if (in.target == ~0u) {  // a built-in
                        pc++;
                        break;
                    }
                    fragments_[f].frame = frame(pc + 1, fragments_[f].frame, in);
                    pc = in.target;
                    return park(Fragment::Ready);
                case Flow::Return:
                    if (fragments_[f].frame >= 0 && in.mode == 0) {
                        if (active != mask) throw Error("predicated return from a function: " + in.text);
                        const Frame& back = warp_.block->frames[static_cast<size_t>(fragments_[f].frame)];
                        back.call->run(warp_, *back.call, 0);  // copies results
                        pc = back.return_pc;
                        fragments_[f].frame = back.caller;
                        return park(Fragment::Ready);
                    }
                    warp_.alive &= ~active;
                    if (fragments_[f].worked && lowest(Fragment::Converging) >= 0) warp_.passed_by |= active;
                    mask &= ~active;
                    pc++;
                    if (!mask) {
                        fragments_.erase(fragments_.begin() + static_cast<long>(f));
                        return;
                    }
                    break;
                case Flow::Barrier:
                    return barrier(f, in, active, pc, mask);
                default:
                    throw Error(format("trap executed: kernel %s line %d",
                                       shortened(warp_.block->kernel->name, 64).c_str(), in.at.line));
            }
        }
        park(Fragment::Ready);
    }

    void spend(u64 instructions) {
        warp_.backward += instructions;
        if (warp_.backward > launch_.options.budget ||
            launch_.counters.warp_instructions + instructions_ > launch_.options.limit)
            throw Error("instruction budget exceeded (endless loop?) in " +
                        shortened(warp_.block->kernel->name, 64));
    }

    void split(size_t f, u32 target, Mask taken, u32 next, Mask stay) {
        Fragment other = fragments_[f];
        fragments_[f].pc = next;
        fragments_[f].mask = stay;
        other.pc = target;
        other.mask = taken;
        fragments_.push_back(other);
    }

    void jump(size_t f, const Instruction& in, Mask active, u32 pc, Mask mask) {
        const u32* index = warp_.reg<u32>(in.a);
        Fragment base = fragments_[f];
        fragments_.erase(fragments_.begin() + static_cast<long>(f));
        auto add = [&](u32 target, Mask lanes) {
            base.pc = target;
            base.mask = lanes;
            if (lanes) fragments_.push_back(base);
        };
        add(pc + 1, mask & ~active);
        for (size_t t = 0; t < in.targets.size(); t++) {
            Mask lanes = 0;
            for (int l = 0; l < kLanes; l++)
                if ((active >> l & 1) && index[l] == t) lanes |= 1u << l;
            if (lanes && in.targets[t] <= pc) spend(pc - in.targets[t] + 1);
            add(in.targets[t], lanes);
            active &= ~lanes;
        }
        if (active) throw Error("brx.idx outside its table: " + in.text);
    }

    int frame(u32 return_pc, int caller, const Instruction& call) {
        std::vector<Frame>& frames = warp_.block->frames;
        for (size_t i = 0; i < frames.size(); i++)
            if (frames[i].return_pc == return_pc && frames[i].caller == caller) return static_cast<int>(i);
        frames.push_back({return_pc, caller, &call});
        return static_cast<int>(frames.size()) - 1;
    }

    void barrier(size_t f, const Instruction& in, Mask active, u32 pc, Mask mask) {
        launch_.counters.barriers++;
        const u32 id = warp_.reg<u32>(in.a)[lowest_lane(active)];
        if (id >= 16) throw Error(format("barrier %u does not exist: %s", id, in.text.c_str()));
        fragments_[f].pc = pc + 1;
        fragments_[f].mask = mask;
        if (in.run) return in.run(warp_, in, active);  // bar.arrive goes on
        if (active != mask) split(f, pc + 1, active, pc + 1, mask & ~active), f = fragments_.size() - 1;
        fragments_[f].state = Fragment::AtBarrier;
        fragments_[f].barrier = id;
    }

    Launch& launch_;
    Warp& warp_;
    const std::vector<Instruction>& code_;
    std::vector<Fragment>& fragments_;
    u64 instructions_ = 0, lanes_ = 0;
};

}  // namespace

void run_warp(Launch& launch, Warp& warp) { Runner(launch, warp).run(); }

}  // namespace ptxsim
