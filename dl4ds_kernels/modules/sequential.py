"""``FusedSequential``: an ``nn.Sequential`` whose conv, BatchNorm and activation neighbours run fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._block import run_conv_bn_act_pool, run_norm_act_conv
from ._chain import Step, run_chain
from ._linear import is_linear, run_linear_act
from ._pool import is_pool, run_pool
from ._replay import is_known, replayed, run_replayed
from ._run import NO_ACT, ActSpec, _no_global_hooks, act_spec, is_plain, run_bn_act, run_conv_act, run_conv_bn_act
from ._transposed import run_conv_transpose_bn_act

_CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)  # beside Conv2d and ConvTranspose2d
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.BatchNorm1d)


class FusedSequential(nn.Sequential):
    """Runs its children one after the other as ``nn.Sequential`` does, with the same state_dict keys.

    A convolution (also transposed or 3-D) followed by a BatchNorm and perhaps an activation is one fused step, a BatchNorm or a
    2-D convolution followed by an activation too; everything else is called as it is. In inference on the CPU 2-D convolutions
    in a row are one op call; poolings, and fully connected layers with their activation, take a kernel of ours. With gradients
    BatchNorm - activation - convolution, and convolution - BatchNorm - activation - max-pooling, are one autograd node.
    Children may be exchanged, hooked or frozen at any time: a hooked child is called by itself. Indexing with a slice returns
    a FusedSequential.

    Shape: as the children say.
    """

    in_order = True  # the forward is the children's, one after the other

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        return run_sequence(list(self._modules.values()), x)


def run_sequence(children: list[nn.Module], x: Tensor) -> Tensor:
    """Run modules one after the other, neighbours fused as :class:`FusedSequential` says."""
    i, n = 0, len(children)
    while i < n:
        module = children[i]
        kind, after = type(module), children[i + 1] if i + 1 < n else None
        if kind is nn.Conv2d:
            steps, i = _steps(children, i)
            pool = children[i] if i < n and type(children[i]) is nn.MaxPool2d else None
            if pool is not None and steps[-1].bn is not None and torch.is_grad_enabled():
                x = run_conv_bn_act_pool(_run_steps(x, steps[:-1]), *steps[-1][:3], pool)
                i += 1
            else:
                x = _run_steps(x, steps)
        elif kind in _CONVOLUTIONS and type(after) in _NORMS:
            act = _act(children, i + 2)
            x = run_conv_bn_act(x, module, after, act)
            i += 2 if act is NO_ACT else 3
        elif kind is nn.ConvTranspose2d and type(after) in _NORMS:
            act = _act(children, i + 2)
            x = run_conv_transpose_bn_act(x, module, after, act)
            i += 2 if act is NO_ACT else 3
        elif kind in _NORMS:
            act = _act(children, i + 1)
            i += 1 if act is NO_ACT else 2
            if act is not NO_ACT and i < n and type(children[i]) is nn.Conv2d and _stands_alone(children, i):
                x = run_norm_act_conv(x, module, act, children[i])
                i += 1
            else:
                x = run_bn_act(x, module, act)
        elif is_linear(module):
            act = _act(children, i + 1)
            x = run_linear_act(x, module, act)
            i += 1 if act is NO_ACT else 2
        else:
            x = run_pool(x, module) if is_pool(module) else module(x)
            i += 1
    return x


def run_concat(xs: tuple[Tensor, ...], block: nn.Module) -> Tensor:
    """``block(torch.cat(xs, 1))``; of a FusedSequential in inference on the CPU as :func:`run_sequence_on_parts`."""
    if not (type(block) is FusedSequential and is_plain(block) and _no_global_hooks()):
        return block(torch.cat(xs, 1))
    return replay_on_parts(xs, block, is_known)


def replay_on_parts(xs: tuple[Tensor, ...], block: nn.Module, is_pure: Callable[[nn.Module], bool], **keywords: Any) -> Tensor:
    """:func:`run_sequence_on_parts` of a block's children, replayed where that applies."""

    def forward() -> Tensor:
        return run_sequence_on_parts(xs, list(block._modules.values()), **keywords)

    return run_replayed(block, xs, forward, is_pure, keywords.get("backend"))


def run_sequence_on_parts(xs: tuple[Tensor, ...], children: list[nn.Module], **keywords: Any) -> Tensor:
    """:func:`run_sequence` of ``torch.cat(xs, 1)``; in inference on the CPU the first convolution reads the parts themselves.

    Winograd's input transform goes channel by channel anyway, so the concatenation of a U-Net is never written (5.7 of 51 ms
    for one of 256 x 256); for another algorithm the op joins them. ``keywords`` of :func:`run_chain`, for the convolutions.
    """
    steps, end = _steps(children, 0)
    if not steps or torch.is_grad_enabled() or torch.compiler.is_compiling() or not _fit(xs):
        return run_sequence(children, torch.cat(xs, 1))
    chain = [step._replace(sources=(i + len(xs) - 1,)) for i, step in enumerate(steps)]
    chain[0] = chain[0]._replace(sources=tuple(range(len(xs))))
    return run_sequence(children[end:], run_chain(xs, tuple(chain), **keywords))


def begins_with_convolutions(block: nn.Module) -> int:
    """How many of a Sequential's first children :func:`run_sequence_on_parts` runs on parts."""
    return _steps(list(block._modules.values()), 0)[1]


def _fit(xs: tuple[Tensor, ...]) -> bool:
    """Whether these are maps that differ in the number of channels alone; else torch.cat says what is wrong."""
    n, _, *sizes = xs[0].shape
    return all(type(x) is Tensor and x.dim() == 4 and [x.shape[0], *x.shape[2:]] == [n, *sizes] for x in xs)


def _run_steps(x: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """Several in one op call where that is possible; one by itself, which costs less host time."""
    if len(steps) != 1:
        return run_chain((x,), steps) if steps else x
    conv, bn, act = steps[0][:3]
    return run_conv_act(x, conv, act) if bn is None else run_conv_bn_act(x, conv, bn, act)


def _steps(children: list[nn.Module], i: int) -> tuple[tuple[Step, ...], int]:
    """(the 2-D convolutions from place ``i`` on that follow one another, where they end)."""
    steps: list[Step] = []
    while i < len(children) and type(children[i]) is nn.Conv2d:
        conv, bn = children[i], None
        i += 1
        if i < len(children) and type(children[i]) in _NORMS:
            bn = children[i]
            i += 1
        act = _act(children, i)
        i += act is not NO_ACT
        steps.append(Step(conv, bn, act, (len(steps),)))
    return tuple(steps), i


def _stands_alone(children: list[nn.Module], i: int) -> bool:
    """Whether nothing behind the convolution at place ``i`` is fused with it."""
    return _act(children, i + 1) is NO_ACT and not (i + 1 < len(children) and type(children[i + 1]) in _NORMS)


def _act(children: list[nn.Module], i: int) -> ActSpec:
    """The activation at place ``i``, NO_ACT if there is none."""
    return (act_spec(children[i]) if i < len(children) else None) or NO_ACT
