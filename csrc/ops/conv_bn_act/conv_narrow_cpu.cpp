// 1x1 convolutions to a few channels: packing and the loop over output rows.
#include "ops/conv_bn_act/conv_narrow_cpu.h"

#include <algorithm>

#include "common/cpu/parallel.h"

namespace dl4ds {

void narrow_pack_weight(const ConvShape& s, const float* weight, float* packed) {
    const int64_t padded = chunks_of(s.channels) * kChunk;
    for (int64_t k = 0; k < s.channels_out; ++k, packed += padded) {
        std::copy(weight + k * s.channels, weight + (k + 1) * s.channels, packed);
        std::fill(packed + s.channels, packed + padded, 0.0f);
    }
}

void narrow_run(const ConvArgs& args) {
    const ConvShape& s = args.shape;
    const ConvEpilogue& e = args.epilogue;
    const int64_t ho = s.out_height(), wo = s.out_width(), row = wo * s.channels_out;
    const auto run = conv_kernels().narrow[s.channels_out];
    parallel_for(
        s.n * ho, s.n * ho * wo * s.channels * int64_t{sizeof(float)}, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const float* x = args.x + i / ho * args.stride_n + i % ho * s.stride_h * args.stride_h;
                const float* residual = e.residual == nullptr ? nullptr : e.residual + i * row;
                run({x,
                     s.stride_w * args.stride_w,
                     wo,
                     s.channels,
                     args.packed,
                     chunks_of(s.channels) * kChunk,
                     args.out + i * row,
                     {e.scale, e.shift, residual, s.channels_out, e.activation, e.slope}});
            }
        });
}

}  // namespace dl4ds
