// The kernel of a bottleneck block's end for bfloat16.
#include "ops/conv_bn_act/conv_bn_act_tail_run.cuh"

namespace dl4ds {

int launch_conv_tail_bfloat16(const ConvTailParams& params, void* stream) {
    return run_conv_tail<__nv_bfloat16>(params, stream);
}

}  // namespace dl4ds
