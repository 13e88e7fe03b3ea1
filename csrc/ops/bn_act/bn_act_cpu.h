// What the CPU kernels of bn_act work on: plain structs and the table of kernels that each ISA fills. No
// torch header.
//
// A tensor is a sequence of rows, each `len` elements without gaps. Two cases:
//   per element (channels last): a row holds all channels of one or more pixels; the channel vectors have
//   `len`
//                                entries (padded to a multiple of kPadElements);
//   per row (contiguous):        a row is a part of one channel's plane; the channel vectors are single
//   values.
// Row r starts at r * x_pitch in x and at r * pitch in every other tensor. pitch is len, except where the
// rows are the planes of one channel in the images of a batch.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cpu/bit_mask.h"
#include "common/dispatch.h"

namespace dl4ds {

/// Channel vectors are padded to this many elements, so that whole vectors can be read at the end.
constexpr int64_t kPadElements = 16;

/// Statistics of some rows: mean and m2 (sum of squared distances from it), `len` entries or (per row) one.
struct BnStatsArgs {
    const void* x;
    int64_t rows, len, x_pitch;
    double* mean;   // out
    double* m2;     // out
    void* scratch;  // per element: bn_stats_scratch_bytes(len)
};

/// z = (x - mean) * scale + shift [+ residual]; out = act(z).
struct BnApplyArgs {
    const void* x;
    const void* residual;  // null: none
    void* out;             // may be x itself (then x_pitch == pitch)
    BitWriter* mask;       // null: none; else takes one bit per element, in the order of the rows
    int64_t rows, len, x_pitch, pitch;
    const void* mean;  // acc dtype
    const void* scale;
    const void* shift;
    double slope;
    bool streaming;  // store past the caches
};

/// dz = dout * act'(z), with z from the mask or recomputed from x (and residual).
struct BnBwdArgs {
    const void* dout;
    const void* x;
    const void* residual;  // null: none
    const uint8_t* mask;   // null: recompute z
    int64_t mask_bit;      // index of the first row's first element
    int64_t rows, len, x_pitch, pitch;
    const void* mean;  // acc dtype
    const void* scale;
    const void* shift;
    double slope;

    // reduce: s1 += sum dz, s2 += sum dz * (x - mean); per element both have padded length
    double* s1;
    double* s2;
    void* scratch;  // per element: bn_reduce_scratch_bytes(len)

    // apply: dx = dz * scale + (x - mean) * factor_x + offset (training), dz * scale (eval); dresidual = dz
    void* dx;         // null: not needed
    void* dresidual;  // null: not needed
    const void* factor_x;
    const void* offset;
    bool training;
    bool streaming;
};

/// Backward of z = (x - mean) * scale + shift, act(z), where x is the first channels of a dense block's
/// buffer. Each operand has its own pitch. Of dx only the part with dz is added, in the same pass that takes
/// the sums: what else dx has is linear in x, and one pass over a channel can add it for all layers that read
/// it.
struct BnDenseBwdArgs {
    void* dz;  // in: gradient of act(z); out: act(z) if `activate`
    const void* x;
    const void* grad;
    void* out;  // grad + act'(z) dz * scale; may be grad itself
    int64_t rows, len, pitch, x_pitch, grad_pitch, out_pitch;
    const void* mean;  // acc dtype
    const void* scale;
    const void* shift;
    double slope;
    bool activate;
    double* s1;  // += sum act'(z) dz, and that times (x - mean); padded length
    double* s2;
    void* scratch;  // bn_reduce_scratch_bytes(len)
};

/// out = grad + (x - mean) * factor + offset; out without gaps.
struct BnDenseTakeArgs {
    const void* grad;
    const void* x;
    void* out;
    int64_t rows, len, grad_pitch, x_pitch;
    const void* mean;  // acc dtype
    const void* factor;
    const void* offset;
};

/// [dtype][per_row] and [dtype][per_row][activation]; the last two per element only.
struct BnKernels {
    void (*stats[4][2])(const BnStatsArgs&);
    void (*apply[4][2][kNumActivations])(const BnApplyArgs&);
    void (*bwd_reduce[4][2][kNumActivations])(const BnBwdArgs&);
    void (*bwd_apply[4][2][kNumActivations])(const BnBwdArgs&);
    void (*dense_bwd[4][kNumActivations])(const BnDenseBwdArgs&);
    void (*dense_take[4])(const BnDenseTakeArgs&);
};

/// The table of the active ISA.
const BnKernels& bn_kernels();

constexpr int64_t pad_elements(int64_t len) { return (len + kPadElements - 1) / kPadElements * kPadElements; }

/// Scratch of the per-element statistics kernel: two totals, a shift and two sums (8 bytes allow for double).
constexpr int64_t bn_stats_scratch_bytes(int64_t len) { return 5 * 8 * pad_elements(len); }

/// Scratch of the per-element backward reduction: two sums.
constexpr int64_t bn_reduce_scratch_bytes(int64_t len) { return 2 * 8 * pad_elements(len); }

}  // namespace dl4ds
