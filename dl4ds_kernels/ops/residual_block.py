"""Contract and schedule of ``residual_block``: a whole residual block, forward and backward, over the fused ops.

No kernel of its own: convolutions (as ``conv2d_step`` chooses them; in training on CUDA ``conv_bn_act_train``), ``bn_act``
(``bn_act_pair`` where a projection's BatchNorm joins the last one), ``add_act`` and their gradient ops, in the namespace the op
belongs to. What one op for the whole block buys is memory. Kept for
backward are the block's input, the output of every convolution in front of a BatchNorm, per-channel statistics and one bit an
element for the activation behind the sum; activations inside the block are computed again in backward from the convolution's
output and the very statistics of the forward pass (the same bits; running statistics are not touched).
``memory_efficient`` also computes the last convolution of a post-activation block again; ``Block.keep_activations`` keeps the
activations instead, which saves two passes over each.

Post-activation: ``act(bn_n(conv_n(… act(bn_1(conv_1(x))))) + shortcut(x))``.
Pre-activation: ``alpha * (conv_n(act(bn_n(… conv_1(act(bn_1(x)))))) + shortcut)``, whose projection reads ``act(bn_1(x))``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._activation import MASK_CODES
from .._define import CPP, define_op, op
from . import _bn_act_pair, _conv_bn_act_train, _conv_dgrad, _residual_step
from ._block_code import IDENTITY, PROJECTION, Conv, Norm, decode
from ._block_gradient import Schedule, autocast, gradients, pack_site
from ._conv_dgrad import Site

Tensors = list[Tensor]


def _forward(
    namespace: str,
    x: Tensor,
    convs: Tensors,
    norms: Tensors,
    running: Tensors,
    code: list[int],
    numbers: list[float],
    training: bool,
    save: bool,
    memory_efficient: bool,
) -> tuple[Tensor, Tensor, Tensors, Tensors, Tensors]:
    """``(out, mask, kept, statistics, new_running)``; see the schema below."""
    plan = _residual_step.plan(namespace, x, convs, norms, code, numbers, memory_efficient) if training else None
    if plan is not None:
        return _residual_step.forward(namespace, plan, x, convs, norms, running, save)
    block = decode(code, numbers)
    s = Schedule(namespace, x, convs, norms, running, block, training)
    kept: Tensors = []
    activations: Tensors = []
    new_running: dict[int, tuple[Tensor, Tensor]] = {}

    def normalise(y: Tensor, norm: Norm, activation: int, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, mean, rstd, mask, new_mean, new_var = op("bn_act", namespace)(
            y, *s.vectors(norm), *s.running(norm), residual, training, norm.momentum, norm.eps, norm.eps_std, activation,
            block.negative_slope, save and residual is not None and activation in MASK_CODES,
        )  # fmt: skip
        note(norm, mean, rstd, new_mean, new_var)
        return out, mask

    def note(norm: Norm, mean: Tensor, rstd: Tensor, new_mean: Tensor, new_var: Tensor) -> None:
        if training and save:
            s.statistics[norm.index] = (mean, rstd)
        if training and norm.running >= 0:
            new_running[norm.index] = (new_mean, new_var)

    def layer(
        z: Tensor, conv: Conv, norm: Norm, activation: int, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, act(bn(y) [+ residual]), mask)`` of ``y = conv(z)``."""
        if not training:
            y = s.convolve(z, conv)
            return y, *normalise(y, norm, activation, residual)
        stride, padding, dilation, *_ = conv.geometry
        bias = convs[conv.bias] if conv.bias >= 0 else None
        out, y, mean, rstd, mask, *new = _conv_bn_act_train.train(
            namespace, z, convs[conv.weight], bias, *s.running(norm), *s.vectors(norm), residual,
            (stride, padding, dilation, conv.groups), norm.momentum, norm.eps, norm.eps_std, activation,
            block.negative_slope, save and residual is not None and activation in MASK_CODES,
        )  # fmt: skip
        note(norm, mean, rstd, *new)
        return y, out, mask

    def normed(z: Tensor, conv: Conv) -> _bn_act_pair.Normed:
        """``conv(z)`` with its statistics."""
        stride, padding, dilation, *_ = conv.geometry
        norm, bias = conv.norm, convs[conv.bias] if conv.bias >= 0 else None
        y, mean, rstd, *new = _bn_act_pair.convolve_and_sum(
            namespace, z, convs[conv.weight], bias, *s.running(norm), (stride, padding, dilation, conv.groups), norm.momentum,
            norm.eps, norm.eps_std,
        )  # fmt: skip
        note(norm, mean, rstd, *new)
        return _bn_act_pair.Normed(y, mean, rstd, *s.vectors(norm), norm.eps, norm.eps_std)

    def keep(y: Tensor, wanted: bool = True) -> None:
        if save and wanted:
            kept.append(y)

    act, last = block.activation, len(block.convs) - 1
    mask = x.new_empty(0, dtype=torch.uint8)
    z = source = x
    if block.preact and block.convs[0].norm is not None:
        z, _ = normalise(x, block.convs[0].norm, act)
        source = z
    for i, conv in enumerate(block.convs[:-1]):
        y, z, _ = layer(z, conv, block.convs[i + 1].norm if block.preact else conv.norm, act)
        keep(y)
        if block.keep_activations and save:
            activations.append(z)
    # The shortcut comes first: the last layer adds it.
    projected = pair = None
    residual = x if block.shortcut == IDENTITY else None
    if block.shortcut == PROJECTION:
        if block.projection.norm is None:
            residual = s.convolve(source, block.projection)
        elif s.pairs(block):
            pair = normed(source, block.projection)
            projected = pair.y
        else:
            projected, residual, _ = layer(source, block.projection, block.projection.norm, 0)
    del source
    if block.preact:
        y = s.convolve(z, block.convs[last])
        if residual is not None:
            y, _ = op("add_act", namespace)(y, residual, block.alpha, 0, 0.0, False)
        elif block.alpha != 1.0:
            y = y * block.alpha
        out = y
    elif pair is not None:
        end = normed(z, block.convs[last])
        saved = save and act in MASK_CODES
        out, mask = _bn_act_pair.apply(namespace, end, pair, act, block.negative_slope, saved)
        keep(end.y, not memory_efficient)
    else:
        y, out, mask = layer(z, block.convs[last], block.convs[last].norm, act, residual)
        keep(y, not memory_efficient)
    if projected is not None:
        keep(projected, block.keep_projection)
    kept += activations
    return out, mask, kept, _in_order(s.statistics), _in_order(new_running)


