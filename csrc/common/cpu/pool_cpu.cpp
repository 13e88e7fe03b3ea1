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
constexpr size_t kRoom =
    size_t{64} << 30;  // of address space that a region is laid into, so that it can grow

const size_t kPage = [] {
    const int64_t bytes = sysconf(_SC_PAGESIZE);
    return bytes > 0 ? static_cast<size_t>(bytes) : size_t{4} << 10;
}();

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

char* next_huge_page(char* address) {
    return reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(address), kHugePage));
}

/// New pages, at this address if it is free; null where the system has no memory left.
char* map_pages(char* address, size_t bytes) {
    void* mapping = mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return mapping == MAP_FAILED ? nullptr : static_cast<char*>(mapping);
}

/// An address with much free space behind it (as far as the system lets us look).
char* find_room() {
    void* room = mmap(nullptr, kRoom, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) {
        return nullptr;
    }
    munmap(room, kRoom);
    return next_huge_page(static_cast<char*>(room));
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
    static Pool& get();
    static Pool* make() {
        Pool* made = new Pool;
        pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                       [] { get().mutex_.unlock(); });
        return made;
    }

    PoolBlock* acquire(size_t asked) {
        const size_t bytes = round_up(asked, kPage);
        char* data = nullptr;
        {
            const std::lock_guard lock(mutex_);
            data = take(bytes);
            if (data == nullptr) {  // what lies idle may be what is missing
                evict_to(0);
                data = take(bytes);
            }
            if (data != nullptr) {
                used_ += static_cast<int64_t>(bytes);
                peak_ = std::max(peak_, used_);
                evict_to(std::min(limit(), most_held() - used_));
            }
        }
        return made(data, bytes, asked, false);
    }

    PoolBlock* acquire_apart(size_t asked) {
        const size_t bytes = round_up(asked, kPage);
        char* data = map_pages(nullptr, bytes);
        if (data == nullptr) {
            trim();
            data = map_pages(nullptr, bytes);
        }
        return made(data, bytes, asked, true);
    }

    void release(PoolBlock* block) noexcept {
        if (block->apart) {
            munmap(block->data, block->bytes);
        } else {
            const std::lock_guard lock(mutex_);
            used_ -= static_cast<int64_t>(block->bytes);
            add_free(static_cast<char*>(block->data), block->bytes);
            evict_to(limit());
        }
        delete block;
    }

    int64_t trim() {
        const std::lock_guard lock(mutex_);
        const int64_t freed = idle_;
        evict_to(0);
        peak_ = used_;
        return freed;
    }

    void set_limit(int64_t bytes) {
        const std::lock_guard lock(mutex_);
        limit_.store(std::max<int64_t>(0, bytes), std::memory_order_relaxed);
        evict_to(limit());
    }

    int64_t limit() const { return limit_.load(std::memory_order_relaxed); }

    PoolStats stats() {
        const std::lock_guard lock(mutex_);
        return {limit(), used_, idle_, peak_, hits_, misses_, evictions_};
    }

  private:
    using Free = std::map<char*, size_t>;  // address -> bytes; neighbours are one range

    PoolBlock* made(char* data, size_t bytes, size_t asked, bool apart) const {
        if (data == nullptr) {
            throw_check_failure("dl4ds_kernels: output: cannot allocate memory: expected ", asked,
                                " bytes, got none from the system");
        }
        if (poison_) {
            std::memset(data, 0xFF, asked);
        }
        return new PoolBlock{data, bytes, apart};
    }

    /// Bytes in use and idle together. First fit leaves 0 to 26 % between the blocks of our models' passes;
    /// this only bounds what a strange sequence of sizes could leave.
    int64_t most_held() const { return peak_ + peak_ / 2 + static_cast<int64_t>(kHugePage); }

    /// The lowest free range that is large enough, or new pages; null where the system has none.
    char* take(size_t bytes) {
        for (auto range = free_.begin(); range != free_.end(); ++range) {
            if (range->second >= bytes) {
                ++hits_;
                return cut(range, bytes);
            }
        }
        ++misses_;
        return grow(bytes) ? cut(std::prev(free_.lower_bound(end_)), bytes) : nullptr;
    }

    char* cut(Free::iterator range, size_t bytes) {
        char* data = range->first;
        const size_t left = range->second - bytes;
        free_.erase(range);
        if (left > 0) {
            free_.emplace(data + bytes, left);
        }
        idle_ -= static_cast<int64_t>(bytes);
        return data;
    }

    /// Pages behind the newest ones, so many that the range that ends there has these bytes.
    bool grow(size_t bytes) {
        size_t tail = 0;  // bytes that are free there
        if (const auto behind = free_.lower_bound(end_); behind != free_.begin()) {
            const auto last = std::prev(behind);
            tail = last->first + last->second == end_ ? last->second : 0;
        }
        // Up to the end of a huge page: what that gives too much is idle, and not resident before it is used.
        size_t more = static_cast<size_t>(next_huge_page(end_ + bytes - tail) - end_);
        char* pages = end_ == nullptr ? nullptr : map_pages(end_, more);
        if (pages == nullptr || pages != end_) {  // there are none yet, or somebody else is there
            if (pages != nullptr) {
                munmap(pages, more);
            }
            more = round_up(bytes, kHugePage);
            pages = map_pages(find_room(), more);
        }
        if (pages == nullptr) {
            return false;
        }
#if defined(MADV_HUGEPAGE)
        madvise(pages, more, MADV_HUGEPAGE);
#endif
        end_ = pages + more;
        add_free(pages, more);
        return true;
    }

    void add_free(char* data, size_t bytes) {
        idle_ += static_cast<int64_t>(bytes);
        auto next = free_.lower_bound(data);
        if (next != free_.end() && data + bytes == next->first) {
            bytes += next->second;
            next = free_.erase(next);
        }
        if (next != free_.begin()) {
            const auto before = std::prev(next);
            if (before->first + before->second == data) {
                before->second += bytes;
                return;
            }
        }
        free_.emplace_hint(next, data, bytes);
    }

    /// Gives idle pages back, those at the highest addresses first, until at most `most` bytes are left.
    void evict_to(int64_t most) noexcept {
        while (idle_ > most && !free_.empty()) {
            const auto last = std::prev(free_.end());
            const size_t surplus = round_up(static_cast<size_t>(idle_ - std::max<int64_t>(most, 0)), kPage);
            const size_t bytes = std::min(last->second, surplus);
            char* pages = last->first + last->second - bytes;
            munmap(pages, bytes);
            if (pages + bytes == end_) {
                end_ = pages;
            }
            idle_ -= static_cast<int64_t>(bytes);
            if ((last->second -= bytes) == 0) {
                free_.erase(last);
            }
            ++evictions_;
        }
    }

    std::mutex mutex_;
    Free free_;
    char* end_ = nullptr;  // behind the newest pages: where the next ones are asked for
    int64_t used_ = 0, idle_ = 0, peak_ = 0, hits_ = 0, misses_ = 0, evictions_ = 0;
    std::atomic<int64_t> limit_{default_limit()};
    const bool poison_ = [] {
        const char* text = std::getenv("DL4DS_POOL_POISON");
        return text != nullptr && *text != '\0' && *text != '0';
    }();
};

/// Made while the library is loaded (see kShim in common/shim.h), and leaked on purpose: tensors may be freed
/// after static destructors have run.
Pool* const kPool = Pool::make();

Pool& Pool::get() { return *kPool; }

}  // namespace

PoolBlock* pool_acquire(size_t bytes) { return Pool::get().acquire(bytes); }
PoolBlock* pool_acquire_apart(size_t bytes) { return Pool::get().acquire_apart(bytes); }
void pool_release(PoolBlock* block) noexcept { Pool::get().release(block); }
PoolStats pool_stats() { return Pool::get().stats(); }
int64_t pool_trim() { return Pool::get().trim(); }
void pool_set_limit(int64_t bytes) { Pool::get().set_limit(bytes); }
bool pool_enabled() { return Pool::get().limit() > 0; }

}  // namespace dl4ds
