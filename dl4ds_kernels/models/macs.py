"""Multiply-adds of a model, counted on the meta device."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ._registry import build_on_meta, model_info


def count_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Multiply-adds of one sample: convolutions and matrix products, which is what papers count.

    Args: model on the meta device, in eval mode. input_size: (C, H, W) or (C, D, H, W).
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() // 2


def macs(name: str) -> int:
    """:func:`count_macs` of a registered model at its registered input size."""
    return count_macs(build_on_meta(name).eval(), model_info(name).input_size)
