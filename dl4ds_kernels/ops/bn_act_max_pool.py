"""Contract and schedule of ``bn_act_max_pool``: ``max_pool2d(act(batch_norm(x)))``, the end of a network's stem.

A schedule of ``bn_act`` and a pooling: ours where its kernels apply, else torch's. What one op buys is memory: ``x`` and
per-channel statistics are kept for backward, neither the activated map (four times the pooled one) nor the pooling's 8-byte
indices. The map is made again; the places of the maxima our pooling looks up where it adds the gradient, torch's pools again.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .._define import CPP, define_op, has_kernel, op
from .bn_act import eval_statistics, normalise_again

_POOL = torch.ops.aten.max_pool2d_with_indices
_ARGS = 16
Pairs = tuple[list[int], list[int], list[int], list[int], bool]  # kernel, stride, padding, dilation; ceil_mode


def _has_pooling(namespace: str, z: Tensor, kernel: list[int], padding: list[int]) -> bool:
    """Whether the kernels of pool2d apply: fp32 in channels_last (by torch's rule for the output's layout), torch's bounds."""
    return (
        has_kernel("max_pool2d_bwd", namespace, z.device.type)
        and z.dtype is torch.float32
        and z.is_contiguous(memory_format=torch.channels_last)
        and not z.is_contiguous()
        and all(0 <= 2 * p <= k for p, k in zip(padding, kernel, strict=True))
    )


def _pool(namespace: str, z: Tensor, pairs: Pairs) -> Tensor:
    *sizes, ceil_mode = pairs
    if _has_pooling(namespace, z, sizes[0], sizes[2]):
        return op("max_pool2d", namespace)(z, *chain.from_iterable(sizes), ceil_mode)
    return _POOL(z, *pairs)[0]


def _pool_back(namespace: str, dout: Tensor, z: Tensor, pairs: Pairs) -> Tensor:
    *sizes, ceil_mode = pairs
    if _has_pooling(namespace, z, sizes[0], sizes[2]):
        return op("max_pool2d_bwd", namespace)(dout, z, *chain.from_iterable(sizes), ceil_mode)
    _, where = _POOL(z, *pairs)
    return torch.ops.aten.max_pool2d_with_indices_backward(dout, z, *pairs, where)


def _forward(
    namespace: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[Tensor, ...]:
    """``(out, mean, rstd, new_running_mean, new_running_var)``; vectors that do not apply are empty."""
    z, mean, rstd, _, new_mean, new_var = op("bn_act", namespace)(
        x, weight, bias, running_mean, running_var, None, training, momentum, eps, eps_std, activation, negative_slope, False
    )
    out = _pool(namespace, z, (kernel, stride, padding, dilation, ceil_mode))
    return out, mean, rstd, new_mean, new_var


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, running_mean, running_var, training = inputs[:6]
    _, mean, rstd, _, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *((mean, rstd) if training else (running_mean, running_var)))
    ctx.scalars = (training, *inputs[7:])


def _backward(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grads: list[Any] = [None] * _ARGS
    if dout is None:
        return tuple(grads)
    x, weight, bias, first, second = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = op("bn_act_max_pool_bwd", namespace)(
        dout, x, weight, bias, first, second, *ctx.scalars, need_x, need_weight or need_bias
    )
    if need_x:
        grads[0] = dx
    if need_weight:
        grads[1] = dweight.to(weight.dtype)
    if need_bias:
        grads[2] = dbias.to(bias.dtype)
    return tuple(grads)


def _gradients(
    namespace: str,
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    training: bool,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    need_dx: bool,
    need_dparams: bool,
) -> tuple[Tensor, ...]:
    """``(dx, dweight, dbias)``; ``first, second``: mean and rstd in training, else the running statistics."""
    z = normalise_again(namespace, x, weight, bias, first, second, training, eps, eps_std, activation, negative_slope)
    mean, rstd = (first, second) if training else eval_statistics(x, first, second, eps, eps_std)
    dz = _pool_back(namespace, dout, z, (kernel, stride, padding, dilation, ceil_mode))
    del z
    return op("bn_act_bwd", namespace)(
        dz, x, weight, bias, mean, rstd, None, None, training, eps, eps_std, activation, negative_slope, need_dx, need_dparams,
        False,
    )[:3]  # fmt: skip


_SCALARS = (
    "bool training, {momentum}float eps, bool eps_std, int activation, float negative_slope, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, bool ceil_mode"
)

define_op(
    "bn_act_max_pool",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    + _SCALARS.format(momentum="float momentum, ")
    + ") -> (Tensor out, Tensor mean, Tensor rstd, Tensor new_running_mean, Tensor new_running_var)",
    fake=partial(_forward, CPP),
    setup_context=_setup_context,
    backward=_backward,
    composed_of="bn_act",
    compose=_forward,
)
define_op(
    "bn_act_max_pool_bwd",
    "(Tensor dout, Tensor x, Tensor? weight, Tensor? bias, Tensor first, Tensor second, "
    + _SCALARS.format(momentum="")
    + ", bool need_dx, bool need_dparams) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake=partial(_gradients, CPP),
    composed_of="bn_act",
    compose=_gradients,
)
