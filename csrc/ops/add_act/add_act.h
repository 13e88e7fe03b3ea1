// CUDA launchers of add_act: out = act(alpha * (x + residual)) and its gradient, over memory in one order.
// out may be x or residual.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace dl4ds {

struct AddActFwdParams {
    DType dtype = DType::kFloat32;
    int64_t numel = 0;
    const void* x = nullptr;
    const void* residual = nullptr;  // null: out = act(alpha * x)
    double alpha = 1;
    Activation activation = Activation::kNone;
    double negative_slope = 0;
    void* out = nullptr;
    uint8_t* mask = nullptr;  // null: not wanted; else ceil(numel / 8) bytes
};

struct AddActBwdParams {
    DType dtype = DType::kFloat32;
    int64_t numel = 0;
    const void* dout = nullptr;
    const uint8_t* mask = nullptr;  // null: recompute from x and residual, if there is an activation
    const void* x = nullptr;
    const void* residual = nullptr;
    double alpha = 1;
    Activation activation = Activation::kNone;
    double negative_slope = 0;
    void* dx = nullptr;
};

/// Enqueues the kernel on a cudaStream_t and returns a cudaError_t as int (0: success).
int launch_add_act_fwd(const AddActFwdParams& params, void* stream);
int launch_add_act_bwd(const AddActBwdParams& params, void* stream);

}  // namespace dl4ds
