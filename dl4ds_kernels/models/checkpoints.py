"""Checkpoint files in and out: safetensors, torch.save, Torch7 and darknet, none of them by running what a file contains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .convert_keys import convert_state_dict
from .fb_resnet import fb_state_dict
from .torch7 import load_t7

_TORCH = (".pt", ".pth", ".bin")


def read_state_dict(path: str | Path, source: str = "torchvision") -> dict[str, Tensor]:
    """The tensors of a checkpoint under this package's names.

    Args:
        path: ``.safetensors`` (needs the package safetensors), ``.pt``, ``.pth`` or ``.bin`` (``weights_only``), or ``.t7`` of
            fb.resnet.torch. A "state_dict" inside a checkpoint is taken out.
        source: whose names they are, see :func:`~dl4ds_kernels.models.convert_state_dict`; ``.t7`` needs none.

    Raises: ValueError for another kind of file or unknown names, ImportError without safetensors, T7Error for a damaged t7.
    """
    path = Path(path)
    if path.suffix == ".t7":
        return fb_state_dict(load_t7(path))
    if path.suffix == ".safetensors":
        found: object = _safetensors().load_file(path)
    elif path.suffix in _TORCH:
        found = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"read_state_dict: path: expected .safetensors, {', '.join(_TORCH)} or .t7, got {path.name!r}")
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"read_state_dict: {path.name}: expected tensors by name, got a {type(found).__name__}")
    return convert_state_dict(found, source)


def load_checkpoint(model: nn.Module, path: str | Path, source: str = "torchvision") -> None:
    """:func:`read_state_dict` into ``model``, strictly (a darknet net reads ``.weights`` with its own ``load_weights``)."""
    model.load_state_dict(read_state_dict(path, source), strict=True)


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write the state_dict, by the file's name as ``.safetensors`` or with ``torch.save`` (``.pt``, ``.pth``, ``.bin``)."""
    path = Path(path)
    state = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    if path.suffix == ".safetensors":
        _safetensors().save_file(state, path)
    elif path.suffix in _TORCH:
        torch.save(state, path)
    else:
        raise ValueError(f"save_checkpoint: path: expected .safetensors, {', '.join(_TORCH)}, got {path.name!r}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("checkpoints: .safetensors files need the package safetensors (pip install safetensors)") from error
    return safetensors.torch
