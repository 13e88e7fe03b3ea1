// A team of threads that stays together over several parallel loops: one region of torch's pool for a whole
// chain of operations. A loop then costs a few hundred nanoseconds instead of a fork and a join, and it ends
// when its items are done, not when every thread has turned up: a thread that the system gave to somebody
// else holds up nobody.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace dl4ds {

using LoopBody = void (*)(int64_t begin, int64_t end, void* context);

/// Shared by the leader, who runs the program and opens one loop after the other, and the helpers.
class Team {
  public:
    explicit Team(int64_t threads)
        : threads_(threads), taken_(new std::atomic<bool>[static_cast<size_t>(kRanges * threads)]) {}
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int64_t threads() const { return threads_; }

    /// The team that this thread leads, or null.
    static Team*& current() {
        static thread_local Team* team = nullptr;
        return team;
    }

    /// Leader: fn(begin, end) on disjoint ranges that cover [0, items), with whoever of the team is there.
    void loop(int64_t items, LoopBody fn, void* context) {
        const int64_t ranges = items < kRanges * threads_ ? items : kRanges * threads_;
        job_ = {items, ranges, fn, context};
        for (int64_t r = 0; r < ranges; ++r) {
            taken_[static_cast<size_t>(r)].store(false, std::memory_order_relaxed);
        }
        epoch_.fetch_add(1);  // odd: open
        take_ranges(0);
        epoch_.fetch_add(1);  // even: closed; who comes now finds nothing
        for (int spins = 0; active_.load() != 0;) {
            pause_a_moment(++spins);
        }
    }

    /// Helper number `member` (from 1): takes part in loops until the leader is done.
    void help(int64_t member) {
        uint64_t last = 0;
        int spins = 0;
        while (!done_.load()) {
            const uint64_t epoch = epoch_.load();
            if ((epoch & 1) == 0 || epoch == last) {
                pause_a_moment(++spins);
                continue;
            }
            spins = 0;
            active_.fetch_add(1);
            if (epoch_.load() == epoch) {
                take_ranges(member);
            }
            active_.fetch_sub(1);
            last = epoch;
        }
    }

    void finish() { done_.store(true); }

  private:
    struct Job {
        int64_t items, ranges;
        LoopBody fn;
        void* context;
    };

    /// First the ranges that are this member's by its number, the same in every loop of equal size, so that
    /// it finds what it left in its cache; then those that nobody has taken.
    void take_ranges(int64_t member) {
        const Job job = job_;
        const int64_t first = job.ranges * member / threads_;
        for (int64_t i = 0; i < job.ranges; ++i) {
            const int64_t r = (first + i) % job.ranges;
            if (!taken_[static_cast<size_t>(r)].exchange(true)) {
                job.fn(job.items * r / job.ranges, job.items * (r + 1) / job.ranges, job.context);
            }
        }
    }

    /// Between two looks at a variable. After some microseconds the core is offered to others: the scheduler
    /// may have put two of the team on one, and whoever spins there holds up whom he waits for.
    static void pause_a_moment(int spins) {
        if (spins > 100) {
            std::this_thread::yield();
        } else {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        }
    }

    static constexpr int64_t kRanges = 8;  // of a thread: what the last one to finish may cost

    const int64_t threads_;
    const std::unique_ptr<std::atomic<bool>[]> taken_;
    Job job_{};
    alignas(64) std::atomic<uint64_t> epoch_{0};
    alignas(64) std::atomic<int64_t> active_{0};
    std::atomic<bool> done_{false};
};

}  // namespace dl4ds
