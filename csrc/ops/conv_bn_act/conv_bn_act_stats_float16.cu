// The convolution with statistics: instances of float16.
#include "ops/conv_bn_act/conv_bn_act_stats_run.cuh"

namespace dl4ds {

int launch_conv_stats_float16(const ConvBnActFwdParams& params, void* stream) {
    return launch_conv_tile<ConvStats, __half>(params, stream);
}

}  // namespace dl4ds
