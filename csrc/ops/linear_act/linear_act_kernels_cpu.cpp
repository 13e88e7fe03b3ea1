#include "ops/linear_act/linear_act_cpu.h"

#define DL4DS_ISA_SOURCE "ops/linear_act/linear_act_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {

const LinearKernels& linear_kernels() { return DL4DS_ISA_TABLE(kLinearKernels); }

}  // namespace dl4ds
