"""A narrow U-Net (same padding, BatchNorm) that separates synthetic cells from an uneven, noisy background."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..datasets import cells
from ..models import UNet
from ..segmentation import weighted_cross_entropy
from ._train import Recipe, cosine


def recipe(*, seed: int = 0, data: str | None = None, quick: bool = False, epochs: int = 5) -> Recipe:
    """The metric is the IoU of the cells on new pictures; 0.85 is reached in a minute or two on a CPU."""
    if data is not None:
        raise ValueError(f"unet: data: expected none (the cells are synthetic), got {data!r}")
    x, masks = cells(32 if quick else 400, seed=seed + 1)
    held_out, truth = cells(16 if quick else 100, seed=seed + 2)
    torch.manual_seed(seed)
    model = UNet(1, 2, padding="same", batch_norm=True, width=8).to(memory_format=torch.channels_last)

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return weighted_cross_entropy(model(batch[0]), (batch[1] > 0).long())

    def evaluate(model: nn.Module) -> dict[str, float]:
        found, want = model(held_out).argmax(1) == 1, truth > 0
        return {"iou": float((found & want).sum() / (found | want).sum())}

    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    return Recipe("unet", model, TensorDataset(x, masks), 8, epochs, optimizer, loss, evaluate, "iou", 0.85, seed, cosine)
