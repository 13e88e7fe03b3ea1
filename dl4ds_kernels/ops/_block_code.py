"""A residual block as the lists of integers and floats that a dispatcher op can take, and back.

``encode`` and ``decode`` are the two halves of one format; ``Block`` is what both the functional API and the schedule of
``residual_block`` (residual_block.py) speak of. Places are indices into the op's tensor lists, -1 for a tensor that is not
there (a list argument with None in it would have no gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

NO_SHORTCUT, IDENTITY, PROJECTION = 0, 1, 2


class Norm(NamedTuple):
    """One BatchNorm: places of its vectors in ``norms``, of its statistics in ``running`` (variance behind the mean).

    ``index``: its number in :attr:`Block.norms`, the order of the statistics that the op returns.
    """

    index: int
    weight: int
    bias: int
    running: int
    eps_std: bool
    momentum: float
    eps: float


class Conv(NamedTuple):
    """One convolution (places in ``convs``) and its BatchNorm: the one behind it, in a pre-activation block before it."""

    weight: int
    bias: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    norm: Norm | None

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Stride, padding, dilation and groups."""
        return self.stride, self.padding, self.dilation, self.groups


class Block(NamedTuple):
    """``convs`` in order; ``projection`` is the shortcut's convolution where ``shortcut`` is PROJECTION.

    ``keep_projection``: its output is kept for backward; False: computed again. ``keep_activations``: so are the activations
    inside a post-activation block.
    """

    preact: bool
    shortcut: int
    activation: int
    keep_projection: bool
    negative_slope: float
    alpha: float
    convs: tuple[Conv, ...]
    projection: Conv | None
    keep_activations: bool = False

    @property
    def all_convs(self) -> tuple[Conv, ...]:
        """The convolutions of branch and shortcut."""
        return self.convs if self.projection is None else (*self.convs, self.projection)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Every BatchNorm, in the order of their statistics in what the op returns."""
        return tuple(conv.norm for conv in self.all_convs if conv.norm is not None)


_HEADER, _CONV = 5, 14  # integers


def encode(block: Block) -> tuple[list[int], list[float]]:
    """``(code, numbers)``: a header and _CONV integers a convolution; slope, alpha, then momentum and eps of each BatchNorm."""
    keep = int(block.keep_projection) + 2 * int(block.keep_activations)
    code = [int(block.preact), block.shortcut, block.activation, keep, len(block.convs)]
    numbers = [block.negative_slope, block.alpha]
    for conv in block.all_convs:
        code += [conv.weight, conv.bias, *conv.stride, *conv.padding, *conv.dilation, conv.groups]
        norm = conv.norm
        if norm is None:
            code += [0, -1, -1, -1, 0]
        else:
            code += [1 + norm.index, norm.weight, norm.bias, norm.running, int(norm.eps_std)]
            numbers += [norm.momentum, norm.eps]
    return code, numbers


def decode(code: Sequence[int], numbers: Sequence[float]) -> Block:
    """The block that :func:`encode` wrote."""
    return _decode(tuple(code), tuple(numbers))


@lru_cache(maxsize=512)
def _decode(code: tuple[int, ...], numbers: tuple[float, ...]) -> Block:
    preact, shortcut, activation, keep, count = code[:_HEADER]
    rest = iter(numbers[2:])
    convs = []
    for start in range(_HEADER, len(code), _CONV):
        weight, bias, s0, s1, p0, p1, d0, d1, groups, norm_number, *norm_code = code[start : start + _CONV]
        norm = None
        if norm_number:
            norm_weight, norm_bias, running, eps_std = norm_code
            norm = Norm(norm_number - 1, norm_weight, norm_bias, running, bool(eps_std), next(rest), next(rest))
        convs.append(Conv(weight, bias, (s0, s1), (p0, p1), (d0, d1), groups, norm))
    projection = convs[count] if len(convs) > count else None
    return Block(
        bool(preact), shortcut, activation, bool(keep & 1), numbers[0], numbers[1], tuple(convs[:count]), projection,
        bool(keep & 2),
    )  # fmt: skip
