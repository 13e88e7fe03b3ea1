#include "ops/upsample_add/upsample_add_cpu.h"

#define DL4DS_ISA_SOURCE "ops/upsample_add/upsample_add_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {

const UpsampleAddKernels& upsample_add_kernels() { return DL4DS_ISA_TABLE(kUpsampleAddKernels); }

}  // namespace dl4ds
