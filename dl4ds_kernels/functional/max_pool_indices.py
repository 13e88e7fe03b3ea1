"""``max_pool_indices`` and ``max_unpool``: 2x2 pooling that remembers where each maximum was, and the way back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import reference
from .._backend import REFERENCE, STOCK, select
from .._define import op
from ._common import call, check_floating, check_tensor, fail, needs_grad


def max_pool_indices(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """2x2 max-pooling with stride 2, and the place of each maximum in its window.

    A place is one byte (0 to 3: upper left, upper right, lower left, lower right) instead of torch's 8-byte index. Of equal
    values the first counts; a NaN beats what came before it, as in ``torch.nn.functional.max_pool2d``.

    Args:
        x: (N, C, H, W), H and W even; float32, float64, float16 or bfloat16.
        backend: overrides ``dk.backend`` for this call ("cpu", "triton" or "reference"). CUDA tensors take the Triton kernels.

    Returns:
        out (N, C, H / 2, W / 2), and where, uint8 of that shape; channels_last if ``x`` is, else contiguous. ``out`` is
        differentiable once in ``x``.

    Raises:
        TypeError: x is not a tensor. RuntimeError: dtype or shape does not fit.

    Reference: Noh et al., Learning Deconvolution Network for Semantic Segmentation, 2015 (switches).
    """
    try:
        if has_torch_function_variadic(x):
            return handle_torch_function(max_pool_indices, (x,), x, backend=backend)
        _check_even("max_pool_indices", x)
        path = select("max_pool_indices", x, backend)
        if path is REFERENCE:
            return reference.max_pool_indices(x)
        if path is STOCK or x.numel() == 0:
            out, index = TF.max_pool2d(x, 2, 2, return_indices=True)
            width = x.shape[3]
            return out, (index // width % 2 * 2 + index % width % 2).to(torch.uint8)
        return call(op("max_pool_indices", path), needs_grad(x), x)
    except Exception:
        check_floating("max_pool_indices", "x", x)
        raise


def max_unpool(y: Tensor, where: Tensor, *, backend: str | None = None) -> Tensor:
    """``y`` back at the places that :func:`max_pool_indices` found, zeros elsewhere.

    Args:
        y: (N, C, H, W); float32, float64, float16 or bfloat16. where: uint8 of that shape, on ``y``'s device.
        backend: as in :func:`max_pool_indices`.

    Returns:
        (N, C, 2 H, 2 W), laid out like ``where``. Differentiable once in ``y``.

    Raises:
        TypeError: an input is not a tensor. RuntimeError: dtypes, devices or shapes do not fit.
    """
    try:
        if has_torch_function_variadic(y, where):
            return handle_torch_function(max_unpool, (y, where), y, where, backend=backend)
        if y.dim() != 4 or where.shape != y.shape or where.dtype != torch.uint8:
            _explain_unpool(y, where)
        path = select("max_pool_indices", y, backend)
        if path is STOCK or path is REFERENCE or y.numel() == 0:
            return reference.max_unpool(y, where)  # torch's own wants 8-byte indices, whose making costs more than this
        return call(op("max_unpool", path), needs_grad(y), y, where)
    except Exception:
        _explain_unpool(y, where)
        raise


def _check_even(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        fail(name, "x", "(N, C, H, W)", tuple(x.shape))
    if x.shape[2] % 2 or x.shape[3] % 2:
        fail(name, "x", "an even height and width", tuple(x.shape))


def _explain_unpool(y: Any, where: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    check_floating("max_unpool", "y", y)
    check_tensor("max_unpool", "where", where)
    if y.dim() != 4:
        fail("max_unpool", "y", "(N, C, H, W)", tuple(y.shape))
    if where.dtype != torch.uint8 or where.shape != y.shape:
        fail("max_unpool", "where", f"uint8 of shape {tuple(y.shape)} like y", f"{where.dtype} {tuple(where.shape)}")
    if where.device != y.device:
        fail("max_unpool", "where", f"a tensor on {y.device} like y", where.device)
