"""Prepacked convolution weights: oneDNN's blocked layout, made once and kept beside (never inside) module state.

Only the weight is prepacked. BatchNorm stays a per-channel scale and shift that the epilogue derives from the live BN vectors
at every call, so a changed statistic or affine parameter can never be stale. A pack is keyed on the weight's identity,
``data_ptr`` and ``_version``: in-place writes, ``load_state_dict``, optimizer steps and ``.to()`` are seen at the next call;
a write through ``.data`` or numpy is not (``dk.refresh(model)`` drops the packs).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

# Multiply-adds of a call from which the prepacked primitive wins: it costs about 30 us more host time than aten's convolution
# and saves the reordering of the weight.
MIN_MACS = 8_000_000

_SLOT = "_dl4ds_packed"


class PackedWeight:
    """Holder of one module's packed weight; copies and pickles as an empty holder."""

    __slots__ = ("weight", "pointer", "version", "packed", "__weakref__")

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Free the packed tensor; the next call packs again."""
        self.weight: weakref.ref[Tensor] | None = None
        self.pointer = self.version = -1
        self.packed: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (PackedWeight, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return PackedWeight()


def supported(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN prepacking applies: fp32 on the CPU, and a weight whose writes torch counts."""
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and x.dim() == 4
        and not weight.is_inference()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def packed_weight(
    module: torch.nn.Module, weight: Tensor, x: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """The packed form of ``weight`` (C_out, C_in/groups, kH, kW) for inputs like ``x`` (N, C_in, H, W)."""
    holder = module.__dict__.get(_SLOT)
    if holder is None:
        holder = module.__dict__[_SLOT] = PackedWeight()
    if (
        holder.packed is None
        or holder.version != weight._version
        or holder.pointer != weight.data_ptr()
        or holder.weight is None
        or holder.weight() is not weight
    ):
        with torch.no_grad():
            holder.packed = torch.ops.mkldnn._reorder_convolution_weight(
                weight.detach(), padding, stride, dilation, groups, list(x.shape)
            )
        holder.weight, holder.pointer, holder.version = weakref.ref(weight), weight.data_ptr(), weight._version
    return holder.packed


def drop(module: torch.nn.Module) -> None:
    """Free the packed weight of one module, if it has one."""
    holder = module.__dict__.get(_SLOT)
    if holder is not None:
        holder.drop()


def forget(module: torch.nn.Module) -> None:
    """Remove the holder itself (``dk.restore``)."""
    module.__dict__.pop(_SLOT, None)
