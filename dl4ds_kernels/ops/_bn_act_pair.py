"""Contracts of ``bn_act_pair``: the end of a residual block whose shortcut has a BatchNorm of its own, in training.

``act(bn(x) + bn(residual))`` reads both convolutions' outputs and writes the block's: the normalised shortcut is no tensor. Its
statistics are those that ``bn_stats`` takes, or ``conv_bn_stats`` with the convolution. In backward one pass makes both
gradients, and the gradient behind the activation is no tensor either. ``residual_block`` schedules these; no op here has a
gradient formula. There is no Triton kernel: there, and where :func:`fits` says no, the schedule is two calls of ``bn_act``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._activation import MASK_CODES
from .._define import define_op, has_kernel, op
from . import _conv_bn_act_train
from ._conv2d import convolve
from ._layout import accumulate_dtype, mask_bytes, suggested_format
from .conv_bn_act import _convolve


class Normed(NamedTuple):
    """A convolution's output and the BatchNorm behind it, in training."""

    y: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    eps_std: bool


def wanted(namespace: str, x: Tensor, activation: int) -> bool:
    """Whether a block of this activation is to take its end from these ops: they have no kernel for the others, in fp64 on CUDA
    or in Triton.

    On the CPU too. ResNet-50's four bottlenecks with a projection, training steps of fp32 on two threads, two calls of
    ``bn_act`` by the pair, taken in turn (median of the ratios): channels_last 1.009, 1.002, 0.998, 1.001; contiguous 1.016,
    1.01, 1.00 and, of the last block, 1.04 and 0.93 in two runs that moved by more than that. No shape is reliably slower, and
    the schedule is the GPU's.
    """
    kernels = has_kernel("bn_act_pair", namespace, x.device.type) and not (x.is_cuda and x.dtype == torch.float64)
    return kernels and (activation == 0 or activation in MASK_CODES)


def fits(y: Tensor) -> bool:
    """Whether the kernels serve maps like this one. On CUDA they want 16-byte vectors: of channels, or in NCHW of planes."""
    if not y.is_cuda:
        return True
    vector, planes = 16 // y.element_size(), y.shape[2:].numel()
    return y.shape[1] % vector == 0 if suggested_format(y) != torch.contiguous_format else planes >= vector


