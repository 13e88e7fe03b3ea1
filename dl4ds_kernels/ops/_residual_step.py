"""A post-activation ``residual_block`` in training as one call each way, in fp32 and channels_last on the CPU.

What the schedules of residual_block.py and _block_gradient.py, which remain for everything else, do in eight to twelve calls
(csrc/ops/conv_bn_act/conv_block_cpu.cpp). The same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _cpu_conv
from .._activation import MASK_CODES
from .._define import define_op, has_kernel, op
from ._block_code import Block, Conv, decode
from ._layout import conv_out_shape, mask_bytes

Tensors = list[Tensor]
_KEPT = 5  # results of a layer: y, mean, rstd and the new running statistics
_HEADER, _CONV = 5, 11  # integers of the code
_KEEP_LAST = 3  # place of one


class Plan(NamedTuple):
    """A block at one size, in the order of conv_block_cpu.cpp."""

    block: Block
    code: list[int]
    numbers: list[float]


def plan(
    namespace: str, x: Tensor, convs: Sequence[Tensor], norms: Sequence[Tensor], code: list[int], numbers: list[float],
    memory_efficient: bool,
) -> Plan | None:  # fmt: skip
    """None: this block goes step by step."""
    if (
        not _cpu_conv.may_be_ours(x)
        or not has_kernel("residual_step", namespace, "cpu")
        or any(t.dtype is not torch.float32 for t in (*convs, *norms))
    ):
        return None
    return _plan(tuple(x.shape), tuple(w.shape for w in convs), tuple(code), tuple(numbers), memory_efficient)


@lru_cache(maxsize=4096)
def _plan(
    size: tuple[int, ...], weights: tuple[tuple[int, ...], ...], code: tuple[int, ...], numbers: tuple[float, ...],
    memory_efficient: bool,
) -> Plan | None:  # fmt: skip
    block = decode(code, numbers)
    if block.preact or block.keep_activations or not (block.activation == 0 or block.activation in MASK_CODES):
        return None
    layers: list[int] = []
    values = [block.negative_slope]
    inner = size
    for conv in block.convs:
        found = _layer(inner, weights[conv.weight], conv)
        if found is None:
            return None
        layers += found[0]
        inner = found[1]
    if block.projection is not None:
        found = _layer(size, weights[block.projection.weight], block.projection)
        if found is None or found[1] != inner:
            return None
        layers += found[0]
    elif block.shortcut and inner != size:
        return None  # step by step it is an error with a name
    for norm in block.norms:
        values += [norm.momentum, norm.eps]
    header = [len(block.convs), block.shortcut, block.activation, int(not memory_efficient), int(block.keep_projection)]
    return Plan(block, [*header, *layers], values)


def _layer(size: tuple[int, ...], weight: tuple[int, ...], conv: Conv) -> tuple[list[int], tuple[int, ...]] | None:
    """A layer's part of the code and the size of its output; None if the call does not serve it."""
    norm = conv.norm
    if conv.bias >= 0 or conv.groups != 1 or norm is None or norm.weight < 0 or norm.bias < 0 or len(weight) != 4:
        return None
    stride, padding, dilation, _ = conv.geometry
    out = conv_out_shape(size, weight, stride, padding, dilation)
    # Of one channel or pixel the layout is ambiguous.
    if size[1] != weight[1] or min(out) < 1 or any(min(c, h * w) < 2 for _, c, h, w in (size, out)):
        return None
    codes = _cpu_conv.choose_shapes(size, weight, conv.geometry)
    return [int(norm.eps_std), int(norm.running >= 0), *codes, *stride, *padding, *dilation], out


def _tensors(block: Block, convs: Tensors, norms: Tensors, rest: Sequence[Sequence[Tensor]]) -> Tensors:
    found: Tensors = []
    for conv, own in zip(block.all_convs, rest, strict=True):
        found += (convs[conv.weight], norms[conv.norm.weight], norms[conv.norm.bias], *own)
    return found


