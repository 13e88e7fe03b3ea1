"""The backward pass of ``residual_block`` (residual_block.py), and what its forward pass shares with it.

On CUDA a convolution's input gradient may come with what follows it (_conv_dgrad.py): the other gradient of the block's input
is added, and the BatchNorm in front finds its sums taken. Between blocks this goes through the graph: ``known`` and ``front``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._activation import MASK_CODES
from .._define import op
from . import _bn_act_pair, _conv_dgrad, _residual_step
from ._block_code import IDENTITY, NO_SHORTCUT, Block, Conv, Norm, decode
from ._conv2d import convolve, convolve_back
from ._conv_dgrad import Added, Site, Sums
from .bn_act import eval_statistics, normalise_again

Tensors = list[Tensor]


def autocast(dtype: torch.dtype, x: Tensor, convs: Tensors, *rest: Any) -> tuple[Any, ...]:
    """Convolutions run in the autocast dtype; BatchNorm vectors and statistics stay as they are."""

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return (cast(x), [cast(t) for t in convs], *rest)


class Schedule:
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

    def pairs(self, block: Block) -> bool:
        """Whether the projection's BatchNorm is applied with the last one."""
        both = not block.preact and block.projection is not None and block.projection.norm is not None
        return both and self.training and _bn_act_pair.wanted(self.namespace, self.x, block.activation)

    def again(self, y: Tensor, norm: Norm, activation: int) -> Tensor:
        """``act(bn(y))`` as the forward pass computed it, bit for bit; running statistics are not touched."""
        statistics = self.statistics[norm.index] if self.training else self.running(norm)
        return normalise_again(
            self.namespace, y, *self.vectors(norm), *statistics, self.training, norm.eps, norm.eps_std, activation,
            self.block.negative_slope,
        )  # fmt: skip


def pack_site(site: Site) -> tuple[Tensors, list[int], list[float]]:
    """A BatchNorm as the op can take it: its tensors, scalars and which of the optional ones there are."""
    optional = (site.weight, site.bias, site.mask, site.other_y, site.other_mean, site.other_rstd)
    code = [int(site.eps_std), site.activation, *(int(v is not None) for v in optional)]
    return [site.y, site.mean, site.rstd, *(v for v in optional if v is not None)], code, [site.eps, site.negative_slope]


def unpack_site(tensors: Sequence[Tensor], code: Sequence[int], numbers: Sequence[float]) -> Site | None:
    if not tensors:
        return None
    y, mean, rstd, *rest = tensors
    left = iter(rest)
    weight, bias, mask, *other = (next(left) if there else None for there in code[2:])
    return Site(y, weight, bias, mean, rstd, mask, numbers[0], bool(code[0]), code[1], numbers[1], *other)


