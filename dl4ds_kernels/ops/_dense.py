"""Steps of ``dense_block`` on its buffers: a CPU kernel each, and the same in plain torch where there is none.

All tensors of features are channels_last or slices of channels of a channels_last buffer. The ops that write to an argument
have no autograd formula and are called below autograd only, like ``bn_act_into``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op, has_kernel, op
from ._layout import accumulate_dtype
from .bn_act import eval_statistics


def has_steps(namespace: str, x: Tensor) -> bool:
    """Whether the steps are kernels."""
    return has_kernel("dense_back_into", namespace, x.device.type)


def empty(namespace: str, like: Tensor, channels: int) -> Tensor:
    """An uninitialised channels_last buffer for this many channels of ``like``'s pixels."""
    if has_kernel("dense_buffer", namespace, like.device.type):
        return op("dense_buffer", namespace)(like, channels)
    n, _, *size = like.shape
    return torch.empty((n, channels, *size), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def append(namespace: str, x: Tensor, out: Tensor, mean: Tensor, var: Tensor) -> None:
    """Copy ``x`` to ``out``, a slice of channels; its biased batch statistics to ``mean`` and ``var``."""
    if has_steps(namespace, x):
        op("dense_append_into", namespace)(x, out, mean, var)
        return
    out.copy_(x)
    second, first = torch.var_mean(x.to(mean.dtype), (0, 2, 3), correction=0)
    mean.copy_(first)
    var.copy_(second)


def back(
    namespace: str, dz: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, grad: Tensor,
    out: Tensor, linear: tuple[Tensor, Tensor], eps: float, eps_std: bool, activation: int, negative_slope: float,
    activate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of weight and bias of ``act(bn(x))`` in training, given ``dz`` of its output.

    ``out`` becomes ``grad`` plus x's gradient, but for a part that is linear in x: ``(x - mean) * factor + offset``, which is
    added to ``linear`` (factor, offset; fp64). ``activate``: dz becomes ``act(bn(x))``.
    """
    if has_steps(namespace, x):
        return op("dense_back_into", namespace)(
            dz, x, weight, bias, mean, var, grad, out, *linear, eps, eps_std, activation, negative_slope, activate
        )  # fmt: skip
    first, rstd = eval_statistics(x, mean, var, eps, eps_std)
    dx, dweight, dbias, _ = op("bn_act_bwd", namespace)(
        dz, x, weight, bias, first, rstd, None, None, True, eps, eps_std, activation, negative_slope, True, True, False
    )  # fmt: skip
    torch.add(grad, dx, out=out)
    if activate:
        dz.copy_(normalise(namespace, x, weight, bias, mean, var, eps, eps_std, activation, negative_slope))
    return dweight, dbias


def normalise(
    namespace: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float,
    eps_std: bool, activation: int, negative_slope: float,
) -> Tensor:  # fmt: skip
    """``act(bn(x))`` by statistics that are known: the same bits in forward and backward."""
    return op("bn_act", namespace)(
        x, weight, bias, mean, var, None, False, 0.0, eps, eps_std, activation, negative_slope, False
    )[0]


def take(namespace: str, grad: Tensor, x: Tensor, mean: Tensor, linear: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of ``x``, dense, once every layer that reads x has added its part to ``grad`` and ``linear``."""
    if has_steps(namespace, x):
        return op("dense_take_step", namespace)(grad, x, mean, *linear)
    return grad.contiguous(memory_format=torch.channels_last)  # back() has left nothing in `linear`


def _fake_empty(like: Tensor, channels: int) -> Tensor:
    n, _, *size = like.shape
    return torch.empty((n, channels, *size), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake_append(*args: Any) -> None:
    return None


def _fake_back(dz: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dweight, dbias = (x.new_empty(x.shape[1], dtype=accumulate_dtype(x)) for _ in range(2))
    return dweight, dbias


def _fake_take(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


define_op("dense_buffer", "(Tensor like, int channels) -> Tensor", fake=_fake_empty, stem="bn_act", triton=False)
define_op(
    "dense_append_into",
    "(Tensor x, Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var) -> ()",
    fake=_fake_append,
    stem="bn_act",
    triton=False,
)
define_op(
    "dense_back_into",
    "(Tensor(a!) dz, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor grad, Tensor(b!) out, "
    "Tensor(c!) factor, Tensor(d!) offset, float eps, bool eps_std, int activation, float negative_slope, bool activate) "
    "-> (Tensor dweight, Tensor dbias)",
    fake=_fake_back,
    stem="bn_act",
    triton=False,
)
define_op(
    "dense_take_step",
    "(Tensor grad, Tensor x, Tensor mean, Tensor factor, Tensor offset) -> Tensor",
    fake=_fake_take,
    stem="bn_act",
    triton=False,
)
