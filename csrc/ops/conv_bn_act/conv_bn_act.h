// CUDA launcher of conv_bn_act's fused kernel: out = act(bn(conv(x)) [+ residual]) in one pass, NHWC.
// Raw device pointers and sizes only, so that the same code runs on a GPU and in the simulator.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/geometry.h"

namespace dl4ds {

/// The block tiles that are compiled: output pixels x output channels of one thread block.
enum class ConvTile : int { k128x128 = 0, k128x64 = 1, k64x64 = 2 };

struct ConvBnActFwdParams {
    DType dtype = DType::kFloat16;  // of x, weight, residual and out; float32 is multiplied as TF32
    ConvTile tile = ConvTile::k128x128;
    int slices = 1;  // of the reduction over input channels; more than one needs a workspace
    int64_t batch = 0, height = 0, width = 0, channels = 0;
    int64_t channels_out = 0, kernel_h = 1, kernel_w = 1, height_out = 0, width_out = 0;
    int64_t pad_h = 0, pad_w = 0, stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
    const void* x = nullptr;                                 // NHWC, the channels of a pixel side by side
    int64_t x_stride_n = 0, x_stride_h = 0, x_stride_w = 0;  // in elements
    const void* weight = nullptr;    // dense (channels_out, kernel_h, kernel_w, channels)
    const void* residual = nullptr;  // dense NHWC like out; null: none
    ChannelVector conv_bias, running_mean, running_var, bn_weight, bn_bias;
    bool eps_std = false;  // rstd = 1 / (sqrt(var) + eps) instead of 1 / sqrt(var + eps)
    double eps = 1e-5;
    Activation activation = Activation::kNone;
    double negative_slope = 0;
    void* out = nullptr;        // dense NHWC
    void* workspace = nullptr;  // conv_bn_act_fwd_workspace() bytes, 16-byte aligned
    // Not null: training. out is the convolution itself (with conv_bias, nothing else is read), and this gets
    // conv_bn_act_moments() floats: for each tile of pixels the means and the sums of squared deviations of
    // all channels, [parts][2][channels_out], then the values that they count, [parts].
    float* moments = nullptr;
    // x's own BatchNorm and relu, applied on the way into a 1x1 filter without padding (one slice, no
    // moments). Then running_mean may be null: no BatchNorm of the output, which still gets conv_bias,
    // residual and activation.
    bool prologue = false;
    Activation in_activation = Activation::kRelu;
    ChannelVector in_mean, in_var, in_weight, in_bias;  // in_weight, in_bias: null for 1 and 0
    bool in_eps_std = false;
    double in_eps = 1e-5;
};

/// Why the fused kernel does not serve a call. The codes are those of dl4ds_kernels/_cuda_conv.py.
enum class ConvRefusal : int {
    kNone = 0,
    kNotCompiled = 1,  // built without CUTLASS' headers
    kDType = 2,        // not fp16, bf16 or fp32
    kEmpty = 3,
    kTooLarge = 4,    // an index does not fit 32 bits
    kChannels = 5,    // input channels that do not fill 16-byte vectors
    kAddresses = 6,   // x or its strides, weight or the workspace off 16-byte boundaries
    kFilter = 7,      // more than 32 rows or columns: the iterators keep a bit for each
    kActivation = 8,  // not none, relu, leaky_relu or relu6
    kTile = 9,  // slices, or output channels that do not fill 16-byte vectors, with another tile than 64x64;
                // slices with moments
    kPrologue = 10,         // a prologue with another filter than 1x1, padding, slices or moments
    kInputActivation = 11,  // of a prologue: not relu
    kInputChannels = 12,    // of a prologue: more than kConvTable, whose scale and shift fill shared memory
};

/// Input channels that a prologue serves at most (32 KiB of shared memory).
constexpr int64_t kConvTable = 4096;

/// Whether the fused kernel was compiled in.
bool conv_bn_act_fused();

/// Compute capability (80, 90, ...) of the current device, asked of the runtime once.
int conv_bn_act_architecture();

/// What keeps the kernel from serving these sizes and addresses.
ConvRefusal conv_bn_act_fwd_refusal(const ConvBnActFwdParams& params);

/// Bytes of workspace (0: none); pointers are not looked at.
int64_t conv_bn_act_fwd_workspace(const ConvBnActFwdParams& params);

/// Floats of `moments`, and the tiles of pixels (parts) that they describe.
int64_t conv_bn_act_moments(const ConvBnActFwdParams& params);
int64_t conv_bn_act_parts(const ConvBnActFwdParams& params);

/// Enqueues the kernels on a cudaStream_t and returns a cudaError_t as int (0: success).
int launch_conv_bn_act_fwd(const ConvBnActFwdParams& params, void* stream);

}  // namespace dl4ds
