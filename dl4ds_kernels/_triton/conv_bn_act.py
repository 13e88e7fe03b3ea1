"""``conv_bn_act`` in Triton: implicit-GEMM 1x1 and 3x3 convolutions with the BatchNorm, residual and activation epilogue.

The portability path (cuDNN and CUTLASS serve the C++ backend). One program computes a tile of output pixels x output channels,
reading x through its strides, so sliced inputs and both layouts need no copy. Groups, other kernel sizes and fp64 go to the
library convolution, followed by the apply kernel of ``bn_act`` in place.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._define import triton_interpreted
from ..ops._layout import suggested_format
from . import _common
from ._common import Matrix, check, slope_of
from ._device import activate, program_index
from .bn_act import apply_statistics, fold_statistics


def conv_launch_config(pixels: int, channels_out: int, channels_in: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes by shape class: BLOCK_P output pixels x BLOCK_K output channels, BLOCK_C input channels a step.

    Tiles shrink until there are about as many programs as a GPU has multiprocessors. fp32 in IEEE precision runs on the
    ordinary cores, whose accumulators need small tiles.
    """
    block_c = 16 if channels_in <= 16 or dtype == torch.float32 else 32
    block_k = 16 if channels_out <= 16 else 32 if channels_out <= 32 else 64
    if dtype == torch.float32:
        return {"BLOCK_P": 64, "BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 2}
    if channels_out > 64 and triton.cdiv(pixels, 128) * triton.cdiv(channels_out, 128) >= 128:
        return {"BLOCK_P": 128, "BLOCK_K": 128, "BLOCK_C": block_c, "num_warps": 8, "num_stages": 3}
    if triton.cdiv(pixels, 128) * triton.cdiv(channels_out, block_k) >= 128:
        return {"BLOCK_P": 128, "BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_P": 64, "BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 4}


@triton.jit
def conv_bn_act_kernel(
    x, weight, residual, out, center, scale, shift,
    pixels, C, K, H, W, P, Q,
    x_n, x_c, x_h, x_w, weight_k, weight_c, weight_r, weight_s, out_n, out_k, out_pixel,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act((conv(x) - center) * scale + shift [+ residual]) for an R x R kernel.

    What is contiguous in memory is the last axis of every tile: channels_last multiplies (pixels, C) by (C, K), NCHW multiplies
    (K, C) by (C, pixels). Indices are made two-dimensional here, so that all else is written once for both.
    """
    k_blocks = tl.cdiv(K, BLOCK_K)
    pixel = (program_index(WIDE) // k_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    k = (program_index(WIDE) % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_C)
    if WIDE:
        lane = lane.to(tl.int64)
    if CHANNELS_LAST:
        pixel, k, x_lane, weight_lane = pixel[:, None], k[None, :], lane[None, :], lane[:, None]
        acc = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    else:
        pixel, k, x_lane, weight_lane = pixel[None, :], k[:, None], lane[:, None], lane[None, :]
        acc = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    n = pixel // (P * Q)
    place = pixel - n * (P * Q)
    h = (place // Q) * stride_h - pad_h
    w = (place % Q) * stride_w - pad_w
    in_pixels = pixel < pixels
    in_k = k < K

    c_steps = tl.cdiv(C, BLOCK_C)
    for step in range(0, R * R * c_steps):
        if R == 1:
            tap_r, tap_s, first_c = 0, 0, step * BLOCK_C
        else:
            tap = step // c_steps
            tap_r, tap_s, first_c = tap // R, tap % R, (step - tap * c_steps) * BLOCK_C
        x_c_index = first_c + x_lane
        weight_c_index = first_c + weight_lane
        tap_h = h + tap_r * dilation_h
        tap_w = w + tap_s * dilation_w
        inside = in_pixels & (tap_h >= 0) & (tap_h < H) & (tap_w >= 0) & (tap_w < W)
        x_tile = tl.load(x + n * x_n + tap_h * x_h + tap_w * x_w + x_c_index * x_c, inside & (x_c_index < C), 0.0)
        weight_at = weight + tap_r * weight_r + tap_s * weight_s + k * weight_k + weight_c_index * weight_c
        weight_tile = tl.load(weight_at, in_k & (weight_c_index < C), 0.0)
        if UPCAST:
            x_tile, weight_tile = x_tile.to(tl.float32), weight_tile.to(tl.float32)
        if CHANNELS_LAST:
            acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(weight_tile, x_tile, acc, input_precision=PRECISION)

    z = acc - tl.load(center + k, in_k, 0.0)
    z = z * tl.load(scale + k, in_k, 0.0) + tl.load(shift + k, in_k, 0.0)
    at = n * out_n + place * out_pixel + k * out_k
    valid = in_pixels & in_k
    if residual is not None:
        z += tl.load(residual + at, valid, 0.0).to(tl.float32)
    tl.store(out + at, activate(z, ACTIVATION, SLOPE).to(out.dtype.element_ty), valid)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
) -> Tensor:
    """``act(bn(conv(x)) [+ residual])`` with running statistics; layout of the result as aten::convolution's."""
    _common.check_x("conv_bn_act", x)
    check(weight.dim() == x.dim(), "conv_bn_act", "weight", f"{x.dim()} dimensions", weight.dim())
    check(weight.dtype == x.dtype, "conv_bn_act", "weight", f"dtype {x.dtype}", weight.dtype)
    check(weight.device == x.device, "conv_bn_act", "weight", f"device {x.device}", weight.device)
    bias, running_mean, running_var, bn_weight, bn_bias = _common.channel_vectors(
        "conv_bn_act", x, weight.shape[0],
        bias=bias, running_mean=running_mean, running_var=running_var, bn_weight=bn_weight, bn_bias=bn_bias,
    )  # fmt: skip
    own = _has_kernel(x, weight, padding, groups)
    if own:
        expected = x.shape[1]
        check(weight.shape[1] == expected, "conv_bn_act", "weight", f"{expected} input channels", weight.shape[1])
        out = _empty_output(x, weight, stride, padding, dilation)
    else:
        out = torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)
    _common.check_like("conv_bn_act", out, residual=residual)
    if out.numel() == 0:
        return out
    with _common.device_of(x):
        folded = fold_statistics(x, running_mean, running_var, bn_weight, bn_bias, bias, eps, eps_std)
        if own:
            geometry = (stride, padding, dilation)
            _launch(x, weight, _common.dense_as(residual, out), out, folded, geometry, activation, negative_slope)
        else:
            matrix, no_mask = Matrix.of(out, out), out.new_empty(0, dtype=torch.uint8)
            apply_statistics(out, matrix, residual, out, no_mask, folded, activation, negative_slope)
    return out


def _has_kernel(x: Tensor, weight: Tensor, padding: list[int], groups: int) -> bool:
    """1x1 and 3x3 2-D convolutions over all channels, in a dtype that tl.dot takes."""
    kernel_size = tuple(weight.shape[2:])
    return groups == 1 and x.dtype != torch.float64 and kernel_size in ((1, 1), (3, 3)) and min(x.shape[1:]) > 0


def _empty_output(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    spatial = [(size + 2 * pad - dilate * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, dilate in sizes]
    check(min(spatial) >= 0, "conv_bn_act", "x", "an image not smaller than the kernel", tuple(x.shape))
    # As aten::convolution's: channels_last if either operand is.
    formats = (suggested_format(x), suggested_format(weight))
    memory_format = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
    return torch.empty((x.shape[0], weight.shape[0], *spatial), dtype=x.dtype, device=x.device, memory_format=memory_format)


def _precision(dtype: torch.dtype) -> str:
    """fp32 products in IEEE precision unless torch's convolutions may use TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _launch(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    out: Tensor,
    folded: tuple[Tensor, Tensor, Tensor],
    geometry: tuple[list[int], list[int], list[int]],
    activation: int,
    negative_slope: float,
) -> None:
    if weight.shape[2] > 1:  # each tap reads a (K, C) slice: C has to be the contiguous dimension
        weight = weight.contiguous(memory_format=torch.channels_last)
    batch, channels_out, height, width = out.shape
    pixels = batch * height * width
    channels_last = suggested_format(out) == torch.channels_last or height * width == 1
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = geometry
    config = conv_launch_config(pixels, channels_out, x.shape[1], x.dtype)
    _common.launch(
        conv_bn_act_kernel,
        triton.cdiv(pixels, config["BLOCK_P"]) * triton.cdiv(channels_out, config["BLOCK_K"]),
        x=x,
        weight=weight,
        residual=residual,
        out=out,
        center=folded[0],
        scale=folded[1],
        shift=folded[2],
        pixels=pixels,
        C=x.shape[1],
        K=channels_out,
        H=x.shape[2],
        W=x.shape[3],
        P=height,
        Q=width,
        **dict(zip(("x_n", "x_c", "x_h", "x_w"), x.stride(), strict=True)),
        **dict(zip(("weight_k", "weight_c", "weight_r", "weight_s"), weight.stride(), strict=True)),
        out_n=channels_out * height * width,
        out_k=1 if channels_last else height * width,
        out_pixel=channels_out if channels_last else 1,
        stride_h=stride_h,
        stride_w=stride_w,
        pad_h=pad_h,
        pad_w=pad_w,
        dilation_h=dilation_h,
        dilation_w=dilation_w,
        R=weight.shape[2],
        CHANNELS_LAST=channels_last,
        PRECISION=_precision(x.dtype),
        # Triton's interpreter would multiply the bit patterns of bf16; products of bf16 values are exact in fp32.
        UPCAST=x.dtype == torch.bfloat16 and triton_interpreted(),
        WIDE=_common.is_wide(out.numel(), x, out),
        ACTIVATION=activation,
        SLOPE=slope_of(activation, negative_slope),
        **config,
    )
