// A 1x1 convolution to at most kMostNarrow output channels as dot products of pixels (conv_engine_cpu.h).
// Packed weight: [output][channels, padded to whole chunks].
#pragma once

#include "ops/conv_bn_act/conv_engine_cpu.h"

namespace dl4ds {

constexpr int64_t kMostNarrow = 4;

inline bool is_narrow(const ConvShape& s) {
    return s.taps() == 1 && s.pad_h == 0 && s.pad_w == 0 && s.more_h == 0 && s.more_w == 0 && s.groups == 1 &&
           s.channels_out <= kMostNarrow;
}

inline int64_t narrow_packed_floats(const ConvShape& s) {
    return s.channels_out * chunks_of(s.channels) * kChunk;
}

void narrow_pack_weight(const ConvShape& shape, const float* weight, float* packed);

/// The work of conv_run for kNarrow.
void narrow_run(const ConvArgs& args);

}  // namespace dl4ds
