// What the CPU kernels of max_pool_indices work on: one row of the small map and the two rows that it covers.
// A pixel is `channels` elements. `where` says which of a window's four pixels, row by row, is the largest.
// No torch header.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace dl4ds {

/// out = max over each 2x2 window of x, where = its place.
struct MaxPoolArgs {
    const void* x[2];
    void* out;
    uint8_t* where;
    int64_t width, channels;
};

/// out = y at its place, zero at the other three. Also the gradient of the pooling.
struct MaxUnpoolArgs {
    const void* y;
    const uint8_t* where;
    void* out[2];
    int64_t width, channels;
};

/// dy = dout at the place. The gradient of the unpooling.
struct MaxGatherArgs {
    const void* dout[2];
    const uint8_t* where;
    void* dy;
    int64_t width, channels;
};

/// [dtype][channels == 1]
struct MaxPoolKernels {
    void (*pool[4][2])(const MaxPoolArgs&);
    void (*unpool[4][2])(const MaxUnpoolArgs&);
    void (*gather[4][2])(const MaxGatherArgs&);
};

/// The table of the active ISA.
const MaxPoolKernels& max_pool_kernels();

}  // namespace dl4ds
