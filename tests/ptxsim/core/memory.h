// Registered tensors, tagged addresses, and the shadow memory behind the race and initialisation checks.
#pragma once
#include <string>
#include <vector>

#include "types.h"

namespace ptxsim {

// Who touched a granule: a block (index + 1; 0: nobody), a thread in it, and that thread's warp clock and
// step.
struct Epoch {
    u32 block = 0, clock = 0, step = 0;
    u16 thread = 0;
    bool strong = false;
};
struct Cell {
    Epoch writer, reader[4];                 // the last readers from different warps
    u32 async_block = 0, async_pending = 0;  // cp.async under way
};

// Cells over a range of bytes. Their size starts at 16 bytes and is halved on demand down to the narrowest
// access seen, which is exact: all earlier accesses were whole cells.
class Shadow {
  public:
    void reset(u64 bytes);
    bool empty() const { return cells_.empty(); }
    // the cells of [offset, offset + bytes)
    Cell* cells(u64 offset, u32 bytes, u32& count);

  private:
    void refine(int shift);
    int shift_ = 4;
    u64 bytes_ = 0;
    std::vector<Cell> cells_;
};

struct Region {
    u64 low = 0, high = 0;
    bool writable = false;
    bool undefined = false;  // bytes count as garbage until written
    bool output = false;     // all of them should be
    bool permanent = false;  // module variables survive clear()
    std::string name;
    u32 tag = 0;
    size_t root = 0;              // outermost region that holds this one: aliases share one history
    bool shared_history = false;  // something in this root may be written: races are tracked
    Shadow shadow;
    std::vector<bool> written;                    // per byte, for undefined regions
    std::vector<u8> read_sectors, write_sectors;  // bitmaps over 32-byte sectors

    void count_sectors(u64 first, u64 last, bool write);
};

class Memory {
  public:
    // Registers host memory; the result is the address to hand to kernels.
    u64 add(u64 address, u64 bytes, bool writable, bool undefined, bool output, const std::string& name);
    void remove(u64 address);
    void keep(u64 address);  // makes it permanent
    void clear();            // all but permanent regions
    void start_launch();     // forgets counts and race history

    Region* find(u64 tag, u64 address, u64 bytes);
    Region& root(const Region& region) { return regions_[region.root]; }
    std::string describe_miss(u64 tag, u64 address, u64 bytes);
    bool is_stale(u64 tag) const { return tag && by_tag_[tag] < 0; }
    std::string stale_name(u64 tag) const { return tag_names_[tag]; }
    std::vector<Region>& regions() { return regions_; }
    bool tags = true;

  private:
    void reindex();
    std::vector<Region> regions_;
    size_t last_ = 0;
    int by_tag_[256] = {};
    std::string tag_names_[256];
    u32 next_tag_ = 0;

  public:
    Memory();
};

inline u64 host_address(u64 address) { return address >> 56 ? address : address & kAddressMask; }
inline u64 tag_of(u64 address) { return address >> 56 ? 0 : address >> kTagShift; }

}  // namespace ptxsim
