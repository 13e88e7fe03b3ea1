"""Run this package's models as plain torch would: the same modules one after the other, no fused op."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import BNAct2d


def stock_twin(model: nn.Module) -> nn.Module:
    """``model`` with stock BatchNorms where ours stand, sharing every parameter; darknet's eps goes under the root."""
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, BNAct2d) and child.activation == "none":
                norm = nn.BatchNorm2d(child.num_features, child.eps)
                norm._parameters, norm._buffers, norm.training = child._parameters, child._buffers, child.training
                setattr(module, name, norm)
    return twin


def _concatenating(block: Any, x: Tensor) -> Tensor:
    features = [x]
    for layer in block.values():
        features.append(layer(torch.cat(features, 1)))
    return torch.cat(features, 1)


def _patches() -> list[tuple[Any, str, Any]]:
    def module(name: str) -> Any:
        return importlib.import_module(f"dl4ds_kernels.{name}")

    return [
        (module("modules._run"), "_no_global_hooks", lambda: False),
        (module("modules._chain"), "_no_global_hooks", lambda: False),
        (module("models.densenet").DenseBlock, "_into_buffer", _concatenating),
        (module("models.hourglass"), "upsample_add", lambda low, skip: F.interpolate(low, scale_factor=2.0) + skip),
        (module("models.deconvnet"), "max_pool_indices", lambda x: F.max_pool2d(x, 2, 2, return_indices=True)),
        (module("models.deconvnet"), "max_unpool", lambda x, where: F.max_unpool2d(x, where, 2, 2)),
    ]


_PATCHES = _patches()


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Within it fused steps call their modules, and the ops without a module take stock torch's functions."""
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in _PATCHES]
    for owner, name, value in _PATCHES:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
