// act(x @ weight^T + bias) for a few rows: inference of the fully connected layers behind a convolutional
// network, fp32. The weight is read as it lies.
#include "ops/linear_act/linear_act_cpu.h"

#include <torch/csrc/stable/library.h>

#include "common/cpu/output.h"
#include "common/cpu/parallel.h"
#include "ops/bn_act/bn_act_host_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "linear_act";

Tensor contiguous(const Tensor& t, const TensorInfo& info) {
    return is_contiguous(info.sizes, info.strides, info.dim)
               ? t
               : copy_with_strides(t, info, contiguous_strides(info).data());
}

}  // namespace

Tensor linear_act_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t activation,
                      double negative_slope) {
    const TensorInfo wi = tensor_info(weight), given = tensor_info(x), bi = tensor_info(bias);
    check_dtype(kOp, "x", given, DType::kFloat32);
    check_dtype(kOp, "weight", wi, DType::kFloat32);
    DL4DS_CHECK(wi.dim == 2, kOp, ": weight: expected shape (out_features, in_features), got ", wi.shape());
    DL4DS_CHECK(given.dim == 2 && given.sizes[1] == wi.sizes[1], kOp, ": x: expected shape (rows, ",
                wi.sizes[1], "), got ", given.shape());
    if (bi.present) {
        check_dtype(kOp, "bias", bi, DType::kFloat32);
        DL4DS_CHECK(bi.dim == 1 && bi.sizes[0] == wi.sizes[0], kOp, ": bias: expected shape (", wi.sizes[0],
                    ",), got ", bi.shape());
    }
    const int64_t rows = given.sizes[0], outputs = wi.sizes[0], k = wi.sizes[1];
    const int64_t sizes[2] = {rows, outputs}, strides[2] = {outputs, 1};
    Tensor out = empty_cpu(sizes, strides, 2, DType::kFloat32);
    const Activation act = activation_from_code(kOp, activation);
    if (rows * outputs == 0) {
        return out;
    }
    const Tensor dense = contiguous(x, given), matrix = contiguous(weight, wi);
    const Tensor shift = bi.present ? contiguous(*bias, bi) : dense;
    const float* const from = tensor_info(dense).as<float>();
    const float* const w = tensor_info(matrix).as<float>();
    const float* const b = bi.present ? tensor_info(shift).as<float>() : nullptr;
    float* const to = tensor_info(out).as<float>();
    const auto run = linear_kernels().run;
    // Shares of outputs, not of k: a sum is made by one thread, in one order.
    constexpr int64_t kShare = 16;
    const int64_t shares = (outputs + kShare - 1) / kShare;
    parallel_for(shares, outputs * k * 4, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kShare, count = std::min(end * kShare, outputs) - first;
        for (int64_t row = 0; row < rows; row += kLinearMostRows) {
            run({from + row * k, std::min(kLinearMostRows, rows - row), w + first * k,
                 b == nullptr ? nullptr : b + first, count, k, to + row * outputs + first, outputs, act,
                 static_cast<float>(negative_slope)});
        }
    });
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) { m.impl("linear_act", TORCH_BOX(&linear_act_cpu)); }

}  // namespace dl4ds
