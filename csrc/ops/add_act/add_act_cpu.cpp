#include "ops/add_act/add_act_cpu.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu/isa.h"
#include "common/cpu/output.h"
#include "common/cpu/parallel.h"

namespace dl4ds {
namespace {

constexpr int64_t kBlockElements = 16 << 10;  // a multiple of 8: blocks own whole mask bytes

Activation checked_activation(const char* op, int64_t code) {
    DL4DS_CHECK(code >= 0 && code < kNumActivations, op, ": activation: expected a code in [0, ",
                kNumActivations, "), got ", code);
    return static_cast<Activation>(code);
}

void check_pair(const char* op, const char* name, const TensorInfo& t, const TensorInfo& x) {
    check_same_shape(op, name, t, x);
    check_dtype(op, name, t, x.dtype);
    check_same_device(op, name, t, x);
}

template <typename P>
void* advance(P* base, int64_t bytes) {
    return base == nullptr ? nullptr : const_cast<char*>(static_cast<const char*>(base)) + bytes;
}

void forward_all(DType dtype, Activation act, const AddActArgs& whole, uint8_t* mask) {
    const auto kernel = add_act_kernels().fwd[static_cast<int>(dtype)][static_cast<int>(act)];
    const int64_t size = dtype_size(dtype);
    const Blocks blocks = fixed_blocks(whole.n, size, kBlockElements * size, 64, int64_t{1} << 40);
    parallel_for(blocks.count, 3 * whole.n * size, [&](int64_t first, int64_t last) {
        const int64_t begin = blocks.begin(first), end = blocks.end(last - 1);
        BitWriter bits{mask == nullptr ? nullptr : mask + begin / 8};
        AddActArgs p = whole;
        p.x = advance(whole.x, begin * size);
        p.residual = advance(whole.residual, begin * size);
        p.third = advance(whole.third, begin * size);
        p.out = advance(whole.out, begin * size);
        p.mask = mask == nullptr ? nullptr : &bits;
        p.n = end - begin;
        kernel(p);
        bits.finish();
    });
}

void backward_all(DType dtype, Activation act, const AddActBwdArgs& whole) {
    const auto kernel = add_act_kernels().bwd[static_cast<int>(dtype)][static_cast<int>(act)];
    const int64_t size = dtype_size(dtype);
    const Blocks blocks = fixed_blocks(whole.n, size, kBlockElements * size, 64, int64_t{1} << 40);
    parallel_for(blocks.count, 3 * whole.n * size, [&](int64_t first, int64_t last) {
        const int64_t begin = blocks.begin(first), end = blocks.end(last - 1);
        AddActBwdArgs p = whole;
        p.dout = advance(whole.dout, begin * size);
        p.x = advance(whole.x, begin * size);
        p.residual = advance(whole.residual, begin * size);
        p.dx = advance(whole.dx, begin * size);
        p.mask_bit = begin;
        p.n = end - begin;
        kernel(p);
    });
}

/// x + residual as torch.add makes it, for strides that no flat loop serves.
Tensor torch_add(const Tensor& x, const Tensor& residual) {
    using AddFn = AOTITorchError(AtenTensorHandle, AtenTensorHandle, double, AtenTensorHandle*);
    AddFn* const add = kShim<AddFn, "aoti_torch_cpu_add_Tensor">;
    DL4DS_CHECK(add != nullptr,
                "add_act: this torch has no aoti_torch_cpu_add_Tensor: pass x and residual with equal, ",
                "dense strides");
    AtenTensorHandle sum = nullptr;
    shim_check(add(x.get(), residual.get(), 1.0, &sum), "aten::add");
    return Tensor(sum);
}

/// One flat loop over memory serves both operands.
bool is_flat(const TensorInfo& x, const TensorInfo& residual) {
    return same_strides(x.strides, residual.strides, x.sizes, x.dim) && is_dense(x);
}

bool streams(int64_t bytes) { return bytes > cache_sizes().llc_bytes / 2; }

/// act(alpha * (x + residual [+ third])) and its bit mask.
std::tuple<Tensor, Tensor> forward(const char* kOp, const Tensor& x, const Tensor& residual,
                                   const Tensor* third, double alpha, int64_t activation,
                                   double negative_slope, bool save_mask) {
    const TensorInfo xi = tensor_info(x), ri = tensor_info(residual);
    const TensorInfo ti = third == nullptr ? TensorInfo{} : tensor_info(*third);
    const Activation act = checked_activation(kOp, activation);
    DL4DS_CHECK(is_floating(xi.dtype), kOp, ": x: expected dtype float32, float64, float16 or bfloat16, got ",
                dtype_name(xi.dtype));
    check_pair(kOp, "residual", ri, xi);
    if (ti.present) {
        check_pair(kOp, "residual2", ti, xi);
    }
    const bool with_mask = save_mask && activation_has_mask(act);
    Tensor mask = empty_vector_cpu(with_mask ? (xi.numel + 7) / 8 : 0, DType::kUInt8);
    const bool flat = is_flat(xi, ri) && (!ti.present || is_flat(xi, ti));
    Tensor out =
        flat ? empty_cpu(xi.sizes, elementwise_strides(xi).data(), xi.dim, xi.dtype) : torch_add(x, residual);
    if (!flat && ti.present) {
        out = torch_add(out, *third);
    }
    const TensorInfo oi = tensor_info(out);
    AddActArgs p{};
    p.x = flat ? xi.data : oi.data;
    p.residual = flat ? ri.data : nullptr;
    p.third = flat ? ti.data : nullptr;
    p.out = oi.data;
    p.n = xi.numel;
    p.alpha = alpha;
    p.slope = negative_slope;
    p.streaming = flat && streams(xi.numel * dtype_size(xi.dtype));
    forward_all(xi.dtype, act, p, with_mask ? tensor_info(mask).as<uint8_t>() : nullptr);
    return {out, mask};
}

}  // namespace

std::tuple<Tensor, Tensor> add_act_fwd_cpu(Tensor x, Tensor residual, double alpha, int64_t activation,
                                           double negative_slope, bool save_mask) {
    return forward("add_act", x, residual, nullptr, alpha, activation, negative_slope, save_mask);
}

std::tuple<Tensor, Tensor> add3_act_fwd_cpu(Tensor x, Tensor residual, Tensor residual2, double alpha,
                                            int64_t activation, double negative_slope, bool save_mask) {
    return forward("add3_act", x, residual, &residual2, alpha, activation, negative_slope, save_mask);
}

Tensor add_act_bwd_cpu(Tensor dout, std::optional<Tensor> mask, std::optional<Tensor> x,
                       std::optional<Tensor> residual, double alpha, int64_t activation,
                       double negative_slope) {
    constexpr const char* kOp = "add_act_bwd";
    const TensorInfo di = tensor_info(dout), mi = tensor_info(mask), xi = tensor_info(x),
                     ri = tensor_info(residual);
    const Activation act = checked_activation(kOp, activation);
    DL4DS_CHECK(is_floating(di.dtype), kOp,
                ": dout: expected dtype float32, float64, float16 or bfloat16, got ", dtype_name(di.dtype));
    const bool from_mask = mi.present && activation_has_mask(act);
    const bool recompute = !from_mask && act != Activation::kNone;
    DL4DS_CHECK(!recompute || (xi.present && ri.present), kOp, ": expected a mask, or x and residual");
    if (from_mask) {
        check_dtype(kOp, "mask", mi, DType::kUInt8);
        const int64_t bytes = (di.numel + 7) / 8;
        DL4DS_CHECK(mi.dim == 1 && mi.numel == bytes && (bytes <= 1 || mi.strides[0] == 1), kOp,
                    ": mask: expected shape (ceil(numel / 8),) = (", bytes, ",) without gaps, got ",
                    mi.shape());
    }
    if (xi.present) {
        check_pair(kOp, "x", xi, di);
    }
    if (ri.present) {
        check_pair(kOp, "residual", ri, di);
    }
    // dx has the strides of the forward's output: those of x + residual where both are given, else dout's
    // own.
    std::optional<Tensor> sum;
    if (xi.present && ri.present && !is_flat(xi, ri)) {
        sum = torch_add(*x, *residual);
    }
    const TensorInfo like = sum ? tensor_info(*sum) : xi.present && ri.present ? xi : di;
    const auto strides = is_dense(like) ? elementwise_strides(like) : contiguous_strides(like);
    const auto in_order = [&](const Tensor& t, const TensorInfo& info) {
        return same_strides(info.strides, strides.data(), info.sizes, info.dim)
                   ? t
                   : copy_with_strides(t, info, strides.data());
    };
    const Tensor dout_flat = in_order(dout, di);
    std::optional<Tensor> x_flat, residual_flat;
    if (recompute) {
        x_flat = in_order(*x, xi);
        residual_flat = in_order(*residual, ri);
    }
    Tensor dx = empty_cpu(di.sizes, strides.data(), di.dim, di.dtype);
    AddActBwdArgs p{};
    p.dout = tensor_info(dout_flat).data;
    p.mask = from_mask ? mi.as<uint8_t>() : nullptr;
    p.x = recompute ? tensor_info(*x_flat).data : nullptr;
    p.residual = recompute ? tensor_info(*residual_flat).data : nullptr;
    p.dx = tensor_info(dx).data;
    p.n = di.numel;
    p.alpha = alpha;
    p.slope = negative_slope;
    p.streaming = streams(di.numel * dtype_size(di.dtype));
    backward_all(di.dtype, act, p);
    return dx;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) {
    m.impl("add_act", TORCH_BOX(&add_act_fwd_cpu));
    m.impl("add3_act", TORCH_BOX(&add3_act_fwd_cpu));
    m.impl("add_act_bwd", TORCH_BOX(&add_act_bwd_cpu));
}

}  // namespace dl4ds
