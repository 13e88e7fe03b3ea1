// The convolution with a prologue: instances of float16.
#include "ops/conv_bn_act/conv_bn_act_prologue_run.cuh"

namespace dl4ds {

int launch_conv_prologue_float16(const ConvBnActFwdParams& params, void* stream) {
    return launch_conv_tile<ConvPrologue, __half>(params, stream);
}

}  // namespace dl4ds
