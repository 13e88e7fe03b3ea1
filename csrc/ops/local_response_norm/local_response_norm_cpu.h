// What the CPU kernels of local_response_norm work on: a run of pixels (channels side by side), or a block of
// columns of all channels (positions side by side). No torch header.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace dl4ds {

/// How s^beta is computed: by square roots where beta allows it, by the library's pow() otherwise.
enum class LrnPower : int { kThreeQuarters, kHalf, kOne, kAny };

/// s[c] = k + scale * (sum of x^2 over the channels from c - before to c + after), out[c] = x[c] / s[c]^beta.
struct LrnArgs {
    const void* x;
    const void* dout;  // backward only
    void* out;         // backward: dx
    void* scratch;     // lrn_scratch_elements() elements of the accumulator type
    int64_t count;     // pixels, or columns of the block
    int64_t channels;
    int64_t pitch;  // columns only: elements from one channel to the next
    int64_t before, after;
    double scale, beta, k;
    LrnPower power;
};

constexpr int64_t kLrnPad = 16;  // a vector of any ISA may reach this far beyond the last channel

/// Room for the padded rows that the kernels keep of a pixel (three), or of a block of columns (two).
inline int64_t lrn_scratch_elements(int64_t channels, int64_t size, int64_t columns) {
    return columns == 0 ? 3 * (channels + size + 2 * kLrnPad) : (2 * channels + size) * columns;
}

/// [dtype][0: pixels, 1: columns]
struct LrnKernels {
    void (*fwd[4][2])(const LrnArgs&);
    void (*bwd[4][2])(const LrnArgs&);
};

/// The table of the active ISA.
const LrnKernels& lrn_kernels();

}  // namespace dl4ds
