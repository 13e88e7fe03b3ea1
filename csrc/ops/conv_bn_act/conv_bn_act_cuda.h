// How the host side of conv_bn_act on CUDA decides between the fused kernel and the library's convolution
// with bn_act's pass over its output, and says why.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/cuda/host.h"
#include "ops/conv_bn_act/conv_bn_act_plan.h"

namespace dl4ds {

/// Reasons for the library beside those of the launcher (ConvRefusal, below 16). The codes are those of
/// dl4ds_kernels/_cuda_conv.py.
enum class ConvReason : int {
    kFused = 0,
    kAskedFor = 16,      // DL4DS_CUDA_CONV=library
    kArchitecture = 17,  // before sm_80
    kRank = 18,          // not two spatial dimensions
    kGroups = 19,
    kLayout = 20,  // neither x nor weight is channels last
    kNoTf32 = 21,  // fp32, and torch.backends.cudnn does not allow TF32 in convolutions
    kModel = 22,   // expected to be no faster
};

struct ConvGeometry {
    std::vector<int64_t> stride, padding, dilation;
    int64_t groups = 1;
};

struct ConvRoute {
    int reason = 0;  // ConvReason or ConvRefusal; 0: the fused kernel
    ConvChoice choice;
    ConvBnActFwdParams params;  // sizes, strides of x, tile and slices
};

/// DL4DS_CUDA_CONV: auto (or unset), fused (wherever it can) or library.
enum class ConvWish { kAuto, kFused, kLibrary };

inline ConvWish conv_wish(const char* op) {
    const char* value = std::getenv("DL4DS_CUDA_CONV");
    if (value == nullptr || *value == '\0' || std::strcmp(value, "auto") == 0) {
        return ConvWish::kAuto;
    }
    const bool fused = std::strcmp(value, "fused") == 0;
    DL4DS_CHECK(fused || std::strcmp(value, "library") == 0, op,
                ": DL4DS_CUDA_CONV: expected auto, fused or library, got ", value);
    return fused ? ConvWish::kFused : ConvWish::kLibrary;
}

/// Whether fp32 convolutions may use TF32, as torch.backends.cudnn.conv.fp32_precision says: known to Python
/// only (no C shim tells it), so an op of the Python side is asked.
inline bool conv_tf32_allowed() {
    StableIValue stack[1] = {0};
    shim_check(torch_call_dispatcher("dl4ds_kernels::conv_tf32_allowed", "", stack, TORCH_ABI_VERSION),
               "dl4ds_kernels::conv_tf32_allowed");
    return torch::stable::detail::to<bool>(stack[0]);
}

/// The route of a call. Sizes that do not fit each other go to the library, which says what is wrong.
/// stats: of the convolution with batch statistics (training), whatever the activation behind it.
ConvRoute conv_route(const TensorInfo& x, const TensorInfo& weight, bool residual,
                     const ConvGeometry& geometry, Activation activation, bool stats = false);

}  // namespace dl4ds
