// The launcher of a convolution's input gradient: what it refuses, the turned filter, the choice of the type.
#include "common/cuda/launch.cuh"
#include "ops/conv_bn_act/conv_bn_act_dgrad.h"
#include "ops/conv_bn_act/conv_bn_act_dgrad_run.cuh"
#include "ops/conv_bn_act/conv_bn_act_turn_kernel.cuh"

namespace dl4ds {
namespace {

int turn_filter(const ConvBnActDgradParams& p, void* stream) {
    ConvTurnArgs args;
    args.filter = p.filter;
    args.stride_out = p.filter_stride_out, args.stride_in = p.filter_stride_in;
    args.stride_h = p.filter_stride_h, args.stride_w = p.filter_stride_w;
    args.channels_out = static_cast<int>(p.conv.channels);
    args.channels_in = static_cast<int>(p.conv.channels_out);
    args.height = static_cast<int>(p.conv.kernel_h), args.width = static_cast<int>(p.conv.kernel_w);
    args.out_tiles = static_cast<int>(ceil_div(args.channels_out, kTurnTile));
    args.in_tiles = static_cast<int>(ceil_div(args.channels_in, kTurnTile));
    args.turned = const_cast<void*>(p.conv.weight);
    const int64_t blocks = int64_t(args.out_tiles) * args.in_tiles * args.height * args.width;
    switch (p.conv.dtype) {
        case DType::kFloat16:
            return launch(conv_bn_act_turn_kernel<__half>, blocks, 256, stream, args);
        case DType::kBFloat16:
            return launch(conv_bn_act_turn_kernel<__nv_bfloat16>, blocks, 256, stream, args);
        default:
            return launch(conv_bn_act_turn_kernel<float>, blocks, 256, stream, args);
    }
}

bool piecewise(Activation activation) {
    return activation == Activation::kNone || activation_has_mask(activation);
}

}  // namespace

int conv_bn_act_dgrad_refusal(const ConvBnActDgradParams& p) {
    const ConvBnActFwdParams& c = p.conv;
    if (const ConvRefusal refusal = conv_bn_act_fwd_refusal(c); refusal != ConvRefusal::kNone) {
        return static_cast<int>(refusal);
    }
    if (c.stride_h != 1 || c.stride_w != 1 || c.pad_h < 0 || c.pad_w < 0 || c.slices != 1) {
        return static_cast<int>(DgradRefusal::kStride);
    }
    const bool bits = p.mask == nullptr || p.activation != Activation::kNone;
    // (Of two BatchNorms' sum the side of the kink does not follow from y.)
    const bool told = p.other == nullptr || p.mask != nullptr || p.activation == Activation::kNone;
    const bool kept = p.residual_mask == nullptr || p.residual_activation != Activation::kNone;
    if (!piecewise(p.activation) || !piecewise(p.residual_activation) || !bits || !told || !kept) {
        return static_cast<int>(DgradRefusal::kSums);
    }
    if (p.residual_step < 1 || (p.residual_step > 1 && p.residual_mask != nullptr)) {
        return static_cast<int>(DgradRefusal::kStep);
    }
    return static_cast<int>(aligned16(p.y) && aligned16(p.other) ? ConvRefusal::kNone
                                                                 : ConvRefusal::kAddresses);
}

int launch_conv_bn_act_dgrad(const ConvBnActDgradParams& p, void* stream) {
    const bool sums =
        p.sums == nullptr || (p.y != nullptr && p.mean.data != nullptr && p.rstd.data != nullptr);
    const bool other = p.other == nullptr || (p.sums != nullptr && p.other_mean != nullptr);
    if (conv_bn_act_dgrad_refusal(p) != 0 || !sums || !other || p.conv.weight == nullptr) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    if (const int error = turn_filter(p, stream); error != 0) {
        return error;
    }
    switch (p.conv.dtype) {
        case DType::kFloat16:
            return launch_dgrad_float16(p, stream);
        case DType::kBFloat16:
            return launch_dgrad_bfloat16(p, stream);
        default:
            return launch_dgrad_float32(p, stream);
    }
}

}  // namespace dl4ds
