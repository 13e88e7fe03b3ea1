"""Contract and schedule of ``residual_block``: a whole residual block, forward and backward, over the fused ops.

No kernel of its own: convolutions (as ``conv2d_step`` chooses them; in training on CUDA ``conv_bn_act_train``), ``bn_act``,
``add_act`` and their gradient ops, in the namespace the op belongs to. What one op for the whole block buys is memory. Kept for
backward are the block's input, the output of every convolution in front of a BatchNorm, per-channel statistics and one bit an
element for the activation behind the sum; activations inside the block are computed again in backward from the convolution's
output and the very statistics of the forward pass (the same bits; running statistics are not touched).
``memory_efficient`` also computes the last convolution of a post-activation block again.

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
from . import _conv_bn_act_train
from ._block_code import IDENTITY, PROJECTION, Block, Conv, Norm, decode
from ._conv2d import convolve, convolve_back
from .bn_act import eval_statistics, normalise_again

Tensors = list[Tensor]


class _Schedule:
    """The tensors and steps that forward and backward share."""

    def __init__(
        self, namespace: str, x: Tensor, convs: Tensors, norms: Tensors, running: Tensors, block: Block, training: bool
    ) -> None:
        self.namespace, self.x, self.block, self.training = namespace, x, block, training
        self._convs, self._norms, self._running = convs, norms, running
        self.statistics: dict[int, tuple[Tensor, Tensor]] = {}  # index of a BatchNorm -> (mean, rstd) of this call

    def convolve(self, z: Tensor, conv: Conv) -> Tensor:
        bias = self._convs[conv.bias] if conv.bias >= 0 else None
        return convolve(z, self._convs[conv.weight], bias, conv.geometry)

    def vectors(self, norm: Norm) -> tuple[Tensor | None, Tensor | None]:
        return tuple(self._norms[place] if place >= 0 else None for place in (norm.weight, norm.bias))

    def running(self, norm: Norm) -> tuple[Tensor | None, Tensor | None]:
        if norm.running < 0:
            return None, None
        return self._running[norm.running], self._running[norm.running + 1]

    def again(self, y: Tensor, norm: Norm, activation: int) -> Tensor:
        """``act(bn(y))`` as the forward pass computed it, bit for bit; running statistics are not touched."""
        statistics = self.statistics[norm.index] if self.training else self.running(norm)
        return normalise_again(
            self.namespace, y, *self.vectors(norm), *statistics, self.training, norm.eps, norm.eps_std, activation,
            self.block.negative_slope,
        )  # fmt: skip


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
    block = decode(code, numbers)
    s = _Schedule(namespace, x, convs, norms, running, block, training)
    kept: Tensors = []
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
    # The shortcut comes first: the last layer adds it.
    projected = None
    residual = x if block.shortcut == IDENTITY else None
    if block.shortcut == PROJECTION:
        if block.projection.norm is None:
            residual = s.convolve(source, block.projection)
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
    else:
        y, out, mask = layer(z, block.convs[last], block.convs[last].norm, act, residual)
        keep(y, not memory_efficient)
    if projected is not None:
        keep(projected, block.keep_projection)
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


def _backward(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    need_x, need_convs, need_norms = ctx.needs_input_grad[0], list(ctx.needs_input_grad[1]), list(ctx.needs_input_grad[2])
    none: tuple[Any, ...] = ([None] * ctx.running_count, *(None,) * 5)
    if dout is None:
        return (None, [None] * len(need_convs), [None] * len(need_norms), *none)
    saved = iter(ctx.saved_tensors)
    (x,), convs, norms, running, kept, statistics, (mask,) = ([next(saved) for _ in range(n)] for n in ctx.counts)
    grads = op("residual_block_bwd", namespace)(
        dout, mask, x, convs, norms, running, kept, statistics, *ctx.scalars, [need_x, *need_convs, *need_norms]
    )
    rest = iter(grads)
    given = [next(rest) if need else None for need in (need_x, *need_convs, *need_norms)]
    count = 1 + len(need_convs)
    return (given[0], given[1:count], given[count:], *none)


class _Gradient(_Schedule):
    """The backward pass of one call."""

    def __init__(self, needs: list[bool], statistics: Tensors, *args: Any) -> None:
        super().__init__(*args)
        self.needs = needs
        self.grads: dict[int, Tensor] = {}  # by place among (x, *convs, *norms)
        if self.training:
            self.statistics = dict(enumerate(zip(statistics[::2], statistics[1::2], strict=True)))

    def normalise(
        self, dz: Tensor, y: Tensor, norm: Norm, activation: int, residual: Tensor | None, mask: Tensor | None,
        need_y: bool, need_residual: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``(dy, dresidual)`` of ``act(bn(y) [+ residual])``; the gradients of the BatchNorm's vectors are noted."""
        weight, bias = self.vectors(norm)
        mean, rstd = (
            self.statistics[norm.index] if self.training else eval_statistics(y, *self.running(norm), norm.eps, norm.eps_std)
        )
        first = 1 + len(self._convs)
        places = [first + place if place >= 0 else -1 for place in (norm.weight, norm.bias)]
        wanted = [place >= 0 and self.needs[place] for place in places]
        dy, dweight, dbias, dresidual = op("bn_act_bwd", self.namespace)(
            dz, y, weight, bias, mean, rstd, residual, mask, self.training, norm.eps, norm.eps_std, activation,
            self.block.negative_slope, need_y, any(wanted), need_residual,
        )  # fmt: skip
        for place, want, grad, vector in zip(places, wanted, (dweight, dbias), (weight, bias), strict=True):
            if want:
                self.grads[place] = grad.to(vector.dtype)
        return dy, dresidual

    def convolve_back(self, dy: Tensor, z: Tensor, conv: Conv, need_z: bool) -> Tensor | None:
        """dz (None if not needed) of ``y = conv(z)``; the gradients of weight and bias are noted."""
        places = [1 + conv.weight, 1 + conv.bias if conv.bias >= 0 else -1]
        wanted = [need_z, *(place >= 0 and self.needs[place] for place in places)]
        if not any(wanted):
            return None
        weight = self._convs[conv.weight]
        dz, *parameters = convolve_back(dy, z, weight, conv.bias >= 0, conv.geometry, wanted)
        for place, want, grad in zip(places, wanted[1:], parameters, strict=True):
            if want:
                self.grads[place] = grad
        return dz if need_z else None


