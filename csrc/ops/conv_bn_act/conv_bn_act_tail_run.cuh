// Host side of the end of a bottleneck block in one kernel, for one element type.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_launch.cuh"
#include "ops/conv_bn_act/conv_bn_act_tail.h"

#if DL4DS_HAVE_CUTLASS
#include "ops/conv_bn_act/conv_bn_act_tail_kernel.cuh"
#endif

namespace dl4ds {

template <typename T>
int run_conv_tail([[maybe_unused]] const ConvTailParams& p, [[maybe_unused]] void* stream) {
#if DL4DS_HAVE_CUTLASS
    using Types = TailTypes<T>;
    ConvTailArgs args;
    args.first = conv_detail::fwd_args<T, Types>(p.first);
    args.weight = const_cast<void*>(p.second.weight);
    args.affine = conv_detail::affine_of(p.second);
    args.output = conv_detail::output_of<T>(p.second);
    args.parts = p.parts;
    args.chunks = static_cast<int>(ceil_div(ceil_div(p.second.channels_out, kTailChunk), p.parts));
    const size_t table = static_cast<size_t>(args.chunks) * kTailChunk * 2 * sizeof(float);
    static_assert(sizeof(typename Types::Shared) + kTailColumns * 2 * sizeof(float) <= 99 * 1024);
    const int64_t tiles = ceil_div(args.output.rows, Types::kM);
    return conv_detail::launch_with_shared(conv_bn_act_tail_kernel<T>, tiles * p.parts,
                                           sizeof(typename Types::Shared) + table, stream, args);
#else
    return static_cast<int>(cudaErrorNotSupported);
#endif
}

}  // namespace dl4ds
