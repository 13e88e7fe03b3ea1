// bn_act_apply_bwd on CUDA: the elementwise pass of bn_act's gradient, where another kernel has taken the
// sums (BnActBwdSteps). The op contract is in dl4ds_kernels/ops/_conv_dgrad.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/bn_act/bn_act_cuda.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "bn_act_apply_bwd";

void settle(const char* name, Operand& map, const TensorInfo& like) {
    check_same_shape(kOp, name, map.info, like);
    check_dtype(kOp, name, map.info, like.dtype);
    check_same_device(kOp, name, map.info, like);
    const auto strides = dense_strides(map.info.sizes, map.info.dim, Format::kChannelsLast);
    if (!same_strides(map.info.strides, strides.data(), map.info.sizes, map.info.dim) ||
        reinterpret_cast<uintptr_t>(map.info.data) % 16 != 0) {
        map.copy_to(Format::kChannelsLast);
    }
}

std::tuple<Tensor, Tensor> bn_act_apply_bwd_cuda(Tensor dout_tensor, Tensor table, Tensor x_tensor,
                                                 std::optional<Tensor> mask_tensor, int64_t activation,
                                                 double negative_slope, bool need_dresidual) {
    Operand dout(dout_tensor), x(x_tensor);
    check_cuda(kOp, x.info);
    DL4DS_CHECK(x.info.dim == 4, kOp, ": x: expected (N, C, H, W), got ", x.info.shape());
    const CudaScope scope(x.info);
    settle("x", x, x.info);
    settle("dout", dout, x.info);
    const TensorInfo ti = tensor_info(table), mask = tensor_info(mask_tensor);
    const int64_t values = bn_act_bwd_table(x.info.sizes[1]), bytes = (x.info.numel + 7) / 8;
    check_dtype(kOp, "table", ti, DType::kFloat32);
    check_same_device(kOp, "table", ti, x.info);
    DL4DS_CHECK(ti.dim == 1 && ti.numel == values, kOp, ": table: expected shape (", values, ",), got ",
                ti.shape());
    if (mask.present) {
        check_dtype(kOp, "mask", mask, DType::kUInt8);
        check_same_device(kOp, "mask", mask, x.info);
        DL4DS_CHECK(mask.dim == 1 && mask.numel == bytes, kOp, ": mask: expected shape (", bytes, ",), got ",
                    mask.shape());
    }
    Tensor dx = empty_like_cuda(x.info, Format::kChannelsLast);
    Tensor dresidual = need_dresidual ? empty_like_cuda(x.info, Format::kChannelsLast)
                                      : empty_vector_cuda(x.info, 0, x.info.dtype);
    BnActBwdParams p;
    p.steps = BnActBwdSteps::kElements;
    p.dtype = x.info.dtype;
    p.channels_last = true;
    p.size = as_dims(x.info.sizes, 4);
    p.dout_strides = p.x_strides = p.residual_strides = as_dims(x.info.strides, 4);
    p.dout = dout.info.data;
    p.x = x.info.data;
    p.activation = checked_activation(kOp, activation);
    p.mask = mask.present && activation_has_mask(p.activation) ? mask.as<uint8_t>() : nullptr;
    p.negative_slope = negative_slope;
    p.training = true;
    p.table = ti.data;
    p.dx = tensor_info(dx).data;
    p.dresidual = need_dresidual ? tensor_info(dresidual).data : nullptr;
    check_launch(launch_bn_act_bwd(p, scope.stream()), kOp);
    return {dx, dresidual};
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) {
    m.impl("bn_act_apply_bwd", TORCH_BOX(&bn_act_apply_bwd_cuda));
}

}  // namespace
}  // namespace dl4ds
