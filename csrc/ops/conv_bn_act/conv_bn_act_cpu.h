// The host functions of conv_bn_act on the CPU: the library's convolution with an epilogue pass
// (conv_bn_act_cpu.cpp) and the engine of our own (conv_packed_cpu.cpp), which falls back to it.
#pragma once

#include <vector>

#include "ops/bn_act/bn_act_host_cpu.h"

namespace dl4ds {

struct Convolution {
    std::vector<int64_t> stride, padding, dilation;
    int64_t groups;
};

/// BatchNorm with running statistics, and what follows it. Without running_mean there is no BatchNorm.
struct BnVectors {
    std::optional<Tensor> running_mean, running_var, weight, bias;
    double eps;
    bool eps_std;
    Activation activation;
    double negative_slope;
};

/// From the arguments of an op, which tell the activation by its code.
inline BnVectors bn_vectors(const char* op, std::optional<Tensor> running_mean,
                            std::optional<Tensor> running_var, std::optional<Tensor> weight,
                            std::optional<Tensor> bias, double eps, bool eps_std, int64_t activation,
                            double negative_slope) {
    return {std::move(running_mean),
            std::move(running_var),
            std::move(weight),
            std::move(bias),
            eps,
            eps_std,
            activation_from_code(op, activation),
            negative_slope};
}

/// Checks the vectors against an output (N, C_out, H_out, W_out).
inline void check_bn_vectors(const char* op, const BnVectors& bn, const TensorInfo& out) {
    check_channel_vector(op, "bn_weight", tensor_info(bn.weight), out);
    check_channel_vector(op, "bn_bias", tensor_info(bn.bias), out);
    check_channel_vector(op, "running_mean", tensor_info(bn.running_mean), out);
    check_channel_vector(op, "running_var", tensor_info(bn.running_var), out);
}

/// x if its pixels are dense vectors of channels, else a channels_last copy.
Tensor as_channels_last(const Tensor& x, const TensorInfo& info);

/// aten::convolution (not transposed).
Tensor library_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Convolution& conv);

/// act(bn(conv(x)) [+ residual]) by the library's convolution; weight may be one that oneDNN packed.
Tensor conv_bn_act_library(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Convolution& conv, const BnVectors& bn,
                           const std::optional<Tensor>& residual);

}  // namespace dl4ds
