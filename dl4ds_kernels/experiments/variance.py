"""Growth of the activations through residual blocks at initialisation (slides 36, 37, 43).

With He initialisation and zero biases the second moment E[h^2] doubles in every block ``h + linear(relu(h))``; a factor
1 / sqrt(2) behind the addition keeps it at 1; with BatchNorm at the head of the branch each block adds exactly 1. The gradient
grows in the same way on its way back. Batch *variances*, which UDL's notebook 11.3 prints, grow by other factors: with
BatchNorm by 1 - 1 / pi for each block, because the mean of relu(z) is not zero.

Reference: Prince, Understanding Deep Learning, sections 11.3 and 11.4, notebook 11.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import add_act, bn_act
from ._result import Check, Result, near

TITLE = "Activations grow through residual blocks at initialisation"
BLOCKS = 5
# Var[linear(relu(z))] over the batch for z ~ N(0, 1) under He initialisation: 2 * Var[relu(z)].
BATCH_VARIANCE_OF_A_BLOCK = 1 - 1 / math.pi
_KINDS = ("plain", "scaled", "bn")


def _he(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator) * math.sqrt(2 / columns)


def _block(kind: str, h: Tensor, weight: Tensor) -> Tensor:
    """One residual block on (N, D) with the package's ops."""
    branch = (bn_act(h, None, None, training=True) if kind == "bn" else h.relu()) @ weight.T
    return add_act(h, branch, alpha=math.sqrt(0.5) if kind == "scaled" else 1.0, activation="none")


def hidden_states(kind: str, x: Tensor, blocks: int, generator: torch.Generator) -> list[Tensor]:
    """``x`` (N, D) and what leaves each of ``blocks`` residual blocks: "plain", "scaled" or "bn"."""
    states = [x]
    for _ in range(blocks):
        states.append(_block(kind, states[-1], _he(x.shape[1], x.shape[1], generator)))
    return states


def second_moments(
    kind: str, seeds: int, seed: int, width: int, samples: int, measure: Callable[[Tensor], Tensor]
) -> list[float]:
    """``measure`` of every hidden state for x ~ N(0, 1), mean over ``seeds`` initialisations."""
    total = torch.zeros(BLOCKS + 1, dtype=torch.float64)
    for i in range(seeds):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        states = hidden_states(kind, torch.randn(samples, width, generator=generator), BLOCKS, generator)
        total += torch.stack([measure(h.double()) for h in states])
    return (total / seeds).tolist()


def gradient_moments(kind: str, seeds: int, seed: int, width: int, samples: int) -> list[float]:
    """E[g^2] at every hidden state for an output gradient of N(0, 1), from the last block back to the input."""
    total = torch.zeros(BLOCKS + 1, dtype=torch.float64)
    for i in range(seeds):
        generator = torch.Generator().manual_seed(1000 * seed + 500 + i)
        x = torch.randn(samples, width, generator=generator).requires_grad_()
        states = hidden_states(kind, x, BLOCKS, generator)
        grads = torch.autograd.grad(states[-1], states, torch.randn(samples, width, generator=generator))
        total += torch.stack([g.double().square().mean() for g in reversed(grads)])
    return (total / seeds).tolist()


def batch_variances(x: Tensor, *, batch_norm: bool, seeds: int, width: int = 100, blocks: int = BLOCKS) -> list[float]:
    """Notebook 11.3: of the data (N, D_in), the first layer and each residual block, each unit's variance over the samples,
    averaged over the units."""
    total = torch.zeros(blocks + 2, dtype=torch.float64)
    for i in range(seeds):
        generator = torch.Generator().manual_seed(i)
        first = x @ _he(width, x.shape[1], generator).T
        states = hidden_states("bn" if batch_norm else "plain", first, blocks, generator)
        total += torch.stack([h.double().var(0).mean() for h in [x, *states]])
    return (total / seeds).tolist()


def run(seed: int = 0, quick: bool = False) -> Result:
    """Second moments forward and backward, batch variances with BatchNorm, over several initialisations."""
    seeds, width, samples = (6, 200, 500) if quick else (20, 400, 1000)
    forward = {k: second_moments(k, seeds, seed, width, samples, lambda h: h.square().mean()) for k in _KINDS}
    backward = {k: gradient_moments(k, seeds, seed, width, samples) for k in _KINDS}
    # The variance over the batch within each unit: what BatchNorm divides by.
    variance = second_moments("bn", seeds, seed, width, samples, lambda h: h.var(0).mean())
    steps = range(BLOCKS + 1)
    tolerance = 0.2 if quick else 0.1
    checks = [near(f"plain, E[h^2] behind block {k}", forward["plain"][k], 2.0**k, tolerance) for k in steps]
    checks += [near(f"x 1/sqrt(2), E[h^2] behind block {k}", forward["scaled"][k], 1.0, tolerance) for k in steps]
    checks += [near(f"BatchNorm, E[h^2] behind block {k}", forward["bn"][k], 1.0 + k, tolerance) for k in steps]
    checks += [near("plain, E[g^2] at the input", backward["plain"][-1], 2.0**BLOCKS, 2 * tolerance)]
    growth = (variance[-1] - variance[0]) / BLOCKS
    checks += [near("BatchNorm, batch variance added by a block", growth, BATCH_VARIANCE_OF_A_BLOCK, tolerance / 2)]
    checks += [Check("plain over BatchNorm behind the last block", forward["plain"][-1] / forward["bn"][-1], low=4.0)]
    numbers = {"second_moments": forward, "gradient_second_moments": backward, "batch_variance_with_bn": variance}

    def paint(figure: Any) -> None:
        from ._style import PLAIN, RESIDUAL, THEORY, THIRD

        left, right = figure.subplots(1, 2, sharey=True)
        labels = {
            "plain": ("no normalisation: doubles", PLAIN, [2.0**k for k in steps]),
            "bn": ("BatchNorm in the branch: + 1", RESIDUAL, [1.0 + k for k in steps]),
            "scaled": (r"$\times\,1/\sqrt{2}$ after the addition: stays", THIRD, [1.0 for _ in steps]),
        }
        for kind, (label, colour, theory) in labels.items():
            left.plot(steps, theory, color=THEORY, linewidth=1, linestyle="--", label="theory" if kind == "scaled" else None)
            left.plot(steps, forward[kind], "o", color=colour, markersize=7, label=label)
            for k, value in enumerate(forward[kind]):
                if k > 1 and (kind != "scaled" or k == BLOCKS):
                    place = (0, -15) if kind == "bn" else (0, 7)
                    left.annotate(f"{value:.1f}", (k, value), place, textcoords="offset points", ha="center", fontsize=8)
            right.plot(steps, backward[kind], "o-", color=colour, markersize=6)
        left.set(yscale="log", xlabel="residual blocks passed", ylabel="second moment (log)", title=r"forward: $E[h^2]$")
        left.set_ylim(0.6, 70)
        right.set(xlabel="residual blocks passed, from the output back", title=r"backward: $E[g^2]$ of the gradient")
        left.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        left.minorticks_off()
        left.legend(loc="upper left")

    return Result(TITLE, numbers, checks, paint)
