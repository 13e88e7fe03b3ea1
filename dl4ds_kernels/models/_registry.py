"""The list of models: what each is called, how many parameters it must have, and who builds it.

A family file registers its builders on import; ``dl4ds_kernels.models`` imports every family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelInfo:
    """One registered model.

    ``parameters`` is the exact count for the default arguments, from the paper or from the independent implementation that
    ``source`` names; ``input_size`` (C, H, W) or (C, D, H, W) is the size that the paper uses.
    """

    name: str
    family: str
    builder: Callable[..., nn.Module]
    parameters: int
    input_size: tuple[int, ...]
    source: str


# The order of lists and tables: the lecture's.
FAMILIES = (
    "alexnet", "vgg", "resnet", "preact_resnet", "cifar_resnet", "densenet", "yolov1", "unet", "unet3d", "deconvnet",
    "hourglass",
)  # fmt: skip
_MODELS: dict[str, ModelInfo] = {}


def register(name: str, family: str, parameters: int, input_size: tuple[int, ...], source: str) -> Callable[..., Any]:
    """Decorator of a builder: ``builder(**options) -> nn.Module``."""

    def add(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in _MODELS or family not in FAMILIES:
            raise ValueError(f"register: expected a new name and one of FAMILIES, got {name!r} and {family!r}")
        _MODELS[name] = ModelInfo(name, family, builder, parameters, input_size, source)
        return builder

    return add


def list_models(family: str | None = None) -> list[str]:
    """Names of all models, family by family, or of one family. ValueError for an unknown family."""
    if family is not None and family not in FAMILIES:
        raise ValueError(f"list_models: family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    chosen = FAMILIES if family is None else (family,)
    return [name for one in chosen for name, info in _MODELS.items() if info.family == one]


def model_info(name: str) -> ModelInfo:
    """What is registered under ``name``; ValueError with the nearest names for an unknown one."""
    if name not in _MODELS:
        import difflib

        near = difflib.get_close_matches(name, _MODELS, 3) or sorted(_MODELS)[:3]
        raise ValueError(f"models: name: expected a registered model (list_models()), such as {', '.join(near)}; got {name!r}")
    return _MODELS[name]


def create(name: str, **options: Any) -> nn.Module:
    """Build a model by name; ``options`` go to its builder (``num_classes=…``)."""
    return model_info(name).builder(**options)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values (BatchNorm statistics are buffers and do not count)."""
    return sum(p.numel() for p in model.parameters())


def build_on_meta(name: str, **options: Any) -> nn.Module:
    """The model without memory for its parameters: names, shapes and counts in milliseconds."""
    with torch.device("meta"), _no_init():
        return create(name, **options)


class _no_init:
    """Random initialisation of meta tensors is skipped: it would do nothing, slowly."""

    def __enter__(self) -> None:
        self._saved = {n: getattr(nn.init, n) for n in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_")}
        for n in self._saved:
            setattr(nn.init, n, _leave)

    def __exit__(self, *error: object) -> None:
        for n, function in self._saved.items():
            setattr(nn.init, n, function)


def _leave(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    return tensor
