#include "ops/conv_bn_act/conv_engine_cpu.h"

#define DL4DS_ISA_SOURCE "ops/conv_bn_act/conv_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {

const ConvKernels& conv_kernels() { return DL4DS_ISA_TABLE(kConvKernels); }

}  // namespace dl4ds
