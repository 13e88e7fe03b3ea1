// Depthwise convolution of the engine (conv_engine_cpu.h): groups == channels == channels_out, any kernel,
// stride, padding and dilation. Packed weight: [tap][channels, padded to whole panels].
#pragma once

#include "ops/conv_bn_act/conv_engine_cpu.h"

namespace dl4ds {

inline bool is_depthwise(const ConvShape& s) {
    return s.groups > 1 && s.groups == s.channels && s.groups == s.channels_out;
}

int64_t depthwise_packed_floats(const ConvShape& shape);

void depthwise_pack_weight(const ConvShape& shape, const float* weight, float* packed);

/// The work of conv_run for kDepthwise.
void depthwise_run(const ConvArgs& args);

}  // namespace dl4ds
