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

from typing import Any

import torch
from torch import Tensor

from .._define import define_op, op
from . import _conv_bn_act_train, _dense, _dense_layer
from ._block_code import decode
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
    out = _dense.empty(namespace, x, total)
    mean, var = (x.new_empty(total, dtype=accumulate_dtype(x)) for _ in range(2))
    kept: Tensors = []
    statistics: Tensors = [mean, var]
    inner: dict[int, Tensors] = {}

    def append(new: Tensor, start: int, channels: int) -> None:
        stop = start + channels
        _dense.append(namespace, new, out[:, start:stop], mean[start:stop], var[start:stop])

    append(x, 0, x.shape[1])
    for channels, new, own in layers:
        norm = own[0].norm
        whole = _dense_layer.prepare(s, channels, new, own, x)
        if whole is not None:
            norm = own[1].norm
            y, z, first_mean, rstd, *inner[norm.index] = _dense_layer.forward(
                namespace, whole, s.running(norm), out, mean, var
            )  # fmt: skip
            if save:
                statistics += [first_mean, rstd]
                kept += [y, z][:keep]
            del y, z
            continue
        z = _dense.normalise(
            namespace, out[:, :channels], *s.vectors(norm), mean[:channels], var[:channels], norm.eps, norm.eps_std,
            block.activation, block.negative_slope,
        )  # fmt: skip
        if per_layer == 2:
            first, norm = own[0], own[1].norm
            bias = convs[first.bias] if first.bias >= 0 else None
            z, y, first_mean, rstd, _, *moved = _conv_bn_act_train.train(
                namespace, z, convs[first.weight], bias, *s.running(norm), *s.vectors(norm), None, first.geometry,
                norm.momentum, norm.eps, norm.eps_std, block.activation, block.negative_slope, False,
            )  # fmt: skip
            inner[norm.index] = moved
            if save:
                statistics += [first_mean, rstd]
                kept += [y, z][:keep]
            del y
        append(s.convolve(z, own[-1]), channels, new)
        del z
    outer = _outer_running(s, layers, mean, var, x.numel() // x.shape[1])
    new_running = [t for norm in block.norms if norm.running >= 0 for t in (inner | outer)[norm.index]]
    return out, kept, statistics if save else [], new_running


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
