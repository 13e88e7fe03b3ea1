"""Fused conv + BatchNorm + activation, residual and NMS kernels for PyTorch, with drop-in layers and models.

    import dl4ds_kernels as dk
    model = dk.optimize(torchvision.models.resnet50().eval())

Importing never fails because a GPU, nvcc, triton or the compiled part is missing; `python -m dl4ds_kernels info` says what is
there. The environment variables are listed in the README.
"""

import importlib as _importlib
from typing import Any as _Any

from . import _extension

_extension.load()  # before the ops are defined: C++ registrations bind to definitions that come later

from . import detection, functional, modules, ops  # noqa: E402
from ._backend import backend, explain  # noqa: E402
from ._version import __version__  # noqa: E402
from .convert import algorithms, analyze, optimize, refresh, restore  # noqa: E402
from .detection import patch_torchvision_nms  # noqa: E402

__all__ = [
    "__version__",
    "algorithms",
    "analyze",
    "backend",
    "explain",
    "detection",
    "functional",
    "models",
    "modules",
    "ops",
    "optimize",
    "patch_torchvision_nms",
    "pose",
    "refresh",
    "restore",
    "segmentation",
]
# Imported when first used: a program that only replaces layers pays nothing for them.
_LAZY = ("models", "pose", "segmentation")


def __getattr__(name: str) -> _Any:
    if name in _LAZY:
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
