"""Shattered gradients (slides 23 to 25): with depth, the gradient of a network becomes white noise in its input.

Balduzzi et al.'s figure needs BatchNorm in the plain network. UDL's notebook 11.1, which has none, does not reproduce it: its
autocorrelation at one grid step stays above 0.9 for 24 layers, as its author notes; ``notebook_gradients`` is that network.
With BatchNorm (over the 256 points), depth shatters the plain net, residual connections shatter less, and residual branches
scaled by 0.1 hardly.

References: Balduzzi et al., The Shattered Gradients Problem, 2017; Prince, Understanding Deep Learning, section 11.1.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..functional import add_act, bn_act
from ._result import Check, Result

TITLE = "Gradients shatter with depth; residual connections keep them together"
WIDTH, POINTS = 200, 256
STEP = 4 / 256
LAGS = (1, 2, 4, 8, 13)


def grid() -> Tensor:
    """(256, 1): the inputs -2 … 2."""
    return (-2 + STEP * torch.arange(POINTS, dtype=torch.float64)).unsqueeze(1)


def gradient(depth: int, seed: int, *, residual: bool = False, beta: float = 1.0, batch_norm: bool = True) -> Tensor:
    """dy/dx (256,) of a network with one input, ``depth`` hidden layers of 200 ReLU units and one output.

    The first layer is N(0, 1); each further one is BatchNorm (over the grid), ReLU, linear with He initialisation, with a
    residual connection around it if wanted, its branch times ``beta``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def act(h: Tensor) -> Tensor:
        return bn_act(h, None, None, training=True) if batch_norm else h.relu()

    x = grid().requires_grad_()
    h = x @ normal(1, WIDTH) + normal(WIDTH)
    for _ in range(depth - 1):
        branch = beta * (act(h) @ (normal(WIDTH, WIDTH) * math.sqrt(2 / WIDTH)))
        h = add_act(h, branch, activation="none") if residual else branch
    y = act(h) @ (normal(WIDTH, 1) * math.sqrt(2 / WIDTH))
    return torch.autograd.grad(y.sum(), x)[0].squeeze(1)


def notebook_parameters(depth: int, width: int = WIDTH, seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of UDL's notebook 11.1 (numpy's generator, in the notebook's order): all N(0, 1 / width)."""
    import numpy as np

    random, sigma = np.random.RandomState(seed), math.sqrt(1 / width)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.normal(size=shape) * sigma)

    first_w, last_w, first_b, last_b = normal(width, 1), normal(1, width), normal(width, 1), normal(1, 1)
    weights, biases = [first_w], [first_b]
    for _ in range(depth - 1):
        weights.append(normal(width, width))
        biases.append(normal(width, 1))
    return [*weights, last_w], [*biases, last_b]


def notebook_gradients(x: Tensor, depth: int, seed: int = 1) -> Tensor:
    """dy/dx at the points ``x`` (N,) of notebook 11.1's network with ``depth`` hidden layers."""
    weights, biases = notebook_parameters(depth, seed=seed)
    x = x.double().unsqueeze(0).requires_grad_()
    h = x
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        h = (w @ h + b).relu()
    return torch.autograd.grad((weights[-1] @ h + biases[-1]).sum(), x)[0].squeeze(0)


def autocorrelation(g: Tensor) -> Tensor:
    """Of a gradient (256,), mean removed, lag 0 first, normalised to 1 there."""
    g = g - g.mean()
    n = g.numel()
    spectrum = torch.fft.rfft(g, 2 * n)
    full = torch.fft.irfft(spectrum.abs().square(), 2 * n)[:n]
    return full / full[0]


def mean_autocorrelation(depth: int, seeds: int, seed: int, **options: Any) -> Tensor:
    """Mean over ``seeds`` networks."""
    return torch.stack([autocorrelation(gradient(depth, 1000 * seed + i, **options)) for i in range(seeds)]).mean(0)


def run(seed: int = 0, quick: bool = False) -> Result:
    """Gradients of shallow and deep nets, and autocorrelations of plain, residual and scaled residual nets."""
    seeds, deep = (3, (24,)) if quick else (20, (24, 50))
    plain = {k: mean_autocorrelation(k, seeds, seed) for k in (2, 4, *deep)}
    residual = {k: mean_autocorrelation(k, seeds, seed, residual=True) for k in deep}
    scaled = {k: mean_autocorrelation(k, seeds, seed, residual=True, beta=0.1) for k in deep}
    without = mean_autocorrelation(24, seeds, seed, batch_norm=False)
    p, r, s = (float(curve[24][1]) for curve in (plain, residual, scaled))
    checks = [
        Check("plain, 24 layers, one grid step", p, high=0.2),
        Check("residual minus plain, 24 layers", r - p, low=0.2),
        Check("residual x 0.1 minus residual, 24 layers", s - r, low=0.1),
        Check("plain, 2 layers, one grid step", float(plain[2][1]), low=0.85),
        Check("plain, 4 layers minus 24 layers", float(plain[4][1]) - p, low=0.4),
        Check("without BatchNorm the plain net does not shatter (24 layers)", float(without[1]), low=0.75),
    ]
    at = {f"lag {lag}": lag for lag in LAGS}
    numbers = {  # fmt: skip
        name: {k: {lag: float(curve[i]) for lag, i in at.items()} for k, curve in curves.items()}
        for name, curves in (
            ("plain", plain),
            ("residual", residual),
            ("residual x 0.1", scaled),
            ("no BatchNorm", {24: without}),
        )
    }
    examples = [gradient(1, seed, batch_norm=False), gradient(24, seed), gradient(24, seed, residual=True, beta=0.1)]

    def paint(figure: Any) -> None:
        from ._style import PLAIN, RESIDUAL, THEORY, THIRD

        axes = figure.subplot_mosaic([["one", "ac"], ["deep", "ac"], ["res", "ac"]], width_ratios=(1, 1.15))
        titles = ("1 hidden layer", "24 layers, plain: white noise", "24 layers, residual x 0.1: smooth again")
        x = grid().squeeze(1)
        for key, g, colour, title in zip(("one", "deep", "res"), examples, (THEORY, PLAIN, RESIDUAL), titles, strict=True):
            axes[key].plot(x, g / g.abs().max(), color=colour, linewidth=1)
            axes[key].set_title(title)
            axes[key].set(ylabel="dy/dx", yticks=[])
        axes["res"].set_xlabel("x")
        ax, lag = axes["ac"], STEP * torch.arange(14)
        for k, style in ((2, ":"), (4, "--"), (24, "-")):
            ax.plot(lag, plain[k][:14], style, color=PLAIN, linewidth=2, label=f"plain, {k} layers")
        ax.plot(lag, residual[24][:14], color=THIRD, linewidth=2, label="residual, 24 layers")
        ax.plot(lag, scaled[24][:14], color=RESIDUAL, linewidth=2, label="residual x 0.1, 24 layers")
        ax.axhline(0, color=THEORY, linewidth=0.8)
        ax.set(xlabel=r"distance $\Delta x$", title="autocorrelation of dy/dx (all with BatchNorm)", ylim=(-0.25, 1.03))
        ax.legend(loc="upper right")

    return Result(TITLE, numbers, checks, paint, (11, 5.2))
