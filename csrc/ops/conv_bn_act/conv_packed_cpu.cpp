// The packed ops of conv_bn_act: conv_bn_act_pack makes the weight that the others read.
#include <torch/csrc/stable/library.h>

#include "ops/conv_bn_act/conv_step_cpu.h"

namespace dl4ds {

constexpr const char* kOp = "conv_bn_act";

Tensor conv_bn_act_pack(Tensor weight, int64_t groups, int64_t algorithm) {
    const TensorInfo wi = tensor_info(weight);
    const ConvAlgorithm how = conv_algorithm_from_code(algorithm);
    const ConvShape s = conv_weight_shape(wi, groups);
    DL4DS_CHECK(conv_supports(how, s), kOp, ": algorithm: expected one for weight ", wi.shape(), ", got ",
                algorithm);
    const Tensor dense = is_contiguous(wi.sizes, wi.strides, wi.dim)
                             ? weight
                             : copy_with_strides(weight, wi, contiguous_strides(wi).data());
    Tensor packed = empty_pack_cpu(conv_packed_floats(how, s), DType::kFloat32);
    conv_pack_weight(how, s, tensor_info(dense).as<float>(), tensor_info(packed).as<float>());
    return packed;
}

Tensor conv_bn_act_packed(Tensor x, Tensor weight, Tensor packed, int64_t algorithm,
                          std::optional<Tensor> bias, std::optional<Tensor> running_mean,
                          std::optional<Tensor> running_var, std::optional<Tensor> bn_weight,
                          std::optional<Tensor> bn_bias, std::optional<Tensor> residual,
                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, int64_t groups, double eps, bool eps_std,
                          int64_t activation, double negative_slope) {
    ConvStep step{};
    step.algorithm = conv_algorithm_from_code(algorithm);
    step.xs.push_back(std::move(x));
    step.weight = std::move(weight), step.packed = std::move(packed), step.bias = std::move(bias);
    step.conv = {std::move(stride), std::move(padding), std::move(dilation), groups};
    step.after = bn_vectors(kOp, std::move(running_mean), std::move(running_var), std::move(bn_weight),
                            std::move(bn_bias), eps, eps_std, activation, negative_slope);
    step.residual = std::move(residual);
    return run_conv_step(step);
}

Tensor bn_act_conv_packed(std::vector<Tensor> xs, Tensor weight, Tensor packed, std::optional<Tensor> in_mean,
                          std::optional<Tensor> in_var, std::optional<Tensor> in_weight,
                          std::optional<Tensor> in_bias, double in_eps, bool in_eps_std,
                          int64_t in_activation, int64_t pool, std::optional<Tensor> bias,
                          std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                          std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, double eps,
                          bool eps_std, int64_t activation, double negative_slope) {
    ConvStep step{};
    step.algorithm = ConvAlgorithm::kDirect;
    step.xs = std::move(xs);
    step.weight = std::move(weight), step.packed = std::move(packed), step.bias = std::move(bias);
    step.conv = {{1, 1}, {0, 0}, {1, 1}, 1};
    step.before = bn_vectors(kOp, std::move(in_mean), std::move(in_var), std::move(in_weight),
                             std::move(in_bias), in_eps, in_eps_std, in_activation, 0.0);
    step.pool = pool;
    step.after = bn_vectors(kOp, std::move(running_mean), std::move(running_var), std::move(bn_weight),
                            std::move(bn_bias), eps, eps_std, activation, negative_slope);
    return run_conv_step(step);
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("conv_bn_act_pack", TORCH_BOX(&conv_bn_act_pack));
    m.impl("conv_bn_act_packed", TORCH_BOX(&conv_bn_act_packed));
    m.impl("bn_act_conv_packed", TORCH_BOX(&bn_act_conv_packed));
}

}  // namespace dl4ds
