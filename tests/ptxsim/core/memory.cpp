#include "memory.h"

#include <algorithm>

namespace ptxsim {

void Shadow::reset(u64 bytes) {
    shift_ = 4;
    bytes_ = bytes;
    cells_.clear();
}

void Shadow::refine(int shift) {
    const size_t factor = size_t{1} << (shift_ - shift);
    std::vector<Cell> finer(cells_.size() * factor);
    for (size_t i = 0; i < finer.size(); i++) finer[i] = cells_[i / factor];
    cells_ = std::move(finer);
    shift_ = shift;
}

Cell* Shadow::cells(u64 offset, u32 bytes, u32& count) {
    int needed = 0;  // the largest power of two that divides both
    while (needed < 4 && !((offset | bytes) >> needed & 1)) needed++;
    if (cells_.empty()) {
        shift_ = needed;
        cells_.assign((bytes_ >> shift_) + 17, Cell());
    } else if (needed < shift_) {
        refine(needed);
    }
    count = bytes >> shift_;
    return &cells_[offset >> shift_];
}

void Region::count_sectors(u64 first, u64 last, bool write) {
    std::vector<u8>& bitmap = write ? write_sectors : read_sectors;
    const u64 base = low >> 5;
    if (bitmap.empty()) bitmap.assign(((high >> 5) - base + 8) / 8 + 1, 0);
    for (u64 s = first - base; s <= last - base; s++) bitmap[s >> 3] |= static_cast<u8>(1 << (s & 7));
}

Memory::Memory() { std::fill(by_tag_, by_tag_ + 256, -1); }

u64 Memory::add(u64 address, u64 bytes, bool writable, bool undefined, bool output, const std::string& name) {
    Region region;
    region.low = address;
    region.high = address + bytes;
    region.writable = writable;
    region.undefined = undefined;
    region.output = output;
    region.name = name;
    for (int tries = 0; tags && tries < 255 && !region.tag;
         tries++) {  // more than 255 live tensors: plain bounds
        u32 tag = next_tag_++ % 255 + 1;
        if (by_tag_[tag] < 0) region.tag = tag, tag_names_[tag] = name;
    }
    regions_.push_back(std::move(region));
    reindex();
    return address | static_cast<u64>(regions_.back().tag) << kTagShift;
}

void Memory::remove(u64 address) {
    const u64 tag = tag_of(address), low = host_address(address);
    for (size_t i = 0; i < regions_.size(); i++) {
        if (regions_[i].low == low && (!tag || regions_[i].tag == tag)) {
            regions_.erase(regions_.begin() + static_cast<long>(i));
            return reindex();
        }
    }
}

void Memory::keep(u64 address) {
    for (Region& r : regions_)
        if (r.low == host_address(address) && (!tag_of(address) || r.tag == tag_of(address)))
            r.permanent = true;
}

void Memory::clear() {
    regions_.erase(
        std::remove_if(regions_.begin(), regions_.end(), [](const Region& r) { return !r.permanent; }),
        regions_.end());
    reindex();
}

void Memory::reindex() {
    std::fill(by_tag_, by_tag_ + 256, -1);
    last_ = 0;
    for (size_t i = 0; i < regions_.size(); i++) {
        Region& r = regions_[i];
        if (r.tag) by_tag_[r.tag] = static_cast<int>(i);
        r.root = i;
        r.shared_history = false;
        for (size_t j = 0; j < regions_.size(); j++) {
            const Region &outer = regions_[j], &best = regions_[r.root];
            const u64 size = outer.high - outer.low, best_size = best.high - best.low;
            if (outer.low <= r.low && outer.high >= r.high &&
                (size > best_size || (size == best_size && j < r.root)))
                r.root = j;
        }
    }
    for (Region& r : regions_)
        if (r.writable) regions_[r.root].shared_history = true;
}

void Memory::start_launch() {
    for (Region& r : regions_) {
        r.shadow.reset(r.high - r.low);
        r.read_sectors.clear();
        r.write_sectors.clear();
        if (r.undefined && r.written.empty()) r.written.assign(r.high - r.low, false);
    }
}

Region* Memory::find(u64 tag, u64 address, u64 bytes) {
    // The sum of an address and a size may wrap: a null pointer less one vector ends at zero.
    auto holds = [&](const Region& r) {
        return address >= r.low && address <= r.high && r.high - address >= bytes;
    };
    if (tag) {
        const int i = by_tag_[tag];
        return i >= 0 && holds(regions_[static_cast<size_t>(i)]) ? &regions_[static_cast<size_t>(i)]
                                                                 : nullptr;
    }
    if (last_ < regions_.size() && holds(regions_[last_])) return &regions_[last_];
    for (size_t i = 0; i < regions_.size(); i++)
        if (holds(regions_[i])) return last_ = i, &regions_[i];
    return nullptr;
}

std::string Memory::describe_miss(u64 tag, u64 address, u64 bytes) {
    const Region *meant = nullptr, *hit = nullptr;
    u64 nearest = ~0ull;
    for (const Region& r : regions_) {
        const u64 end = address + bytes < address ? ~0ull : address + bytes;
        u64 distance = end > r.high ? end - r.high : address < r.low ? r.low - address : 0;
        if (distance == 0) hit = &r;
        if (tag ? r.tag == tag : distance < nearest) meant = &r, nearest = distance;
    }
    if (!meant) return "no tensor is registered there";
    std::string text =
        format("%llu bytes outside %s", static_cast<unsigned long long>(nearest), meant->name.c_str());
    if (hit && hit != meant) text += ", inside " + hit->name;
    return text;
}

}  // namespace ptxsim
