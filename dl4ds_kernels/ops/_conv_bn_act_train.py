"""Contract of ``conv_bn_act_train``: ``act(batch_norm(conv2d(x)) [+ residual])`` with batch statistics.

On CUDA one call may take the batch statistics from the convolution's own epilogue (csrc/ops/conv_bn_act/conv_bn_act_stats*),
which saves a pass over its output. There is no CPU or Triton kernel: there :func:`train` is the convolution of ``conv2d_step``
and ``bn_act``, which is what the CUDA op does too where the fused convolution is not expected to pay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op, has_kernel, op
from . import _conv_dgrad
from ._conv2d import convolve, convolve_back
from ._conv_dgrad import Added, Site
from .bn_act import _fake as _fake_bn_act
from .conv_bn_act import _autocast, _convolve

_ARGS = 18


def has_train(namespace: str, x: Tensor) -> bool:
    """Whether the op has a kernel for x (fp64 has none: its convolutions are the library's)."""
    return x.is_cuda and x.dtype != torch.float64 and has_kernel("conv_bn_act_train", namespace, "cuda")


def train(
    namespace: str, x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, geometry: tuple[Any, ...], momentum: float,
    eps: float, eps_std: bool, activation: int, negative_slope: float, save_mask: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``(out, y, mean, rstd, mask, new_running_mean, new_running_var)`` on any backend; y is the convolution's output.

    ``geometry``: stride, padding, dilation, groups.
    """
    if has_train(namespace, x):
        return op("conv_bn_act_train", namespace)(
            x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual, *geometry, momentum, eps, eps_std,
            activation, negative_slope, save_mask,
        )  # fmt: skip
    y = convolve(x, weight, bias, geometry)
    out, *rest = op("bn_act", namespace)(
        y, bn_weight, bn_bias, running_mean, running_var, residual, True, momentum, eps, eps_std, activation, negative_slope,
        save_mask,
    )  # fmt: skip
    return (out, y, *rest)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *geometry, momentum, eps, eps_std, activation, negative_slope, save_mask = rest
    y = _convolve(x, weight, bias, tuple(geometry))
    out, *others = _fake_bn_act(
        y, bn_weight, bn_bias, running_mean, running_var, residual, True, momentum, eps, eps_std, activation, negative_slope,
        save_mask,
    )  # fmt: skip
    return (out, y, *others)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, bn_weight, bn_bias, residual = inputs[:8]
    _, y, mean, rstd, mask, _, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    activation = inputs[15]
    saved_residual = None if activation == 0 or mask.numel() else residual
    ctx.save_for_backward(x, weight, bn_weight, bn_bias, y, mean, rstd, saved_residual, mask if mask.numel() else None)
    ctx.has_bias = bias is not None
    ctx.has_residual = residual is not None
    ctx.geometry, ctx.scalars = inputs[8:12], inputs[13:17]
    ctx.residual_edge = sum(t is not None for t in inputs[:7])
    _conv_dgrad.open_node(ctx, "conv_bn_act_train")


def _site(ctx: Any) -> Site | None:
    """The BatchNorm behind which the output lies."""
    _, _, bn_weight, bn_bias, y, mean, rstd, _, mask = ctx.saved_tensors
    if ctx.has_residual and mask is None and ctx.scalars[2] != 0:
        return None  # the side of the kink depends on what was added
    return Site(y, bn_weight, bn_bias, mean, rstd, mask, *ctx.scalars)


_conv_dgrad.offers_site("conv_bn_act_train", _site)


def _convolve_back(namespace: str, ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, left: Added | None) -> list[Tensor | None]:
    """Gradients of x, weight and bias; x's with what was left to be added, and sums for the BatchNorm that made x."""
    needs = ctx.needs_input_grad
    found = _conv_dgrad.site_of(ctx) if needs[0] and _conv_dgrad.has_dgrad(namespace, x) else None
    site = None if found is None else found[1]
    about = int(left is not None), site, left is not None and left.mask is not None
    if needs[0] and (site or left) and _conv_dgrad.serves(namespace, x, weight, ctx.geometry, *about):
        grads = convolve_back(dy, x, weight, ctx.has_bias, ctx.geometry, (False, *needs[1:3]))
        grads[0], sums = _conv_dgrad.dgrad(namespace, dy, weight, x.shape[2:], ctx.geometry, left, site)
        if found is not None:
            _conv_dgrad.hand_over(found[0], grads[0], sums)
        return grads
    grads = convolve_back(dy, x, weight, ctx.has_bias, ctx.geometry, needs[:3])
    if left is not None and needs[0]:
        gradient = left.gradient
        if left.mask is not None:
            gradient = op("add_act_bwd", namespace)(
                gradient, left.mask, None, None, 1.0, left.activation, left.negative_slope
            )  # fmt: skip
        grads[0] = grads[0].add_(gradient)
    return grads


def _backward(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grads: list[Any] = [None] * _ARGS
    if dout is None:
        return tuple(grads)
    x, weight, bn_weight, bn_bias, y, mean, rstd, residual, mask = ctx.saved_tensors
    eps, eps_std, activation, negative_slope = ctx.scalars
    needs = ctx.needs_input_grad
    need_residual = ctx.has_residual and needs[7]
    known, left = _conv_dgrad.known_sums(ctx, dout), _conv_dgrad.left_residual(ctx)
    need_dresidual = need_residual and activation != 0
    if need_residual and (activation == 0 or mask is not None) and _conv_dgrad.has_dgrad(namespace, dout):
        added = Added(dout) if activation == 0 else Added(dout, mask, activation, negative_slope)
        if _conv_dgrad.leave_residual(ctx, ctx.residual_edge, added):
            need_residual = need_dresidual = False
    if known is not None and any(needs[:3]):
        table, dbn_weight, dbn_bias = known
        dy, dresidual = _conv_dgrad.apply(namespace, dout, table, _site(ctx), need_dresidual)
    else:
        dy, dbn_weight, dbn_bias, dresidual = op("bn_act_bwd", namespace)(
            dout, y, bn_weight, bn_bias, mean, rstd, residual, mask, True, eps, eps_std, activation, negative_slope,
            any(needs[:3]), needs[5] or needs[6], need_dresidual,
        )  # fmt: skip
    if any(needs[:3]):
        grads[:3] = _convolve_back(namespace, ctx, dy, x, weight, left)
    if needs[5]:
        grads[5] = dbn_weight.to(bn_weight.dtype)
    if needs[6]:
        grads[6] = dbn_bias.to(bn_bias.dtype)
    if need_residual:
        grads[7] = dout if activation == 0 else dresidual
    return tuple(grads)


define_op(
    "conv_bn_act_train",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, float momentum, float eps, bool eps_std, "
    "int activation, float negative_slope, bool save_mask) -> (Tensor out, Tensor y, Tensor mean, Tensor rstd, Tensor mask, "
    "Tensor new_running_mean, Tensor new_running_var)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
    stem="conv_bn_act",
    triton=False,
)
