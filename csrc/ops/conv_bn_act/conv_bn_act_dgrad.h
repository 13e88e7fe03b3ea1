// CUDA launcher of the gradient of a stride-1 convolution's input, and of what lies around it in a backward
// pass: another gradient of the same tensor is added, and the BatchNorm whose output the tensor is (or the
// two whose outputs were added) gets the sums that its gradient starts with. Raw device pointers and sizes
// only.
#pragma once

#include "ops/conv_bn_act/conv_bn_act.h"

namespace dl4ds {

struct ConvBnActDgradParams {
    // The sum as a forward convolution (stride 1, one slice): x is dout, out the gradient, weight gets the
    // turned filter (room for all of it, 16-byte aligned; written here). residual: a gradient that is added.
    ConvBnActFwdParams conv;
    // The filter of the convolution whose gradient this is, (conv.channels, conv.channels_out, kernel_h,
    // kernel_w), with its strides in elements.
    const void* filter = nullptr;
    int64_t filter_stride_out = 0, filter_stride_in = 0, filter_stride_h = 0, filter_stride_w = 0;
    // Not null: residual is the gradient behind an activation (relu, leaky_relu, relu6) whose bits, in memory
    // order of out, these are: it is added as behind it.
    const uint8_t* residual_mask = nullptr;
    Activation residual_activation = Activation::kNone;
    double residual_slope = 0;
    // More than 1: residual holds only the pixels whose row and column are multiples of it (the input's
    // gradient of a 1x1 convolution with this stride); at the others nothing is added. Not with a mask.
    int64_t residual_step = 1;
    // Not null: conv_bn_act_parts(conv) * 2 * channels_out floats (with other: * 3), for each tile of pixels
    // the sums over dz, dz * (y - mean) and dz * (other - other_mean), where dz = out * act'(.) and
    // act(bn(y) [+ something, or bn(other)]) is what the convolution read.
    float* sums = nullptr;
    const void *y = nullptr, *other = nullptr;  // dense NHWC like out; other: null, or with y
    const float* other_mean = nullptr;          // (channels_out,)
    const uint8_t* mask = nullptr;              // the activation's bits; null: made again from y
    ChannelVector mean, rstd, bn_weight, bn_bias;
    Activation activation = Activation::kNone;  // not silu, hardswish
    double negative_slope = 0;
};

/// Reasons beside ConvRefusal (below 16) why the kernel does not serve a call; dl4ds_kernels/_cuda_conv.py.
enum class DgradRefusal : int {
    kStride = 13,  // not stride 1, or more padding than the filter reaches
    kSums = 14,    // sums behind an activation that needs its argument, or with a mask of another kind
    kStep = 15,    // residual_step with a mask
};

/// 0, or a ConvRefusal or DgradRefusal: what keeps the kernel from serving these sizes and addresses.
int conv_bn_act_dgrad_refusal(const ConvBnActDgradParams& params);

/// Enqueues the kernels (the turned filter, then the gradient) on a cudaStream_t; a cudaError_t as int.
int launch_conv_bn_act_dgrad(const ConvBnActDgradParams& params, void* stream);

}  // namespace dl4ds
