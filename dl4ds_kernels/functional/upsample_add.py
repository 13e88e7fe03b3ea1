"""``upsample_add``: nearest-neighbour enlargement by two and the addition of a skip connection in one pass."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as TF
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import reference
from .._backend import MIN_NUMEL, REFERENCE, STOCK, current, is_large, select
from .._define import CPP, op
from ._common import call, check_floating, fail, needs_grad

# With gradients the host overhead of two ops comes on top. Stock torch is good at channels_last: measured, it breaks even there
# between 0.26 and 1 million elements of skip, and at 16384 where torch has to enlarge plane by plane.
_MIN_NUMEL_GRAD_NHWC = 32 * MIN_NUMEL["upsample_add"]


def upsample_add(low: Tensor, skip: Tensor, *, backend: str | None = None) -> Tensor:
    """``skip + nearest_x2(low)``: how an hourglass network goes back up.

    One pass instead of two: the enlarged map is never written. Small maps on the CPU go to stock torch, which is faster
    there. CUDA tensors take the Triton kernel (float64 ones two stock ops unless a backend is asked for).

    Args:
        low: (N, C, H, W); float32, float64, float16 or bfloat16. skip: (N, C, 2 H, 2 W), dtype and device of ``low``.
        backend: overrides ``dk.backend`` for this call ("cpu", "triton" or "reference").

    Returns:
        (N, C, 2 H, 2 W), dense: channels_last if ``skip`` is, else contiguous. Differentiable once in both.

    Raises:
        TypeError: an input is not a tensor. RuntimeError: shapes, dtypes or devices do not fit.

    Reference: Newell et al., Stacked Hourglass Networks for Human Pose Estimation, 2016.
    """
    try:
        if has_torch_function_variadic(low, skip):
            return handle_torch_function(upsample_add, (low, skip), low, skip, backend=backend)
        n, c, h, w = low.shape
        if skip.shape != (n, c, 2 * h, 2 * w):
            fail("upsample_add", "skip", f"shape {(n, c, 2 * h, 2 * w)} for low {tuple(low.shape)}", tuple(skip.shape))
        grad = needs_grad(low, skip)
        path = select("upsample_add", skip, backend)
        if path is CPP and grad and (backend or current()) == "auto" and not is_large(skip, _MIN_NUMEL_GRAD_NHWC):
            path = path if skip.is_contiguous() else STOCK
        if path is STOCK or low.numel() == 0 or low.dtype != skip.dtype:
            return skip + TF.interpolate(low, scale_factor=2.0, mode="nearest")
        if path is REFERENCE:
            return reference.upsample_add(low, skip)
        return call(op("upsample_add", path), grad, low, skip)
    except Exception:
        _explain(low, skip)
        raise


def _explain(low: Any, skip: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    check_floating("upsample_add", "low", low)
    check_floating("upsample_add", "skip", skip)
    if low.dim() != 4:
        fail("upsample_add", "low", "(N, C, H, W)", tuple(low.shape))
    if skip.device != low.device:
        fail("upsample_add", "skip", f"a tensor on {low.device} like low", skip.device)
    n, c, h, w = low.shape
    if skip.shape != (n, c, 2 * h, 2 * w):
        fail("upsample_add", "skip", f"shape {(n, c, 2 * h, 2 * w)} for low {tuple(low.shape)}", tuple(skip.shape))
