"""Small nets with the weights that come with the package; each was trained by this package's own recipe."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..models import read_state_dict

FOLDER = Path(__file__).resolve().parents[1] / "weights"


class TrainedNet(NamedTuple):
    """``least``: of ``metric`` on pictures that no training has seen (tested); ``command``: what made the file (seed 0)."""

    metric: str
    least: float
    command: str


TRAINED = {
    "yolo": TrainedNet("map50", 0.88, "train yolo --small --epochs 20 --threads 1 --save yolo.safetensors"),
    "unet": TrainedNet("iou", 0.9, "train unet --small --epochs 30 --threads 1 --save unet.safetensors"),
    "hourglass": TrainedNet("pck", 0.97, "train hourglass --small --epochs 10 --threads 1 --save hourglass.safetensors"),
}


def trained(name: str) -> nn.Module:
    """A small net in eval with trained weights: "yolo" (three shapes), "unet" (cells) or "hourglass" (stick figures).

    The files hold fp16; the net is fp32.
    Raises: ValueError for an unknown name; ImportError without safetensors.
    """
    if name not in TRAINED:
        raise ValueError(f"trained: name: expected one of {', '.join(TRAINED)}, got {name!r}")
    net = importlib.import_module(f".{name}", __package__).small()
    net.load_state_dict(read_state_dict(FOLDER / f"{name}.safetensors"), strict=True)
    return net.eval()


def save_half(net: nn.Module, path: str | Path) -> None:
    """Write the weights as fp16 safetensors; counters of batches as they are. Raises: ValueError for another suffix."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save: expected a name that ends in .safetensors, got {path.name!r}")
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("save: .safetensors files need the package safetensors (pip install safetensors)") from error
    state = {name: t.detach().contiguous() for name, t in net.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.half() if t.dtype is torch.float32 else t for name, t in state.items()}, path)
