// CUDA launcher of NMS: for every image the kept boxes by descending score, as a row of indices padded with
// -1, and their count. No launch depends on data, so nothing waits for the GPU. (CPU: nms_segment.h.)
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace dl4ds {

struct NmsFwdParams {
    DType dtype = DType::kFloat32;
    int64_t batch = 0;
    int64_t count = 0;                 // boxes per image, below 2^31
    const void* boxes = nullptr;       // (batch, count, 4) as (x1, y1, x2, y2), contiguous
    const void* scores = nullptr;      // (batch, count)
    const int64_t* classes = nullptr;  // (batch, count); null: all of one class
    double iou_threshold = 0;
    bool filter = false;  // only boxes that score above score_threshold take part
    double score_threshold = 0;
    int64_t max_output = 0;
    int64_t* keep = nullptr;    // (batch, max_output)
    int64_t* kept = nullptr;    // (batch,)
    void* workspace = nullptr;  // nms_fwd_workspace() bytes, 16-byte aligned
};

/// Bytes of workspace: O(batch * count); see nms_plan.cuh.
int64_t nms_fwd_workspace(const NmsFwdParams& params);

/// How many kernels launch_nms_fwd enqueues for these sizes.
int nms_fwd_launches(const NmsFwdParams& params);

/// Enqueues the kernels on a cudaStream_t and returns a cudaError_t as int (0: success).
int launch_nms_fwd(const NmsFwdParams& params, void* stream);

}  // namespace dl4ds
