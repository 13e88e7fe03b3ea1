"""Contract and schedule of ``dense_block``: a whole DenseNet block in training, forward and backward, in one buffer.

Every layer reads all features before it, ``act(bn(buffer[:, :C]))``, and its output is the buffer's next slice; nothing is
concatenated. The batch statistics of a channel are the same for every layer that reads it, so they are taken once, when the
channel is made, and each layer's BatchNorm only applies them (with its own weight, bias and eps). Backward goes through a
gradient buffer in the same way: a layer's BatchNorm adds its gradient where it belongs, in the pass that takes its sums and
makes the normalised input again, which the convolution's weight gradient reads. What a BatchNorm's gradient has besides that
is linear in x; the coefficients of all layers are summed and applied to a slice once, before its own layer's turn.

Kept for backward: the buffer, which is the output, and each bottleneck's first convolution's output. ``keep`` 0: the buffer
alone, the convolution is computed again; 2: also the activation behind it, which saves computing that again.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .._define import define_op, op
from . import _conv_bn_act_train, _dense, _dense_layer
from ._block_code import Norm, decode
from ._block_gradient import Schedule, autocast
from ._dense_gradient import Layer, Tensors, gradients, layers_of
from ._layout import accumulate_dtype


def _forward(
    namespace: str,
    x: Tensor,
    convs: Tensors,
    norms: Tensors,
    running: Tensors,
    code: list[int],
    numbers: list[float],
    per_layer: int,
    keep: int,
    save: bool,
) -> tuple[Tensor, Tensors, Tensors, Tensors]:
    """``(out, kept, statistics, new_running)``.

    ``statistics``: mean and biased variance of every channel of ``out``, then mean and rstd of each bottleneck's inner
    BatchNorm. ``new_running``: in the order of ``running``.
    """
    block = decode(code, numbers)
    s = Schedule(namespace, x, convs, norms, running, block, True)
    layers, total = layers_of(x, convs, block, per_layer)
    f = _Forward(s, total, keep if save else 0)
    f.append(x, 0, x.shape[1])
    whole = [_dense_layer.prepare(s, *layer, x) if per_layer == 2 else None for layer in layers]

    def kind(place: int) -> tuple[bool, bool]:
        return whole[place] is not None, layers[place].convs[-1].norm.running >= 0

    for (is_whole, _), group in groupby(range(len(layers)), key=kind):
        places = list(group)
        if is_whole:
            f.whole_layers([layers[p].convs[1].norm for p in places], [whole[p] for p in places])
        else:
            for place in places:
                f.layer(layers[place])
    outer = _outer_running(s, layers, f.mean, f.var, x.numel() // x.shape[1])
    new_running = [t for norm in block.norms if norm.running >= 0 for t in (f.moved | outer)[norm.index]]
    return f.out, f.kept, [f.mean, f.var, *f.statistics] if save else [], new_running


class _Forward:
    """The buffer, statistics of its channels, and what the layers leave. ``keep``: tensors of a bottleneck for backward."""

    def __init__(self, s: Schedule, total: int, keep: int) -> None:
        self.s, self.namespace, self.block, self.keep = s, s.namespace, s.block, keep
        self.out = _dense.empty(s.namespace, s.x, total)
        self.mean, self.var = (s.x.new_empty(total, dtype=accumulate_dtype(s.x)) for _ in range(2))
        self.kept: Tensors = []
        self.statistics: Tensors = []  # mean and rstd of each inner BatchNorm
        self.moved: dict[int, Tensors] = {}  # index of an inner BatchNorm -> its new running statistics

    def append(self, new: Tensor, start: int, channels: int) -> None:
        stop = start + channels
        _dense.append(self.namespace, new, self.out[:, start:stop], self.mean[start:stop], self.var[start:stop])

    def note(self, norm: Norm, y: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, *moved: Tensor) -> None:
        """The inner BatchNorm's input, activated output, statistics and new running statistics."""
        self.kept += [y, z][: self.keep]
        self.statistics += [mean, rstd]
        self.moved[norm.index] = list(moved)

    def whole_layers(self, norms: list[Norm], calls: list[_dense_layer.LayerCall]) -> None:
        """Bottlenecks in a row, all with running statistics or none, in one call."""
        running = [self.s.running(norm) for norm in norms]
        made = _dense_layer.forward(self.namespace, calls, running, self.out, self.mean, self.var, self.keep)
        for norm, results in zip(norms, made, strict=True):
            self.note(norm, *results)

    def layer(self, layer: Layer) -> None:
        """Any other layer, step by step."""
        channels, new, own = layer
        first, block, convs = own[0], self.block, self.s._convs
        z = _dense.normalise(
            self.namespace, self.out[:, :channels], *self.s.vectors(first.norm), self.mean[:channels], self.var[:channels],
            first.norm.eps, first.norm.eps_std, block.activation, block.negative_slope,
        )  # fmt: skip
        if len(own) == 2:
            norm = own[1].norm
            bias = convs[first.bias] if first.bias >= 0 else None
            z, y, mean, rstd, _, *moved = _conv_bn_act_train.train(
                self.namespace, z, convs[first.weight], bias, *self.s.running(norm), *self.s.vectors(norm), None,
                first.geometry, norm.momentum, norm.eps, norm.eps_std, block.activation, block.negative_slope, False,
            )  # fmt: skip
            self.note(norm, y, z, mean, rstd, *moved)
            del y
        self.append(self.s.convolve(z, own[-1]), channels, new)


