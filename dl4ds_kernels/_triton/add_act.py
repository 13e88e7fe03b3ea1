"""``add_act`` in Triton: ``act(alpha * (x + residual))`` and its gradient, flat over memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import check
from ._device import activate, activate_bwd, masked_bwd, pack_bits, positive_side, program_index, unpack_bits

CONFIG = {"BLOCK": 4 * _common.WARP_ELEMENTS, "num_warps": 4}


@triton.jit
def flat_indices(numel, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(element index, validity, byte index, validity) of this program as rows of 8 elements and one byte."""
    program = program_index(WIDE)
    index = program * BLOCK + tl.arange(0, BLOCK)[None, :]
    byte = program * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    return index, index < numel, byte, byte * 8 < numel


@triton.jit
def sum_of(x, residual, index, valid, alpha, ACC: tl.constexpr):
    """``alpha * (x + residual)`` in the accumulation dtype; a missing residual counts as zero."""
    z = tl.load(x + index, valid, 0.0).to(ACC)
    if residual is not None:
        z += tl.load(residual + index, valid, 0.0).to(ACC)
    return z * alpha


@triton.jit
def add_act_kernel(
    x, residual, out, mask, numel, ALPHA: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, valid, byte, byte_valid = flat_indices(numel, WIDE, BLOCK)
    z = sum_of(x, residual, index, valid, ALPHA, ACC)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + index, activate(z, ACTIVATION, SLOPE).to(dtype), valid)
    if mask is not None:
        positive = positive_side(z.to(dtype).to(ACC), ACTIVATION) & valid
        tl.store(mask + byte, pack_bits(positive, 1, BLOCK), byte_valid)


@triton.jit
def add3_act_kernel(
    x, residual, residual2, out, mask, numel, ALPHA: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The three operands are added from left to right and rounded once."""
    index, valid, byte, byte_valid = flat_indices(numel, WIDE, BLOCK)
    z = (sum_of(x, residual, index, valid, 1.0, ACC) + tl.load(residual2 + index, valid, 0.0).to(ACC)) * ALPHA
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + index, activate(z, ACTIVATION, SLOPE).to(dtype), valid)
    if mask is not None:
        positive = positive_side(z.to(dtype).to(ACC), ACTIVATION) & valid
        tl.store(mask + byte, pack_bits(positive, 1, BLOCK), byte_valid)


@triton.jit
def add_act_bwd_kernel(
    dout, mask, x, residual, dx, numel, ALPHA: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, valid, byte, byte_valid = flat_indices(numel, WIDE, BLOCK)
    dz = tl.load(dout + index, valid, 0.0).to(ACC)
    dtype: tl.constexpr = dx.dtype.element_ty
    if mask is not None:
        positive = unpack_bits(tl.load(mask + byte, byte_valid, 0), 1, BLOCK)
        dz = masked_bwd(dz, positive, ACTIVATION, SLOPE)
    elif x is not None:
        z = sum_of(x, residual, index, valid, ALPHA, ACC).to(dtype).to(ACC)
        dz = activate_bwd(dz, z, ACTIVATION, SLOPE)
    tl.store(dx + index, (dz * ALPHA).to(dtype), valid)


def add_act(
    x: Tensor, residual: Tensor, alpha: float, activation: int, negative_slope: float, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """``(out, mask)``. Operands of one dense memory order are read once; others are added by torch and activated in place."""
    check(x.device == residual.device, "add_act", "residual", f"device {x.device}", residual.device)
    out, operands = _operands(x, residual)
    check(out.dtype in _common.TRITON_DTYPE, "add_act", "x", "a floating dtype", out.dtype)
    mask = _common.empty_mask(out, save_mask, activation)
    if out.numel():
        _launch(
            add_act_kernel, out, alpha, activation, negative_slope,
            x=operands[0], residual=operands[1], out=out, mask=mask if mask.numel() else None,
        )  # fmt: skip
    return out, mask


def add3_act(
    x: Tensor, residual: Tensor, residual2: Tensor, alpha: float, activation: int, negative_slope: float, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """``(out, mask)`` of three operands; where they lie differently, torch adds the first two."""
    _common.check_like("add3_act", x, residual=residual, residual2=residual2)
    dense = torch.ops.aten.is_non_overlapping_and_dense(x)
    if not (dense and _common.same_order(x, residual) and _common.same_order(x, residual2)):
        return add_act(torch.add(x, residual), residual2, alpha, activation, negative_slope, save_mask)
    check(x.dtype in _common.TRITON_DTYPE, "add3_act", "x", "a floating dtype", x.dtype)
    out = _empty_sum(x)
    mask = _common.empty_mask(out, save_mask, activation)
    if out.numel():
        _launch(
            add3_act_kernel, out, alpha, activation, negative_slope,
            x=x, residual=residual, residual2=residual2, out=out, mask=mask if mask.numel() else None,
        )  # fmt: skip
    return out, mask


def add_act_bwd(
    dout: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    alpha: float,
    activation: int,
    negative_slope: float,
) -> Tensor:
    """``dx`` (the gradient of both operands), in the memory order of the forward's output."""
    check(dout.dtype in _common.TRITON_DTYPE, "add_act_bwd", "dout", "a floating dtype", dout.dtype)
    if x is None or residual is None:
        needs_input = activation != 0 and mask is None and dout.numel() > 0
        check(not needs_input, "add_act_bwd", "x, residual", "both tensors where no mask is given", "None")
        dx, operands = torch.empty_like(dout), (None, None)
    else:
        dx, operands = _operands(x, residual)
        _common.check_like("add_act_bwd", dx, dout=dout)
    _common.check_mask("add_act_bwd", dx, mask)
    if dx.numel():
        _launch(
            add_act_bwd_kernel, dx, alpha, activation, negative_slope,
            dout=_common.dense_as(dout, dx), mask=mask, x=operands[0], residual=operands[1], dx=dx,
        )  # fmt: skip
    return dx


def _operands(x: Tensor, residual: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """(tensor for the result, what to add in its memory order).

    Two tensors of one dense layout stay as they are. Otherwise torch adds them: it decides shape, dtype and strides of the
    result, which is then both the only operand and the place of the result.
    """
    same = x.shape == residual.shape and x.dtype == residual.dtype and _common.same_order(x, residual)
    if same and torch.ops.aten.is_non_overlapping_and_dense(x):
        return _empty_sum(x), (x, residual)
    total = torch.add(x, residual)
    return total, (total, None)


def _empty_sum(x: Tensor) -> Tensor:
    """Room for the sum of two tensors with the dense layout of ``x``, with torch.add's strides.

    They differ from those of ``x`` where a size of 1 or 0 leaves the layout open: torch then prefers contiguous, channels_last.
    """
    formats = (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (torch.contiguous_format,)
    fitting = (memory_format for memory_format in formats if x.is_contiguous(memory_format=memory_format))
    return torch.empty_like(x, memory_format=next(fitting, torch.preserve_format))


def _launch(kernel: Any, like: Tensor, alpha: float, activation: int, negative_slope: float, **tensors: Tensor | None) -> None:
    numel = like.numel()
    with _common.device_of(like):
        _common.launch(
            kernel,
            triton.cdiv(numel, CONFIG["BLOCK"]),
            **tensors,
            numel=numel,
            ALPHA=float(alpha),
            ACTIVATION=activation,
            SLOPE=_common.slope_of(activation, negative_slope),
            ACC=_common.accumulator(like),
            WIDE=_common.is_wide(numel),
            **CONFIG,
        )
