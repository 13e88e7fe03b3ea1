#include "ops/local_response_norm/local_response_norm_cpu.h"

#define DL4DS_ISA_SOURCE "ops/local_response_norm/local_response_norm_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {

const LrnKernels& lrn_kernels() { return DL4DS_ISA_TABLE(kLrnKernels); }

}  // namespace dl4ds
