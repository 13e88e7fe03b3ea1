// The fused convolution's instances of float16.
#include "ops/conv_bn_act/conv_bn_act_fwd_run.cuh"

namespace dl4ds {

int launch_conv_float16(const ConvBnActFwdParams& params, void* stream) {
    return launch_conv_tile<ConvForward, __half>(params, stream);
}

}  // namespace dl4ds
