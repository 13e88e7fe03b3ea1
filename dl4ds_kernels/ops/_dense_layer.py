"""A bottleneck layer of ``dense_block`` as one call each way, where all its convolutions are ours.

What the schedules of dense_block.py and _dense_gradient.py, which remain for everything else, do in a dozen calls
(csrc/ops/conv_bn_act/conv_dense_layer_cpu.cpp). The same bits, but for gradients behind sums that the first convolution's
epilogue takes where features are large.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _cpu_conv
from .._define import define_op, has_kernel, op
from ._block_code import Conv
from ._block_gradient import Schedule


class LayerCall(NamedTuple):
    """Arguments that both calls share, in the order of conv_dense_layer_cpu.cpp."""

    tensors: list[Tensor]
    code: list[int]
    numbers: list[float]


def prepare(s: Schedule, channels: int, new: int, convs: tuple[Conv, ...], like: Tensor) -> LayerCall | None:
    """The call of a layer that makes ``new`` of ``channels`` on maps of ``like``'s size; None where it goes step by step."""
    if len(convs) != 2 or like.dim() != 4 or not has_kernel("dense_layer_into", s.namespace, like.device.type):
        return None
    weights = [s._convs[conv.weight] for conv in convs]
    vectors = [v for conv in convs for v in s.vectors(conv.norm)]
    if any(v is None for v in vectors) or any(t.dtype is not torch.float32 for t in (like, *weights)):
        return None
    plan = _plan(tuple(like.shape), channels, weights[0].shape, weights[1].shape, convs[0].geometry, convs[1].geometry)
    if plan is None or convs[0].bias >= 0 or convs[1].bias >= 0:
        return None
    first, last = (conv.norm for conv in convs)
    code = [channels, new, int(first.eps_std), int(last.eps_std), s.block.activation, *plan]
    tensors = [*vectors[:2], weights[0], *vectors[2:], weights[1]]
    return LayerCall(tensors, code, [first.eps, last.eps, s.block.negative_slope, last.momentum])


@lru_cache(maxsize=4096)
def _plan(size: tuple[int, ...], channels: int, *of_convs: Any) -> tuple[int, ...] | None:
    """Algorithms and geometry as the call wants them; None if a convolution is not ours, or the first no plain 1x1."""
    (n, _, h, w), weights, geometries = size, of_convs[:2], of_convs[2:]
    inner = weights[0][0]
    if geometries[0] != ((1, 1), (0, 0), (1, 1), 1) or tuple(weights[0][2:]) != (1, 1):
        return None
    if min(channels, inner, h * w) < 2:  # of one channel or pixel the layout is ambiguous
        return None
    sizes = (n, channels, h, w), (n, inner, h, w)
    codes = [_cpu_conv.choose_shapes(*c) for c in zip(sizes, weights, geometries, strict=True)]
    if not all(codes[0]) or not all(codes[1]):
        return None
    algorithms = [algorithm for both in zip(*codes, strict=True) for algorithm in both]
    return (*algorithms, *(value for geometry in geometries for pair in geometry[:3] for value in pair))


def forward(
    namespace: str, layer: LayerCall, running: tuple[Tensor | None, Tensor | None], out: Tensor, mean: Tensor, var: Tensor
) -> list[Tensor]:
    """``(y, z, mean, rstd, new_running_mean, new_running_var)`` of the inner BatchNorm; the layer's output is appended."""
    tensors = layer.tensors + [t for t in running if t is not None]
    return op("dense_layer_into", namespace)(out, mean, var, tensors, layer.code, layer.numbers)


def backward(
    namespace: str, layer: LayerCall, total: Tensor, grad: Tensor, linear: tuple[Tensor, Tensor], out: Tensor, mean: Tensor,
    var: Tensor, y: Tensor, inner: tuple[Tensor, Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients of (outer weight and bias, first convolution, inner weight and bias, last convolution).

    From ``total``, the gradient of all features, to ``grad``, where the layer's part is added, and ``linear``.
    """
    tensors = [*layer.tensors, *inner]
    return op("dense_layer_back_into", namespace)(
        total, grad, *linear, out, mean, var, y, tensors, layer.code, layer.numbers
    )  # fmt: skip


def _fake_forward(out: Tensor, mean: Tensor, var: Tensor, tensors: list[Tensor], *args: Any) -> list[Tensor]:
    n, _, *size = out.shape
    inner = tensors[2].shape[0]
    maps = [
        torch.empty((n, inner, *size), dtype=out.dtype, device=out.device, memory_format=torch.channels_last) for _ in range(2)
    ]
    return [*maps, *(out.new_empty(inner) for _ in range(2)), *(out.new_empty(t.shape) for t in tensors[6:])]


def _fake_backward(*args: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in args[8][:6]]


define_op(
    "dense_layer_into",
    "(Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var, Tensor[] tensors, int[] code, float[] numbers) -> Tensor[]",
    fake=_fake_forward,
    stem="conv_bn_act",
    triton=False,
)
define_op(
    "dense_layer_back_into",
    "(Tensor total, Tensor(a!) grad, Tensor(b!) factor, Tensor(c!) offset, Tensor out, Tensor mean, Tensor var, Tensor y, "
    "Tensor[] tensors, int[] code, float[] numbers) -> Tensor[]",
    fake=_fake_backward,
    stem="conv_bn_act",
    triton=False,
)
