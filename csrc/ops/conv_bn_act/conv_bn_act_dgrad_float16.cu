// The gradient of a convolution's input: instances of float16.
#include "ops/conv_bn_act/conv_bn_act_dgrad_run.cuh"

namespace dl4ds {

int launch_dgrad_float16(const ConvBnActDgradParams& params, void* stream) {
    return launch_dgrad_tile<__half>(params, stream);
}

}  // namespace dl4ds
