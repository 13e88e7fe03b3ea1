"""``conv_transpose_bn_act`` in Triton: 2x2 with stride 2 as a GEMM that stores each value where it belongs.

With stride 2 the four taps of a 2x2 kernel meet no two times: output pixel (2 h + r, 2 w + s) is x (h, w) times the slice
(r, s) of the weight. One program makes a tile of input pixels x output channels of one tap and applies scale, shift and
activation before the store. Other geometries, groups and fp64 take the library's convolution and bn_act's apply kernel.
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
from .conv_bn_act import _precision, conv_launch_config

_OP = "conv_transpose_bn_act"
TAPS = 4


@triton.jit
def conv_transpose_bn_act_kernel(
    x, weight, out, center, scale, shift,
    pixels, C, K, H, W, x_n, x_c, x_h, x_w, weight_c, weight_k, weight_r, weight_s, out_n, out_k, out_h, out_w,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (n, k, 2 h + r, 2 w + s) = act((sum over c of x (n, c, h, w) * weight (c, k, r, s) - center) * scale + shift).

    Neighbouring programs are the taps of one tile, so that they find x in the cache. What is contiguous in memory is the last
    axis of every tile, as in conv_bn_act.
    """
    k_blocks = tl.cdiv(K, BLOCK_K)
    tap = tl.program_id(0) % 4
    block = program_index(WIDE) // 4
    pixel = (block // k_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    k = (block % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_C)
    if WIDE:
        lane = lane.to(tl.int64)
    if CHANNELS_LAST:
        pixel, k, x_lane, weight_lane = pixel[:, None], k[None, :], lane[None, :], lane[:, None]
        acc = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    else:
        pixel, k, x_lane, weight_lane = pixel[None, :], k[:, None], lane[:, None], lane[None, :]
        acc = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    n = pixel // (H * W)
    place = pixel - n * (H * W)
    h, w = place // W, place % W
    in_pixels, in_k = pixel < pixels, k < K
    r, s = tap // 2, tap % 2

    x_at = x + n * x_n + h * x_h + w * x_w
    weight_at = weight + r * weight_r + s * weight_s + k * weight_k
    for first in range(0, C, BLOCK_C):
        x_c_index, weight_c_index = first + x_lane, first + weight_lane
        x_tile = tl.load(x_at + x_c_index * x_c, in_pixels & (x_c_index < C), 0.0)
        weight_tile = tl.load(weight_at + weight_c_index * weight_c, in_k & (weight_c_index < C), 0.0)
        if UPCAST:
            x_tile, weight_tile = x_tile.to(tl.float32), weight_tile.to(tl.float32)
        if CHANNELS_LAST:
            acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(weight_tile, x_tile, acc, input_precision=PRECISION)

    z = acc - tl.load(center + k, in_k, 0.0)
    z = z * tl.load(scale + k, in_k, 0.0) + tl.load(shift + k, in_k, 0.0)
    at = n * out_n + (2 * h + r) * out_h + (2 * w + s) * out_w + k * out_k
    tl.store(out + at, activate(z, ACTIVATION, SLOPE).to(out.dtype.element_ty), in_pixels & in_k)


def conv_transpose_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
) -> Tensor:
    """``act(bn(conv_transpose(x)))`` with running statistics, or without BatchNorm; layout as aten::convolution's."""
    _common.check_x(_OP, x)
    check(x.dim() == weight.dim() == 4, _OP, "x, weight", "4 dimensions", (x.dim(), weight.dim()))
    check(weight.dtype == x.dtype, _OP, "weight", f"dtype {x.dtype}", weight.dtype)
    check(weight.device == x.device, _OP, "weight", f"device {x.device}", weight.device)
    check(weight.shape[0] == x.shape[1], _OP, "weight", f"{x.shape[1]} input channels", weight.shape[0])
    channels_out = weight.shape[1] * groups
    bias, running_mean, running_var, bn_weight, bn_bias = _common.channel_vectors(
        _OP, x, channels_out,
        bias=bias, running_mean=running_mean, running_var=running_var, bn_weight=bn_weight, bn_bias=bn_bias,
    )  # fmt: skip
    check((running_mean is None) == (running_var is None), _OP, "running_mean, running_var", "both or neither", "one")
    geometry = (tuple(stride), tuple(padding), tuple(output_padding), groups)
    own = (
        geometry == ((2, 2), (0, 0), (0, 0), 1)
        and tuple(weight.shape[2:]) == (2, 2)
        and x.dtype != torch.float64
        and min(x.shape[1:]) > 0
    )
    with _common.device_of(x):
        if own:
            out = _empty_output(x, weight)
        else:
            args = (stride, padding, dilation, True, output_padding, groups)
            out = torch.ops.aten.convolution(x, weight, None, *args)
        if out.numel() == 0:
            return out
        folded = _fold(x, channels_out, running_mean, running_var, bn_weight, bn_bias, bias, eps, eps_std)
        if own:
            _launch(x, weight, out, folded, activation, negative_slope)
        else:
            no_mask = out.new_empty(0, dtype=torch.uint8)
            apply_statistics(out, Matrix.of(out, out), None, out, no_mask, folded, activation, negative_slope)
    return out


