// bn_act and bn_act_bwd on CUDA: checks, output memory, and the launchers of bn_act.h. The op contract is in
// dl4ds_kernels/ops/bn_act.py.
#include "ops/bn_act/bn_act_cuda.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace dl4ds {
namespace {

constexpr const char* kOp = "bn_act";
constexpr const char* kBwdOp = "bn_act_bwd";

void check_residual(const char* op, const TensorInfo& residual, const TensorInfo& x) {
    if (residual.present) {
        check_same_shape(op, "residual", residual, x);
        check_dtype(op, "residual", residual, x.dtype);
        check_same_device(op, "residual", residual, x);
    }
}

/// mean or rstd of the forward pass.
Operand statistics_operand(const char* name, const Tensor& t, const TensorInfo& x) {
    Operand v = channel_operand(kBwdOp, name, t, x);
    check_dtype(kBwdOp, name, v.info, acc_dtype(x.dtype));
    return v;
}

void check_mask(const TensorInfo& mask, const TensorInfo& x) {
    if (mask.present) {
        const int64_t bytes = (x.numel + 7) / 8;
        check_dtype(kBwdOp, "mask", mask, DType::kUInt8);
        check_same_device(kBwdOp, "mask", mask, x);
        DL4DS_CHECK(mask.dim == 1 && mask.numel == bytes && (bytes <= 1 || mask.strides[0] == 1), kBwdOp,
                    ": mask: expected shape (ceil(numel / 8),) = (", bytes, ",) without gaps, got ",
                    mask.shape());
    }
}

}  // namespace

