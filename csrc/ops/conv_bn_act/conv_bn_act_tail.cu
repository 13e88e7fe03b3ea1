// The launcher of a bottleneck block's end in one kernel: what it refuses, and the choice of the element
// type.
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "ops/conv_bn_act/conv_bn_act_tail.h"

namespace dl4ds {

int launch_conv_tail_float16(const ConvTailParams& params, void* stream);
int launch_conv_tail_bfloat16(const ConvTailParams& params, void* stream);
int launch_conv_tail_float32(const ConvTailParams& params, void* stream);

int conv_bn_act_tail_refusal(const ConvTailParams& p) {
    const ConvBnActFwdParams &a = p.first, &b = p.second;
    if (const ConvRefusal why = conv_bn_act_fwd_refusal(a); why != ConvRefusal::kNone) {
        return static_cast<int>(why);
    }
    if (a.channels_out != kTailMiddle) {
        return static_cast<int>(ConvTailReason::kMiddle);
    }
    const bool follows = b.dtype == a.dtype && b.batch == a.batch && b.channels == a.channels_out &&
                         b.height == a.height_out && b.width == a.width_out;
    const bool pointwise = b.kernel_h == 1 && b.kernel_w == 1 && b.pad_h == 0 && b.pad_w == 0 &&
                           b.stride_h == 1 && b.stride_w == 1;
    const bool plain = !a.prologue && !b.prologue && a.moments == nullptr && b.moments == nullptr;
    if (!follows || !pointwise || !plain || b.height_out != b.height || b.width_out != b.width) {
        return static_cast<int>(ConvTailReason::kPointwise);
    }
    if (const ConvRefusal why = conv_bn_act_fwd_refusal(b); why != ConvRefusal::kNone) {
        return static_cast<int>(why);
    }
    const bool vectors = b.channels_out % (16 / dtype_size(b.dtype)) == 0;
    if (!vectors || b.channels_out > kTailColumns || !aligned16(b.out) || !aligned16(b.residual)) {
        return static_cast<int>(ConvTailReason::kColumns);
    }
    return 0;
}

int launch_conv_bn_act_tail(const ConvTailParams& p, void* stream) {
    const int64_t chunks = ceil_div(p.second.channels_out, kTailChunk);
    if (conv_bn_act_tail_refusal(p) != 0 || p.first.slices != 1 || p.parts < 1 || p.parts > chunks) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    switch (p.first.dtype) {
        case DType::kFloat16:
            return launch_conv_tail_float16(p, stream);
        case DType::kBFloat16:
            return launch_conv_tail_bfloat16(p, stream);
        default:
            return launch_conv_tail_float32(p, stream);
    }
}

}  // namespace dl4ds
