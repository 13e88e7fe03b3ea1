"""Small CIFAR-style networks with and without residual connections, trained on textures: what three experiments share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import CifarResNet


def make_net(depth: int, residual: bool, seed: int, classes: int = 10) -> nn.Module:
    """6n + 2 layers with shortcut A or without shortcuts, in channels_last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = CifarResNet(depth, classes, shortcut="A" if residual else "none")
    return net.to(memory_format=torch.channels_last)


def train(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    batch: int,
    seed: int,
    lr: float = 0.1,
    watch: Callable[[int, float, float], None] | None = None,
) -> nn.Module:
    """SGD with Nesterov momentum 0.9, weight decay 1e-4, linear warm-up of a tenth, lr / 10 for the last quarter.

    ``watch(step, loss, error)`` sees each step's training loss and error on its batch. Returns ``net`` in eval.
    """
    x, y = data
    x = x.contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    net.train()
    for step in range(steps):
        rate = lr * min(1.0, 10 * (step + 1) / steps) * (0.1 if step >= 0.75 * steps else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(y), (batch,), generator=generator)
        logits = net(x[chosen])
        loss = F.cross_entropy(logits, y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if watch is not None:
            watch(step, float(loss.detach()), float((logits.argmax(1) != y[chosen]).float().mean()))
    return net.eval()


@torch.no_grad()
def evaluate(net: nn.Module, data: tuple[Tensor, Tensor], batch: int = 256) -> tuple[float, float]:
    """(mean cross entropy, error in [0, 1]) in eval."""
    net.eval()
    loss = wrong = 0.0
    for x, y in zip(data[0].split(batch), data[1].split(batch), strict=True):
        logits = net(x.contiguous(memory_format=torch.channels_last))
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        wrong += float((logits.argmax(1) != y).sum())
    return loss / len(data[1]), wrong / len(data[1])


def smooth(values: list[float], width: int) -> list[float]:
    """Running mean over the last ``width`` values."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
