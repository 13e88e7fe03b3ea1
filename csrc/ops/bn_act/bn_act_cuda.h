// What other CUDA host functions use of bn_act.
#pragma once

#include <tuple>

#include "common/cuda/host.h"
#include "ops/bn_act/bn_act.h"

namespace dl4ds {

/// Fills dtype, sizes, strides and addresses of x and residual for an output in `format`; operands whose
/// strides the kernels can't read become dense copies.
void read_or_copy(BnActFwdParams& params, Operand& x, Operand& residual, Format format);

/// What a kernel left of the moments of x (BnActFwdParams), or nothing.
struct BnMoments {
    const float* data = nullptr;
    int64_t parts = 0;
};

/// The op bn_act: out, mean, rstd, mask, new running mean and variance.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_forward(
    Tensor x_tensor, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> residual_tensor, bool training, double momentum, double eps, bool eps_std,
    int64_t activation, double negative_slope, bool save_mask, BnMoments moments);

/// The op bn_stats: mean, rstd, new running mean and variance of x in training.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_statistics(Tensor x_tensor, std::optional<Tensor> running_mean,
                                                         std::optional<Tensor> running_var, double momentum,
                                                         double eps, bool eps_std, BnMoments moments);

}  // namespace dl4ds