def _fold(
    x: Tensor, channels: int, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, shift: Tensor | None,
    bias: Tensor | None, eps: float, eps_std: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(center, scale, shift) of the epilogue; without BatchNorm those of the identity, the bias as shift."""
    if mean is not None and var is not None:
        return fold_statistics(x, mean, var, weight, shift, bias, eps, eps_std)
    zero, one = x.new_zeros(channels, dtype=torch.float32), x.new_ones(channels, dtype=torch.float32)
    if x.dtype == torch.float64:
        zero, one = zero.double(), one.double()
    return zero, one, zero if bias is None else bias.to(zero.dtype)


def _empty_output(x: Tensor, weight: Tensor) -> Tensor:
    """As aten::convolution's: channels_last if either operand is."""
    formats = (suggested_format(x), suggested_format(weight))
    memory_format = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
    shape = (x.shape[0], weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _launch(
    x: Tensor, weight: Tensor, out: Tensor, folded: tuple[Tensor, Tensor, Tensor], activation: int, negative_slope: float
) -> None:
    batch, channels_in, height, width = x.shape
    channels_out, pixels = weight.shape[1], batch * height * width
    channels_last = suggested_format(out) == torch.channels_last
    # Each tap reads a (C, K) slice whose contiguous axis is that of its tile: K in channels_last, C in NCHW.
    order = (2, 3, 0, 1) if channels_last else (2, 3, 1, 0)
    taps = weight.permute(order).contiguous()
    strides = dict(zip(("weight_r", "weight_s", *(("weight_c", "weight_k") if channels_last else ("weight_k", "weight_c"))),
                       taps.stride(), strict=True))  # fmt: skip
    config: dict[str, Any] = conv_launch_config(pixels, channels_out, channels_in, x.dtype)
    if x.dtype == torch.float32:
        config["num_stages"] = 3  # with two, Triton 3.8's code for sm_120 keeps 8 bytes on a stack
    _common.launch(
        conv_transpose_bn_act_kernel,
        TAPS * triton.cdiv(pixels, config["BLOCK_P"]) * triton.cdiv(channels_out, config["BLOCK_K"]),
        x=x,
        weight=taps,
        out=out,
        center=folded[0],
        scale=folded[1],
        shift=folded[2],
        pixels=pixels,
        C=channels_in,
        K=channels_out,
        H=height,
        W=width,
        **dict(zip(("x_n", "x_c", "x_h", "x_w"), x.stride(), strict=True)),
        **strides,
        **dict(zip(("out_n", "out_k", "out_h", "out_w"), out.stride(), strict=True)),
        CHANNELS_LAST=channels_last,
        PRECISION=_precision(x.dtype),
        # Triton's interpreter would multiply the bit patterns of bf16; products of bf16 values are exact in fp32.
        UPCAST=x.dtype == torch.bfloat16 and triton_interpreted(),
        WIDE=_common.is_wide(out.numel(), x, out),
        ACTIVATION=activation,
        SLOPE=slope_of(activation, negative_slope),
        **config,
    )
