// bn_stats, bn_act_pair and bn_act_pair_bwd on CUDA. The contracts are in dl4ds_kernels/ops/_bn_act_pair.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/bn_act/bn_act_cuda.h"
#include "ops/bn_act/bn_act_pair.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "bn_act_pair";
constexpr const char* kBwdOp = "bn_act_pair_bwd";

/// A map of x's shape as the kernels read it: dense in the call's order, at a multiple of 16 bytes.
void settle(const char* op, const char* name, Operand& map, const TensorInfo& x, Format format) {
    check_same_shape(op, name, map.info, x);
    check_dtype(op, name, map.info, x.dtype);
    check_same_device(op, name, map.info, x);
    const auto strides = dense_strides(map.info.sizes, map.info.dim, format);
    if (!same_strides(map.info.strides, strides.data(), map.info.sizes, map.info.dim) ||
        reinterpret_cast<uintptr_t>(map.info.data) % 16 != 0) {
        map.copy_to(format);
    }
}

/// What both ops check of x; the order of the results.
Format checked_format(const char* op, const TensorInfo& x) {
    check_batched(op, x);
    check_cuda(op, x);
    const Format format = suggest_format(x);
    DL4DS_CHECK(bn_act_pair_serves(x.dtype, format == Format::kChannelsLast, as_dims(x.sizes, x.dim)), op,
                ": x: expected fp32, fp16 or bf16 and rows of whole 16-byte vectors, got ", x.shape());
    return format;
}

Activation linear_activation(const char* op, int64_t code) {
    const Activation activation = checked_activation(op, code);
    DL4DS_CHECK(activation == Activation::kNone || activation_has_mask(activation), op,
                ": activation: expected none, relu, leaky_relu or relu6, got ", activation_name(activation));
    return activation;
}

/// The vectors of one BatchNorm, alive with this object; prefix: of the arguments' names.
struct NormOperands {
    Operand mean, rstd, weight, bias;

