// The convolution with a prologue: instances of bfloat16.
#include "ops/conv_bn_act/conv_bn_act_prologue_run.cuh"

namespace dl4ds {

int launch_conv_prologue_bfloat16(const ConvBnActFwdParams& params, void* stream) {
    return launch_conv_tile<ConvPrologue, __nv_bfloat16>(params, stream);
}

}  // namespace dl4ds
