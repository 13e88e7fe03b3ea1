// Depthwise convolution (one filter a channel) of the engine: packing and the loop over output rows.
#include "ops/conv_bn_act/conv_depthwise_cpu.h"

#include <algorithm>

#include "common/cpu/parallel.h"

namespace dl4ds {
namespace {

int64_t padded_channels(const ConvShape& s) {
    const int64_t width = conv_kernels().panel;
    return (s.channels + width - 1) / width * width;
}

}  // namespace

int64_t depthwise_packed_floats(const ConvShape& s) { return s.taps() * padded_channels(s); }

void depthwise_pack_weight(const ConvShape& s, const float* weight, float* packed) {
    const int64_t padded = padded_channels(s), taps = s.taps();
    for (int64_t tap = 0; tap < taps; ++tap, packed += padded) {
        for (int64_t c = 0; c < s.channels; ++c) {
            packed[c] = weight[c * taps + tap];
        }
        std::fill(packed + s.channels, packed + padded, 0.0f);
    }
}

void depthwise_run(const ConvArgs& args) {
    const ConvKernels& kernels = conv_kernels();
    const ConvShape& s = args.shape;
    const ConvEpilogue& e = args.epilogue;
    const int64_t ho = s.out_height(), row = s.out_width() * s.channels, padded = padded_channels(s);
    // What a row costs, in bytes of traffic as parallel_for counts it: a multiply-add of a cached value is
    // about one.
    const int64_t work = s.n * ho * row * (s.taps() + 4);
    parallel_for(s.n * ho, work, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const float* residual = e.residual == nullptr ? nullptr : e.residual + i * row;
            kernels.depthwise_row({args.x + i / ho * args.stride_n,
                                   args.stride_h,
                                   args.stride_w,
                                   &s,
                                   i % ho,
                                   args.packed,
                                   padded,
                                   args.out + i * row,
                                   {e.scale, e.shift, residual, s.channels, e.activation, e.slope}});
        }
    });
}

}  // namespace dl4ds
