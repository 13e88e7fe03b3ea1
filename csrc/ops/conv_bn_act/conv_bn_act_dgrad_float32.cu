// The gradient of a convolution's input: instances of float32.
#include "ops/conv_bn_act/conv_bn_act_dgrad_run.cuh"

namespace dl4ds {

int launch_dgrad_float32(const ConvBnActDgradParams& params, void* stream) {
    return launch_dgrad_tile<float>(params, stream);
}

}  // namespace dl4ds
