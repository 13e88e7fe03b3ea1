"""Contract of ``local_response_norm``: x over a power of the mean square of its channel neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op, op
from ._layout import suggested_format


def _fake(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return torch.empty_like(x, memory_format=suggested_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])  # the sums are made again: reading x once more costs less than keeping them
    ctx.scalars = inputs[1:]


def _backward(namespace: str, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return op("local_response_norm_bwd", namespace)(dout, x, *ctx.scalars), None, None, None, None


def _fake_bwd(dout: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return torch.empty_like(x, memory_format=suggested_format(x))


define_op(
    "local_response_norm",
    "(Tensor x, int size, float alpha, float beta, float k) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define_op(
    "local_response_norm_bwd",
    "(Tensor dout, Tensor x, int size, float alpha, float beta, float k) -> Tensor",
    fake=_fake_bwd,
)
