"""CIFAR ResNet-20 on the user's CIFAR-10 files, on synthetic textures of ten classes, on scikit-learn's digits or on MNIST-1D.

The paper's recipe for CIFAR (batch 128, lr 0.1, momentum 0.9, weight decay 1e-4, pad 4 and crop, flip), shortened by a cosine
schedule. Reference: He et al., 2015, section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..datasets import cifar as read_cifar
from ..datasets import digits, mnist1d, textures
from ..models import cifar_resnet20
from ._train import Recipe, cosine


def augmented(x: Tensor, pad: int = 4) -> Tensor:
    """(N, 3, H, W): each picture shifted by up to ``pad`` pixels and mirrored with probability a half."""
    n, _, height, width = x.shape
    padded = F.pad(x, (pad,) * 4)
    dy, dx = torch.randint(2 * pad + 1, (2, n)).tolist()
    moved = torch.stack([p[:, b : b + height, a : a + width] for p, a, b in zip(padded, dx, dy, strict=True)])
    return torch.where((torch.rand(n) < 0.5).view(n, 1, 1, 1), moved.flip(-1), moved)


def _pictures(data: str | None, seed: int, quick: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(training part, test part), pictures with three channels."""
    if data is None:
        counts = (256, 200) if quick else (4096, 1000)
        return tuple(textures(count, size=16, seed=seed + k) for k, count in enumerate(counts, 1))
    if data == "digits":
        parts = [digits(train=train) for train in (True, False)]
        return tuple((x.expand(-1, 3, -1, -1).contiguous(), y) for x, y in parts)
    if data == "mnist1d":  # a signal is a picture of one row
        parts = [mnist1d(4000, seed=seed + 1), mnist1d(1000, seed=seed + 2)]
        return tuple((x.view(-1, 1, 1, 40).repeat(1, 3, 1, 1), y) for x, y in parts)
    return read_cifar(data, train=True), read_cifar(data, train=False)


# Epochs, batch, learning rate and target: of textures, of the named data sets, and of the user's CIFAR-10.
_PLANS = {None: (5, 64, 0.05, 0.9), "digits": (15, 64, 0.05, 0.93), "mnist1d": (20, 64, 0.05, 0.95)}
_CIFAR = (5, 128, 0.1, 0.85)


def recipe(*, seed: int = 0, data: str | None = None, quick: bool = False, epochs: int | None = None) -> Recipe:
    """The metric is accuracy on the test part; the targets are reached in a few minutes on a CPU (CIFAR-10: with more epochs).

    Args: data: None (textures), "digits", "mnist1d", or a folder with CIFAR-10's binary files.
    """
    train, test = _pictures(data, seed, quick)
    if quick and data in ("digits", "mnist1d"):
        train = train[0][:256], train[1][:256]
    default_epochs, batch, rate, target = _PLANS.get(data, _CIFAR)
    torch.manual_seed(seed)
    model = cifar_resnet20().to(memory_format=torch.channels_last)

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        x, y = batch
        if data not in _PLANS:  # a mirrored texture or digit is one of another class
            x = augmented(x)
        return F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)

    def evaluate(model: nn.Module) -> dict[str, float]:
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(test[0].split(250), test[1].split(250), strict=True))
        return {"accuracy": right / len(test[1])}

    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    return Recipe(
        "cifar", model, TensorDataset(*train), batch, epochs or default_epochs, optimizer, loss, evaluate, "accuracy", target,
        seed, cosine,
    )  # fmt: skip
