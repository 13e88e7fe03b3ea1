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
from ._conv2d import convolve, convolve_back
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


def _backward(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grads: list[Any] = [None] * _ARGS
    if dout is None:
        return tuple(grads)
    x, weight, bn_weight, bn_bias, y, mean, rstd, residual, mask = ctx.saved_tensors
    eps, eps_std, activation, negative_slope = ctx.scalars
    needs = ctx.needs_input_grad
    need_residual = ctx.has_residual and needs[7]
    dy, dbn_weight, dbn_bias, dresidual = op("bn_act_bwd", namespace)(
        dout, y, bn_weight, bn_bias, mean, rstd, residual, mask, True, eps, eps_std, activation, negative_slope,
        any(needs[:3]), needs[5] or needs[6], need_residual and activation != 0,
    )  # fmt: skip
    if any(needs[:3]):
        grads[:3] = convolve_back(dy, x, weight, ctx.has_bias, ctx.geometry, needs[:3])
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
