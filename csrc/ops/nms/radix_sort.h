// Stable least-significant-digit radix sort of (key, index) pairs, the host-side sort of NMS.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace dl4ds::nms {

template <typename Key>
struct Keyed {
    Key key;
    uint32_t index;
};

constexpr int kMaxDigitBits = 11;
constexpr int64_t kSmallSort = 64;  // below this, insertion sort beats the histograms

template <typename Key>
void insertion_sort(Keyed<Key>* items, int64_t n) {
    for (int64_t i = 1; i < n; ++i) {
        const Keyed<Key> item = items[i];
        int64_t j = i;
        for (; j > 0 && items[j - 1].key > item.key; --j) {
            items[j] = items[j - 1];
        }
        items[j] = item;
    }
}

/// Sorts `items` by the low `key_bits` bits of the key, ascending and stable. `spare` is scratch of the same
/// length; the result is in the returned one of the two. Digits that all keys share cost only their
/// histogram.
template <typename Key>
Keyed<Key>* radix_sort(Keyed<Key>* items, Keyed<Key>* spare, int64_t n, int key_bits) {
    if (n <= kSmallSort) {
        insertion_sort(items, n);
        return items;
    }
    // Wide digits save passes, narrow ones save clearing and scanning the histograms.
    const int max_digit_bits = n < 2048 ? 8 : kMaxDigitBits;
    const int passes = (key_bits + max_digit_bits - 1) / max_digit_bits;
    const int digit_bits = passes ? (key_bits + passes - 1) / passes : 0;
    const uint32_t buckets = uint32_t{1} << digit_bits;
    const Key mask = static_cast<Key>(buckets - 1);

    std::vector<uint32_t> counts(static_cast<size_t>(passes) * buckets, 0);
    for (int64_t i = 0; i < n; ++i) {
        Key key = items[i].key;
        for (int pass = 0; pass < passes; ++pass) {
            ++counts[static_cast<size_t>(pass) * buckets + static_cast<uint32_t>(key & mask)];
            key = static_cast<Key>(key >> digit_bits);
        }
    }
    for (int pass = 0; pass < passes; ++pass) {
        uint32_t* count = counts.data() + static_cast<size_t>(pass) * buckets;
        const int shift = pass * digit_bits;
        if (count[(items[0].key >> shift) & mask] == n) {
            continue;
        }
        uint32_t offset = 0;
        for (uint32_t b = 0; b < buckets; ++b) {
            const uint32_t size = count[b];
            count[b] = offset;
            offset += size;
        }
        for (int64_t i = 0; i < n; ++i) {
            spare[count[(items[i].key >> shift) & mask]++] = items[i];
        }
        std::swap(items, spare);
    }
    return items;
}

/// Maps a score to a key whose ascending order is torch's stable descending order: NaN first (whatever its
/// sign or payload), then +inf down to -inf; +0 and -0 tie.
inline uint32_t descending_key(float score) {
    if (score != score) {
        return 0;
    }
    uint32_t bits;
    score += 0.0f;  // -0 + 0 = +0
    std::memcpy(&bits, &score, sizeof bits);
    return bits & 0x80000000u ? bits : 0x7fffffffu - bits;
}

inline uint64_t descending_key(double score) {
    if (score != score) {
        return 0;
    }
    uint64_t bits;
    score += 0.0;
    std::memcpy(&bits, &score, sizeof bits);
    return bits >> 63 ? bits : 0x7fffffffffffffffu - bits;
}

}  // namespace dl4ds::nms
