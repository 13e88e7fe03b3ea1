// The kernel of a bottleneck block's end for float32.
#include "ops/conv_bn_act/conv_bn_act_tail_run.cuh"

namespace dl4ds {

int launch_conv_tail_float32(const ConvTailParams& params, void* stream) {
    return run_conv_tail<float>(params, stream);
}

}  // namespace dl4ds
