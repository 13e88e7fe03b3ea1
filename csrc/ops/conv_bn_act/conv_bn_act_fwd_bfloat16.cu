// The fused convolution's instances of bfloat16.
#include "ops/conv_bn_act/conv_bn_act_fwd_run.cuh"

namespace dl4ds {

int launch_conv_bfloat16(const ConvBnActFwdParams& params, void* stream) {
    return launch_conv_tile<ConvForward, __nv_bfloat16>(params, stream);
}

}  // namespace dl4ds
