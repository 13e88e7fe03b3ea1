// CUDA launchers of bn_act_pair, the end of a residual block whose shortcut has a BatchNorm of its own:
// out = act(bn(x) + bn(residual)) with statistics that are known, and the gradients of both inputs from one
// read of dout. Raw device pointers and sizes only, so that the same code runs on a GPU and in the simulator.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/geometry.h"

namespace dl4ds {

/// A BatchNorm in training. mean, rstd: (C,) floats; weight, bias: (C,) of any floating type, or null.
struct BnPairNorm {
    const float* mean = nullptr;
    const float* rstd = nullptr;
    ChannelVector weight, bias;
    // Backward only: what belongs to rstd, and sum dz * (x - mean) * rstd, (C,) floats.
    double eps = 1e-5;
    bool eps_std = false;
    const float* dweight = nullptr;
};

/// Every map is dense in one memory order (channels_last or not) and begins at a multiple of 16 bytes.
struct BnActPairFwdParams {
    DType dtype = DType::kFloat32;  // not fp64
    bool channels_last = false;
    Dims size;
    const void *x = nullptr, *residual = nullptr;
    BnPairNorm norm, residual_norm;
    Activation activation = Activation::kNone;  // none, relu, leaky_relu, relu6
    double negative_slope = 0;
    void* out = nullptr;
    uint8_t* mask = nullptr;    // null: not wanted; else ceil(numel / 8) bytes, bits in memory order
    void* workspace = nullptr;  // bn_act_pair_fwd_workspace() bytes, 16-byte aligned
};

struct BnActPairBwdParams {
    DType dtype = DType::kFloat32;
    bool channels_last = false;
    Dims size;
    const void *dout = nullptr, *x = nullptr, *residual = nullptr;
    const uint8_t* mask = nullptr;  // null: no activation
    BnPairNorm norm, residual_norm;
    const float* dbias = nullptr;  // (C,) sum dz, of both
    Activation activation = Activation::kNone;
    double negative_slope = 0;
    void *dx = nullptr, *dresidual = nullptr;
    void* workspace = nullptr;  // bn_act_pair_bwd_workspace() bytes, 16-byte aligned
};

/// The sums of the gradients over batch and places, of both BatchNorms from one read of dout and its bits.
struct BnActPairSumsParams {
    DType dtype = DType::kFloat32;
    bool channels_last = false;
    Dims size;
    const void *dout = nullptr, *x = nullptr, *residual = nullptr;
    const uint8_t* mask = nullptr;  // null: no activation
    // (C,) floats each, mean and rstd of x and of the residual.
    const float *mean = nullptr, *rstd = nullptr, *residual_mean = nullptr, *residual_rstd = nullptr;
    Activation activation = Activation::kNone;
    double negative_slope = 0;
    // (C,) floats: sum dz * (x - mean) * rstd, the same of the residual, sum dz.
    float *dweight = nullptr, *residual_dweight = nullptr, *dbias = nullptr;
    void* workspace = nullptr;  // bn_act_pair_sums_workspace() bytes, 16-byte aligned
    // Not null: another kernel has taken the sums of sums_parts parts, in fp32, [parts][3][C]: over dz,
    // dz * (x - mean) and dz * (residual - residual_mean). They are finished; no map is read.
    const float* sums = nullptr;
    int64_t sums_parts = 0;
};

/// Whether the kernels have 16-byte vectors for these sizes: of channels (a multiple of 16 bytes), or in NCHW
/// order of planes (at least 16 bytes).
constexpr bool bn_act_pair_serves(DType dtype, bool channels_last, const Dims& size) {
    const int64_t vec = dtype == DType::kFloat64 ? 0 : 16 / dtype_size(dtype);
    return vec > 0 && size.c <= INT32_MAX / 16 && size.plane() <= INT32_MAX - 64 &&
           (channels_last ? size.c % vec == 0 : size.plane() >= vec);
}

/// Bytes of the tables of coefficients.
constexpr int64_t bn_act_pair_fwd_workspace(const BnActPairFwdParams& p) { return 16 * p.size.c; }
constexpr int64_t bn_act_pair_bwd_workspace(const BnActPairBwdParams& p) { return 32 * p.size.c; }

/// Bytes of the partial sums.
int64_t bn_act_pair_sums_workspace(const BnActPairSumsParams& params);

/// Enqueues the kernels on a cudaStream_t and returns a cudaError_t as int (0: success).
int launch_bn_act_pair_fwd(const BnActPairFwdParams& params, void* stream);
int launch_bn_act_pair_bwd(const BnActPairBwdParams& params, void* stream);
int launch_bn_act_pair_sums(const BnActPairSumsParams& params, void* stream);

}  // namespace dl4ds
