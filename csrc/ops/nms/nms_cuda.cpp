// nms, batched_nms and nms_padded on CUDA. The op contracts are in dl4ds_kernels/ops/nms.py.
//
// nms_padded never waits for the GPU. The other two wait once, for the size of their result.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cuda/host.h"
#include "ops/nms/nms.h"
#include "ops/nms/nms_host.h"

namespace dl4ds {
namespace {

void check_device(const char* op, const char* name, const TensorInfo& t, const TensorInfo& boxes) {
    DL4DS_CHECK(t.device_type == aoti_torch_device_type_cuda() && t.device_index == boxes.device_index, op,
                ": ", name, ": expected the CUDA device of boxes");
}

/// Checks, and runs the kernels on (batch, count) boxes; keep (batch, max_output) and kept (batch,) are
/// filled.
void solve(const char* op, const Tensor& boxes_tensor, const Tensor& scores_tensor,
           const std::optional<Tensor>& classes_tensor, NmsFwdParams p, const Tensor& keep,
           const Tensor& kept) {
    // No copies where they are contiguous; else they stay alive until the launches are queued, as do the
    // workspace's bytes: the caching allocator hands memory on in the order of the stream.
    const Tensor boxes = torch::stable::contiguous(boxes_tensor),
                 scores = torch::stable::contiguous(scores_tensor);
    const TensorInfo info = tensor_info(boxes);
    check_device(op, "boxes", info, info);
    check_device(op, "scores", tensor_info(scores), info);
    std::optional<Tensor> classes;
    if (classes_tensor) {
        classes = torch::stable::contiguous(*classes_tensor);
        check_device(op, "classes", tensor_info(*classes), info);
    }
    const CudaScope scope(info);
    p.dtype = info.dtype;
    p.boxes = info.data;
    p.scores = tensor_info(scores).data;
    p.classes = classes ? tensor_info(*classes).as<int64_t>() : nullptr;
    const Tensor workspace = empty_vector_cuda(info, nms_fwd_workspace(p), DType::kUInt8);
    p.workspace = tensor_info(workspace).data;
    p.keep = tensor_info(keep).as<int64_t>();
    p.kept = tensor_info(kept).as<int64_t>();
    check_launch(launch_nms_fwd(p, scope.stream()), op);
}

Tensor solve_one(const char* op, const Tensor& boxes, const Tensor& scores,
                 const std::optional<Tensor>& classes, double iou_threshold) {
    const TensorInfo info = tensor_info(boxes), score_info = tensor_info(scores);
    nms::check_boxes(op, info, score_info, 0);
    if (classes) {
        nms::check_classes(op, *classes, score_info);
    }
    const int64_t count = score_info.numel;
    const Tensor keep = nms::new_indices(boxes, {count});
    if (count == 0) {
        return keep;
    }
    const Tensor kept = nms::new_indices(boxes, {1});
    NmsFwdParams p;
    p.batch = 1;
    p.count = p.max_output = count;
    p.iou_threshold = iou_threshold;
    solve(op, boxes, scores, classes, p, keep, kept);
    int64_t size = 0;
    shim_check(aoti_torch_item_int64(kept.get(), &size), "item");
    const Tensor part = torch::stable::narrow(const_cast<Tensor&>(keep), 0, 0, size);
    return 2 * size < count ? torch::stable::clone(part) : part;  // don't hold much memory for few indices
}

}  // namespace

Tensor nms_cuda(Tensor boxes, Tensor scores, double iou_threshold) {
    return solve_one("nms", boxes, scores, std::nullopt, iou_threshold);
}

Tensor batched_nms_cuda(Tensor boxes, Tensor scores, Tensor idxs, double iou_threshold) {
    return solve_one("batched_nms", boxes, scores, idxs, iou_threshold);
}

std::tuple<Tensor, Tensor> nms_padded_cuda(Tensor boxes, Tensor scores, std::optional<Tensor> class_ids,
                                           double iou_threshold, double score_threshold, int64_t max_output) {
    const char* op = "nms_padded";
    const TensorInfo info = tensor_info(boxes), score_info = tensor_info(scores);
    nms::check_boxes(op, info, score_info, 1);
    if (class_ids) {
        nms::check_classes(op, *class_ids, score_info);
    }
    nms::check_max_output(op, max_output);
    NmsFwdParams p;
    p.batch = info.sizes[0];
    p.count = info.sizes[1];
    p.max_output = max_output;
    p.iou_threshold = iou_threshold;
    p.filter = true;
    p.score_threshold = score_threshold;
    Tensor keep = nms::new_indices(boxes, {p.batch, max_output}), kept = nms::new_indices(boxes, {p.batch});
    if (p.batch > 0) {
        solve(op, boxes, scores, class_ids, p, keep, kept);
    }
    return {keep, kept};
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CUDA, m) {
    m.impl("nms", TORCH_BOX(&nms_cuda));
    m.impl("batched_nms", TORCH_BOX(&batched_nms_cuda));
    m.impl("nms_padded", TORCH_BOX(&nms_padded_cuda));
}

}  // namespace dl4ds
