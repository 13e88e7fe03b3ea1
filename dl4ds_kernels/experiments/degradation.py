"""Degradation (slide 22): a deeper plain network trains *worse*, on its training data; residual connections undo that.

The lecture's curves are of CIFAR-10 over 64,000 steps. Here the same nets (6n + 2 layers) learn small textures for some hundred
steps, which is enough to see that 56 plain layers cannot even fit.

Reference: He et al., Deep Residual Learning for Image Recognition, 2015, figures 1 and 6.
"""

from __future__ import annotations

from typing import Any

from ..datasets import textures
from ._nets import evaluate, make_net, smooth, train
from ._result import Check, Result

TITLE = "Deeper plain networks train worse; residual networks do not"
NETS = {"plain 20": (20, False), "plain 56": (56, False), "residual 20": (20, True), "residual 56": (56, True)}


def run(seed: int = 0, quick: bool = False) -> Result:
    """Train 20 and 56 layers with and without residual connections on the same batches."""
    steps, size, batch = (200 if quick else 600), 8, 32
    data, held_out = textures(4096, size=size, seed=2 * seed + 1), textures(1000, size=size, seed=2 * seed + 2)
    curves: dict[str, list[float]] = {}
    final, losses, test = {}, {}, {}
    for name, (depth, residual) in NETS.items():
        log: list[tuple[float, float]] = []
        net = train(
            make_net(depth, residual, seed), data, steps=steps, batch=batch, seed=seed, lr=0.05,
            watch=lambda step, loss, error, log=log: log.append((loss, error)),
        )  # fmt: skip
        tail = log[-steps // 8 :]
        curves[name] = smooth([error for _, error in log], 25)
        losses[name] = sum(loss for loss, _ in tail) / len(tail)
        final[name] = sum(error for _, error in tail) / len(tail)
        test[name] = evaluate(net, held_out)[1]
    checks = [
        Check("training error, plain 56 minus plain 20", final["plain 56"] - final["plain 20"], low=0.2),
        Check("test error, plain 56 minus plain 20", test["plain 56"] - test["plain 20"], low=0.2),
        Check("training error, plain 56 minus residual 56", final["plain 56"] - final["residual 56"], low=0.08),
    ]
    if not quick:  # a few hundred steps are needed before depth pays off
        rise = final["residual 56"] - final["residual 20"]
        checks.append(Check("training error, residual 56 minus residual 20", rise, high=0.1))
    numbers = {"steps": steps, "training_error": final, "training_loss": losses, "test_error": test}

    def paint(figure: Any) -> None:
        from ._style import PLAIN, RESIDUAL

        left, right = figure.subplots(1, 2, sharey=True)
        for ax, kind, colour, title in (
            (left, "plain", PLAIN, f"plain: 56 layers end at {final['plain 56']:.0%} on their own training data"),
            (right, "residual", RESIDUAL, f"residual: 56 layers end at {final['residual 56']:.0%} after {steps} steps"),
        ):
            for depth, style, width in ((20, "--", 1.6), (56, "-", 2.4)):
                name = f"{kind} {depth}"
                label = f"{depth} layers (test {test[name]:.0%})"
                ax.plot([100 * e for e in curves[name]], style, color=colour, linewidth=width, label=label)
            ax.set(xlabel="training step", title=title, ylim=(0, 100))
            ax.legend(loc="upper right")
        left.set_ylabel("training error (%)")

    return Result(TITLE, numbers, checks, paint)