def forward(
    namespace: str, p: Plan, x: Tensor, convs: Tensors, norms: Tensors, running: Tensors, save: bool
) -> tuple[Tensor, Tensor, Tensors, Tensors, Tensors]:
    """What ``residual_block`` returns."""
    rest = [running[n.running : n.running + 2] if n.running >= 0 else () for n in p.block.norms]
    made = op("residual_step", namespace)(x, _tensors(p.block, convs, norms, rest), p.code, p.numbers, save)
    layers = [made[i : i + _KEPT] for i in range(2, len(made), _KEPT)]
    kept = [layer[0] for layer in layers if layer[0].numel()]
    statistics = [t for layer in layers for t in layer[1:3]] if save else []
    return made[0], made[1], kept, statistics, [t for layer in layers for t in layer[3:] if t.numel()]


def backward(
    namespace: str, p: Plan, dout: Tensor, mask: Tensor, x: Tensor, convs: Tensors, norms: Tensors, kept: Tensors,
    statistics: Tensors,
) -> Tensors:  # fmt: skip
    """The gradients of x, convs and norms, all of them."""
    block, ys = p.block, list(kept)
    missing = x.new_empty(0)
    if not p.code[_KEEP_LAST]:
        ys.insert(len(block.convs) - 1, missing)
    if block.projection is not None and not block.keep_projection:
        ys.append(missing)
    rest = [(y, *statistics[2 * n.index : 2 * n.index + 2]) for y, n in zip(ys, block.norms, strict=True)]
    made = op("residual_step_bwd", namespace)(dout, mask, x, _tensors(block, convs, norms, rest), p.code, p.numbers)
    of_convs: list[Any] = [None] * len(convs)
    of_norms: list[Any] = [None] * len(norms)
    for i, conv in enumerate(block.all_convs):
        of_convs[conv.weight], of_norms[conv.norm.weight], of_norms[conv.norm.bias] = made[1 + 3 * i : 4 + 3 * i]
    return [made[0], *of_convs, *of_norms]


def _fake(x: Tensor, tensors: Tensors, code: list[int], numbers: list[float], save: bool) -> Tensors:
    (count, shortcut, activation, *keeps), places = code[:_HEADER], iter(tensors)
    out, kept = x, []
    for i, start in enumerate(range(_HEADER, len(code), _CONV)):
        _, tracks, _, _, _, *geometry = code[start : start + _CONV]
        weight, _, _, *running = (next(places) for _ in range(5 if tracks else 3))
        pairs = [geometry[at : at + 2] for at in (0, 2, 4)]
        y = torch.ops.aten.convolution(x if i == count else out, weight, None, *pairs, False, [0, 0], 1)
        is_kept = save and (i < count - 1 or bool(keeps[i - count + 1]))
        kept += [y.to(memory_format=torch.channels_last) if is_kept else x.new_empty(0)]
        kept += [x.new_empty(weight.shape[0]) for _ in range(2)]
        kept += [torch.empty_like(t) for t in running] if tracks else [x.new_empty(0) for _ in range(2)]
        if i < count:
            out = torch.empty_like(y, memory_format=torch.channels_last)
    bits = mask_bytes(out) if save and shortcut and activation in MASK_CODES else 0
    return [out, x.new_empty(bits, dtype=torch.uint8), *kept]


def _fake_bwd(dout: Tensor, mask: Tensor, x: Tensor, tensors: Tensors, code: list[int], numbers: list[float]) -> Tensors:
    made = [torch.empty_like(x)]
    for at, start in zip(range(0, len(tensors), 6), range(_HEADER, len(code), _CONV), strict=True):
        library = not code[start + 4]  # whose gradient of a weight lies as x does
        layout = torch.channels_last if library else torch.preserve_format
        made += [torch.empty_like(tensors[at], memory_format=layout), *(torch.empty_like(t) for t in tensors[at + 1 : at + 3])]
    return made


define_op(
    "residual_step",
    "(Tensor x, Tensor[] tensors, int[] code, float[] numbers, bool save) -> Tensor[]",
    fake=_fake,
    stem="conv_bn_act",
    triton=False,
)
define_op(
    "residual_step_bwd",
    "(Tensor dout, Tensor mask, Tensor x, Tensor[] tensors, int[] code, float[] numbers) -> Tensor[]",
    fake=_fake_bwd,
    stem="conv_bn_act",
    triton=False,
)
