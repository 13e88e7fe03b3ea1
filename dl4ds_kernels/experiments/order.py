"""The order of operations inside a residual branch (slide 33): a) linear, ReLU; b) ReLU, linear; c) ReLU, linear, ReLU, linear.

a) The branch is never negative, so that values can only grow. b) It takes either sign, but an input without a positive value
passes unchanged (up to biases). c) The usual choice has the same property and more to compute with.

Reference: Prince, Understanding Deep Learning, section 11.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules import OrderedResidual2d
from ._result import Check, Result

TITLE = "What a residual block can do depends on the order of its operations"
ORDERS = {"a": "linear, ReLU", "b": "ReLU, linear", "c": "ReLU, linear, ReLU, linear"}


def make_block(order: str, channels: int, seed: int) -> OrderedResidual2d:
    """A block with He weights and zero biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = OrderedResidual2d(channels, order)
        for conv in (block.conv1, block.conv2):
            if conv is not None:
                nn.init.kaiming_normal_(conv.weight)
                nn.init.zeros_(conv.bias)
    return block


def _apply(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return block(x)


def run(seed: int = 0, quick: bool = False) -> Result:
    """Change ``y - x`` that each order makes to inputs of either sign and to inputs without a positive value."""
    channels, samples = 32, 4 if quick else 16
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels, 8, 8, generator=generator)
    dark = -x.abs()
    changes, silent, pairs, checks = {}, {}, {}, []
    for order in ORDERS:
        block = make_block(order, channels, seed)
        y, z = _apply(block, x), _apply(block, dark)
        change = y - x
        changes[order] = {"smallest": float(change.min()), "largest": float(change.max())}
        silent[order] = float((z - dark).abs().max())
        pairs[order] = [(x.flatten()[:600], y.flatten()[:600]), (dark.flatten()[:200], z.flatten()[:200])]
    checks = [
        Check("a: smallest y - x", changes["a"]["smallest"], low=0.0),
        Check("b: smallest y - x", changes["b"]["smallest"], high=-0.5),
        Check("c: smallest y - x", changes["c"]["smallest"], high=-0.5),
        Check("b: largest |y - x| for x <= 0", silent["b"], 0.0, 0.0),
        Check("c: largest |y - x| for x <= 0", silent["c"], 0.0, 0.0),
        Check("a: largest |y - x| for x <= 0", silent["a"], low=0.5),
    ]

    def paint(figure: Any) -> None:
        from ._style import PLAIN, RESIDUAL, THEORY

        stories = ("values can only grow", "both ways; x ≤ 0 passes unchanged", "both ways; the usual block")
        for ax, (order, text), story in zip(figure.subplots(1, 3, sharey=True), ORDERS.items(), stories, strict=True):
            (px, py), (dx, dy) = pairs[order]
            low, high = -4, 7
            ax.fill_between([low, high], [low, high], [low, low], color=THEORY, alpha=0.10, linewidth=0)
            ax.plot([low, high], [low, high], color=THEORY, linewidth=1)
            ax.plot(px, py, ".", color=RESIDUAL, markersize=3, alpha=0.6, label="inputs of either sign")
            ax.plot(dx, dy, ".", color=PLAIN, markersize=4, label="inputs with no positive value")
            ax.set(xlim=(low, high), ylim=(low, high), xlabel="x (a value of the input)", title=f"{order}) {text}\n{story}")
            ax.text(3.2, -3.3, "y < x", color=THEORY)
        figure.axes[0].set_ylabel("y = x + branch(x)")
        figure.axes[0].legend(loc="upper left", markerscale=3)

    return Result(TITLE, {"change": changes, "change_for_no_positive_input": silent}, checks, paint, (11.5, 4.5))
