// Host side of the 1x1 convolution with a BatchNorm and relu of its input, for one element type.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_launch.cuh"

namespace dl4ds {

template <typename T, int kRows, int kColumns, int kStages>
struct ConvPrologue;

}  // namespace dl4ds

#if DL4DS_HAVE_CUTLASS
#include "ops/conv_bn_act/conv_bn_act_prologue_kernel.cuh"

namespace dl4ds {

template <typename T, int kRows, int kColumns, int kStages>
struct ConvPrologue {
    // 128 x 128 sums leave fp32's prologue too few registers (on sm_100 it spilled): half the columns then.
    static constexpr int kN = sizeof(T) == 4 && kRows == 128 ? 64 : kColumns;

    static int run(const ConvBnActFwdParams& p, void* stream) {
        using Types = ConvTypes<T, kRows, kN, kStages>;
        ConvPrologueArgs args;
        args.fwd = conv_detail::fwd_args<T, Types>(p);
        args.input = {
            {}, p.in_mean, p.in_var, p.in_weight, p.in_bias, p.in_eps_std, static_cast<float>(p.in_eps)};
        const size_t table = static_cast<size_t>(args.fwd.steps) * Types::kK * 2 * sizeof(float);
        return conv_detail::launch_with_shared(conv_bn_act_prologue_kernel<T, kRows, kN, kStages>,
                                               args.fwd.tiles, sizeof(typename Types::Shared) + table, stream,
                                               args);
    }
};

}  // namespace dl4ds
#endif
