"""Contracts of ``add_act``, ``act(alpha * (x + residual))``, and ``add3_act`` of three operands.

All operands have the same gradient, so that ``add_act_bwd`` serves both. ``add3_act`` has the activations that need no more
than a bit an element for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._activation import MASK_CODES
from .._define import define_op, op
from ._layout import mask_bytes


def _fake(
    x: Tensor, residual: Tensor, alpha: float, activation: int, negative_slope: float, save_mask: bool
) -> tuple[Tensor, Tensor]:
    masked = save_mask and activation in MASK_CODES
    # torch.add decides the strides of the result, for mixed layouts too.
    return torch.add(x, residual), x.new_empty(mask_bytes(x) if masked else 0, dtype=torch.uint8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, alpha, activation, negative_slope, _ = inputs
    out, mask = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mask)
    ctx.scalars = (alpha, activation, negative_slope)
    ctx.out_strides = out.stride()
    needs_inputs = activation != 0 and mask.numel() == 0
    ctx.save_for_backward(mask if mask.numel() else None, x if needs_inputs else None, residual if needs_inputs else None)


def _backward(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    none = (None,) * 6
    if dout is None:
        return none
    mask, x, residual = ctx.saved_tensors
    alpha, activation, negative_slope = ctx.scalars
    dx = op("add_act_bwd", namespace)(
        _in_order(dout, ctx.out_strides, mask), mask, x, residual, alpha, activation, negative_slope
    )
    need_x, need_residual = ctx.needs_input_grad[:2]
    return (dx if need_x else None, dx if need_residual else None, *none[2:])


def _in_order(dout: Tensor, strides: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """The mask lies in memory order of the output; an expanded or transposed gradient is laid out like it first."""
    if mask is None or dout.stride() == strides:
        return dout
    return torch.empty_strided(dout.shape, strides, dtype=dout.dtype, device=dout.device).copy_(dout)


def _fake_bwd(
    dout: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    alpha: float,
    activation: int,
    negative_slope: float,
) -> Tensor:
    return torch.empty_like(dout) if x is None or residual is None else torch.add(x, residual)


define_op(
    "add_act",
    "(Tensor x, Tensor residual, float alpha, int activation, float negative_slope, bool save_mask) "
    "-> (Tensor out, Tensor mask)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define_op(
    "add_act_bwd",
    "(Tensor dout, Tensor? mask, Tensor? x, Tensor? residual, float alpha, int activation, float negative_slope) -> Tensor",
    fake=_fake_bwd,
)


def _fake3(
    x: Tensor, residual: Tensor, residual2: Tensor, alpha: float, activation: int, negative_slope: float, save_mask: bool
) -> tuple[Tensor, Tensor]:
    masked = save_mask and activation in MASK_CODES
    return torch.add(torch.add(x, residual), residual2), x.new_empty(mask_bytes(x) if masked else 0, dtype=torch.uint8)


def _setup_context3(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, mask = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mask)
    ctx.scalars, ctx.out_strides = inputs[3:6], out.stride()
    ctx.save_for_backward(mask if mask.numel() else None)


def _backward3(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 7
    (mask,) = ctx.saved_tensors
    alpha, activation, negative_slope = ctx.scalars
    if mask is None and activation != 0 and dout.numel():
        raise RuntimeError("add3_act: save_mask: expected True for a call with gradients, got False")
    needs = ctx.needs_input_grad[:3]
    if activation == 0 and alpha == 1.0:  # the sum hands its gradient on as it is
        return tuple(dout if need else None for need in needs) + (None,) * 4
    code = activation if mask is not None else 0  # an empty tensor has no mask and needs none
    dx = op("add_act_bwd", namespace)(_in_order(dout, ctx.out_strides, mask), mask, None, None, alpha, code, negative_slope)
    return tuple(dx if need else None for need in needs) + (None,) * 4


define_op(
    "add3_act",
    "(Tensor x, Tensor residual, Tensor residual2, float alpha, int activation, float negative_slope, bool save_mask) "
    "-> (Tensor out, Tensor mask)",
    stem="add_act",
    fake=_fake3,
    setup_context=_setup_context3,
    backward=_backward3,
)
