#include "ops/bn_act/bn_act_cpu.h"

#define DL4DS_ISA_SOURCE "ops/bn_act/bn_act_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {

const BnKernels& bn_kernels() { return DL4DS_ISA_TABLE(kBnKernels); }

}  // namespace dl4ds
