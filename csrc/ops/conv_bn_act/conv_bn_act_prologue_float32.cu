// The convolution with a prologue: instances of float32.
#include "ops/conv_bn_act/conv_bn_act_prologue_run.cuh"

namespace dl4ds {

int launch_conv_prologue_float32(const ConvBnActFwdParams& params, void* stream) {
    return launch_conv_tile<ConvPrologue, float>(params, stream);
}

}  // namespace dl4ds
