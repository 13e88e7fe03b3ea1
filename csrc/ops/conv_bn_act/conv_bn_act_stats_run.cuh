// Host side of the convolution with statistics for one element type.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_launch.cuh"

namespace dl4ds {

template <typename T, int kRows, int kColumns, int kStages>
struct ConvStats;

}  // namespace dl4ds

#if DL4DS_HAVE_CUTLASS
#include "ops/conv_bn_act/conv_bn_act_stats_kernel.cuh"

namespace dl4ds {

template <typename T, int kRows, int kColumns, int kStages>
struct ConvStats {
    static int run(const ConvBnActFwdParams& p, void* stream) {
        using Types = ConvTypes<T, kRows, kColumns, kStages>;
        ConvStatsArgs args;
        args.fwd = conv_detail::fwd_args<T, Types>(p);
        args.partial = p.moments;
        args.counts = p.moments + ceil_div(args.fwd.output.rows, kRows) * 2 * p.channels_out;
        return conv_detail::launch_with_shared(conv_bn_act_stats_kernel<T, kRows, kColumns, kStages>,
                                               args.fwd.tiles, sizeof(typename Types::Shared), stream, args);
    }
};

}  // namespace dl4ds
#endif