def _gradients(
    namespace: str,
    dout: Tensor,
    mask: Tensor,
    x: Tensor,
    convs: Tensors,
    norms: Tensors,
    running: Tensors,
    kept: Tensors,
    statistics: Tensors,
    code: list[int],
    numbers: list[float],
    training: bool,
    memory_efficient: bool,
    needs: list[bool],
) -> Tensors:
    """The gradients that are needed of x, convs and norms, in this order."""
    block = decode(code, numbers)
    g = _Gradient(needs, statistics, namespace, x, convs, norms, running, block, training)
    act, last = block.activation, len(block.convs) - 1
    outputs = list(kept)  # of the branch's convolutions, in order; then of the projection
    projection = block.projection
    has_projected = projection is not None and projection.norm is not None
    projected = outputs.pop() if has_projected and block.keep_projection else None
    need_x = needs[0]

    def before(i: int) -> Tensor:
        """The input of convolution i."""
        norm = block.convs[i].norm if block.preact else block.convs[i - 1].norm if i > 0 else None
        if norm is None:  # a convolution that reads x, or the output of the one before it
            return x if i == 0 else outputs[i - 1]
        return g.again(x if i == 0 else outputs[i - 1], norm, act)

    # The end of the block.
    z = source = None
    if block.preact and block.projection is not None:
        source = before(0)
    elif projection is not None:
        source = x
    if block.preact:
        dy = dout if block.alpha == 1.0 else dout * block.alpha
        dresidual = dy
    else:
        if memory_efficient:
            z = before(last)
            outputs.append(g.convolve(z, block.convs[last]))
        residual = None
        if has_projected and projected is None:
            projected = g.convolve(source, projection)
        if act not in MASK_CODES and act != 0 and block.shortcut:  # neither mask nor sign: the residual itself is needed
            residual = x
            if projection is not None:
                residual = projected if has_projected else g.convolve(source, projection)
                residual = g.again(residual, projection.norm, 0) if has_projected else residual
        dy, dresidual = g.normalise(
            dout, outputs.pop(), block.convs[last].norm, act, residual, mask if mask.numel() else None, True,
            block.shortcut != 0 and act != 0,
        )  # fmt: skip
        if act == 0:
            dresidual = dout
    # The shortcut.
    shortcut_dx: Tensor | None = None
    need_source = need_x or (block.preact and _any_needed(block.convs[0].norm, len(convs), needs))
    if block.shortcut == IDENTITY:
        shortcut_dx = dresidual if need_x else None
    elif projection is not None:
        if has_projected:
            dresidual, _ = g.normalise(dresidual, projected, projection.norm, 0, None, None, True, False)
            del projected
        shortcut_dx = g.convolve_back(dresidual, source, projection, need_source)
    del dresidual
    # The branch, from its end.
    for i in range(last, -1, -1):
        conv = block.convs[i]
        if z is None:
            z = source if i == 0 and source is not None else before(i)
        need_z = i > 0 or need_source
        dz = g.convolve_back(dy, z, conv, need_z)
        z = dy = None
        norm = conv.norm if block.preact else block.convs[i - 1].norm if i > 0 else None
        if i == 0 and projection is not None and need_source:
            dz.add_(shortcut_dx)
            shortcut_dx = None
        if norm is None:
            dy = dz
        elif i > 0 or need_source:
            dy, _ = g.normalise(dz, outputs.pop() if i > 0 else x, norm, act, None, None, i > 0 or need_x, False)
        dz = None
    if need_x:
        g.grads[0] = dy if shortcut_dx is None else dy.add_(shortcut_dx)
    return [g.grads[place] for place, need in enumerate(needs) if need]


def _any_needed(norm: Norm | None, conv_tensors: int, needs: list[bool]) -> bool:
    """Whether a vector of this BatchNorm needs a gradient."""
    places = () if norm is None else (norm.weight, norm.bias)
    return any(place >= 0 and needs[1 + conv_tensors + place] for place in places)


def _autocast(dtype: torch.dtype, x: Tensor, convs: Tensors, *rest: Any) -> tuple[Any, ...]:
    """Convolutions run in the autocast dtype; BatchNorm vectors and statistics stay as they are."""

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return (cast(x), [cast(t) for t in convs], *rest)


define_op(
    "residual_block",
    "(Tensor x, Tensor[] convs, Tensor[] norms, Tensor[] running, int[] code, float[] numbers, bool training, bool save, "
    "bool memory_efficient) -> (Tensor out, Tensor mask, Tensor[] kept, Tensor[] statistics, Tensor[] new_running)",
    fake=partial(_forward, CPP),
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
    composed_of="bn_act",
    compose=_forward,
)
define_op(
    "residual_block_bwd",
    "(Tensor dout, Tensor mask, Tensor x, Tensor[] convs, Tensor[] norms, Tensor[] running, Tensor[] kept, "
    "Tensor[] statistics, int[] code, float[] numbers, bool training, bool memory_efficient, bool[] needs) -> Tensor[]",
    fake=partial(_gradients, CPP),
    composed_of="bn_act",
    compose=_gradients,
)
