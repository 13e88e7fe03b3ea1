// Host side of the fused convolution of inference for one element type.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_launch.cuh"

namespace dl4ds {

template <typename T, int kRows, int kColumns, int kStages>
struct ConvForward;

}  // namespace dl4ds

#if DL4DS_HAVE_CUTLASS
#include "ops/conv_bn_act/conv_bn_act_fwd_kernel.cuh"

namespace dl4ds {

template <typename T, int kRows, int kColumns, int kStages>
struct ConvForward {
    static int run(const ConvBnActFwdParams& p, void* stream) {
        using Types = ConvTypes<T, kRows, kColumns, kStages>;
        const ConvFwdArgs args = conv_detail::fwd_args<T, Types>(p);
        const auto kernel = conv_bn_act_fwd_kernel<T, kRows, kColumns, kStages>;
        const int64_t blocks = static_cast<int64_t>(args.tiles) * p.slices;
        const int error =
            conv_detail::launch_with_shared(kernel, blocks, sizeof(typename Types::Shared), stream, args);
        if (error != 0 || p.slices == 1) {
            return error;
        }
        if constexpr (kRows == 64 && kColumns == 64) {  // the only tile that is cut into slices
            ConvFinishArgs finish;
            finish.slices = p.slices;
            finish.column_tiles = args.column_tiles;
            finish.tiles = args.tiles;
            finish.affine = args.affine;
            finish.output = args.output;
            finish.partial = args.partial;
            return conv_detail::launch_with_shared(conv_bn_act_finish_kernel<T, kRows, kColumns, kStages>,
                                                   args.tiles, sizeof(typename Types::Shared), stream,
                                                   finish);
        }
        return static_cast<int>(cudaErrorInvalidValue);
    }
};

}  // namespace dl4ds
#endif
