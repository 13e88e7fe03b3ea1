"""Reference of ``upsample_add``: every pixel of the small map repeated twice down and twice across."""

from __future__ import annotations

from torch import Tensor


def upsample_add(low: Tensor, skip: Tensor) -> Tensor:
    """``skip + low`` with ``low`` (N, C, H, W) enlarged to ``skip``'s (N, C, 2 H, 2 W)."""
    return skip + low.repeat_interleave(2, 2).repeat_interleave(2, 3)
