// The host functions of bn_act on the CPU. The op contract is in dl4ds_kernels/ops/bn_act.py.
#pragma once

#include <cmath>
#include <tuple>

#include "ops/bn_act/bn_act_plan_cpu.h"

namespace dl4ds {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_fwd_cpu(
    Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> residual, bool training, double momentum,
    double eps, bool eps_std, int64_t activation, double negative_slope, bool save_mask);

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_bwd_cpu(
    Tensor dout, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor mean, Tensor rstd,
    std::optional<Tensor> residual, std::optional<Tensor> mask, bool training, double eps, bool eps_std,
    int64_t activation, double negative_slope, bool need_dx, bool need_dparams, bool need_dresidual);

/// act(bn(y)) in training with the bits of an earlier call, whose mean and rstd these are (normalise_again in
/// ops/bn_act.py): weight * rstd as the weight, with a variance of 1.
Tensor bn_act_again_cpu(const Tensor& y, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd,
                        int64_t activation, double negative_slope);

// Steps of a dense block on its buffers (bn_act_dense_cpu.cpp).
void dense_append_cpu(Tensor x, Tensor out, Tensor mean, Tensor var);
std::tuple<Tensor, Tensor> dense_back_cpu(Tensor dz, Tensor x, std::optional<Tensor> weight,
                                          std::optional<Tensor> bias, Tensor mean, Tensor var, Tensor grad,
                                          Tensor out, Tensor factor, Tensor offset, double eps, bool eps_std,
                                          int64_t activation, double negative_slope, bool activate);
Tensor dense_take_cpu(Tensor grad, Tensor x, Tensor mean, Tensor factor, Tensor offset);

/// 1/sqrt(var + eps), or 1/(sqrt(var) + eps) with eps_std.
inline double bn_rstd(double var, double eps, bool eps_std) {
    return eps_std ? 1.0 / (std::sqrt(var) + eps) : 1.0 / std::sqrt(var + eps);
}

/// Entry c of a per-channel tensor without gaps.
inline void write_entry(const TensorInfo& v, int64_t c, double value) {
    switch (v.dtype) {
        case DType::kFloat64:
            v.as<double>()[c] = value;
            return;
        case DType::kFloat32:
            v.as<float>()[c] = static_cast<float>(value);
            return;
        case DType::kFloat16:
            v.as<half_t>()[c] = to_half(static_cast<float>(value));
            return;
        default:
            v.as<bfloat16_t>()[c] = to_bfloat16(static_cast<float>(value));
    }
}

inline Activation activation_from_code(const char* op, int64_t code) {
    DL4DS_CHECK(code >= 0 && code < kNumActivations, op, ": activation: expected a code in [0, ",
                kNumActivations, "), got ", code);
    return static_cast<Activation>(code);
}

/// Elements from one pixel to the next if that is the same everywhere and a pixel's channels are side by
/// side, else 0.
inline int64_t pixel_pitch(const TensorInfo& t) {
    if (t.sizes[1] > 1 && t.strides[1] != 1) {
        return 0;
    }
    int64_t pitch = 0, pixels = 1;
    for (int64_t i = 0; i < t.dim - 1; ++i) {
        const int64_t d = i == t.dim - 2 ? 0 : t.dim - 1 - i;  // from the innermost: W, H, D, then N
        if (t.sizes[d] == 1) {
            continue;
        }
        if (pitch == 0) {
            pitch = t.strides[d];
        } else if (t.strides[d] != pitch * pixels) {
            return 0;
        }
        pixels *= t.sizes[d];
    }
    return pitch == 0 ? t.sizes[1] : pitch;
}

/// Eval mode on raw pointers: out = act((x - running_mean) * weight * rstd + bias [+ residual]). out may be
/// x. x follows the plan, residual and out are dense in its order. mask: the mask's bytes, or null.
struct BnEvalArgs {
    const void* x;
    const void* residual;
    void* out;
    uint8_t* mask;
    TensorInfo weight, bias, running_mean, running_var;
    double eps;
    bool eps_std;
    Activation activation;
    double negative_slope;
};
void bn_apply_eval(const BnPlan& plan, const BnEvalArgs& args);

}  // namespace dl4ds
