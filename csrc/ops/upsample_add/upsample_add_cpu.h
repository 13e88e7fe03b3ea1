// What the CPU kernels of upsample_add work on: one row of the small map and the two rows it covers. No torch
// header.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace dl4ds {

/// out[y][2 j + s] = skip[y][2 j + s] + low[j] for both rows y and s = 0, 1. A pixel is `channels` elements.
struct UpsampleAddArgs {
    const void* low;
    const void* skip[2];
    void* out[2];
    int64_t width, channels;
};

/// dlow[j] = the sum of dout over the four pixels that low[j] went to.
struct UpsampleAddBwdArgs {
    const void* dout[2];
    void* dlow;
    int64_t width, channels;
};

/// [dtype][channels == 1]
struct UpsampleAddKernels {
    void (*fwd[4][2])(const UpsampleAddArgs&);
    void (*bwd[4][2])(const UpsampleAddBwdArgs&);
};

/// The table of the active ISA.
const UpsampleAddKernels& upsample_add_kernels();

}  // namespace dl4ds
