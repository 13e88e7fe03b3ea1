"""Fused conv + BatchNorm + activation, residual and NMS kernels for PyTorch, with drop-in layers and models.

    import dl4ds_kernels as dk
    model = dk.optimize(torchvision.models.resnet50().eval())

Importing never fails because a GPU, nvcc, triton or the compiled part is missing; `python -m dl4ds_kernels info` says what is
there. The environment variables are listed in the README.
"""

from . import _extension

_extension.load()  # before the ops are defined: C++ registrations bind to definitions that come later

from . import functional, modules, ops  # noqa: E402
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
    "functional",
    "modules",
    "ops",
    "optimize",
    "patch_torchvision_nms",
    "refresh",
    "restore",
]
