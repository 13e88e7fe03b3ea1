// How the host side of conv_bn_act on CUDA decides between the fused kernel and the library's convolution
// with bn_act's pass over its output, and says why.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
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

/// DL4DS_AUTOTUNE=1: choices by timing, which the Python side makes and keeps.
bool conv_autotune();

/// Asks the Python side (dl4ds_kernels/_cuda_autotune.py) for the way of a call: -1: the model's; 0: what the
/// kernel replaces; else the kernel, as the question's numbers say (dl4ds_kernels/_cuda_candidates.py). It
/// may time the candidates first, by calls that come here again.
int64_t conv_measured(const char* question, const std::vector<int64_t>& call);

/// What the fused kernel does beside convolving.
struct ConvWay {
    bool stats = false;     // batch statistics of the output (training), whatever the activation behind it
    bool prologue = false;  // BatchNorm and in_activation of the input
    Activation in_activation = Activation::kRelu;
    bool epilogue = true;  // BatchNorm of the output; only a prologue goes without
    bool measure = true;   // with DL4DS_AUTOTUNE=1: candidates may be timed
};

/// The route of a call. Sizes that do not fit each other go to the library, which says what is wrong.
ConvRoute conv_route(const TensorInfo& x, const TensorInfo& weight, bool residual,
                     const ConvGeometry& geometry, Activation activation, const ConvWay& way = {});

/// The route for dk.explain: reason, tile, slices, modelled nanoseconds of the fused kernel and of the other
/// way.
inline std::vector<int64_t> route_answer(const ConvRoute& route) {
    return {route.reason, static_cast<int64_t>(route.choice.tile), route.choice.slices,
            static_cast<int64_t>(1e3 * route.choice.fused_us),
            static_cast<int64_t>(1e3 * route.choice.library_us)};
}

/// aten::convolution (not transposed).
Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const ConvGeometry& geometry);

/// Throws unless the residual is there and fits, or is not there.
void check_residual(const char* op, const Operand& residual, const TensorInfo& out);

/// As the fused kernels read it: dense channels last on a 16-byte boundary, a copy where it is not.
void make_dense(Operand& t);

/// The filter as the fused kernels read it: as cuDNN would copy it; a channels_last model has no copy to
/// make.
Operand dense_filter(const Tensor& weight);

/// The vectors of the BatchNorm behind the convolution (mean: none for no BatchNorm) and the activation.
struct ConvBehind {
    std::optional<Tensor> mean, var, weight, bias;
    double eps;
    bool eps_std;
    Activation activation;
    double negative_slope;
};

/// The vectors of a convolution and of the BatchNorm behind it as the kernels read them: copies of those that
/// have gaps.
struct ConvVectors {
    Operand conv_bias, mean, var, weight, bias;

    /// suffix: what the arguments' names end in.
    ConvVectors(const char* op, const char* suffix, const std::optional<Tensor>& cb, const ConvBehind& v,
                const TensorInfo& out) {
        const auto operand = [&](const char* name, const std::optional<Tensor>& t) {
            return channel_operand(op, (name + std::string(suffix)).c_str(), t, out);
        };
        conv_bias = operand("bias", cb);
        mean = operand("running_mean", v.mean);
        var = operand("running_var", v.var);
        weight = operand("bn_weight", v.weight);
        bias = operand("bn_bias", v.bias);
    }

    void fill(ConvBnActFwdParams& p, const ConvBehind& v) const {
        p.conv_bias = channel_vector(conv_bias);
        p.running_mean = channel_vector(mean);
        p.running_var = channel_vector(var);
        p.bn_weight = channel_vector(weight);
        p.bn_bias = channel_vector(bias);
        p.eps_std = v.eps_std;
        p.eps = v.eps;
        p.activation = v.activation;
        p.negative_slope = v.negative_slope;
    }
};

/// Runs the fused kernel as the route says. params: its own, with what a prologue needs filled in.
Tensor by_fused_kernel(const char* op, const CudaScope& scope, ConvBnActFwdParams& params,
                       const TensorInfo& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const ConvBehind& behind);

/// The op conv_bn_act.
Tensor conv_bn_act_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor running_mean,
                        Tensor running_var, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias,
                        std::optional<Tensor> residual, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        double eps, bool eps_std, int64_t activation, double negative_slope);

}  // namespace dl4ds
