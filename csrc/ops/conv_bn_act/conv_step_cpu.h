// One convolution with everything around it, as the packed ops see it: tensors, checked and turned into the
// engine's arguments.
#pragma once

#include <exception>

#include "ops/conv_bn_act/conv_bn_act_cpu.h"
#include "ops/conv_bn_act/conv_engine_cpu.h"
#include "ops/conv_bn_act/conv_train_cpu.h"

namespace dl4ds {

/// act(bn(conv(x)) [+ residual]); with `before`, x first goes through a BatchNorm and an activation (and a
/// mean over pool x pool pixels). x may be several tensors, side by side along the channels: they are joined
/// where the algorithm cannot read them where they lie.
struct ConvStep {
    ConvAlgorithm algorithm;
    std::vector<Tensor> xs;
    Tensor weight, packed;
    std::optional<Tensor> bias;
    Convolution conv;
    std::optional<BnVectors> before;  // 1x1, stride 1, kDirect only
    int64_t pool = 1;
    BnVectors after;
    std::optional<Tensor> residual;
    bool residual_is_dead = false;  // nobody reads it later: it may become the output
};

/// The output, in channels_last.
Tensor run_conv_step(ConvStep& step);

ConvAlgorithm conv_algorithm_from_code(int64_t code);

/// Channels and kernel of a weight (C_out, C / groups, kH, kW); everything else is left open.
ConvShape conv_weight_shape(const TensorInfo& weight, int64_t groups);

bool is_dense_channels_last(const TensorInfo& info);

/// t as it is if it lies densely in channels_last, else a copy that does.
Tensor dense_channels_last(const Tensor& t, const TensorInfo& info);

/// fp32 (N, C, H, W) tensors side by side along the channels.
Tensor join_channels(const std::vector<Tensor>& xs);

/// An uninitialised (n, channels, height, width) fp32 tensor in channels_last.
Tensor empty_channels_last(int64_t n, int64_t channels, int64_t height, int64_t width, DType dtype);

// The convolutions of a training step, fp32 and channels_last (conv_train_cpu.cpp).

/// A weight that is dense in one of the two layouts, copied if it is not.
struct Filters {
    Tensor tensor;
    TensorInfo info;
    FilterLayout layout;

    explicit Filters(const Tensor& weight);
};

/// The convolution of `x` with filters of this layout, plus `added` (a map like `out`, or null); kWinograd2,
/// `gradient`: see conv_pack_filters2; the prologue: see ConvArgs. False: see conv_run and conv_pack_taps.
bool run_exact(ConvAlgorithm algorithm, const ConvShape& s, const TensorInfo& x, const Filters& filters,
               bool gradient, const TensorInfo& bias, float* out, const float* added = nullptr,
               const ConvPrologue* prologue = nullptr);

Tensor conv2d_exact(Tensor x, Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t algorithm);
std::tuple<Tensor, Tensor> conv2d_exact_bwd(Tensor dout, Tensor x, Tensor weight, std::vector<int64_t> stride,
                                            std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                            int64_t dgrad, int64_t wgrad);

/// Thrown where a gradient is the library's but the caller leads a team: oneDNN cuts such a product by the
/// size of the pool, and a region inside a team's has one thread, which would leave parts of it out.
struct NeedsPool : std::exception {
    const char* what() const noexcept override { return "a gradient of the library inside a team"; }
};

/// Gradients of one group's convolution by these algorithms (kLibrary: aten's; none: not wanted and empty):
/// of x plus `added` (dense channels_last, or null; dead: nobody reads it later, and it may become the
/// result), of the weight.
std::tuple<Tensor, Tensor> conv_gradients(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                          const Convolution& conv, std::optional<ConvAlgorithm> dgrad,
                                          std::optional<ConvAlgorithm> wgrad, const Tensor* added,
                                          bool added_is_dead);

// The same of a 1x1 convolution with stride 1 behind a BatchNorm and an activation that nobody writes down
// (conv_normed_cpu.cpp): the features that these read may be a slice of wider maps' channels.

/// act((x - mean) * scale + shift) as the convolution's input; vectors are padded to whole panels and chunks.
struct NormedInput {
    TensorInfo x;
    const float *mean, *scale, *shift;
    Activation activation;  // kNone, kRelu or kRelu6
};

Tensor normed_conv(const NormedInput& in, const Tensor& weight);
Tensor normed_conv_wgrad(const NormedInput& in, const Tensor& weight, const Tensor& dout);

/// grad + scale * (the gradient of the BatchNorm's output) into out, either may be a slice and both the same;
/// the sums of that gradient and of its products with x - mean into `sum` and `product`.
void normed_conv_dgrad(const NormedInput& in, const Tensor& weight, const Tensor& dout,
                       const TensorInfo& grad, const TensorInfo& out, double* sum, double* product);

}  // namespace dl4ds