void read_or_copy(BnActFwdParams& p, Operand& x, Operand& residual, Format format) {
    p.dtype = x.info.dtype;
    p.channels_last = format == Format::kChannelsLast;
    p.size = as_dims(x.info.sizes, x.info.dim);
    p.x_strides = as_dims(x.info.strides, x.info.dim);
    if (!bn_act_fwd_reads(p)) {
        x.copy_to(format);
        p.x_strides = as_dims(x.info.strides, x.info.dim);
    }
    p.x = x.info.data;
    if (residual.info.present) {
        p.residual = residual.info.data;
        p.residual_strides = as_dims(residual.info.strides, residual.info.dim);
        if (!bn_act_fwd_reads(p)) {
            residual.copy_to(format);
            p.residual = residual.info.data;
            p.residual_strides = as_dims(residual.info.strides, residual.info.dim);
        }
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_forward(
    Tensor x_tensor, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
    std::optional<Tensor> residual_tensor, bool training, double momentum, double eps, bool eps_std,
    int64_t activation, double negative_slope, bool save_mask, BnMoments moments) {
    Operand x(x_tensor), residual(residual_tensor);
    check_batched(kOp, x.info);
    check_cuda(kOp, x.info);
    check_residual(kOp, residual.info, x.info);
    const CudaScope scope(x.info);
    const Operand w = channel_operand(kOp, "weight", weight, x.info),
                  b = channel_operand(kOp, "bias", bias, x.info);
    const Operand rm = channel_operand(kOp, "running_mean", running_mean, x.info);
    const Operand rv = channel_operand(kOp, "running_var", running_var, x.info);
    DL4DS_CHECK(rm.info.present == rv.info.present, kOp,
                ": expected running_mean and running_var both given or both None");
    DL4DS_CHECK(training || rm.info.present, kOp, ": expected running statistics in eval mode, got None");

    BnActFwdParams p;
    p.activation = checked_activation(kOp, activation);
    const Format format = suggest_format(x.info);
    Tensor out = empty_like_cuda(x.info, format);
    read_or_copy(p, x, residual, format);
    const bool with_mask = save_mask && residual.info.present && activation_has_mask(p.activation);
    const DType acc = acc_dtype(x.info.dtype);
    const int64_t channels = training ? p.size.c : 0, running = rm.info.present ? channels : 0;
    Tensor mask = empty_vector_cuda(x.info, with_mask ? (x.info.numel + 7) / 8 : 0, DType::kUInt8);
    Tensor mean = empty_vector_cuda(x.info, channels, acc), rstd = empty_vector_cuda(x.info, channels, acc);
    Tensor new_mean = empty_vector_cuda(x.info, running, rm.info.present ? rm.info.dtype : acc);
    Tensor new_var = empty_vector_cuda(x.info, running, rv.info.present ? rv.info.dtype : acc);

    p.weight = channel_vector(w);
    p.bias = channel_vector(b);
    p.running_mean = channel_vector(rm);
    p.running_var = channel_vector(rv);
    p.training = training;
    p.eps_std = eps_std;
    p.momentum = momentum;
    p.eps = eps;
    p.negative_slope = negative_slope;
    p.out = tensor_info(out).data;
    p.mask = with_mask ? tensor_info(mask).as<uint8_t>() : nullptr;
    p.mean = tensor_info(mean).data;
    p.rstd = tensor_info(rstd).data;
    p.moments = moments.data;
    p.moments_parts = moments.parts;
    p.new_running_mean = running > 0 ? tensor_info(new_mean).data : nullptr;
    p.new_running_var = running > 0 ? tensor_info(new_var).data : nullptr;
    const Tensor workspace = empty_vector_cuda(x.info, bn_act_fwd_workspace(p), DType::kUInt8);
    p.workspace = tensor_info(workspace).data;
    check_launch(launch_bn_act_fwd(p, scope.stream()), kOp);
    return {out, mean, rstd, mask, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_statistics(Tensor x_tensor, std::optional<Tensor> running_mean,
                                                         std::optional<Tensor> running_var, double momentum,
                                                         double eps, bool eps_std, BnMoments moments) {
    constexpr const char* kStatsOp = "bn_stats";
    Operand x(x_tensor), none;
    check_batched(kStatsOp, x.info);
    check_cuda(kStatsOp, x.info);
    const CudaScope scope(x.info);
    const Operand rm = channel_operand(kStatsOp, "running_mean", running_mean, x.info);
    const Operand rv = channel_operand(kStatsOp, "running_var", running_var, x.info);
    DL4DS_CHECK(rm.info.present == rv.info.present, kStatsOp,
                ": expected running_mean and running_var both given or both None");
    BnActFwdParams p;
    read_or_copy(p, x, none, suggest_format(x.info));
    const DType acc = acc_dtype(x.info.dtype);
    const int64_t running = rm.info.present ? p.size.c : 0;
    Tensor mean = empty_vector_cuda(x.info, p.size.c, acc), rstd = empty_vector_cuda(x.info, p.size.c, acc);
    Tensor new_mean = empty_vector_cuda(x.info, running, rm.info.present ? rm.info.dtype : acc);
    Tensor new_var = empty_vector_cuda(x.info, running, rv.info.present ? rv.info.dtype : acc);
    p.running_mean = channel_vector(rm);
    p.running_var = channel_vector(rv);
    p.training = true;
    p.eps_std = eps_std;
    p.momentum = momentum;
    p.eps = eps;
    p.mean = tensor_info(mean).data;
    p.rstd = tensor_info(rstd).data;
    p.moments = moments.data;
    p.moments_parts = moments.parts;
    p.new_running_mean = running > 0 ? tensor_info(new_mean).data : nullptr;
    p.new_running_var = running > 0 ? tensor_info(new_var).data : nullptr;
    const Tensor workspace = empty_vector_cuda(x.info, bn_act_fwd_workspace(p), DType::kUInt8);
    p.workspace = tensor_info(workspace).data;
    check_launch(launch_bn_act_fwd(p, scope.stream()), kStatsOp);
    return {mean, rstd, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_fwd_cuda(
    Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> residual, bool training, double momentum,
    double eps, bool eps_std, int64_t activation, double negative_slope, bool save_mask) {
    return bn_act_forward(std::move(x), std::move(weight), std::move(bias), std::move(running_mean),
                          std::move(running_var), std::move(residual), training, momentum, eps, eps_std,
                          activation, negative_slope, save_mask, {});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_bwd_cuda(
    Tensor dout_tensor, Tensor x_tensor, std::optional<Tensor> weight, std::optional<Tensor> bias,
    Tensor mean, Tensor rstd, std::optional<Tensor> residual_tensor, std::optional<Tensor> mask_tensor,
    bool training, double eps, bool eps_std, int64_t activation, double negative_slope, bool need_dx,
    bool need_dparams, bool need_dresidual) {
    Operand dout(dout_tensor), x(x_tensor), residual(residual_tensor);
    check_batched(kBwdOp, x.info);
    check_cuda(kBwdOp, x.info);
    check_same_shape(kBwdOp, "dout", dout.info, x.info);
    check_dtype(kBwdOp, "dout", dout.info, x.info.dtype);
    check_same_device(kBwdOp, "dout", dout.info, x.info);
    check_residual(kBwdOp, residual.info, x.info);
    const TensorInfo mask = tensor_info(mask_tensor);
    check_mask(mask, x.info);
    const CudaScope scope(x.info);
    const Operand w = channel_operand(kBwdOp, "weight", weight, x.info);
    const Operand b = channel_operand(kBwdOp, "bias", bias, x.info);
    const Operand m = statistics_operand("mean", mean, x.info), r = statistics_operand("rstd", rstd, x.info);

    BnActBwdParams p;
    p.activation = checked_activation(kBwdOp, activation);
    p.mask = mask.present && activation_has_mask(p.activation) ? mask.as<uint8_t>() : nullptr;
    const Format format = suggest_format(x.info);
    const DType acc = acc_dtype(x.info.dtype);
    const auto optional_output = [&](bool needed) {
        return needed ? empty_like_cuda(x.info, format) : empty_vector_cuda(x.info, 0, x.info.dtype);
    };
    Tensor dx = optional_output(need_dx), dresidual = optional_output(need_dresidual);
    const int64_t channels = need_dparams ? x.info.sizes[1] : 0;
    Tensor dweight = empty_vector_cuda(x.info, channels, acc),
           dbias = empty_vector_cuda(x.info, channels, acc);

    p.dtype = x.info.dtype;
    p.channels_last = format == Format::kChannelsLast;
    p.size = as_dims(x.info.sizes, x.info.dim);
    p.dout_strides = p.x_strides = p.residual_strides = dense_dims(p.size, p.channels_last);
    const bool with_residual =
        p.mask == nullptr && p.activation != Activation::kNone && residual.info.present;
    p.residual = with_residual ? residual.info.data : nullptr;
    // One after the other takes its own strides, if the kernels can read it beside those before it.
    const auto settle = [&](Operand& operand, Dims& strides, const void*& data) {
        strides = as_dims(operand.info.strides, operand.info.dim);
        if (!bn_act_bwd_reads(p)) {
            operand.copy_to(format);
            strides = as_dims(operand.info.strides, operand.info.dim);
        }
        data = operand.info.data;
    };
    settle(x, p.x_strides, p.x);
    settle(dout, p.dout_strides, p.dout);
    if (with_residual) {
        settle(residual, p.residual_strides, p.residual);
    }

    p.weight = channel_vector(w);
    p.bias = channel_vector(b);
    p.mean = m.info.data;
    p.rstd = r.info.data;
    p.training = training;
    p.eps_std = eps_std;
    p.eps = eps;
    p.negative_slope = negative_slope;
    p.dx = need_dx ? tensor_info(dx).data : nullptr;
    p.dresidual = need_dresidual ? tensor_info(dresidual).data : nullptr;
    p.dweight = need_dparams ? tensor_info(dweight).data : nullptr;
    p.dbias = need_dparams ? tensor_info(dbias).data : nullptr;
    const Tensor workspace = empty_vector_cuda(x.info, bn_act_bwd_workspace(p), DType::kUInt8);
    p.workspace = tensor_info(workspace).data;
    check_launch(launch_bn_act_bwd(p, scope.stream()), kBwdOp);
    return {dx, dweight, dbias, dresidual};
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) {
    m.impl("bn_act", TORCH_BOX(&bn_act_fwd_cuda));
    m.impl("bn_act_bwd", TORCH_BOX(&bn_act_bwd_cuda));
}

}  // namespace dl4ds
