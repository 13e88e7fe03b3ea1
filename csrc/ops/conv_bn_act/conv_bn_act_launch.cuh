// What the host sides of the fused convolution's kernels share: Params to kernel arguments, tile to instance.
// Each way and element type has a file of its own (conv_bn_act_<way>_<type>.cu): they compile side by side.
#pragma once

#include "ops/conv_bn_act/conv_bn_act_instances.h"

#if DL4DS_HAVE_CUTLASS
#include "ops/conv_bn_act/conv_bn_act_tile.cuh"

namespace dl4ds {
namespace conv_detail {

inline ConvAffine affine_of(const ConvBnActFwdParams& p) {
    return {p.conv_bias, p.running_mean,           p.running_var, p.bn_weight, p.bn_bias,
            p.eps_std,   static_cast<float>(p.eps)};
}

template <typename T>
ConvOutput output_of(const ConvBnActFwdParams& p) {
    ConvOutput out;
    out.rows = static_cast<int>(p.batch * p.height_out * p.width_out);
    out.columns = static_cast<int>(p.channels_out);
    out.vectors = p.channels_out % (16 / sizeof(T)) == 0 && aligned16(p.out) && aligned16(p.residual);
    out.zero_below = p.activation == Activation::kRelu || p.activation == Activation::kRelu6;
    out.slope = p.activation == Activation::kLeakyRelu ? static_cast<float>(p.negative_slope) : 1.0f;
    out.limit = p.activation == Activation::kRelu6 ? 6.0f : INFINITY;
    out.residual = p.residual;
    out.out = p.out;
    return out;
}

/// Launches with `bytes` of shared memory, more than a kernel gets unasked.
template <typename Args>
int launch_with_shared(void (*kernel)(Args), int64_t blocks, size_t bytes, void* stream, const Args& args) {
    if (blocks <= 0 || blocks > INT32_MAX) {
        return static_cast<int>(cudaErrorInvalidConfiguration);
    }
    // Asked every time: the grant belongs to the current device, and the call takes less than a microsecond.
    const auto granted =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (granted != cudaSuccess) {
        return static_cast<int>(granted);
    }
    kernel<<<static_cast<unsigned>(blocks), 128, bytes, static_cast<cudaStream_t>(stream)>>>(args);
    return static_cast<int>(cudaGetLastError());
}

/// What the kernels of this element type and tile are given.
template <typename T, typename Types>
ConvFwdArgs fwd_args(const ConvBnActFwdParams& p) {
    using Mma = typename Types::Mma;
    const auto narrow = [](int64_t v) { return static_cast<int>(v); };  // checked: conv_bn_act_fwd_refusal
    ConvFwdArgs args;
    args.size = cutlass::conv::Conv2dProblemSize(
        narrow(p.batch), narrow(p.height), narrow(p.width), narrow(p.channels), narrow(p.channels_out),
        narrow(p.kernel_h), narrow(p.kernel_w), narrow(p.height_out), narrow(p.width_out), narrow(p.pad_h),
        narrow(p.pad_w), narrow(p.stride_h), narrow(p.stride_w), narrow(p.dilation_h), narrow(p.dilation_w),
        cutlass::conv::Mode::kCrossCorrelation, p.slices, 1);
    const ConvLayout x_layout(
        ConvLayout::Stride({narrow(p.x_stride_w), narrow(p.x_stride_h), narrow(p.x_stride_n)}));
    const auto weight_layout = ConvLayout::packed(
        {narrow(p.channels_out), narrow(p.kernel_h), narrow(p.kernel_w), narrow(p.channels)});
    args.x_walk = Mma::IteratorA::getParams(args.size, x_layout);
    args.weight_walk = typename Mma::IteratorB::Params(args.size, weight_layout);
    args.x = const_cast<void*>(p.x);
    args.weight = const_cast<void*>(p.weight);
    args.steps = narrow(p.kernel_h * p.kernel_w * ceil_div(ceil_div(p.channels, p.slices), Types::kK));
    args.affine = affine_of(p);
    args.output = output_of<T>(p);
    args.column_tiles = narrow(ceil_div(p.channels_out, Types::kN));
    args.tiles = narrow(ceil_div(args.output.rows, Types::kM) * args.column_tiles);
    args.partial = p.slices > 1 ? static_cast<float*>(p.workspace) : nullptr;
    return args;
}

}  // namespace conv_detail
}  // namespace dl4ds
#endif

namespace dl4ds {

/// Calls Way<T, rows, columns, stages>::run for the tile of the call. Way is one of the kernels' host sides.
template <template <typename, int, int, int> class Way, typename T>
int launch_conv_tile([[maybe_unused]] const ConvBnActFwdParams& p, [[maybe_unused]] void* stream) {
#if DL4DS_HAVE_CUTLASS
    switch (p.tile) {
        case ConvTile::k128x128:
            return Way<T, 128, 128, 4>::run(p, stream);
        case ConvTile::k128x64:
            return Way<T, 128, 64, 4>::run(p, stream);
        case ConvTile::k64x64:
            return Way<T, 64, 64, 5>::run(p, stream);
    }
    return static_cast<int>(cudaErrorInvalidValue);
#else
    return static_cast<int>(cudaErrorNotSupported);
#endif
}

}  // namespace dl4ds
