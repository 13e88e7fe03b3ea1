"""Contract of ``upsample_add``: ``skip + nearest x 2 (low)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op, op
from ._layout import suggested_format


def _fake(low: Tensor, skip: Tensor) -> Tensor:
    return torch.empty_like(skip, memory_format=suggested_format(skip))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass  # linear: nothing to keep


def _backward(namespace: str, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    dlow = op("upsample_add_bwd", namespace)(dout) if ctx.needs_input_grad[0] else None
    return dlow, dout if ctx.needs_input_grad[1] else None


def _fake_bwd(dout: Tensor) -> Tensor:
    n, c, h, w = dout.shape
    return dout.new_empty((n, c, h // 2, w // 2)).to(memory_format=suggested_format(dout))


def _autocast(dtype: torch.dtype, low: Tensor, skip: Tensor) -> tuple[Any, ...]:
    """The addition promotes, as torch.add does under autocast."""
    wide = torch.promote_types(low.dtype, skip.dtype)
    return low.to(wide), skip.to(wide)


define_op(
    "upsample_add",
    "(Tensor low, Tensor skip) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)
define_op("upsample_add_bwd", "(Tensor dout) -> Tensor", fake=_fake_bwd)
