#include "ops/pool2d/pool2d_cpu.h"

#define DL4DS_ISA_SOURCE "ops/pool2d/pool2d_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {

const PoolKernels& pool_kernels() { return DL4DS_ISA_TABLE(kPoolKernels); }

}  // namespace dl4ds
