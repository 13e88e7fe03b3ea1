#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "common/checks.h"
#include "common/cpu/pool.h"

namespace dl4ds {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// A block lent where there is no room for one of its own, in times what was asked for: for a short while, and
// `lasting`.
constexpr size_t kMostBorrowed = 16;
constexpr size_t kMostBorrowedLasting = 2;
constexpr size_t kHugeFrom = size_t{8} << 20;  // blocks this large ask for huge pages

/// Size classes: eight steps an octave, so a block is at most 1/8 larger than asked for.
size_t class_size(size_t bytes) {
    size_t step = size_t{4} << 10;
    while (step * 16 < bytes) {
        step *= 2;
    }
    return (bytes + step - 1) / step * step;
}

/// Null where the system has no memory left.
PoolBlock* map_block(size_t bytes) {
    const bool huge = bytes >= kHugeFrom;
    const size_t mapped = huge ? bytes + kHugePage : bytes;
    void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) {
        return nullptr;
    }
    auto address = reinterpret_cast<uintptr_t>(mapping);
    if (huge) {
        address = (address + kHugePage - 1) / kHugePage * kHugePage;
#if defined(MADV_HUGEPAGE)
        // Whole huge pages only: the tail keeps small pages, so nothing beyond `bytes` becomes resident.
        madvise(reinterpret_cast<void*>(address), bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    }
    return new PoolBlock{reinterpret_cast<void*>(address), bytes, mapping, mapped, 0, false};
}

void unmap_block(PoolBlock* block) noexcept {
    munmap(block->mapping, block->mapped_bytes);
    delete block;
}

int64_t default_limit() {
    if (const char* text = std::getenv("DL4DS_POOL_MB"); text != nullptr && *text != '\0') {
        return std::max<int64_t>(0, std::strtoll(text, nullptr, 10)) << 20;
    }
    const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? pages / 4 * page : int64_t{1} << 30;
}

class Pool {
  public:
    /// Leaked on purpose: tensors may be freed after static destructors have run.
    static Pool& get() {
        static Pool* const pool = [] {
            Pool* made = new Pool;
            pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                           [] { get().mutex_.unlock(); });
            return made;
        }();
        return *pool;
    }

    PoolBlock* acquire(size_t asked, bool lasting) {
        const size_t bytes = class_size(asked);
        PoolBlock* block = take_idle(bytes, lasting);
        if (block == nullptr) {
            block = map_or_trim(bytes);
        }
        if (block == nullptr) {
            {
                const std::lock_guard lock(mutex_);
                used_ -= static_cast<int64_t>(bytes);
                peak_ = used_;
            }
            no_memory(asked);
        }
        return poisoned(block, asked);
    }

    PoolBlock* acquire_apart(size_t asked) {
        const size_t page = size_t{4} << 10, bytes = (asked + page - 1) / page * page;
        PoolBlock* block = map_or_trim(bytes);
        if (block == nullptr) {
            no_memory(asked);
        }
        block->apart = true;
        return poisoned(block, asked);
    }

    void release(PoolBlock* block) noexcept {
        if (block->apart) {
            unmap_block(block);
            return;
        }
        PoolBlock* evicted = nullptr;
        {
            const std::lock_guard lock(mutex_);
            used_ -= static_cast<int64_t>(block->bytes);
            block->released = ++clock_;
            insert_idle(block);
            evicted = evict_to(limit());
        }
        unmap_chain(evicted);
    }

    int64_t trim() {
        PoolBlock* evicted = nullptr;
        int64_t freed = 0;
        {
            const std::lock_guard lock(mutex_);
            freed = idle_;
            evicted = evict_to(0);
            peak_ = used_;
        }
        unmap_chain(evicted);
        return freed;
    }

    void set_limit(int64_t bytes) {
        PoolBlock* evicted = nullptr;
        {
            const std::lock_guard lock(mutex_);
            limit_.store(std::max<int64_t>(0, bytes), std::memory_order_relaxed);
            evicted = evict_to(limit());
        }
        unmap_chain(evicted);
    }

    int64_t limit() const { return limit_.load(std::memory_order_relaxed); }

    PoolStats stats() {
        const std::lock_guard lock(mutex_);
        return {limit(), used_, idle_, peak_, hits_, misses_, evictions_};
    }

  private:
    PoolBlock* map_or_trim(size_t bytes) {
        PoolBlock* block = map_block(bytes);
        if (block == nullptr) {
            trim();  // what lies idle may be what is missing
            block = map_block(bytes);
        }
        return block;
    }

