"""The bottleneck layers of ``dense_block`` as one call each way, where all their convolutions are ours.

What the schedules of dense_block.py and _dense_gradient.py, which remain for everything else, do in a dozen calls a layer
(csrc/ops/conv_bn_act/conv_dense_layer_cpu.cpp). The same bits, but for gradients behind sums that the first convolution's
epilogue takes where features are large.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _cpu_conv
from .._define import define_op, has_kernel, op
from ._block_code import Conv
from ._block_gradient import Schedule

_NUMBERS, _PLACES = 4, 8  # of a layer: numbers, and tensors with statistics of the inner BatchNorm


class LayerCall(NamedTuple):
    """A layer's arguments that both calls share, in the order of conv_dense_layer_cpu.cpp."""

    tensors: list[Tensor]
    code: list[int]
    numbers: list[float]


def prepare(s: Schedule, channels: int, new: int, convs: tuple[Conv, ...], like: Tensor) -> LayerCall | None:
    """The part in a call of a layer that makes ``new`` of ``channels`` on ``like``'s pixels; None: it goes step by step."""
    if len(convs) != 2 or like.dim() != 4 or not has_kernel("dense_layers_into", s.namespace, like.device.type):
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
    namespace: str, layers: Sequence[LayerCall], running: Sequence[tuple[Tensor | None, ...]], out: Tensor, mean: Tensor,
    var: Tensor, keep: int,
) -> list[list[Tensor]]:  # fmt: skip
    """Of each layer ``[y, z, mean, rstd, new_running_mean, new_running_var]`` of the inner BatchNorm; outputs are appended.

    ``running``: of all layers or of none. ``keep``: how many of y and z are wanted; the others are empty.
    """
    tensors = [t for layer, own in zip(layers, running, strict=True) for t in (*layer.tensors, *own) if t is not None]
    made = op("dense_layers_into", namespace)(out, mean, var, tensors, *_joined(layers), keep)
    return [made[i : i + 6] for i in range(0, len(made), 6)]


def backward(
    namespace: str, layers: Sequence[LayerCall], total: Tensor, grad: Tensor, linear: tuple[Tensor, Tensor], out: Tensor,
    mean: Tensor, var: Tensor, ys: list[Tensor], inner: Sequence[tuple[Tensor, Tensor]],
) -> list[list[Tensor]]:  # fmt: skip
    """Of each layer, the last one first, gradients of (outer weight, bias, convolution, inner weight, bias, convolution).

    From ``total``, the gradient of all features, to ``grad``, where the layers' parts are added, and ``linear``.
    """
    tensors = [t for layer, own in zip(layers, inner, strict=True) for t in (*layer.tensors, *own)]
    made = op("dense_layers_back_into", namespace)(
        total, grad, *linear, out, mean, var, ys, tensors, *_joined(layers)
    )  # fmt: skip
    return [made[i : i + 6] for i in range(0, len(made), 6)]


def _joined(layers: Sequence[LayerCall]) -> tuple[list[int], list[float]]:
    return [v for layer in layers for v in layer.code], [v for layer in layers for v in layer.numbers]


def _fake_forward(
    out: Tensor, mean: Tensor, var: Tensor, tensors: list[Tensor], code: list[int], numbers: list[float], keep: int
) -> list[Tensor]:
    n, _, *size = out.shape
    count = len(numbers) // _NUMBERS
    places, made = len(tensors) // count, []
    for start in range(0, len(tensors), places):
        own = tensors[start : start + places]
        inner = own[2].shape[0]
        maps = {"dtype": out.dtype, "device": out.device, "memory_format": torch.channels_last}
        made += [torch.empty((n, inner, *size), **maps) for _ in range(keep)]
        made += [out.new_empty(0) for _ in range(2 - keep)]
        made += [out.new_empty(inner) for _ in range(2)]
        made += [out.new_empty(inner if places == _PLACES else 0) for _ in range(2)]
    return made


def _fake_backward(*args: Any) -> list[Tensor]:
    return [torch.empty_like(t) for i, t in enumerate(args[8]) if i % _PLACES < 6]


define_op(
    "dense_layers_into",
    "(Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var, Tensor[] tensors, int[] code, float[] numbers, int keep) -> Tensor[]",
    fake=_fake_forward,
    stem="conv_bn_act",
    triton=False,
)
define_op(
    "dense_layers_back_into",
    "(Tensor total, Tensor(a!) grad, Tensor(b!) factor, Tensor(c!) offset, Tensor out, Tensor mean, Tensor var, Tensor[] ys, "
    "Tensor[] tensors, int[] code, float[] numbers) -> Tensor[]",
    fake=_fake_backward,
    stem="conv_bn_act",
    triton=False,
)
