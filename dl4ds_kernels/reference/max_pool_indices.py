"""Reference of ``max_pool_indices`` and ``max_unpool``: the four pixels of each window side by side, compared in turn."""

from __future__ import annotations

import torch
from torch import Tensor


def max_pool_indices(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, where)``: the first of equal maxima; a NaN beats what came before it, as in torch."""
    four = [x[:, :, i // 2 :: 2, i % 2 :: 2] for i in range(4)]
    out, where = four[0], torch.zeros_like(four[0], dtype=torch.uint8)
    for i in range(1, 4):
        take = (four[i] > out) | four[i].isnan()
        out = torch.where(take, four[i], out)
        where = torch.where(take, torch.full_like(where, i), where)
    return out, where


def max_unpool(y: Tensor, where: Tensor) -> Tensor:
    """``y`` at its places in maps of twice the size, zeros elsewhere."""
    n, c, h, w = y.shape
    four = torch.stack([torch.where(where == i, y, torch.zeros_like(y)) for i in range(4)], -1)
    return four.view(n, c, h, w, 2, 2).transpose(3, 4).reshape(n, c, 2 * h, 2 * w)
