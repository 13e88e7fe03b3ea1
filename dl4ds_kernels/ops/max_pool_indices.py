"""Contracts of ``max_pool_indices`` (2x2 windows, a byte for each maximum's place) and its inverse ``max_unpool``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op, op
from ._layout import suggested_format


def _maps(like: Tensor, layout: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=suggested_format(layout))


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    h, w = x.shape[2] // 2, x.shape[3] // 2
    return _maps(x, x, h, w), _maps(x, x, h, w, torch.uint8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> Any:
    return None if dout is None else op("max_pool_indices_bwd", namespace)(dout, ctx.saved_tensors[0])


def _fake_unpool(y: Tensor, where: Tensor) -> Tensor:
    return _maps(y, where, 2 * y.shape[2], 2 * y.shape[3])


def _setup_unpool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_unpool(namespace: str, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return op("max_unpool_bwd", namespace)(dout, ctx.saved_tensors[0]), None


def _fake_gather(dout: Tensor, where: Tensor) -> Tensor:
    return _maps(dout, where, dout.shape[2] // 2, dout.shape[3] // 2)


define_op(
    "max_pool_indices",
    "(Tensor x) -> (Tensor out, Tensor where)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define_op("max_pool_indices_bwd", "(Tensor dout, Tensor where) -> Tensor", fake=_fake_unpool)
define_op(
    "max_unpool",
    "(Tensor y, Tensor where) -> Tensor",
    stem="max_pool_indices",
    fake=_fake_unpool,
    setup_context=_setup_unpool,
    backward=_backward_unpool,
)
define_op("max_unpool_bwd", "(Tensor dout, Tensor where) -> Tensor", stem="max_pool_indices", fake=_fake_gather)
