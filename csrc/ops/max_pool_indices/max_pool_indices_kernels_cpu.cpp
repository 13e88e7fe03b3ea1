#include "ops/max_pool_indices/max_pool_indices_cpu.h"

#define DL4DS_ISA_SOURCE "ops/max_pool_indices/max_pool_indices_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {

const MaxPoolKernels& max_pool_kernels() { return DL4DS_ISA_TABLE(kMaxPoolKernels); }

}  // namespace dl4ds
