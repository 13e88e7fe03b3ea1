#include "ops/conv_bn_act/conv_train_cpu.h"

#define DL4DS_ISA_SOURCE "ops/conv_bn_act/conv_train_kernels_cpu.h"
#include "common/cpu/foreach_isa.h"

namespace dl4ds {

const TrainKernels& train_kernels() { return DL4DS_ISA_TABLE(kTrainKernels); }

}  // namespace dl4ds
