// CUDA launchers of bn_act: out = act(weight * (x - mean) * rstd + bias [+ residual]) and its gradient.
// Raw device pointers and sizes only, so that the same code runs on a GPU and in the simulator.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/geometry.h"

namespace dl4ds {

struct BnActFwdParams {
    DType dtype = DType::kFloat32;  // of x, residual and out; the accumulator type follows from it
    bool channels_last = false;     // layout of out, which is dense
    Dims size;
    Dims x_strides, residual_strides;
    const void* x = nullptr;
    const void* residual = nullptr;  // null: none
    ChannelVector weight, bias, running_mean, running_var;
    bool training = false;  // false: normalise with the running statistics; then out may be x itself
    bool eps_std = false;   // rstd = 1 / (sqrt(var) + eps) instead of 1 / sqrt(var + eps)
    double momentum = 0.1, eps = 1e-5;
    Activation activation = Activation::kNone;
    double negative_slope = 0;
    void* out = nullptr;      // null, in training: the statistics alone
    uint8_t* mask = nullptr;  // null: not wanted; else ceil(numel / 8) bytes, bits in memory order of out
    // Training only: (C,) in the accumulator type; new running statistics in the dtype of the old, or null.
    void* mean = nullptr;
    void* rstd = nullptr;
    void* new_running_mean = nullptr;
    void* new_running_var = nullptr;
    // Not null, in training (not fp64): x's moments are known, from the convolution that made x. Per part its
    // channels' means and sums of squared deviations, [parts][2][C], then its values per channel, [parts].
    const float* moments = nullptr;
    int64_t moments_parts = 0;
    void* workspace = nullptr;  // bn_act_fwd_workspace() bytes, 16-byte aligned
};

enum class BnActBwdSteps : int { kAll = 0, kSums = 1, kElements = 2 };

struct BnActBwdParams {
    DType dtype = DType::kFloat32;
    bool channels_last = false;  // layout of dx and dresidual, and the order of the mask's bits
    Dims size;
    Dims dout_strides, x_strides, residual_strides;
    const void* dout = nullptr;
    const void* x = nullptr;
    const void* residual = nullptr;  // read only where z is recomputed, so not with a mask
    const uint8_t* mask = nullptr;
    ChannelVector weight, bias;
    const void* mean = nullptr;  // (C,) in the accumulator type
    const void* rstd = nullptr;
    bool training = false, eps_std = false;
    double eps = 1e-5;
    Activation activation = Activation::kNone;
    double negative_slope = 0;
    void* dx = nullptr;  // null: not wanted; the same for the next three
    void* dresidual = nullptr;
    void* dweight = nullptr;  // (C,) in the accumulator type, both or none
    void* dbias = nullptr;
    void* workspace = nullptr;  // bn_act_bwd_workspace() bytes, 16-byte aligned
    // For a convolution that takes the sums itself, in two calls. kSums: from its partial sums (fp32,
    // [sums_parts][2][C]) only the table and dweight, dbias; kElements: from the table only dx and dresidual.
    // In both the same sizes, layout and alignment of the maps.
    BnActBwdSteps steps = BnActBwdSteps::kAll;
    const float* sums = nullptr;
    int64_t sums_parts = 0;
    void* table = nullptr;  // bn_act_bwd_table() accumulators, 16-byte aligned
};

/// True if the kernels can read the operands as they lie; otherwise the caller passes dense copies.
bool bn_act_fwd_reads(const BnActFwdParams& params);
bool bn_act_bwd_reads(const BnActBwdParams& params);

/// Bytes of workspace for these sizes and flags (0: none); pointers are not looked at, save for null.
int64_t bn_act_fwd_workspace(const BnActFwdParams& params);
int64_t bn_act_bwd_workspace(const BnActBwdParams& params);

/// Values of BnActBwdParams::table.
constexpr int64_t bn_act_bwd_table(int64_t channels) { return 4 * ((channels + 3) / 4 * 4); }

/// Enqueues the kernels on a cudaStream_t and returns a cudaError_t as int (0: success). Nothing to do is
/// fine.
int launch_bn_act_fwd(const BnActFwdParams& params, void* stream);
int launch_bn_act_bwd(const BnActBwdParams& params, void* stream);

}  // namespace dl4ds