def convolve_and_sum(
    namespace: str, x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    geometry: tuple[Any, ...], momentum: float, eps: float, eps_std: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``(y, mean, rstd, new_running_mean, new_running_var)`` of ``y = conv(x)`` on any backend."""
    if _conv_bn_act_train.has_train(namespace, x):
        return op("conv_bn_stats", namespace)(x, weight, bias, running_mean, running_var, *geometry, momentum, eps, eps_std)
    y = convolve(x, weight, bias, geometry)
    return (y, *op("bn_stats", namespace)(y, running_mean, running_var, momentum, eps, eps_std))


def apply(
    namespace: str, x: Normed, residual: Normed, activation: int, negative_slope: float, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """``(out, mask)``; the mask is empty where it is not saved."""
    if fits(x.y):
        return op("bn_act_pair", namespace)(*x[:5], *residual[:5], activation, negative_slope, save_mask)
    added, _ = _again(namespace, residual, None, 0, 0.0, False)
    return _again(namespace, x, added, activation, negative_slope, save_mask)


def _again(
    namespace: str, x: Normed, residual: Tensor | None, activation: int, negative_slope: float, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """``bn_act`` with known statistics: in eval with weight * rstd as the weight and a variance of 1 (see normalise_again)."""
    weight = x.rstd if x.weight is None else x.weight.to(x.rstd.dtype) * x.rstd
    found = op("bn_act", namespace)(
        x.y, weight, x.bias, x.mean, torch.ones_like(x.rstd), residual, False, 0.0, 0.0, False, activation, negative_slope,
        save_mask,
    )  # fmt: skip
    return found[0], found[3]


class Gradients(NamedTuple):
    """Of :func:`apply`: dbias is that of both BatchNorms."""

    dx: Tensor
    dresidual: Tensor
    dweight: Tensor
    dbias: Tensor
    residual_dweight: Tensor


def apply_back(
    namespace: str, dout: Tensor, mask: Tensor | None, activation: int, negative_slope: float, x: Normed, residual: Normed,
    known: tuple[Tensor, ...] = (),
) -> Gradients:  # fmt: skip
    """known: dweight and dbias of x's BatchNorm, if another kernel has taken its sums; and dweight of the residual's, if those
    of both. They are among the results.
    """
    if fits(x.y):
        maps = [(n.y, n.weight, n.mean, n.rstd, n.eps, n.eps_std) for n in (x, residual)]
        found = Gradients(
            *op("bn_act_pair_bwd", namespace)(
                dout, mask, activation, negative_slope, *maps[0], *maps[1], *known, *[None] * (3 - len(known))
            )
        )
        return found._replace(**dict(zip(("dweight", "dbias", "residual_dweight"), known, strict=False)))
    both = [
        op("bn_act_bwd", namespace)(
            dout, n.y, n.weight, n.bias, n.mean, n.rstd, None, mask, True, n.eps, n.eps_std, activation, negative_slope,
            True, True, False,
        )
        for n in (x, residual)
    ]  # fmt: skip
    (dx, dweight, dbias, _), (dresidual, residual_dweight, _, _) = both
    return Gradients(dx, dresidual, dweight, dbias, residual_dweight)


# ---- Contracts.


def _statistics(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> tuple[Tensor, ...]:
    acc, channels = accumulate_dtype(x), x.shape[1]
    new = [
        x.new_empty(0 if old is None else channels, dtype=acc if old is None else old.dtype)
        for old in (running_mean, running_var)
    ]
    return (*(x.new_empty(channels, dtype=acc) for _ in range(2)), *new)


def _fake_stats(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _statistics(x, running_mean, running_var)


def _fake_conv_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    y = _convolve(x, weight, bias, tuple(rest[:4]))
    return (y, *_statistics(y, running_mean, running_var))


def _fake_pair(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    activation, save_mask = rest[9], rest[11]
    mask = x.new_empty(mask_bytes(x) if save_mask and activation in MASK_CODES else 0, dtype=torch.uint8)
    return torch.empty_like(x, memory_format=suggested_format(x)), mask


def _fake_pair_bwd(
    dout: Tensor, mask: Tensor | None, activation: int, slope: float, x: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    known, both = rest[-3] is not None, rest[-1] is not None
    maps = [torch.empty_like(x, memory_format=suggested_format(x)) for _ in range(2)]
    sizes = [0 if taken else x.shape[1] for taken in (known, both, both)]
    return (*maps, *(x.new_empty(n, dtype=accumulate_dtype(x)) for n in sizes))


define_op(
    "bn_stats",
    "(Tensor x, Tensor? running_mean, Tensor? running_var, float momentum, float eps, bool eps_std) "
    "-> (Tensor mean, Tensor rstd, Tensor new_running_mean, Tensor new_running_var)",
    fake=_fake_stats,
    stem="bn_act",
    triton=False,
)
define_op(
    "conv_bn_stats",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, int[] stride, int[] padding, "
    "int[] dilation, int groups, float momentum, float eps, bool eps_std) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor new_running_mean, Tensor new_running_var)",
    fake=_fake_conv_stats,
    stem="conv_bn_act",
    triton=False,
)
define_op(
    "bn_act_pair",
    "(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor residual, Tensor residual_mean, "
    "Tensor residual_rstd, Tensor? residual_weight, Tensor? residual_bias, int activation, float negative_slope, "
    "bool save_mask) -> (Tensor out, Tensor mask)",
    fake=_fake_pair,
    stem="bn_act",
    triton=False,
)
define_op(
    "bn_act_pair_bwd",
    "(Tensor dout, Tensor? mask, int activation, float negative_slope, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
    "float eps, bool eps_std, Tensor residual, Tensor? residual_weight, Tensor residual_mean, Tensor residual_rstd, "
    "float residual_eps, bool residual_eps_std, Tensor? dweight, Tensor? dbias, Tensor? residual_dweight) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor residual_dweight)",
    fake=_fake_pair_bwd,
    stem="bn_act",
    triton=False,
)