class Gradient(Schedule):
    """The backward pass of one call."""

    def __init__(self, needs: list[bool], statistics: Tensors, *args: Any) -> None:
        super().__init__(*args)
        self.needs = needs
        self.grads: dict[int, Tensor] = {}  # by place among (x, *convs, *norms)
        self.lean = self.training and _conv_dgrad.has_dgrad(self.namespace, self.x)
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
        wanted = [place >= 0 and self.needs[place] for place in self._places(norm)]
        dy, dweight, dbias, dresidual = op("bn_act_bwd", self.namespace)(
            dz, y, weight, bias, mean, rstd, residual, mask, self.training, norm.eps, norm.eps_std, activation,
            self.block.negative_slope, need_y, any(wanted), need_residual,
        )  # fmt: skip
        self._note(norm, dweight, dbias)
        return dy, dresidual

    def _places(self, norm: Norm) -> tuple[int, int]:
        """Of its vectors among all gradients, -1 for one that is not there."""
        first = 1 + len(self._convs)
        return tuple(first + place if place >= 0 else -1 for place in (norm.weight, norm.bias))

    def _note(self, norm: Norm, dweight: Tensor, dbias: Tensor) -> None:
        for place, grad, vector in zip(self._places(norm), (dweight, dbias), self.vectors(norm), strict=True):
            if place >= 0 and self.needs[place]:
                self.grads[place] = grad if grad.dtype == vector.dtype else grad.to(vector.dtype)

    def site(self, y: Tensor, norm: Norm, activation: int, mask: Tensor | None) -> Site:
        return Site(
            y, *self.vectors(norm), *self.statistics[norm.index], mask, norm.eps, norm.eps_std, activation,
            self.block.negative_slope,
        )  # fmt: skip

    def normalise_known(
        self, dz: Tensor, sums: Sums, y: Tensor, norm: Norm, activation: int, mask: Tensor | None, need_residual: bool
    ) -> tuple[Tensor, Tensor]:
        """The same where the convolution behind has taken the sums."""
        table, dweight, dbias = sums
        self._note(norm, dweight, dbias)
        return _conv_dgrad.apply(self.namespace, dz, table, self.site(y, norm, activation, mask), need_residual)

    def normed(self, y: Tensor, norm: Norm) -> _bn_act_pair.Normed:
        return _bn_act_pair.Normed(y, *self.statistics[norm.index], *self.vectors(norm), norm.eps, norm.eps_std)

    def normalise_pair(
        self, dz: Tensor, known: Sequence[Tensor], y: Tensor, norm: Norm, projected: Tensor, other: Norm, activation: int,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``(dy, dprojected)`` of ``act(bn(y) + bn(projected))``; known: the sums of y's or of both, if they were taken."""
        found = _bn_act_pair.apply_back(
            self.namespace, dz, mask, activation, self.block.negative_slope, self.normed(y, norm),
            self.normed(projected, other), tuple(known[1:]),
        )  # fmt: skip
        self._note(norm, found.dweight, found.dbias)
        self._note(other, found.residual_dweight, found.dbias.clone())  # no result is another
        return found.dx, found.dresidual

    def convolve_back_fused(
        self, dy: Tensor, z: Tensor, conv: Conv, added: Added | None, site: Site | None
    ) -> tuple[Tensor, Sums | None]:
        """dz with what is added, and the sums over it of the BatchNorm in front; weight and bias as convolve_back."""
        self.convolve_back(dy, z, conv, False)
        return _conv_dgrad.dgrad(
            self.namespace, dy, self._convs[conv.weight], (z.shape[2], z.shape[3]), conv.geometry, added, site
        )  # fmt: skip

    def serves(self, z: Tensor, conv: Conv, step: int = 0, site: Site | None = None, masked: bool = False) -> bool:
        if not self.lean:
            return False
        return _conv_dgrad.serves(self.namespace, z, self._convs[conv.weight], conv.geometry, step, site, masked)

    def compact_step(self, conv: Conv) -> int:
        """The stride of a 1x1 projection, whose source's gradient is zero between its pixels; 1 for other layers."""
        stride, kernel = conv.stride, self._convs[conv.weight].shape[2:]
        return stride[0] if stride[0] == stride[1] and not any(conv.padding) and conv.groups == 1 and max(kernel) == 1 else 1

    def compact_back(self, dy: Tensor, source: Tensor, conv: Conv, need_source: bool) -> Tensor:
        """convolve_back of such a projection, without the zeros."""
        weight = self._convs[conv.weight]
        self.convolve_back(dy, source, conv, False)
        n, c = source.shape[:2]  # the library looks at the input's sizes only
        like = source.new_empty(n, c, *dy.shape[2:]).to(memory_format=torch.channels_last)
        return torch.ops.aten.convolution_backward(
            dy, like, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]

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


def gradients(
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
    known: Sequence[Tensor] = (),
    front: Sequence[Tensor] = (),
    front_code: Sequence[int] = (),
    front_numbers: Sequence[float] = (),
) -> Tensors:
    """The gradients that are needed of x, convs and norms, in this order.

    ``known``: the sums over dout of the last BatchNorm (and of the projection's, where the two are applied together), if a
    convolution behind the block has taken them. ``front``: the BatchNorm that made x; the sums over x's gradient then follow
    the gradients, if they were taken.
    """
    if training and all(needs):
        plan = _residual_step.plan(namespace, x, convs, norms, code, numbers, memory_efficient)
        if plan is not None:
            return _residual_step.backward(namespace, plan, dout, mask, x, convs, norms, kept, statistics)
    block = decode(code, numbers)
    front_site = unpack_site(front, front_code, front_numbers)
    g = Gradient(needs, statistics, namespace, x, convs, norms, running, block, training)
    act, last = block.activation, len(block.convs) - 1
    outputs = list(kept)  # of the branch's convolutions, in order; then of the projection; then activations
    activations = outputs[-last:] if block.keep_activations and last else []
    del outputs[len(outputs) - len(activations) :]
    projection = block.projection
    has_projected = projection is not None and projection.norm is not None
    projected = outputs.pop() if has_projected and block.keep_projection else None
    need_x = needs[0]

    def before(i: int) -> Tensor:
        """The input of convolution i."""
        norm = block.convs[i].norm if block.preact else block.convs[i - 1].norm if i > 0 else None
        if activations and i > 0:
            return activations[i - 1]
        if norm is None:  # a convolution that reads x, or the output of the one before it
            return x if i == 0 else outputs[i - 1]
        return g.again(x if i == 0 else outputs[i - 1], norm, act)

    # The end of the block. What the first convolution's gradient adds and sums is settled first: it may save writes here.
    z = source = None
    if block.preact and block.projection is not None:
        source = before(0)
    elif projection is not None:
        source = x
    bits = mask if mask.numel() else None
    lean, pair = g.lean and not block.preact, g.pairs(block)
    step = 0 if block.shortcut == NO_SHORTCUT else g.compact_step(projection) if projection is not None else 1
    masked = bits is not None and block.shortcut == IDENTITY
    first = lean and need_x and g.serves(x, block.convs[0], step, front_site, masked)
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
        # The bits stand for the residual's gradient where all its readers take them.
        by_bits = not pair and bits is not None and (lean and has_projected or first and block.shortcut == IDENTITY)
        need_residual = block.shortcut != 0 and act != 0 and not by_bits
        norm = block.convs[last].norm
        if pair:
            dy, dresidual = g.normalise_pair(dout, known, outputs.pop(), norm, projected, projection.norm, act, bits)
        elif known:
            dy, dresidual = g.normalise_known(dout, tuple(known), outputs.pop(), norm, act, bits, need_residual)
        else:
            dy, dresidual = g.normalise(dout, outputs.pop(), norm, act, residual, bits, True, need_residual)
        if by_bits or act == 0 and not pair:
            dresidual = dout
    # The shortcut.
    added = Added(dresidual) if block.preact or not by_bits else Added(dout, bits, act, block.negative_slope)
    need_source = need_x or (block.preact and _any_needed(block.convs[0].norm, len(convs), needs))
    if projection is not None:
        if has_projected and not pair:
            through = (act, None, bits) if not block.preact and by_bits else (0, None, None)
            dresidual, _ = g.normalise(dresidual, projected, projection.norm, *through, True, False)
        del projected
        compact = first and step > 1
        made = (g.compact_back if compact else g.convolve_back)(dresidual, source, projection, need_source)
        added = Added(made, step=step if compact else 1)
    del dresidual
    # The branch, from its end.
    sums: Sums | None = None
    for i in range(last, -1, -1):
        conv = block.convs[i]
        if z is None:
            z = source if i == 0 and source is not None else before(i)
        need_z = i > 0 or need_source
        norm = conv.norm if block.preact else block.convs[i - 1].norm if i > 0 else None
        site = None
        if i > 0 and norm is not None and g.lean and (act == 0 or act in MASK_CODES):
            site = g.site(outputs[-1], norm, act, None)
        if i == 0 and first:
            dy, sums = g.convolve_back_fused(dy, z, conv, added if block.shortcut else None, front_site)
            continue
        if site is not None and g.serves(z, conv, 0, site):
            dz, taken = g.convolve_back_fused(dy, z, conv, None, site)
            dy, _ = g.normalise_known(dz, taken, outputs.pop(), norm, act, None, False)
            z = None
            continue
        dz = g.convolve_back(dy, z, conv, need_z)
        z = dy = None
        if i == 0 and projection is not None and need_source:
            dz.add_(added.gradient)
        if norm is None:
            dy = dz
        elif i > 0 or need_source:
            dy, _ = g.normalise(dz, outputs.pop() if i > 0 else x, norm, act, None, None, i > 0 or need_x, False)
        dz = None
    if need_x:
        g.grads[0] = dy.add_(added.gradient) if block.shortcut == IDENTITY and not first else dy
    return [*(g.grads[place] for place, need in enumerate(needs) if need), *(sums or ())]


def _any_needed(norm: Norm | None, conv_tensors: int, needs: list[bool]) -> bool:
    """Whether a vector of this BatchNorm needs a gradient."""
    places = () if norm is None else (norm.weight, norm.bias)
    return any(place >= 0 and needs[1 + conv_tensors + place] for place in places)