    [[noreturn]] static void no_memory(size_t asked) {
        throw_check_failure("dl4ds_kernels: output: cannot allocate memory: expected ", asked,
                            " bytes, got none from the system");
    }

    PoolBlock* poisoned(PoolBlock* block, size_t bytes) const {
        if (poison_) {
            std::memset(block->data, 0xFF, bytes);
        }
        return block;
    }

    /// An idle block of this class or one slightly larger. Where mapping a new one would cost an idle block
    /// its place under the peak, a much larger one will do: its pages are there already, and a model whose
    /// layers differ in size would otherwise unmap and map again in every pass. Null: map a new block.
    PoolBlock* take_idle(size_t bytes, bool lasting) {
        PoolBlock* evicted = nullptr;
        PoolBlock* block = nullptr;
        {
            const std::lock_guard lock(mutex_);
            auto found = by_size_.lower_bound({bytes, 0});
            const bool full = used_ + idle_ + static_cast<int64_t>(bytes) > most_held();
            const size_t most = !full     ? bytes + bytes / 4
                                : lasting ? kMostBorrowedLasting * bytes
                                          : kMostBorrowed * bytes;
            if (found != by_size_.end() && found->second->bytes <= most) {
                // Of one size the youngest block is the warmest in cache.
                found = std::prev(by_size_.upper_bound({found->second->bytes, UINT64_MAX}));
                block = found->second;
                remove_idle(block);
                used_ += static_cast<int64_t>(block->bytes);
                ++hits_;
            } else {
                used_ += static_cast<int64_t>(bytes);
                ++misses_;
            }
            peak_ = std::max(peak_, used_);
            evicted = evict_to(most_held() - used_);
        }
        unmap_chain(evicted);
        return block;
    }

    /// Bytes in use and idle together. What a step needs at one time is not cut into the sizes that it needs
    /// at another: with no more than the peak, a ResNet-18's training step unmapped and mapped 166 MB again
    /// every time, with 3/16 more nothing (ResNet-50 and a U-Net neither).
    int64_t most_held() const { return peak_ + peak_ / 16 * 3; }

    void insert_idle(PoolBlock* block) {
        by_size_.emplace(Key{block->bytes, block->released}, block);
        by_age_.emplace(block->released, block);
        idle_ += static_cast<int64_t>(block->bytes);
    }

    void remove_idle(PoolBlock* block) {
        by_size_.erase(Key{block->bytes, block->released});
        by_age_.erase(block->released);
        idle_ -= static_cast<int64_t>(block->bytes);
    }

    /// Takes the oldest idle blocks out until at most `target` idle bytes are left. They are returned as a
    /// chain (for unmap_chain), so that munmap runs without the lock.
    PoolBlock* evict_to(int64_t target) {
        PoolBlock* chain = nullptr;
        while (idle_ > target && !by_age_.empty()) {
            PoolBlock* block = by_age_.begin()->second;
            remove_idle(block);
            block->data = chain;  // an evicted block's data pointer is the link to the next one
            chain = block;
            ++evictions_;
        }
        return chain;
    }

    static void unmap_chain(PoolBlock* chain) noexcept {
        while (chain != nullptr) {
            PoolBlock* next = static_cast<PoolBlock*>(chain->data);
            unmap_block(chain);
            chain = next;
        }
    }

    using Key = std::pair<size_t, uint64_t>;  // bytes, order of release

    std::mutex mutex_;
    std::map<Key, PoolBlock*> by_size_;
    std::map<uint64_t, PoolBlock*> by_age_;
    uint64_t clock_ = 0;
    int64_t used_ = 0, idle_ = 0, peak_ = 0, hits_ = 0, misses_ = 0, evictions_ = 0;
    std::atomic<int64_t> limit_{default_limit()};
    const bool poison_ = [] {
        const char* text = std::getenv("DL4DS_POOL_POISON");
        return text != nullptr && *text != '\0' && *text != '0';
    }();
};

}  // namespace

PoolBlock* pool_acquire(size_t bytes, bool lasting) { return Pool::get().acquire(bytes, lasting); }
PoolBlock* pool_acquire_apart(size_t bytes) { return Pool::get().acquire_apart(bytes); }
void pool_release(PoolBlock* block) noexcept { Pool::get().release(block); }
PoolStats pool_stats() { return Pool::get().stats(); }
int64_t pool_trim() { return Pool::get().trim(); }
void pool_set_limit(int64_t bytes) { Pool::get().set_limit(bytes); }
bool pool_enabled() { return Pool::get().limit() > 0; }

}  // namespace dl4ds