    NormOperands(const char* op, const std::string& prefix, const Tensor& m, const Tensor& r,
                 const std::optional<Tensor>& w, const std::optional<Tensor>& b, const TensorInfo& x) {
        const auto read = [&](const char* name, const std::optional<Tensor>& t) {
            return channel_operand(op, (prefix + name).c_str(), t, x);
        };
        mean = read("mean", m), rstd = read("rstd", r), weight = read("weight", w), bias = read("bias", b);
        check_dtype(op, (prefix + "mean").c_str(), mean.info, DType::kFloat32);
        check_dtype(op, (prefix + "rstd").c_str(), rstd.info, DType::kFloat32);
    }
    BnPairNorm norm() const {
        BnPairNorm n;
        n.mean = mean.info.as<float>();
        n.rstd = rstd.info.as<float>();
        n.weight = channel_vector(weight);
        n.bias = channel_vector(bias);
        return n;
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_stats_cuda(Tensor x, std::optional<Tensor> running_mean,
                                                         std::optional<Tensor> running_var, double momentum,
                                                         double eps, bool eps_std) {
    return bn_statistics(std::move(x), std::move(running_mean), std::move(running_var), momentum, eps,
                         eps_std, {});
}

std::tuple<Tensor, Tensor> bn_act_pair_cuda(Tensor x_tensor, Tensor mean, Tensor rstd,
                                            std::optional<Tensor> weight, std::optional<Tensor> bias,
                                            Tensor residual_tensor, Tensor residual_mean,
                                            Tensor residual_rstd, std::optional<Tensor> residual_weight,
                                            std::optional<Tensor> residual_bias, int64_t activation,
                                            double negative_slope, bool save_mask) {
    Operand x(x_tensor), residual(residual_tensor);
    const Format format = checked_format(kOp, x.info);
    const CudaScope scope(x.info);
    BnActPairFwdParams p;
    p.activation = linear_activation(kOp, activation);
    settle(kOp, "x", x, x.info, format);
    settle(kOp, "residual", residual, x.info, format);
    const NormOperands own(kOp, "", mean, rstd, weight, bias, x.info);
    const NormOperands theirs(kOp, "residual_", residual_mean, residual_rstd, residual_weight, residual_bias,
                              x.info);
    Tensor out = empty_like_cuda(x.info, format);
    const bool with_mask = save_mask && activation_has_mask(p.activation);
    Tensor mask = empty_vector_cuda(x.info, with_mask ? (x.info.numel + 7) / 8 : 0, DType::kUInt8);
    p.dtype = x.info.dtype;
    p.channels_last = format == Format::kChannelsLast;
    p.size = as_dims(x.info.sizes, x.info.dim);
    p.x = x.info.data;
    p.residual = residual.info.data;
    p.norm = own.norm();
    p.residual_norm = theirs.norm();
    p.negative_slope = negative_slope;
    p.out = tensor_info(out).data;
    p.mask = with_mask ? tensor_info(mask).as<uint8_t>() : nullptr;
    const Tensor workspace = empty_vector_cuda(x.info, bn_act_pair_fwd_workspace(p), DType::kUInt8);
    p.workspace = tensor_info(workspace).data;
    check_launch(launch_bn_act_pair_fwd(p, scope.stream()), kOp);
    return {out, mask};
}

/// dweight of both and dbias from one pass.
void sum_both(const BnActPairBwdParams& p, Tensor& dweight, Tensor& residual_dweight, Tensor& dbias,
              const TensorInfo& like, void* stream) {
    BnActPairSumsParams v;
    v.dtype = p.dtype;
    v.channels_last = p.channels_last;
    v.size = p.size;
    v.dout = p.dout;
    v.x = p.x;
    v.residual = p.residual;
    v.mask = p.mask;
    v.mean = p.norm.mean;
    v.rstd = p.norm.rstd;
    v.residual_mean = p.residual_norm.mean;
    v.residual_rstd = p.residual_norm.rstd;
    v.activation = p.activation;
    v.negative_slope = p.negative_slope;
    v.dweight = tensor_info(dweight).as<float>();
    v.residual_dweight = tensor_info(residual_dweight).as<float>();
    v.dbias = tensor_info(dbias).as<float>();
    const Tensor workspace = empty_vector_cuda(like, bn_act_pair_sums_workspace(v), DType::kUInt8);
    v.workspace = tensor_info(workspace).data;
    check_launch(launch_bn_act_pair_sums(v, stream), kBwdOp);
}

/// dweight and dbias of the residual alone, by the kernels of bn_act_bwd: another kernel has taken x's.
void sum_residual(const BnActPairBwdParams& p, Tensor& dweight, Tensor& dbias, const TensorInfo& like,
                  void* stream) {
    const BnPairNorm& norm = p.residual_norm;
    BnActBwdParams v;
    v.dtype = p.dtype;
    v.channels_last = p.channels_last;
    v.size = p.size;
    v.dout_strides = v.x_strides = v.residual_strides = dense_dims(p.size, p.channels_last);
    v.dout = p.dout;
    v.x = p.residual;
    v.mask = p.mask;
    v.weight = norm.weight;
    v.mean = norm.mean;
    v.rstd = norm.rstd;
    v.training = true;
    v.eps_std = norm.eps_std;
    v.eps = norm.eps;
    v.activation = p.activation;
    v.negative_slope = p.negative_slope;
    v.dweight = tensor_info(dweight).data;
    v.dbias = tensor_info(dbias).data;
    const Tensor workspace = empty_vector_cuda(like, bn_act_bwd_workspace(v), DType::kUInt8);
    v.workspace = tensor_info(workspace).data;
    check_launch(launch_bn_act_bwd(v, stream), kBwdOp);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_act_pair_bwd_cuda(
    Tensor dout_tensor, std::optional<Tensor> mask_tensor, int64_t activation, double negative_slope,
    Tensor x_tensor, std::optional<Tensor> weight, Tensor mean, Tensor rstd, double eps, bool eps_std,
    Tensor residual_tensor, std::optional<Tensor> residual_weight, Tensor residual_mean, Tensor residual_rstd,
    double residual_eps, bool residual_eps_std, std::optional<Tensor> known_dweight,
    std::optional<Tensor> known_dbias, std::optional<Tensor> known_residual_dweight) {
    Operand dout(dout_tensor), x(x_tensor), residual(residual_tensor);
    const Format format = checked_format(kBwdOp, x.info);
    const CudaScope scope(x.info);
    settle(kBwdOp, "x", x, x.info, format);
    settle(kBwdOp, "dout", dout, x.info, format);
    settle(kBwdOp, "residual", residual, x.info, format);
    BnActPairBwdParams p;
    p.activation = linear_activation(kBwdOp, activation);
    const TensorInfo mask = tensor_info(mask_tensor);
    DL4DS_CHECK(mask.present == (p.activation != Activation::kNone), kBwdOp,
                ": mask: expected one with an activation, and none without");
    if (mask.present) {
        const int64_t bytes = (x.info.numel + 7) / 8;
        check_dtype(kBwdOp, "mask", mask, DType::kUInt8);
        check_same_device(kBwdOp, "mask", mask, x.info);
        DL4DS_CHECK(mask.dim == 1 && mask.numel == bytes && (bytes <= 1 || mask.strides[0] == 1), kBwdOp,
                    ": mask: expected shape (ceil(numel / 8),) = (", bytes, ",) without gaps, got ",
                    mask.shape());
        p.mask = mask.as<uint8_t>();
    }
    const NormOperands own(kBwdOp, "", mean, rstd, weight, std::nullopt, x.info);
    const NormOperands theirs(kBwdOp, "residual_", residual_mean, residual_rstd, residual_weight,
                              std::nullopt, x.info);
    p.dtype = x.info.dtype;
    p.channels_last = format == Format::kChannelsLast;
    p.size = as_dims(x.info.sizes, x.info.dim);
    p.dout = dout.info.data;
    p.x = x.info.data;
    p.residual = residual.info.data;
    p.norm = own.norm();
    p.residual_norm = theirs.norm();
    p.norm.eps = eps, p.norm.eps_std = eps_std;
    p.residual_norm.eps = residual_eps, p.residual_norm.eps_std = residual_eps_std;
    p.negative_slope = negative_slope;

    const int64_t channels = x.info.sizes[1];
    const auto vector = [&](int64_t size) { return empty_vector_cuda(x.info, size, DType::kFloat32); };
    const Operand given = channel_operand(kBwdOp, "dweight", known_dweight, x.info);
    const Operand given_bias = channel_operand(kBwdOp, "dbias", known_dbias, x.info);
    const Operand given_other = channel_operand(kBwdOp, "residual_dweight", known_residual_dweight, x.info);
    const bool known = given.info.present, all = given_other.info.present;
    DL4DS_CHECK(known == given_bias.info.present && (known || !all), kBwdOp,
                ": expected dweight and dbias both given or both None, and with residual_dweight given");
    for (const auto& [name, t] :
         {std::pair{"dweight", &given}, {"dbias", &given_bias}, {"residual_dweight", &given_other}}) {
        if (t->info.present) {
            check_dtype(kBwdOp, name, t->info, DType::kFloat32);
        }
    }
    Tensor dweight = vector(known ? 0 : channels), residual_dweight = vector(all ? 0 : channels);
    Tensor dbias = vector(all ? 0 : channels);
    if (!known) {
        sum_both(p, dweight, residual_dweight, dbias, x.info, scope.stream());
    } else if (!all) {
        sum_residual(p, residual_dweight, dbias, x.info, scope.stream());
    }
    p.norm.dweight = (known ? given.info : tensor_info(dweight)).as<float>();
    p.residual_norm.dweight = (all ? given_other.info : tensor_info(residual_dweight)).as<float>();
    p.dbias = (all ? given_bias.info : tensor_info(dbias)).as<float>();
    Tensor dx = empty_like_cuda(x.info, format), dresidual = empty_like_cuda(x.info, format);
    p.dx = tensor_info(dx).data;
    p.dresidual = tensor_info(dresidual).data;
    const Tensor workspace = empty_vector_cuda(x.info, bn_act_pair_bwd_workspace(p), DType::kUInt8);
    p.workspace = tensor_info(workspace).data;
    check_launch(launch_bn_act_pair_bwd(p, scope.stream()), kBwdOp);
    return {dx, dresidual, dweight, dbias, residual_dweight};
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) {
    m.impl("bn_stats", TORCH_BOX(&bn_stats_cuda));
    m.impl("bn_act_pair", TORCH_BOX(&bn_act_pair_cuda));
    m.impl("bn_act_pair_bwd", TORCH_BOX(&bn_act_pair_bwd_cuda));
}

}  // namespace
}  // namespace dl4ds
