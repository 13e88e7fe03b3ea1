// What other CUDA host functions use of bn_act.
#pragma once

#include "common/cuda/host.h"
#include "ops/bn_act/bn_act.h"

namespace dl4ds {

/// Fills dtype, sizes, strides and addresses of x and residual for an output in `format`; operands whose
/// strides the kernels can't read become dense copies.
void read_or_copy(BnActFwdParams& params, Operand& x, Operand& residual, Format format);

}  // namespace dl4ds