def _in_order(pairs: dict[int, tuple[Tensor, Tensor]]) -> Tensors:
    return [t for index in sorted(pairs) for t in pairs[index]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, convs, norms, running, code, numbers, training, save, memory_efficient = inputs
    out, mask, kept, statistics, new_running = output
    if not save:
        raise RuntimeError("residual_block: save: expected True for a call with gradients, got False")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mask, *kept, *statistics, *new_running)
    # In eval the statistics are the caller's tensors: saving them lets autograd notice a change in between.
    groups = ([x], convs, norms, [] if training else running, kept, statistics, [mask])
    ctx.counts = [len(group) for group in groups]
    ctx.save_for_backward(*(t for group in groups for t in group))
    ctx.scalars = (code, numbers, training, memory_efficient)
    ctx.running_count = len(running)
    _conv_dgrad.open_node(ctx, "residual_block")


def _groups(ctx: Any) -> list[Tensors]:
    """x, convs, norms, running, kept, statistics and mask of the call, lists all."""
    saved = iter(ctx.saved_tensors)
    return [[next(saved) for _ in range(n)] for n in ctx.counts]


def _site(ctx: Any) -> Site | None:
    """The BatchNorm behind which the block's output lies, or the two; None if its convolution's output is not kept."""
    code, numbers, training, memory_efficient = ctx.scalars
    block = decode(code, numbers)
    if block.preact or not training or memory_efficient:
        return None
    _, _, norms, _, kept, statistics, (mask,) = _groups(ctx)
    norm = block.convs[-1].norm
    weight, bias = (norms[place] if place >= 0 else None for place in (norm.weight, norm.bias))
    mean, rstd = statistics[2 * norm.index : 2 * norm.index + 2]
    y, other = kept[len(block.convs) - 1], ()
    bits = mask if mask.numel() else None
    if bits is None and block.shortcut and block.activation:
        return None  # the side of the kink depends on what was added
    if block.projection is not None and block.projection.norm is not None and _bn_act_pair.wanted(CPP, y, block.activation):
        if not _bn_act_pair.fits(y):
            return None  # two calls of bn_act_bwd, which take their sums themselves
        if block.keep_projection:
            index = 2 * block.projection.norm.index
            other = kept[len(block.convs)], *statistics[index : index + 2]
    return Site(y, weight, bias, mean, rstd, bits, norm.eps, norm.eps_std, block.activation, block.negative_slope, *other)


