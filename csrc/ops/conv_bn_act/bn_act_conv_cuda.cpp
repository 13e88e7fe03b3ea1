// Inference of conv(act(bn(x))), with a BatchNorm and activation behind it too or without, on CUDA: one
// kernel that normalises on the way in, or bn_act's pass over x and then the convolution. The op contract is
// in dl4ds_kernels/ops/_bn_act_conv.py.
#include <torch/csrc/stable/library.h>

#include "ops/bn_act/bn_act_cuda.h"
#include "ops/conv_bn_act/conv_bn_act_cuda.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "bn_act_conv";

}  // namespace

Tensor bn_act_conv_cuda(Tensor x, Tensor in_mean, Tensor in_var, std::optional<Tensor> in_weight,
                        std::optional<Tensor> in_bias, double in_eps, bool in_eps_std, int64_t in_activation,
                        double in_slope, Tensor weight, std::optional<Tensor> bias,
                        std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                        std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                        std::optional<Tensor> residual, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        double eps, bool eps_std, int64_t activation, double negative_slope) {
    const TensorInfo xi = tensor_info(x), wi = tensor_info(weight);
    check_batched(kOp, xi);
    check_cuda(kOp, xi);
    check_same_device(kOp, "weight", wi, xi);
    const bool epilogue = running_mean.has_value();
    DL4DS_CHECK(running_var.has_value() == epilogue, kOp,
                ": running_var: expected with running_mean and not without");
    const bool plain = !residual && !bn_weight && !bn_bias && activation == 0;
    DL4DS_CHECK(epilogue || plain, kOp,
                ": running_mean: expected where bn_weight, bn_bias, residual or an activation are given");
    const ConvGeometry geometry{stride, padding, dilation, groups};
    ConvWay way;
    way.prologue = true;
    way.in_activation = checked_activation(kOp, in_activation);
    way.epilogue = epilogue;
    {
        const CudaScope scope(xi);
        ConvRoute route =
            conv_route(xi, wi, residual.has_value(), geometry, checked_activation(kOp, activation), way);
        if (route.reason == static_cast<int>(ConvReason::kFused)) {
            ConvBnActFwdParams& p = route.params;
            const Operand im = channel_operand(kOp, "in_mean", in_mean, xi);
            const Operand iv = channel_operand(kOp, "in_var", in_var, xi);
            const Operand iw = channel_operand(kOp, "in_weight", in_weight, xi);
            const Operand ib = channel_operand(kOp, "in_bias", in_bias, xi);
            p.in_mean = channel_vector(im);
            p.in_var = channel_vector(iv);
            p.in_weight = channel_vector(iw);
            p.in_bias = channel_vector(ib);
            p.in_eps_std = in_eps_std;
            p.in_eps = in_eps;
            const ConvBehind behind{running_mean, running_var, bn_weight,    bn_bias,
                                    eps,          eps_std,     p.activation, negative_slope};
            return by_fused_kernel(kOp, scope, p, xi, weight, bias, residual, behind);
        }
    }
    const Tensor z = std::get<0>(bn_act_forward(x, in_weight, in_bias, in_mean, in_var, std::nullopt, false,
                                                0.0, in_eps, in_eps_std, in_activation, in_slope, false, {}));
    return epilogue
               ? conv_bn_act_cuda(z, weight, bias, *running_mean, *running_var, bn_weight, bn_bias, residual,
                                  stride, padding, dilation, groups, eps, eps_std, activation, negative_slope)
               : convolve(z, weight, bias, geometry);
}

/// For dk.explain, as conv_bn_act_route.
std::vector<int64_t> bn_act_conv_route_cuda(Tensor x, Tensor weight, int64_t in_activation, bool epilogue,
                                            bool residual, std::vector<int64_t> stride,
                                            std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                            int64_t groups, int64_t activation) {
    const TensorInfo xi = tensor_info(x);
    check_batched(kOp, xi);
    check_cuda(kOp, xi);
    const CudaScope scope(xi);
    ConvWay way;
    way.prologue = true;
    way.in_activation = checked_activation(kOp, in_activation);
    way.epilogue = epilogue;
    const ConvRoute route = conv_route(xi, tensor_info(weight), residual,
                                       {std::move(stride), std::move(padding), std::move(dilation), groups},
                                       checked_activation(kOp, activation), way);
    return route_answer(route);
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) {
    m.impl("bn_act_conv", TORCH_BOX(&bn_act_conv_cuda));
    m.impl("bn_act_conv_route", TORCH_BOX(&bn_act_conv_route_cuda));
}

}  // namespace dl4ds
