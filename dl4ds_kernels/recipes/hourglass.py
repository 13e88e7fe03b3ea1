"""One hourglass on stick figures: heatmaps of eight joints, PCK within a tenth of the picture's height."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..datasets import figures
from ..datasets.figures import JOINTS
from ..models import StackedHourglass
from ..pose import decode_heatmaps, encode_heatmaps, pck, stacked_mse
from ._train import Recipe, cosine

SIZE = 64


def small() -> StackedHourglass:
    """The net whose trained weights come with the package."""
    return StackedHourglass(1, len(JOINTS), depth=2, features=48)


def to_heatmap(points: Tensor) -> Tensor:
    """Places in the picture -> places in heatmaps of a quarter of its size (pixel centres at whole numbers in both)."""
    return (points + 0.5) / 4 - 0.5


def score(model: nn.Module, pictures: Tensor, joints: Tensor) -> dict[str, float]:
    """Share of joints (all seen) found within a tenth of the picture, of a model in eval."""
    found = torch.cat([decode_heatmaps(model(part)[-1])[0] for part in pictures.split(16)])
    return {"pck": pck(found, to_heatmap(joints), torch.ones(joints.shape[:2], dtype=torch.bool), SIZE / 4, 0.1)[1]}


def held_out(seed: int, count: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures and joints for :func:`score`."""
    return figures(count, size=SIZE, seed=seed)


def recipe(*, seed: int = 0, data: str | None = None, quick: bool = False, small_net: bool = False, epochs: int = 4) -> Recipe:
    """The metric is the share of joints within 1.6 heatmap pixels (a tenth of the picture); 0.8 in a few minutes on a CPU."""
    if data is not None:
        raise ValueError(f"hourglass: data: expected none (the figures are synthetic), got {data!r}")
    x, joints = figures(16 if quick else 1600 if small_net else 320, size=SIZE, seed=seed + 1)
    fresh, truth = held_out(seed + 2, 8 if quick else 64)
    visible = torch.ones(joints.shape[:2], dtype=torch.bool)
    targets = encode_heatmaps(to_heatmap(joints), visible, (SIZE // 4, SIZE // 4), sigma=1.0)
    torch.manual_seed(seed)
    model = small() if small_net else StackedHourglass(1, len(JOINTS), depth=2)
    model = model.to(memory_format=torch.channels_last)

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return 100 * stacked_mse(model(batch[0]), batch[1])

    optimizer = torch.optim.RMSprop(model.parameters(), 5e-4, alpha=0.99, eps=1e-8)
    return Recipe(
        "hourglass", model, TensorDataset(x, targets), 8, epochs, optimizer, loss, lambda net: score(net, fresh, truth), "pck",
        0.8, seed, cosine,
    )  # fmt: skip
