"""The layout rules that fake kernels and C++ share (csrc/common/layout.h is the other copy)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def suggested_format(x: Tensor) -> torch.memory_format:
    """Memory format of a normalisation's output, as torch's ``batch_norm`` decides it.

    Contiguous if ``x`` is (ambiguous cases, C = 1 or H = W = 1, included), else what ``suggest_memory_format`` says.
    """
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and torch._prims_common.suggest_memory_format(x) == torch.channels_last:
        return torch.channels_last
    if x.dim() == 5 and torch._prims_common.suggest_memory_format(x) == torch.channels_last_3d:
        return torch.channels_last_3d
    return torch.contiguous_format


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 input, fp32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mask_bytes(x: Tensor) -> int:
    """Size of a bit mask over ``x``: one bit an element, in memory order of the output."""
    return (x.numel() + 7) // 8


def conv_out_shape(
    shape: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """(N, C_out, H_out, W_out) of the convolution of an input of ``shape`` with a weight of shape ``weight``."""
    spatial = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(shape[2:], weight[2:], stride, padding, dilation, strict=True)
    )
    return (shape[0], weight[0], *spatial)