_conv_dgrad.offers_site("residual_block", _site)


def _backward(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    need_x, need_convs, need_norms = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1]), list(ctx.needs_input_grad[2])
    none: tuple[Any, ...] = ([None] * ctx.running_count, *(None,) * 5)
    if dout is None:
        return (None, [None] * len(need_convs), [None] * len(need_norms), *none)
    (x,), convs, norms, running, kept, statistics, (mask,) = _groups(ctx)
    lean, known = _conv_dgrad.has_dgrad(namespace, x), _conv_dgrad.known_sums(ctx, dout)
    known = known if lean else None  # a block of another namespace leaves sums that this one has no op for
    found = _conv_dgrad.site_of(ctx) if need_x and lean else None
    given_to = (
        dout, mask, x, convs, norms, running, kept, statistics, *ctx.scalars, [need_x, *need_convs, *need_norms]
    )  # fmt: skip
    if found is None and known is None:
        grads = op("residual_block_bwd", namespace)(*given_to)
    else:
        front = ([], [], []) if found is None else pack_site(found[1])
        grads = op("residual_block_chained_bwd", namespace)(*given_to, list(known or ()), *front)
    rest = iter(grads)
    given = [next(rest) if need else None for need in (need_x, *need_convs, *need_norms)]
    sums = tuple(rest)
    if found is not None and sums:
        _conv_dgrad.hand_over(found[0], given[0], sums)
    count = 1 + len(need_convs)
    return (given[0], given[1:count], given[count:], *none)


define_op(
    "residual_block",
    "(Tensor x, Tensor[] convs, Tensor[] norms, Tensor[] running, int[] code, float[] numbers, bool training, bool save, "
    "bool memory_efficient) -> (Tensor out, Tensor mask, Tensor[] kept, Tensor[] statistics, Tensor[] new_running)",
    fake=partial(_forward, CPP),
    setup_context=_setup_context,
    backward=_backward,
    autocast=autocast,
    composed_of="bn_act",
    compose=_forward,
)
define_op(
    "residual_block_bwd",
    "(Tensor dout, Tensor mask, Tensor x, Tensor[] convs, Tensor[] norms, Tensor[] running, Tensor[] kept, "
    "Tensor[] statistics, int[] code, float[] numbers, bool training, bool memory_efficient, bool[] needs) -> Tensor[]",
    fake=partial(gradients, CPP),
    composed_of="bn_act",
    compose=gradients,
)
# The same between blocks on CUDA, never in a graph that is traced: `known`, `front` (see gradients).
define_op(
    "residual_block_chained_bwd",
    "(Tensor dout, Tensor mask, Tensor x, Tensor[] convs, Tensor[] norms, Tensor[] running, Tensor[] kept, "
    "Tensor[] statistics, int[] code, float[] numbers, bool training, bool memory_efficient, bool[] needs, "
    "Tensor[] known, Tensor[] front, int[] front_code, float[] front_numbers) -> Tensor[]",
    fake=partial(gradients, CPP),
    stem="residual_block",
    composed_of="bn_act",
    compose=gradients,
)
