"""AlexNet: ``alexnet`` is torchvision's one-tower net, ``alexnet_paper`` the two-tower net of 2012.

Reference: Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep CNNs, 2012; the one-tower variant is Krizhevsky,
One Weird Trick, 2014.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import FusedSequential, LocalResponseNorm
from ..modules._replay import replayed
from ._registry import register


class AlexNet(nn.Module):
    """Five convolutions, three fully connected layers; attribute names and state_dict keys of ``torchvision.models.alexnet``.

    Shape: x (N, 3, H, W) with H, W at least 63, in the paper 224 -> logits (N, num_classes).
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        relu, pool = (lambda: nn.ReLU(inplace=True)), (lambda: nn.MaxPool2d(3, 2))
        self.features = FusedSequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), relu(), pool(),
            nn.Conv2d(64, 192, 5, padding=2), relu(), pool(),
            nn.Conv2d(192, 384, 3, padding=1), relu(),
            nn.Conv2d(384, 256, 3, padding=1), relu(),
            nn.Conv2d(256, 256, 3, padding=1), relu(), pool(),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = FusedSequential(
            nn.Dropout(dropout), nn.Linear(256 * 6 * 6, 4096), relu(),
            nn.Dropout(dropout), nn.Linear(4096, 4096), relu(),
            nn.Linear(4096, num_classes),
        )  # fmt: skip

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class AlexNetPaper(nn.Module):
    """The net of the paper: 96 - 256 - 384 - 384 - 256, groups 2 where a GPU saw only its half, LRN, overlapping pooling.

    Local response normalisation divides by ``(2 + 1e-4 * sum over 5 channels)^0.75``; torch's layer divides its alpha by the
    window, hence 5e-4 there. Convolutions 2, 4, 5 and the hidden layers start with bias 1, weights with N(0, 0.01^2).

    Shape: x (N, 3, 227, 227) -> logits (N, num_classes). Raises: RuntimeError for another size (the first layer has no padding,
    so that 224 does not give the 55 x 55 maps of the paper).
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        relu, pool, lrn = (lambda: nn.ReLU(inplace=True)), (lambda: nn.MaxPool2d(3, 2)), _paper_lrn
        self.features = FusedSequential(
            nn.Conv2d(3, 96, 11, stride=4), relu(), lrn(), pool(),
            nn.Conv2d(96, 256, 5, padding=2, groups=2), relu(), lrn(), pool(),
            nn.Conv2d(256, 384, 3, padding=1), relu(),
            nn.Conv2d(384, 384, 3, padding=1, groups=2), relu(),
            nn.Conv2d(384, 256, 3, padding=1, groups=2), relu(), pool(),
        )  # fmt: skip
        self.classifier = FusedSequential(
            nn.Linear(9216, 4096), relu(), nn.Dropout(dropout),
            nn.Linear(4096, 4096), relu(), nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )  # fmt: skip
        layers = [m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for i, layer in enumerate(layers):
            nn.init.normal_(layer.weight, 0.0, 0.01)
            nn.init.constant_(layer.bias, 1.0 if i in (1, 3, 4, 5, 6) else 0.0)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (3, 227, 227):
            raise RuntimeError(f"alexnet_paper: x: expected shape (N, 3, 227, 227), got {tuple(x.shape)}")
        return self.classifier(torch.flatten(self.features(x), 1))


def _paper_lrn() -> nn.Module:
    return LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)


@register("alexnet", "alexnet", 61_100_840, (3, 224, 224), "torchvision alexnet")
def alexnet(num_classes: int = 1000, dropout: float = 0.5) -> AlexNet:
    """torchvision's AlexNet."""
    return AlexNet(num_classes, dropout)


@register("alexnet_paper", "alexnet", 60_965_224, (3, 227, 227), "paper, table of layers")
def alexnet_paper(num_classes: int = 1000, dropout: float = 0.5) -> AlexNetPaper:
    """AlexNet as the paper describes it."""
    return AlexNetPaper(num_classes, dropout)
