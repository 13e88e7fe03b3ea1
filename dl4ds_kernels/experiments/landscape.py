"""The loss around a trained network, with and without residual connections (slide 44).

The loss is drawn on the plane through the trained weights along two random directions, each filter of a direction scaled to the
norm of that filter's weights; BatchNorm and biases stay. With residual connections the minimum lies in a wide, round valley.

Reference: Li et al., Visualizing the Loss Landscape of Neural Nets, 2018.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..datasets import textures
from ._nets import evaluate, make_net, train
from ._result import Check, Result

TITLE = "The loss around the trained weights"
DEPTH, CHANCE = 32, math.log(10)


def filter_normalised(net: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """A random direction for each parameter: of every filter the weights' norm, nothing for biases and BatchNorm."""
    direction = []
    for p in net.parameters():
        d = torch.zeros_like(p)
        if p.dim() > 1:
            d = torch.randn(p.shape, generator=generator)
            shape = [-1] + [1] * (p.dim() - 1)
            d *= (p.detach().flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1).clamp(min=1e-12)).view(shape)
        direction.append(d)
    return direction


@torch.no_grad()
def loss_plane(net: nn.Module, data: tuple[Tensor, Tensor], steps: list[float], generator: torch.Generator) -> Tensor:
    """(len(steps), len(steps)): cross entropy at ``weights + a * first + b * second``. The weights are put back."""
    first, second = (filter_normalised(net, generator) for _ in range(2))
    parameters = list(net.parameters())
    start = [p.detach().clone() for p in parameters]
    plane = torch.empty(len(steps), len(steps))
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            for p, s, d, e in zip(parameters, start, first, second, strict=True):
                p.copy_(s + a * d + b * e)
            plane[i, j] = min(evaluate(net, data)[0], 1e6)
    for p, s in zip(parameters, start, strict=True):
        p.copy_(s)
    return plane


def run(seed: int = 0, quick: bool = False) -> Result:
    """Train 32 layers with and without residual connections, then measure the loss on a plane around each."""
    steps, count, samples = (160, 7, 64) if quick else (600, 21, 256)
    axis = torch.linspace(-1, 1, count).tolist()
    data = textures(4096, size=8, seed=2 * seed + 1)
    some = (data[0][:samples], data[1][:samples])
    planes: dict[str, Tensor] = {}
    for kind in ("plain", "residual"):
        net = train(make_net(DEPTH, kind == "residual", seed), data, steps=steps, batch=32, seed=seed, lr=0.05)
        planes[kind] = loss_plane(net, some, axis, torch.Generator().manual_seed(seed))
    middle = count // 2
    centre = {k: float(v[middle, middle]) for k, v in planes.items()}
    valley = {k: float((v < CHANCE).float().mean()) for k, v in planes.items()}
    checks = [
        Check("loss at the trained weights, plain minus residual", centre["plain"] - centre["residual"], low=0.1),
        Check("share of the plane that beats chance, residual minus plain", valley["residual"] - valley["plain"], low=0.02),
        Check("no better point on the residual net's plane", centre["residual"] - float(planes["residual"].min()), high=0.15),
    ]
    numbers = {
        "loss_at_centre": centre, "share_below_chance": valley, "largest_loss": {k: float(v.max()) for k, v in planes.items()},
    }  # fmt: skip

    def paint(figure: Any) -> None:
        from ._style import INK

        axes = figure.subplots(1, 2, sharey=True)
        levels = [0.1 * 1.5**k for k in range(18)]
        for ax, kind, title in zip(
            axes, ("plain", "residual"), ("without residual connections", "with residual connections"), strict=True
        ):
            z = planes[kind].clamp(levels[0], levels[-1]).log()
            ticks = [math.log(v) for v in levels]
            filled = ax.contourf(axis, axis, z.T, levels=ticks, cmap="viridis", extend="both")
            ax.contour(axis, axis, z.T, levels=[math.log(CHANCE)], colors="white", linewidths=2)
            ax.plot(0, 0, "+", color="white", markersize=12, markeredgewidth=2)
            ax.set_title(f"{title}: loss {centre[kind]:.2f} at +,\n{valley[kind]:.0%} of the plane beats chance")
            ax.set(xlabel="first direction", aspect="equal")
            ax.grid(False)
        axes[0].set_ylabel("second direction")
        bar = figure.colorbar(filled, ax=axes, label="loss (log); white line: chance, ln 10")
        marks = [0.1, 0.3, 1, 3, 10, 30, 100]
        bar.set_ticks([math.log(m) for m in marks], labels=[str(m) for m in marks])
        bar.ax.yaxis.label.set_color(INK)

    return Result(f"{TITLE} ({DEPTH} layers)", numbers, checks, paint, (11.5, 5))
