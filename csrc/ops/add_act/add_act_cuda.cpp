// add_act and add_act_bwd on CUDA. The op contract is in dl4ds_kernels/ops/add_act.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/cuda/host.h"
#include "ops/add_act/add_act.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "add_act";
constexpr const char* kBwdOp = "add_act_bwd";

void check_first(const char* op, const char* name, const TensorInfo& x) {
    DL4DS_CHECK(is_floating(x.dtype), op, ": ", name,
                ": expected dtype float32, float64, float16 or bfloat16, got ", dtype_name(x.dtype));
    DL4DS_CHECK(x.device_type == aoti_torch_device_type_cuda(), op, ": ", name, ": expected a CUDA tensor");
}

void check_like(const char* op, const char* name, const TensorInfo& t, const TensorInfo& x) {
    check_same_shape(op, name, t, x);
    check_dtype(op, name, t, x.dtype);
    check_same_device(op, name, t, x);
}

bool same_order(const TensorInfo& x, const TensorInfo& residual) {
    return same_strides(x.strides, residual.strides, x.sizes, x.dim) && is_dense(x);
}

/// x + residual with torch's strides for operands in different orders. (The dispatcher's C interface does not
/// take aten::add's Scalar.)
Tensor torch_add(const Tensor& x, const Tensor& residual) {
    using AddFn = AOTITorchError(AtenTensorHandle, AtenTensorHandle, double, AtenTensorHandle*);
    AddFn* const add = kShim<AddFn, "aoti_torch_cuda_add_Tensor">;
    DL4DS_CHECK(add != nullptr,
                "add_act: this torch has no aoti_torch_cuda_add_Tensor: pass x and residual with ",
                "equal, dense strides");
    AtenTensorHandle sum = nullptr;
    shim_check(add(x.get(), residual.get(), 1.0, &sum), "aten::add");
    return Tensor(sum);
}

}  // namespace

std::tuple<Tensor, Tensor> add_act_fwd_cuda(Tensor x, Tensor residual, double alpha, int64_t activation,
                                            double negative_slope, bool save_mask) {
    const TensorInfo xi = tensor_info(x), ri = tensor_info(residual);
    check_first(kOp, "x", xi);
    check_like(kOp, "residual", ri, xi);
    const CudaScope scope(xi);
    AddActFwdParams p;
    p.activation = checked_activation(kOp, activation);
    const bool with_mask = save_mask && activation_has_mask(p.activation);
    Tensor mask = empty_vector_cuda(xi, with_mask ? (xi.numel + 7) / 8 : 0, DType::kUInt8);
    const bool flat = same_order(xi, ri);
    Tensor out = flat ? empty_cuda(xi, xi.sizes, elementwise_strides(xi).data(), xi.dim, xi.dtype)
                      : torch_add(x, residual);
    p.dtype = xi.dtype;
    p.numel = xi.numel;
    p.out = tensor_info(out).data;
    p.x = flat ? xi.data : p.out;
    p.residual = flat ? ri.data : nullptr;
    p.alpha = alpha;
    p.negative_slope = negative_slope;
    p.mask = with_mask ? tensor_info(mask).as<uint8_t>() : nullptr;
    check_launch(launch_add_act_fwd(p, scope.stream()), kOp);
    return {out, mask};
}

Tensor add_act_bwd_cuda(Tensor dout_tensor, std::optional<Tensor> mask, std::optional<Tensor> x,
                        std::optional<Tensor> residual, double alpha, int64_t activation,
                        double negative_slope) {
    Operand dout(dout_tensor);
    const TensorInfo di = dout.info, mi = tensor_info(mask), xi = tensor_info(x), ri = tensor_info(residual);
    check_first(kBwdOp, "dout", di);
    AddActBwdParams p;
    p.activation = checked_activation(kBwdOp, activation);
    const bool from_mask = mi.present && activation_has_mask(p.activation);
    const bool recompute = !from_mask && p.activation != Activation::kNone;
    const bool both = xi.present && ri.present;
    DL4DS_CHECK(!recompute || both, kBwdOp, ": expected a mask, or x and residual");
    if (from_mask) {
        const int64_t bytes = (di.numel + 7) / 8;
        check_dtype(kBwdOp, "mask", mi, DType::kUInt8);
        check_same_device(kBwdOp, "mask", mi, di);
        DL4DS_CHECK(mi.dim == 1 && mi.numel == bytes && (bytes <= 1 || mi.strides[0] == 1), kBwdOp,
                    ": mask: expected shape (ceil(numel / 8),) = (", bytes, ",) without gaps, got ",
                    mi.shape());
    }
    if (both) {
        check_like(kBwdOp, "x", xi, di);
        check_like(kBwdOp, "residual", ri, di);
    }
    const CudaScope scope(di);
    // dx lies like the forward's output: like x + residual where they are given, else like dout.
    const bool flat = both && same_order(xi, ri);
    std::optional<Tensor> sum;
    if (both && !flat) {
        sum = torch_add(*x, *residual);
    }
    Tensor dx = flat ? empty_cuda(xi, xi.sizes, elementwise_strides(xi).data(), xi.dim, xi.dtype)
                     : torch::stable::empty_like(sum ? *sum : dout_tensor);
    const TensorInfo dxi = tensor_info(dx);
    if (!same_strides(di.strides, dxi.strides, di.sizes, di.dim)) {
        dout.copy_to(dxi.strides);
    }
    p.dtype = di.dtype;
    p.numel = di.numel;
    p.dout = dout.info.data;
    p.mask = from_mask ? mi.as<uint8_t>() : nullptr;
    if (recompute) {
        p.x = flat ? xi.data : tensor_info(*sum).data;
        p.residual = flat ? ri.data : nullptr;
    }
    p.alpha = alpha;
    p.negative_slope = negative_slope;
    p.dx = dxi.data;
    check_launch(launch_add_act_bwd(p, scope.stream()), kBwdOp);
    return dx;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) {
    m.impl("add_act", TORCH_BOX(&add_act_fwd_cuda));
    m.impl("add_act_bwd", TORCH_BOX(&add_act_bwd_cuda));
}

}  // namespace dl4ds
