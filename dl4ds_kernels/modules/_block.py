"""Stock modules of a residual block through one autograd op; the training path of the blocks and of ``dk.optimize``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _packing
from ..functional import bn_act_max_pool
from ..functional.residual_block import BNParams, ConvParams, run_block
from ..ops._block_code import IDENTITY, NO_SHORTCUT, PROJECTION
from ._pool import run_pool
from ._run import (
    NO_ACT,
    ActSpec,
    _act_fusable,
    _autocast_differs,
    _bn_fusable,
    _conv_fusable,
    _eps_mode,
    _no_global_hooks,
    _slope,
    has_hooks,
    is_plain,
    run_bn_act,
    run_conv_act,
    run_conv_bn_act,
    run_norm_act_conv_norm_act,
)  # fmt: skip
from .bn_act import batch_statistics_choice

Pair = tuple[nn.Module, nn.Module | None]  # a convolution and its BatchNorm


def _is_recorded() -> bool:
    """Whether this call is written down, to be run with and without gradients: then layer by layer."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def run_residual_block(
    x: Tensor,
    pairs: Sequence[Pair],
    act: ActSpec,
    shortcut: nn.Module | None,
    *,
    preact: bool = False,
    add: bool = True,
    alpha: float = 1.0,
    memory_efficient: bool = False,
    keep_activations: bool = False,
    backend: str | None = None,
) -> Tensor | None:
    """The block of these stock modules with gradients; None where it must go layer by layer (inference, hooks, other types).

    ``shortcut``: None (the input itself), or a convolution, alone or with a BatchNorm in a Sequential. ``add=False``: no sum.
    """
    if not (
        isinstance(x, Tensor)
        and x.dim() == 4
        and torch.is_grad_enabled()
        and _act_fusable(act)
        and _no_global_hooks()
        and not _is_recorded()
    ):
        return None
    projection = None
    if shortcut is not None:
        projection = _projection(shortcut)
        if projection is None or (preact and projection[1] is not None):
            return None
    every = [*pairs] if projection is None else [*pairs, projection]
    if not all(_fits(conv, bn) for conv, bn in every):
        return None
    if add and not preact and _autocast_differs(x):  # stock adds in place, which keeps the branch's dtype
        return None
    training = {_uses_batch(bn) for _, bn in every if bn is not None}
    trained = x.requires_grad or any(p.requires_grad for pair in every for m in pair if m is not None for p in _tensors(m))
    if len(training) != 1 or not trained:
        return None
    params = [_params(conv, bn) for conv, bn in every]
    return run_block(
        x, params[: len(pairs)], None if projection is None else params[-1], preact=preact,
        shortcut=PROJECTION if projection is not None else IDENTITY if add else NO_SHORTCUT, alpha=alpha,
        training=training.pop(), activation=act.name, negative_slope=_slope(act), memory_efficient=memory_efficient,
        keep_activations=keep_activations, backend=backend,
    )  # fmt: skip


def run_conv_bn_act_pool(
    x: Tensor, conv: nn.Module, bn: nn.Module, act: ActSpec, pool: nn.Module, *, backend: str | None = None, **keywords: Any
) -> Tensor:
    """``pool(act(bn(conv(x))))``, a network's stem; with gradients only the convolution's output is kept.

    ``keywords``: of :func:`run_conv_bn_act`, which serves inference.
    """
    if (
        type(pool) is nn.MaxPool2d
        and not pool.return_indices
        and is_plain(pool)
        and isinstance(x, Tensor)
        and x.dim() == 4
        and torch.is_grad_enabled()
        and _act_fusable(act)
        and _no_global_hooks()
        and _fits(conv, bn)
        and not _is_recorded()
    ):
        training = _uses_batch(bn)
        norm = _params(conv, bn).norm
        y = torch.conv2d(
            x, conv._parameters["weight"], conv._parameters["bias"], conv.stride, conv.padding, conv.dilation, conv.groups
        )
        return bn_act_max_pool(
            y, norm.running_mean, norm.running_var, norm.weight, norm.bias, kernel_size=pool.kernel_size, stride=pool.stride,
            pool_padding=pool.padding, dilation=pool.dilation, ceil_mode=pool.ceil_mode, training=training,
            momentum=norm.momentum, eps=norm.eps, eps_mode=norm.eps_mode, activation=act.name, negative_slope=_slope(act),
            backend=backend,
        )  # fmt: skip
    return run_pool(run_conv_bn_act(x, conv, bn, act, backend=backend, **keywords), pool, backend=backend)


def run_norm_act_conv(
    x: Tensor, bn: nn.Module, act: ActSpec, conv: nn.Module, *, backend: str | None = None, **keywords: Any
) -> Tensor:
    """``conv(act(bn(x)))``; with gradients only ``x`` is kept."""
    out = run_residual_block(x, [(conv, bn)], act, None, preact=True, add=False, backend=backend)
    if out is not None:
        return out
    out = run_norm_act_conv_norm_act(x, bn, act, conv, None, NO_ACT, backend)
    if out is not None:
        return out
    return run_conv_act(run_bn_act(x, bn, act, backend=backend), conv, backend=backend, **keywords)


def _projection(shortcut: nn.Module) -> Pair | None:
    """(convolution, BatchNorm or None) of a shortcut, None if it is anything else."""
    if type(shortcut) is nn.Conv2d:
        return shortcut, None
    in_order = type(shortcut) is nn.Sequential or "in_order" in vars(type(shortcut))  # FusedSequential
    if in_order and is_plain_container(shortcut) and len(shortcut) == 2:
        conv, bn = shortcut
        return conv, bn
    return None


def is_plain_container(module: nn.Module) -> bool:
    """No hooks, and no forward but its class's or the fused one that stands for it."""
    return not has_hooks(module) and type(module.__dict__.get("forward")).__name__ in ("NoneType", "FusedForward")


def _fits(conv: nn.Module, bn: nn.Module | None) -> bool:
    if not _conv_fusable(conv) or type(conv.padding) is str:
        return False
    return bn is None or (_bn_fusable(bn) and type(bn) is not nn.BatchNorm1d and type(bn) is not nn.BatchNorm3d)


def _uses_batch(bn: nn.Module) -> bool:
    return bn.training or (bn._buffers["running_mean"] is None and bn._buffers["running_var"] is None)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in module._parameters.values() if t is not None]


def _params(conv: nn.Module, bn: nn.Module | None) -> ConvParams:
    """The tensors of this call; counts the batch, as :func:`batch_statistics_choice` does."""
    norm = None
    if bn is not None:
        _, momentum, mean, var = batch_statistics_choice(bn)
        norm = BNParams(mean, var, bn._parameters["weight"], bn._parameters["bias"], momentum, bn.eps, _eps_mode(bn))
        _packing.drop(conv)
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    return ConvParams(weight, norm, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
