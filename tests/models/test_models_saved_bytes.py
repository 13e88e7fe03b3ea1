"""Bytes that a training step keeps for backward, by autograd's own hooks, against torchvision's models."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dl4ds_kernels import models, optimize

# (model, options, the most of torchvision's bytes that we may keep)
BUDGETS = [
    ("resnet18", {}, 0.62),
    ("resnet50", {}, 0.80),
    ("resnet50", {"memory_efficient": True}, 0.55),
    ("densenet121", {}, 0.60),
    ("densenet121", {"memory_efficient": True}, 0.45),
]


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd keeps for one training call, each once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage().data_ptr()
        if storage not in own:
            kept[storage] = t.detach()  # keeps the address taken; without its graph, which holds this very dictionary
        return t.detach()  # an output that is saved would hold its own graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(x)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.fixture(scope="module")
def eager() -> dict[str, int]:
    """What torchvision's models keep for one image."""
    names = {name for name, _, _ in BUDGETS}
    return {name: saved_bytes(getattr(torchvision.models, name)(), torch.randn(2, 3, 224, 224)) for name in names}


@pytest.mark.parametrize(("name", "options", "most"), BUDGETS, ids=lambda value: str(value).replace(" ", ""))
def test_saved_bytes(name: str, options: dict[str, bool], most: float, eager: dict[str, int], kernels: None) -> None:
    kept = saved_bytes(getattr(models, name)(**options), torch.randn(2, 3, 224, 224))
    assert kept <= most * eager[name], f"{kept / eager[name]:.3f} of {eager[name]} bytes"


@pytest.mark.parametrize(("name", "options", "most"), BUDGETS[:3], ids=lambda value: str(value).replace(" ", ""))
def test_saved_bytes_of_optimized_models(
    name: str, options: dict[str, bool], most: float, eager: dict[str, int], kernels: None
) -> None:
    """``dk.optimize`` gives torchvision's own blocks the same."""
    model = optimize(getattr(torchvision.models, name)(), inplace=True, **options)
    kept = saved_bytes(model, torch.randn(2, 3, 224, 224))
    assert kept <= most * eager[name], f"{kept / eager[name]:.3f} of {eager[name]} bytes"
