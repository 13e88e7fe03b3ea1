// CUDA launcher of the end of a bottleneck block in one kernel, NHWC:
// out = act2(bn2(conv1x1(act1(bn1(conv(x))))) [+ residual]), with 64 channels between the two convolutions.
#pragma once

#include "ops/conv_bn_act/conv_bn_act.h"

namespace dl4ds {

/// Channels between the convolutions, and output channels of a step of the second one.
constexpr int64_t kTailMiddle = 64, kTailChunk = 64;
/// Output channels at most: their scale and shift beside the rest fit the 99 KiB of a block's shared memory
/// on the GPUs that have least (sm_86, 89, 120).
constexpr int64_t kTailColumns = 2048;

struct ConvTailParams {
    /// Of any filter, stride, padding, dilation; 64 output channels; out stays on chip.
    ConvBnActFwdParams first;
    /// 1x1, stride 1, no padding. x is what first would write; residual and out are dense NHWC.
    ConvBnActFwdParams second;
    /// Blocks that share a tile of 64 pixels, each with a part of the output channels (and all of the first
    /// convolution). Any number gives the same bits.
    int parts = 1;
};

/// Reasons beside those of either convolution (ConvRefusal, ConvReason). The codes are those of
/// dl4ds_kernels/_cuda_conv.py.
enum class ConvTailReason : int {
    kOff = 28,        // DL4DS_CUDA_TAIL=0
    kMiddle = 29,     // not 64 channels between the convolutions
    kPointwise = 30,  // the second convolution is not the 1x1 one that fits the first
    kColumns = 31,    // output channels that fill no vectors of 16 bytes, or more than kTailColumns of them
};

/// What keeps the kernel from serving these sizes and addresses (0: nothing).
int conv_bn_act_tail_refusal(const ConvTailParams& params);

/// Enqueues the kernel on a cudaStream_t and returns a cudaError_t as int (0: success).
int launch_conv_bn_act_tail(const ConvTailParams& params, void* stream);

}  // namespace dl4ds
