// What the CPU kernels of add_act work on: flat stretches of memory. No torch header.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cpu/bit_mask.h"
#include "common/dispatch.h"

namespace dl4ds {

/// out = act(alpha * (x + residual + third)) over n elements in memory order.
struct AddActArgs {
    const void* x;
    const void* residual;  // null: out = act(alpha * x)
    const void* third;     // null: of two operands
    void* out;             // may be x
    BitWriter* mask;       // null: none; else takes one bit per element
    int64_t n;
    double alpha, slope;
    bool streaming;
};

/// dx = alpha * dout * act'(z), z from the mask or recomputed.
struct AddActBwdArgs {
    const void* dout;
    const uint8_t* mask;  // null: recompute from x and residual
    int64_t mask_bit;     // index of the first element
    const void* x;
    const void* residual;
    void* dx;
    int64_t n;
    double alpha, slope;
    bool streaming;
};

/// [dtype][activation]
struct AddActKernels {
    void (*fwd[4][kNumActivations])(const AddActArgs&);
    void (*bwd[4][kNumActivations])(const AddActBwdArgs&);
};

/// The table of the active ISA.
const AddActKernels& add_act_kernels();

}  // namespace dl4ds
