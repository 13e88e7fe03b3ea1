"""One hourglass on stick figures: heatmaps of eight joints, PCK within a tenth of the picture's height."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..datasets import figures
from ..models import StackedHourglass
from ..pose import decode_heatmaps, encode_heatmaps, pck, stacked_mse
from ._train import Recipe, cosine

SIZE = 64


def recipe(*, seed: int = 0, data: str | None = None, quick: bool = False, epochs: int = 4) -> Recipe:
    """The metric is the share of joints within 1.6 heatmap pixels (a tenth of the picture); 0.8 in a few minutes on a CPU."""
    if data is not None:
        raise ValueError(f"hourglass: data: expected none (the figures are synthetic), got {data!r}")
    x, joints = figures(16 if quick else 320, size=SIZE, seed=seed + 1)
    held_out, truth = figures(8 if quick else 64, size=SIZE, seed=seed + 2)
    points = (joints + 0.5) / 4 - 0.5
    wanted = (truth + 0.5) / 4 - 0.5
    visible = torch.ones(points.shape[:2], dtype=torch.bool)
    targets = encode_heatmaps(points, visible, (SIZE // 4, SIZE // 4), sigma=1.0)
    torch.manual_seed(seed)
    model = StackedHourglass(1, points.shape[1], depth=2).to(memory_format=torch.channels_last)

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return 100 * stacked_mse(model(batch[0]), batch[1])

    def evaluate(model: nn.Module) -> dict[str, float]:
        found = torch.cat([decode_heatmaps(model(part)[-1])[0] for part in held_out.split(16)])
        everything = torch.ones(wanted.shape[:2], dtype=torch.bool)
        return {"pck": pck(found, wanted, everything, SIZE / 4, 0.1)[1]}

    optimizer = torch.optim.RMSprop(model.parameters(), 5e-4, alpha=0.99, eps=1e-8)
    return Recipe("hourglass", model, TensorDataset(x, targets), 8, epochs, optimizer, loss, evaluate, "pck", 0.8, seed, cosine)