def _outer_running(s: Schedule, layers: list[Layer], mean: Tensor, var: Tensor, count: int) -> dict[int, Tensors]:
    """New running statistics of the BatchNorms that read the buffer, by index; a few calls for all of them."""
    unbiased = var * (count / (count - 1))
    by_momentum: dict[float, list[tuple[int, Tensors, Tensors]]] = {}
    for channels, _, own in layers:
        norm = own[0].norm
        if norm.running >= 0:
            old = list(s.running(norm))
            batch = [v[:channels].to(t.dtype) for v, t in zip((mean, unbiased), old, strict=True)]
            by_momentum.setdefault(norm.momentum, []).append((norm.index, old, batch))
    found: dict[int, Tensors] = {}
    for momentum, rows in by_momentum.items():
        kept = torch._foreach_mul([t for _, old, _ in rows for t in old], 1.0 - momentum)
        moved = iter(torch._foreach_add(kept, [t for _, _, batch in rows for t in batch], alpha=momentum))
        found |= {index: [next(moved), next(moved)] for index, _, _ in rows}
    return found


def _fake(
    x: Tensor, convs: Tensors, norms: Tensors, running: Tensors, code: list[int], numbers: list[float], per_layer: int,
    keep: int, save: bool,
) -> tuple[Tensor, Tensors, Tensors, Tensors]:  # fmt: skip
    layers, total = layers_of(x, convs, decode(code, numbers), per_layer)
    n, _, *size = x.shape

    def features(channels: int) -> Tensor:
        return torch.empty((n, channels, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def vector(channels: int) -> Tensor:
        return x.new_empty(channels, dtype=accumulate_dtype(x))

    widths = [convs[own[0].weight].shape[0] for _, _, own in layers] if per_layer == 2 and save else []
    statistics = [vector(total), vector(total), *(vector(w) for w in widths for _ in range(2))] if save else []
    return (
        features(total),
        [features(w) for w in widths for _ in range(keep)],
        statistics,
        [torch.empty_like(t) for t in running],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, convs, norms, running, code, numbers, per_layer, keep, save = inputs
    out, kept, statistics, new_running = output
    if not save:
        raise RuntimeError("dense_block: save: expected True for a call with gradients, got False")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept, *statistics, *new_running)
    groups = ([out], convs, norms, kept, statistics)
    ctx.counts = [len(group) for group in groups]
    ctx.save_for_backward(*(t for group in groups for t in group))
    ctx.scalars = (code, numbers, per_layer, keep)
    ctx.channels, ctx.running_count = x.shape[1], len(running)


def _backward(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    need_x, need_convs, need_norms = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1]), list(ctx.needs_input_grad[2])
    none: tuple[Any, ...] = ([None] * ctx.running_count, *(None,) * 5)
    if dout is None:
        return (None, [None] * len(need_convs), [None] * len(need_norms), *none)
    saved = iter(ctx.saved_tensors)
    (out,), convs, norms, kept, statistics = ([next(saved) for _ in range(n)] for n in ctx.counts)
    grads = op("dense_block_bwd", namespace)(
        dout, out, convs, norms, kept, statistics, *ctx.scalars, ctx.channels, [need_x, *need_convs, *need_norms]
    )  # fmt: skip
    rest = iter(grads)
    given = [next(rest) if need else None for need in (need_x, *need_convs, *need_norms)]
    count = 1 + len(need_convs)
    return (given[0], given[1:count], given[count:], *none)


def _fake_gradients(
    dout: Tensor, out: Tensor, convs: Tensors, norms: Tensors, kept: Tensors, statistics: Tensors, code: list[int],
    numbers: list[float], per_layer: int, keep: int, channels: int, needs: list[bool],
) -> Tensors:  # fmt: skip
    n, _, *size = out.shape
    dx = torch.empty((n, channels, *size), dtype=out.dtype, device=out.device, memory_format=torch.channels_last)
    grads = [dx, *(torch.empty_like(t) for t in (*convs, *norms))]
    return [grad for grad, need in zip(grads, needs, strict=True) if need]


define_op(
    "dense_block",
    "(Tensor x, Tensor[] convs, Tensor[] norms, Tensor[] running, int[] code, float[] numbers, int per_layer, int keep, "
    "bool save) -> (Tensor out, Tensor[] kept, Tensor[] statistics, Tensor[] new_running)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast,
    composed_of="bn_act",
    compose=_forward,
)
define_op(
    "dense_block_bwd",
    "(Tensor dout, Tensor out, Tensor[] convs, Tensor[] norms, Tensor[] kept, Tensor[] statistics, int[] code, "
    "float[] numbers, int per_layer, int keep, int channels, bool[] needs) -> Tensor[]",
    fake=_fake_gradients,
    composed_of="bn_act",
    compose=gradients,
)
