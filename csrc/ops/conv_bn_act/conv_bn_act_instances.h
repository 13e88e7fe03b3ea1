// The fused convolution's launchers, one for each element type and file, and whether they are compiled at
// all: CUTLASS' headers are needed for building (PyPI's nvidia-cutlass, or CUTLASS_PATH), not for running.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops/conv_bn_act/conv_bn_act.h"

#if __has_include("cutlass/cutlass.h")
#define DL4DS_HAVE_CUTLASS 1
#else
#define DL4DS_HAVE_CUTLASS 0
#endif

namespace dl4ds {

int launch_conv_float16(const ConvBnActFwdParams& params, void* stream);
int launch_conv_bfloat16(const ConvBnActFwdParams& params, void* stream);
int launch_conv_float32(const ConvBnActFwdParams& params, void* stream);

int launch_conv_prologue_float16(const ConvBnActFwdParams& params, void* stream);
int launch_conv_prologue_bfloat16(const ConvBnActFwdParams& params, void* stream);
int launch_conv_prologue_float32(const ConvBnActFwdParams& params, void* stream);

int launch_conv_stats_float16(const ConvBnActFwdParams& params, void* stream);
int launch_conv_stats_bfloat16(const ConvBnActFwdParams& params, void* stream);
int launch_conv_stats_float32(const ConvBnActFwdParams& params, void* stream);

}  // namespace dl4ds
