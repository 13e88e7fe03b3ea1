"""A narrow U-Net (same padding, BatchNorm) that separates cells from their background.

Synthetic cells with exact masks, or with ``data="skimage"`` the nuclei of scikit-image's microscope picture.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..datasets import cells, nuclei
from ..models import UNet
from ..segmentation import weighted_cross_entropy
from ._train import Recipe, cosine


def _net(channels: int, width: int) -> UNet:
    return UNet(channels, 2, padding="same", batch_norm=True, width=width)


def small() -> UNet:
    """The net whose trained weights come with the package."""
    return _net(1, 4)


def score(model: nn.Module, pictures: Tensor, masks: Tensor) -> dict[str, float]:
    """IoU of the cells over all pictures, of a model in eval."""
    found, want = torch.cat([model(part) for part in pictures.split(50)]).argmax(1) == 1, masks > 0
    return {"iou": float((found & want).sum() / (found | want).sum())}


def held_out(seed: int, count: int = 100) -> tuple[Tensor, Tensor]:
    """Pictures and masks for :func:`score`."""
    return cells(count, seed=seed)


def recipe(
    *, seed: int = 0, data: str | None = None, quick: bool = False, small_net: bool = False, epochs: int | None = None
) -> Recipe:
    """The metric is the IoU of the cells on new pictures; 0.85 is reached in a minute or two on a CPU.

    The left half of the microscope picture is for training, the right half is new.
    """
    if data not in (None, "skimage"):
        raise ValueError(f"unet: data: expected none (synthetic cells) or 'skimage', got {data!r}")
    if small_net and data is not None:
        raise ValueError(f"unet: data: expected none for the small net (it was made for synthetic cells), got {data!r}")
    if data is None:
        (x, masks), (fresh, truth) = cells(32 if quick else 400, seed=seed + 1), held_out(seed + 2, 16 if quick else 100)
    else:
        (x, masks), (fresh, truth) = nuclei(train=True), nuclei(train=False)
        if quick:
            x, masks = x[:16], masks[:16]
    torch.manual_seed(seed)
    model = (small() if small_net else _net(x.shape[1], 8)).to(memory_format=torch.channels_last)

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        x, masks = batch
        if data is not None:  # few pictures, but a tissue has no upper side
            turns, mirrored = torch.randint(4, ()).item(), torch.rand(()).item() < 0.5
            x, masks = (torch.rot90(t.flip(-1) if mirrored else t, turns, (-2, -1)) for t in (x, masks))
        return weighted_cross_entropy(model(x), (masks > 0).long())

    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    return Recipe(
        "unet", model, TensorDataset(x, masks), 8, epochs or (5 if data is None else 20), optimizer, loss,
        lambda net: score(net, fresh, truth), "iou", 0.85, seed, cosine,
    )  # fmt: skip
