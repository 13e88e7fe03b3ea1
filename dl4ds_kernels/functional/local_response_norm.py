"""``local_response_norm``: AlexNet's normalisation across neighbouring channels, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import reference
from .._backend import REFERENCE, STOCK, select
from .._define import TRITON, op
from ._common import call, check_floating, fail, needs_grad

_HALVES = (torch.float16, torch.bfloat16)  # stock torch does not pool them on the CPU
_MAX_DIMS = 5  # of the kernels


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, backend: str | None = None
) -> Tensor:
    """``x / (k + alpha / size * sum(x^2))^beta``, the sum over ``size`` neighbouring channels.

    The window of channel c reaches from ``c - size // 2`` to ``c + (size - 1) // 2``; missing channels count as zeros.
    Same meaning as ``torch.nn.functional.local_response_norm``, which squares, pads, pools, scales and divides in passes of
    their own; here x is read once (twice in backward, beside its gradient). Note that the paper's alpha is not divided by the
    window: ``alpha=5e-4`` for its 1e-4 with ``size=5``.

    Args:
        x: (N, C, *spatial), at least 3 dimensions; NCHW or channels_last; float32, float64, float16 or bfloat16.
        size: channels of the window. alpha, beta, k: see the formula. beta 0.75, 0.5 and 1 are computed by square roots, any
            other by ``pow``, one value at a time on the CPU (negative alpha or k too; in Triton those go to stock torch).
        backend: overrides ``dk.backend`` for this call.

    Returns:
        Shape and dtype of x, dense: channels_last if x is, else contiguous. Differentiable once.

    Raises:
        TypeError: x is not a tensor. ValueError: fewer than 3 dimensions, as torch raises.
        RuntimeError: dtype or size do not fit (NotImplementedError for a dtype without kernels).

    Reference: Krizhevsky et al., ImageNet Classification with Deep CNNs, 2012.
    """
    try:
        if has_torch_function_unary(x):
            return handle_torch_function(local_response_norm, (x,), x, size, alpha=alpha, beta=beta, k=k, backend=backend)
        path = select("local_response_norm", x, backend)
        if path is STOCK and x.dtype in _HALVES and x.device.type == "cpu":
            path = REFERENCE
        if path is STOCK or x.numel() == 0 or not 3 <= x.dim() <= _MAX_DIMS or (path is TRITON and min(alpha, k) < 0):
            return TF.local_response_norm(x, size, alpha, beta, k)
        if size < 1:
            _explain(x, size)
        if path is REFERENCE:
            return reference.local_response_norm(x, size, alpha, beta, k)
        return call(op("local_response_norm", path), needs_grad(x), x, size, alpha, beta, k)
    except Exception:
        _explain(x, size)
        raise


def _explain(x: Any, size: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    if isinstance(x, Tensor) and x.dim() < 3:
        fail("local_response_norm", "x", "at least 3 dimensions (N, C, …)", f"{x.dim()} (shape {tuple(x.shape)})", ValueError)
    check_floating("local_response_norm", "x", x)
    if isinstance(size, int) and size < 1:
        fail("local_response_norm", "size", "a positive number of channels", size)
