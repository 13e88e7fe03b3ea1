#include "ops/add_act/add_act_cpu.h"

#define DL4DS_ISA_SOURCE "ops/add_act/add_act_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {

const AddActKernels& add_act_kernels() { return DL4DS_ISA_TABLE(kAddActKernels); }

}  // namespace dl4ds
