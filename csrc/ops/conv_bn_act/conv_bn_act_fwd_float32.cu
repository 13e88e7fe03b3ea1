// The fused convolution's instances of float32, multiplied as TF32.
#include "ops/conv_bn_act/conv_bn_act_fwd_run.cuh"

namespace dl4ds {

int launch_conv_float32(const ConvBnActFwdParams& params, void* stream) {
    return launch_conv_tile<ConvForward, float>(params, stream);
}

}  // namespace dl4ds
