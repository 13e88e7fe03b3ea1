"""Contract of ``conv_transpose_bn_act``: ``act(batch_norm(conv_transpose2d(x)))`` with running statistics or no BatchNorm.

The inference op. Training composes the library's transposed convolution with ``bn_act`` (functional/conv_transpose_bn_act.py).
Backward makes the convolution's output again, then runs bn_act's gradient and the library's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op, op
from ._layout import accumulate_dtype
from .bn_act import eval_statistics

_ARGS = 16


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
    stride, padding, output_padding, dilation, groups = geometry
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    return _convolve(x, weight, bias, args[4:9])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.geometry, ctx.scalars = inputs[7:12], inputs[12:]


def _backward(namespace: str, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, weight, bias, running_mean, running_var, bn_weight, bn_bias = ctx.saved_tensors
    eps, eps_std, activation, negative_slope = ctx.scalars
    stride, padding, output_padding, dilation, groups = ctx.geometry
    needs = ctx.needs_input_grad
    y = _convolve(x, weight, bias, ctx.geometry)
    if running_mean is None:  # the identity's statistics
        mean, rstd = y.new_zeros(y.shape[1], dtype=accumulate_dtype(y)), y.new_ones(y.shape[1], dtype=accumulate_dtype(y))
    else:
        mean, rstd = eval_statistics(y, running_mean, running_var, eps, eps_std)
    dy, dbn_weight, dbn_bias, _ = op("bn_act_bwd", namespace)(
        dout, y, bn_weight, bn_bias, mean, rstd, None, None, False, eps, eps_std, activation, negative_slope,
        any(needs[:3]), needs[5] or needs[6], False,
    )  # fmt: skip
    grads: list[Any] = [None] * _ARGS
    if any(needs[:3]):
        sizes = None if bias is None else list(bias.shape)
        grads[:3] = torch.ops.aten.convolution_backward(
            dy, x, weight, sizes, stride, padding, dilation, True, output_padding, groups, [needs[0], needs[1], needs[2]]
        )
    if needs[5]:
        grads[5] = dbn_weight.to(bn_weight.dtype)
    if needs[6]:
        grads[6] = dbn_bias.to(bn_bias.dtype)
    return tuple(grads)


def _autocast(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    """Convolution operands run in the autocast dtype; BatchNorm vectors stay fp32."""

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)

    return (*(cast(t) for t in args[:3]), *args[3:])


define_op(
    "conv_transpose_bn_act",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, Tensor? bn_bias, "
    "int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups, float eps, bool eps_std, int activation, "
    "float negative_slope) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)
