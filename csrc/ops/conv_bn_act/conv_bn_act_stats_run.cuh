// Host side of the convolution with statistics for one element type, as conv_bn_act_fwd_run.cuh.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_fwd_run.cuh"

#if DL4DS_HAVE_CUTLASS
#include "ops/conv_bn_act/conv_bn_act_stats_kernel.cuh"

namespace dl4ds {
namespace conv_detail {

template <typename T, int kRows, int kColumns, int kStages>
int run_stats(const ConvBnActFwdParams& p, void* stream) {
    using Types = ConvTypes<T, kRows, kColumns, kStages>;
    ConvStatsArgs args;
    args.fwd = fwd_args<T, Types>(p);
    args.partial = p.moments;
    args.counts = p.moments + ceil_div(args.fwd.output.rows, kRows) * 2 * p.channels_out;
    return launch_with_shared(conv_bn_act_stats_kernel<T, kRows, kColumns, kStages>, args.fwd.tiles,
                              sizeof(typename Types::Shared), stream, args);
}

}  // namespace conv_detail

template <typename T>
int launch_conv_stats_tile(const ConvBnActFwdParams& p, void* stream) {
    switch (p.tile) {
        case ConvTile::k128x128:
            return conv_detail::run_stats<T, 128, 128, 4>(p, stream);
        case ConvTile::k128x64:
            return conv_detail::run_stats<T, 128, 64, 4>(p, stream);
        case ConvTile::k64x64:
            return conv_detail::run_stats<T, 64, 64, 5>(p, stream);
    }
    return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace dl4ds

#else

namespace dl4ds {

template <typename T>
int launch_conv_stats_tile(const ConvBnActFwdParams&, void*) {
    return static_cast<int>(cudaErrorNotSupported);
}

}  // namespace dl4ds
#endif
