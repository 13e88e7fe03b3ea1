// The route of a CUDA convolution layer: what the fused kernel can serve, and what the model says of the
// rest.
#include "ops/conv_bn_act/conv_bn_act_cuda.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_bn_act";

int code(ConvReason reason) { return static_cast<int>(reason); }

int64_t out_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t span = in + 2 * pad - dilation * (kernel - 1) - 1;
    return span < 0 || stride < 1 ? 0 : span / stride + 1;
}

}  // namespace

bool conv_autotune() {
    const char* value = std::getenv("DL4DS_AUTOTUNE");
    return value != nullptr && std::strcmp(value, "1") == 0;
}

int64_t conv_measured(const char* question, const std::vector<int64_t>& call) {
    using torch::stable::detail::from;
    StableIValue stack[1] = {from(call)};
    const std::string name = std::string("dl4ds_kernels::") + question;
    shim_check(torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION), name.c_str());
    return torch::stable::detail::to<int64_t>(stack[0]);
}

ConvRoute conv_route(const TensorInfo& x, const TensorInfo& weight, bool residual, const ConvGeometry& g,
                     Activation activation, const ConvWay& way) {
    ConvRoute route;
    const auto library = [&](ConvReason reason) {
        route.reason = code(reason);
        return route;
    };
    const ConvWish wish = conv_wish(kOp);
    if (wish == ConvWish::kLibrary) {
        return library(ConvReason::kAskedFor);
    }
    const bool pairs = g.stride.size() == 2 && g.padding.size() == 2 && g.dilation.size() == 2;
    if (x.dim != 4 || weight.dim != 4 || !pairs) {
        return library(ConvReason::kRank);
    }
    if (g.groups != 1) {
        return library(ConvReason::kGroups);
    }
    if (suggest_format(x) != Format::kChannelsLast || (x.strides[1] != 1 && x.sizes[1] > 1)) {
        return library(ConvReason::kLayout);
    }
    ConvBnActFwdParams& p = route.params;
    p.dtype = x.dtype;
    p.batch = x.sizes[0], p.channels = x.sizes[1], p.height = x.sizes[2], p.width = x.sizes[3];
    p.channels_out = weight.sizes[0], p.kernel_h = weight.sizes[2], p.kernel_w = weight.sizes[3];
    p.stride_h = g.stride[0], p.stride_w = g.stride[1], p.pad_h = g.padding[0], p.pad_w = g.padding[1];
    p.dilation_h = g.dilation[0], p.dilation_w = g.dilation[1];
    p.height_out = out_size(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
    p.width_out = out_size(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
    const bool odd =
        weight.sizes[1] != p.channels || p.pad_h < 0 || p.pad_w < 0 || p.dilation_h < 1 || p.dilation_w < 1;
    route.reason = static_cast<int>(odd ? ConvRefusal::kEmpty : ConvRefusal::kNone);
    if (weight.dtype != x.dtype) {
        route.reason = static_cast<int>(ConvRefusal::kDType);
    }
    // The stride of a dimension of size 1 says nothing.
    p.x_stride_w = p.width > 1 ? x.strides[3] : p.channels;
    p.x_stride_h = p.height > 1 ? x.strides[2] : p.width * p.x_stride_w;
    p.x_stride_n = p.batch > 1 ? x.strides[0] : p.height * p.x_stride_h;
    p.x = x.data;
    p.activation = way.stats ? Activation::kNone : activation;
    p.prologue = way.prologue;
    p.in_activation = way.in_activation;
    p.tile = ConvTile::k64x64;  // for now: the one that serves any sizes
    if (route.reason == 0) {
        route.reason = static_cast<int>(conv_bn_act_fwd_refusal(p));
    }
    if (route.reason != 0) {
        return route;
    }
    const int architecture = conv_bn_act_architecture();
    if (architecture < 80) {
        return library(ConvReason::kArchitecture);
    }
    if (p.dtype == DType::kFloat32 && !conv_tf32_allowed()) {
        return library(ConvReason::kNoTf32);
    }
    const int64_t rows = p.batch * p.height_out * p.width_out, pixels = p.batch * p.height * p.width;
    route.choice = way.prologue ? choose_prologue_conv(architecture, p.dtype, rows, p.channels_out,
                                                       p.channels, pixels, residual, way.epilogue)
                                : choose_conv(architecture, p.dtype, rows, p.channels_out, p.channels,
                                              p.kernel_h * p.kernel_w, pixels, residual, way.stats);
    p.tile = route.choice.tile;
    p.slices = route.choice.slices;
    if (wish == ConvWish::kAuto && !way.prologue && way.measure && conv_autotune()) {
        const int64_t code = conv_measured(
            "conv_bn_act_measured", {architecture, static_cast<int64_t>(p.dtype), way.stats, residual,
                                     static_cast<int64_t>(p.activation), p.batch, p.channels, p.height,
                                     p.width, p.channels_out, p.kernel_h, p.kernel_w, p.stride_h, p.stride_w,
                                     p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, p.slices});
        if (code == 0) {
            return library(ConvReason::kModel);
        }
        if (code > 0) {
            p.tile = route.choice.tile = static_cast<ConvTile>((code - 1) % 4);
            p.slices = route.choice.slices = static_cast<int>(1 + (code - 1) / 4);
            return route;
        }
    }
    if (!route.choice.fused && wish != ConvWish::kFused) {
        return library(ConvReason::kModel);
    }
    return route;
}

}  // namespace dl4ds
