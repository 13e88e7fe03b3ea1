// The two reductions of bn_act over a whole tensor: batch statistics and the backward sums. Blocks depend on
// the shape alone and are merged in order, in double, so that the bits do not depend on the number of
// threads.
#pragma once

#include "ops/bn_act/bn_act_plan_cpu.h"

namespace dl4ds {

/// Mean and sum of squared distances of every channel: mean, m2 (C,) as doubles.
void bn_stats_all(const BnPlan& plan, const void* x, double* mean, double* m2);

/// The same for one channel of the per-row layout.
void bn_stats_channel(const BnPlan& plan, const void* x, int64_t c, double& mean, double& m2);

/// s1 = sum dz, s2 = sum dz * (x - mean) of every channel: (C,) as doubles. `whole` has the pointers to the
/// tensors' first elements and the channel arrays.
void bn_bwd_reduce_all(const BnPlan& plan, Activation act, const BnBwdArgs& whole, double* s1, double* s2);

/// The same of two BatchNorms behind one dout, whose blocks are read from memory once where both passes take
/// them in turn; s1 is the same of both. first null: of the second alone.
void bn_bwd_reduce_both(const BnPlan& plan, Activation act, const BnBwdArgs* first, const BnBwdArgs& second,
                        double* s1, double* first_s2, double* second_s2);

/// The same for one channel of the per-row layout.
void bn_bwd_reduce_channel(const BnPlan& plan, Activation act, const BnBwdArgs& whole, int64_t c, double& s1,
                           double& s2);

/// Arguments of `count` rows of the per-element layout from `element` on, x at x_offset.
BnBwdArgs bwd_rows(const BnPlan& plan, const BnBwdArgs& whole, int64_t element, int64_t x_offset,
                   int64_t count, int64_t len, int64_t x_pitch);

/// Arguments of plane (n, c) of the per-row layout, or of all n planes of channel c if n < 0 (plane_rows == 1
/// only).
BnBwdArgs bwd_planes(const BnPlan& plan, const BnBwdArgs& whole, int64_t n, int64_t c);

}  // namespace dl4ds
