// What the CPU and the CUDA host functions of NMS share: argument checks and index tensors. Includes torch's
// stable headers, so never include it from a .cu or .cuh file.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>

#include "common/layout.h"

namespace dl4ds::nms {

constexpr int64_t kMaxBoxes = int64_t{1} << 31;  // indices are 32 bits wide inside

inline void check_boxes(const char* op, const TensorInfo& boxes, const TensorInfo& scores,
                        int64_t batch_dims) {
    DL4DS_CHECK(is_floating(boxes.dtype), op, ": boxes: not implemented for ", dtype_name(boxes.dtype),
                "; expected float32, float64, float16 or bfloat16");
    const bool dims = boxes.dim == batch_dims + 2 && scores.dim == batch_dims + 1;
    DL4DS_CHECK(dims && boxes.sizes[boxes.dim - 1] == 4, op, ": boxes: expected shape ",
                batch_dims ? "(B, N, 4)" : "(N, 4)", " with scores ", batch_dims ? "(B, N)" : "(N,)",
                ", got ", boxes.shape(), " and ", scores.shape());
    DL4DS_CHECK(boxes.numel == 4 * scores.numel && boxes.sizes[0] == scores.sizes[0], op,
                ": scores: expected one per box ", boxes.shape(), ", got ", scores.shape());
    DL4DS_CHECK(boxes.dtype == scores.dtype, op, ": scores: expected dtype ", dtype_name(boxes.dtype),
                " like boxes, got ", dtype_name(scores.dtype));
    DL4DS_CHECK(boxes.sizes[batch_dims] < kMaxBoxes, op, ": boxes: expected fewer than 2^31, got ",
                boxes.sizes[batch_dims]);
}

inline void check_classes(const char* op, const Tensor& classes, const TensorInfo& scores) {
    const TensorInfo info = tensor_info(classes);
    DL4DS_CHECK(info.dim == scores.dim && std::equal(info.sizes, info.sizes + info.dim, scores.sizes), op,
                ": classes: expected the shape of scores ", scores.shape(), ", got ", info.shape());
    int32_t dtype = 0;
    shim_check(aoti_torch_get_dtype(classes.get(), &dtype), "get_dtype");
    DL4DS_CHECK(dtype == aoti_torch_dtype_int64(), op, ": classes: expected dtype int64");
}

inline void check_max_output(const char* op, int64_t max_output) {
    DL4DS_CHECK(max_output >= 0, op, ": max_output: expected at least 0, got ", max_output);
}

inline Tensor new_indices(const Tensor& like, std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(like,
                                    torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()),
                                    torch::headeronly::ScalarType::Long);
}

}  // namespace dl4ds::nms
