// The gradient of a convolution's input: instances of bfloat16.
#include "ops/conv_bn_act/conv_bn_act_dgrad_run.cuh"

namespace dl4ds {

int launch_dgrad_bfloat16(const ConvBnActDgradParams& params, void* stream) {
    return launch_dgrad_tile<__nv_bfloat16>(params, stream);
}

}  // namespace dl4ds
