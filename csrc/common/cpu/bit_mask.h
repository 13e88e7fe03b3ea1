// Writing and reading the one-bit-per-element masks of the forward ops (bit i % 8 of byte i / 8).
#pragma once

#include <cstdint>

namespace dl4ds {

/// Writes bits one after the other, starting at bit 0 of a byte. finish() writes what is pending; call it
/// once, at the end of the stretch of memory that this writer owns.
struct BitWriter {
    uint8_t* to = nullptr;
    uint64_t pending = 0;
    int count = 0;

    __attribute__((always_inline)) void put(uint32_t bits, int n) {
        pending |= static_cast<uint64_t>(bits) << count;
        count += n;
        if (count >= 32) {
            const uint32_t word = static_cast<uint32_t>(pending);
            __builtin_memcpy(to, &word, sizeof(word));  // little-endian, as every supported CPU is
            to += 4;
            pending >>= 32;
            count -= 32;
        }
    }
    void finish() {
        for (; count > 0; count -= 8) {
            *to++ = static_cast<uint8_t>(pending);
            pending >>= 8;
        }
        count = 0;
    }
};

/// n bits (at most 16) from bit position `at`; touches only the bytes that hold them.
__attribute__((always_inline)) inline uint32_t read_bits(const uint8_t* mask, int64_t at, int n) {
    const uint8_t* from = mask + (at >> 3);
    const int skip = static_cast<int>(at & 7);
    uint32_t bits = from[0];
    if (skip + n > 8) {
        bits |= static_cast<uint32_t>(from[1]) << 8;
    }
    if (skip + n > 16) {
        bits |= static_cast<uint32_t>(from[2]) << 16;
    }
    return (bits >> skip) & ((1u << n) - 1u);
}

}  // namespace dl4ds
