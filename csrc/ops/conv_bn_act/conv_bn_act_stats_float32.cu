// The convolution with statistics: instances of float32.
#include "ops/conv_bn_act/conv_bn_act_stats_run.cuh"

namespace dl4ds {

int launch_conv_stats_float32(const ConvBnActFwdParams& params, void* stream) {
    return launch_conv_tile<ConvStats, float>(params, stream);
}

}  // namespace dl4ds
