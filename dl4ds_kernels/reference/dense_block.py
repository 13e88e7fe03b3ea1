"""Reference of ``dense_block``: each layer's ``residual_block`` reference on the concatenation of all features so far."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._block_code import Block
from .residual_block import residual_block


def dense_block(
    x: Tensor, convs: list[Tensor], norms: list[Tensor], running: list[Tensor], block: Block, per_layer: int, training: bool
) -> tuple[Tensor, list[Tensor]]:
    """``(out, new running statistics in the order of block.norms)``; ``per_layer`` convolutions make a layer."""
    new_running: list[Tensor] = []
    for start in range(0, len(block.convs), per_layer):
        layer = block._replace(convs=block.convs[start : start + per_layer])
        new, moved = residual_block(x, convs, norms, running, layer, training)
        x = torch.cat([x, new], 1)
        new_running += moved
    return x, new_running
