// The fused convolution's launcher: what it refuses, its workspace, and the choice of the element type.
#include <algorithm>
#include <atomic>

#include "common/cuda/launch.cuh"
#include "ops/conv_bn_act/conv_bn_act_instances.h"

namespace dl4ds {

bool conv_bn_act_fused() { return DL4DS_HAVE_CUTLASS != 0; }

int conv_bn_act_architecture() {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];  // 0: not asked yet
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device < 0) {
        return 0;
    }
    if (device < kDevices && known[device].load(std::memory_order_relaxed) != 0) {
        return known[device].load(std::memory_order_relaxed);
    }
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        return 0;
    }
    if (device < kDevices) {
        known[device].store(10 * major + minor, std::memory_order_relaxed);
    }
    return 10 * major + minor;
}

namespace {

ConvRefusal prologue_refusal(const ConvBnActFwdParams& p) {
    // A pixel of padding is zero behind the prologue; the copies' zeros would go through it.
    if (p.kernel_h != 1 || p.kernel_w != 1 || p.pad_h != 0 || p.pad_w != 0 || p.slices > 1 ||
        p.moments != nullptr) {
        return ConvRefusal::kPrologue;
    }
    if (p.in_activation != Activation::kRelu) {
        return ConvRefusal::kInputActivation;
    }
    return p.channels > kConvTable ? ConvRefusal::kInputChannels : ConvRefusal::kNone;
}

}  // namespace

ConvRefusal conv_bn_act_fwd_refusal(const ConvBnActFwdParams& p) {
    if (!conv_bn_act_fused()) {
        return ConvRefusal::kNotCompiled;
    }
    if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat32) {
        return ConvRefusal::kDType;
    }
    const int64_t rows = p.batch * p.height_out * p.width_out;
    if (rows <= 0 || p.channels <= 0 || p.channels_out <= 0 || p.kernel_h <= 0 || p.kernel_w <= 0) {
        return ConvRefusal::kEmpty;
    }
    // Rows of the last tile are numbered too; strides and sizes are ints, products of them are not.
    const int64_t largest = std::max({rows + 128, p.channels_out + 128, p.batch * p.x_stride_n,
                                      p.channels_out * p.kernel_h * p.kernel_w * p.channels});
    if (largest > INT32_MAX) {
        return ConvRefusal::kTooLarge;
    }
    const int64_t vec = 16 / dtype_size(p.dtype);
    if (p.channels % vec != 0) {
        return ConvRefusal::kChannels;
    }
    const bool strides = p.x_stride_n % vec == 0 && p.x_stride_h % vec == 0 && p.x_stride_w % vec == 0;
    if (!strides || !aligned16(p.x) || !aligned16(p.weight) || !aligned16(p.workspace)) {
        return ConvRefusal::kAddresses;
    }
    if (p.kernel_h > 32 || p.kernel_w > 32) {
        return ConvRefusal::kFilter;
    }
    if (p.activation != Activation::kNone && p.activation != Activation::kRelu &&
        p.activation != Activation::kLeakyRelu && p.activation != Activation::kRelu6) {
        return ConvRefusal::kActivation;
    }
    const bool vectors = p.channels_out % vec == 0 && aligned16(p.out) && aligned16(p.residual);
    if (p.tile != ConvTile::k64x64 && (!vectors || p.slices > 1)) {
        return ConvRefusal::kTile;
    }
    if (p.moments != nullptr && p.slices > 1) {
        return ConvRefusal::kTile;
    }
    return p.prologue ? prologue_refusal(p) : ConvRefusal::kNone;
}

int64_t conv_bn_act_parts(const ConvBnActFwdParams& p) {
    return ceil_div(p.batch * p.height_out * p.width_out, p.tile == ConvTile::k64x64 ? 64 : 128);
}

int64_t conv_bn_act_moments(const ConvBnActFwdParams& p) {
    return conv_bn_act_parts(p) * (2 * p.channels_out + 1);
}

int64_t conv_bn_act_fwd_workspace(const ConvBnActFwdParams& p) {
    if (p.slices <= 1) {
        return 0;
    }
    const int64_t tiles = ceil_div(p.batch * p.height_out * p.width_out, 64) * ceil_div(p.channels_out, 64);
    return p.slices * tiles * 64 * 64 * static_cast<int64_t>(sizeof(float));
}

int launch_conv_bn_act_fwd(const ConvBnActFwdParams& p, void* stream) {
    const ConvRefusal refusal = conv_bn_act_fwd_refusal(p);
    if (refusal == ConvRefusal::kEmpty && p.batch * p.height_out * p.width_out * p.channels_out == 0) {
        return 0;
    }
    if (refusal != ConvRefusal::kNone || p.slices < 1 || (p.slices > 1 && p.workspace == nullptr)) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    const auto one_of = [&](auto forward, auto stats, auto prologue) {
        return (p.prologue ? prologue : p.moments != nullptr ? stats : forward)(p, stream);
    };
    switch (p.dtype) {
        case DType::kFloat16:
            return one_of(launch_conv_float16, launch_conv_stats_float16, launch_conv_prologue_float16);
        case DType::kBFloat16:
            return one_of(launch_conv_bfloat16, launch_conv_stats_bfloat16, launch_conv_prologue_bfloat16);
        default:
            return one_of(launch_conv_float32, launch_conv_stats_float32, launch_conv_prologue_float32);
    }
}

}  // namespace dl4ds
