// Host side of the gradient of a convolution's input for one element type.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_dgrad.h"
#include "ops/conv_bn_act/conv_bn_act_launch.cuh"

#if DL4DS_HAVE_CUTLASS
#include "ops/conv_bn_act/conv_bn_act_dgrad_kernel.cuh"

namespace dl4ds {

inline ConvKink kink_of(Activation activation, double slope) {
    ConvKink kink;
    kink.leaky = activation == Activation::kLeakyRelu;
    kink.slope = static_cast<float>(slope);
    kink.lower = activation == Activation::kNone ? NAN : 0.0f;
    kink.upper = activation == Activation::kRelu6 ? 6.0f : NAN;
    return kink;
}

template <typename T, int kRows, int kColumns, int kStages>
int launch_dgrad(const ConvBnActDgradParams& p, void* stream) {
    using Types = ConvTypes<T, kRows, kColumns, kStages>;
    const auto kernel = conv_bn_act_dgrad_kernel<T, kRows, kColumns, kStages>;
    const int step = static_cast<int>(p.residual_step);
    ConvDgradArgs args;
    args.fwd = conv_detail::fwd_args<T, Types>(p.conv);
    args.fwd.affine = {{}, p.mean, p.rstd, p.bn_weight, p.bn_bias, false, 0};
    args.y = p.y;
    args.other = p.other;
    args.other_mean = p.other_mean;
    args.mask = p.mask;
    args.residual_mask = p.residual_mask;
    args.kink = kink_of(p.activation, p.negative_slope);
    args.residual_kink = kink_of(p.residual_activation, p.residual_slope);
    args.partial = p.sums;
    args.step = step;
    args.step_height = static_cast<int>(ceil_div(p.conv.height_out, step));
    args.step_width = static_cast<int>(ceil_div(p.conv.width_out, step));
    args.width = cutlass::FastDivmod(static_cast<int>(p.conv.width_out));
    args.height = cutlass::FastDivmod(static_cast<int>(p.conv.height_out));
    args.stride = cutlass::FastDivmod(step);
    return conv_detail::launch_with_shared(kernel, args.fwd.tiles, sizeof(ConvDgradShared<Types>), stream,
                                           args);
}

}  // namespace dl4ds
#endif

namespace dl4ds {

template <typename T>
int launch_dgrad_tile([[maybe_unused]] const ConvBnActDgradParams& p, [[maybe_unused]] void* stream) {
#if DL4DS_HAVE_CUTLASS
    switch (p.conv.tile) {
        case ConvTile::k128x128:
            return launch_dgrad<T, 128, 128, 4>(p, stream);
        case ConvTile::k128x64:
            return launch_dgrad<T, 128, 64, 4>(p, stream);
        case ConvTile::k64x64:
            return launch_dgrad<T, 64, 64, 5>(p, stream);
    }
    return static_cast<int>(cudaErrorInvalidValue);
#else
    return static_cast<int>(cudaErrorNotSupported);
#endif
}

int launch_dgrad_float16(const ConvBnActDgradParams& params, void* stream);
int launch_dgrad_bfloat16(const ConvBnActDgradParams& params, void* stream);
int launch_dgrad_float32(const ConvBnActDgradParams& params, void* stream);

}  // namespace dl4ds
