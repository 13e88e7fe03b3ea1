"""Residual networks as ensembles of paths (slides 27 to 32), and what happens when a block is deleted.

Four residual blocks unravel into 2^4 = 16 paths, eight of them through the first. For linear blocks the network *is* the sum of
the 16 products; for others its Jacobian is: the product of (I + J_k) is the sum over all subsets of the J_k's products. In a
trained network, deleting a residual block removes half of the paths and hardly matters; deleting a block of a plain network
removes the only one.

References: Veit et al., Residual Networks Behave Like Ensembles of Relatively Shallow Networks, 2016; Prince, Understanding
Deep Learning, section 11.2.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets import textures
from ..modules import OrderedResidual2d
from ._nets import evaluate, make_net, train
from ._result import Check, Result

TITLE = "A residual network is a sum of paths: no single block is indispensable"
BLOCKS = 4


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Every path: the blocks whose branch it takes, in order."""
    for length in range(count + 1):
        yield from itertools.combinations(range(count), length)


def sum_of_paths(matrices: list[Tensor]) -> Tensor:
    """Sum over all paths of the product of the path's matrices, first block rightmost: equals the product of (I + M_k)."""
    identity = torch.eye(matrices[0].shape[0], dtype=matrices[0].dtype)
    total = torch.zeros_like(identity)
    for path in subsets(len(matrices)):
        product = identity
        for k in path:
            product = matrices[k] @ product
        total += product
    return total


def linear_error(seed: int, width: int = 16) -> float:
    """Largest difference between a network of linear residual blocks and the sum of its 16 paths, relative."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5 for _ in range(BLOCKS)]
    h = torch.randn(width, generator=generator, dtype=torch.float64)
    want = sum_of_paths(matrices) @ h
    for matrix in matrices:
        h = h + matrix @ h
    return float((h - want).abs().max() / want.abs().max())


def jacobian_error(seed: int) -> float:
    """The same for the Jacobian of four nonlinear blocks of the package, each J_k taken where the forward pass meets it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [OrderedResidual2d(2, "c").double() for _ in range(BLOCKS)]
        x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    n = x.numel()

    def jacobian(function: Any, at: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(function, at).reshape(n, n)

    whole = jacobian(nn.Sequential(*blocks), x)
    branches, h = [], x
    for block in blocks:
        branches.append(jacobian(block, h) - torch.eye(n, dtype=torch.float64))
        h = block(h).detach()
    return float((sum_of_paths(branches) - whole).abs().max() / whole.abs().max())


def block_names(net: nn.Module) -> list[str]:
    """Names of the residual (or plain) blocks, first to last."""
    return [f"{stage}.{i}" for stage in ("layer1", "layer2", "layer3") for i in range(len(net.get_submodule(stage)))]


def delete_block(net: nn.Module, name: str) -> nn.Module | None:
    """A copy in which a block passes its input on (through the shortcut, if it has one); None where shapes forbid that."""
    net = copy.deepcopy(net)
    block = net.get_submodule(name)
    shortcut = getattr(block, "downsample", None)
    if shortcut is None and not hasattr(block, "downsample") and block[0].stride != (1, 1):
        return None
    net.set_submodule(name, nn.Identity() if shortcut is None else shortcut)
    return net


def gradients_by_length(net: nn.Module, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
    """The loss's gradient at the first block's input, split by how many branches its paths take; and the whole gradient.

    Backwards through ``relu(branch(h) + shortcut(h))`` the gradient of every length either takes the shortcut or, one longer,
    the branch: a polynomial in the number of branches.
    """
    points = [torch.relu(net.bn1(net.conv1(x))).detach()]
    blocks = [net.get_submodule(name) for name in block_names(net)]
    for block in blocks:
        points.append(block(points[-1]).detach())
    last = points[-1].requires_grad_()
    loss = F.cross_entropy(net.fc(torch.flatten(net.avgpool(last), 1)), y)
    parts = list(torch.autograd.grad(loss, last))
    for block, point in zip(reversed(blocks), reversed(points[:-1]), strict=True):
        point = point.detach().requires_grad_()
        out = block(point)
        shortcut = point * 1 if block.downsample is None else block.downsample(point)
        mask = (out > 0).detach()
        longer = [torch.zeros_like(point)]
        shorter = []
        for g in parts:
            whole = torch.autograd.grad(out, point, g, retain_graph=True)[0]
            skip = torch.autograd.grad(shortcut, point, g * mask, retain_graph=True)[0]
            shorter.append(skip)
            longer.append(whole - skip)
        parts = [a + b for a, b in zip([*shorter, torch.zeros_like(point)], longer, strict=True)]
    start = points[0].detach().requires_grad_()
    h = start
    for block in blocks:
        h = block(h)
    total = torch.autograd.grad(F.cross_entropy(net.fc(torch.flatten(net.avgpool(h), 1)), y), start)[0]
    return [p.detach() for p in parts], total


def run(seed: int = 0, quick: bool = False) -> Result:
    """The two identities, the count of paths, and the lesion study on trained nets of 20 layers."""
    paths = list(subsets(BLOCKS))
    lengths = [sum(len(p) == j for p in paths) for j in range(BLOCKS + 1)]
    through = [p for p in paths if 0 in p]
    further = [sum(len(p) - 1 == j for p in through) for j in range(BLOCKS)]

    steps, samples = (160, 400) if quick else (600, 1000)
    data, held_out = textures(4096, size=8, seed=2 * seed + 1), textures(samples, size=8, seed=2 * seed + 2)
    errors: dict[str, dict[str, float | None]] = {}
    for kind in ("plain", "residual"):
        net = train(make_net(20, kind == "residual", seed), data, steps=steps, batch=32, seed=seed, lr=0.05)
        errors[kind] = {"none": evaluate(net, held_out)[1]}
        for name in block_names(net):
            lesioned = delete_block(net, name)
            errors[kind][name] = None if lesioned is None else evaluate(lesioned, held_out)[1]
    parts, whole = gradients_by_length(net, held_out[0][:64], held_out[1][:64])
    norms = [float(p.norm()) for p in parts]
    kept = [n for n, e in errors["plain"].items() if e is not None and n != "none"]
    rise = {k: sorted(v[n] - v["none"] for n in kept)[len(kept) // 2] for k, v in errors.items()}
    checks = [
        Check("paths through 4 blocks", len(paths), 16, 16),
        Check("of these through the first block", len(through), 8, 8),
        Check("paths with 2 further blocks behind the first", further[2], 3, 3),
        Check("linear blocks: network against the sum of paths", linear_error(seed), high=1e-12),
        Check("nonlinear blocks: Jacobian against the sum of paths", jacobian_error(seed), high=1e-12),
        Check("gradient against the sum over path lengths", float((sum(parts) - whole).norm() / whole.norm()), high=1e-4),
        Check("median rise of the error by deleting a block: plain minus residual", rise["plain"] - rise["residual"], low=0.15),
    ]
    numbers = {
        "paths_by_length": lengths, "paths_through_first_by_further_blocks": further, "error_without_block": errors,
        "median_rise": rise, "gradient_norm_by_length": norms,
    }  # fmt: skip

    def paint(figure: Any) -> None:
        from ._style import PLAIN, RESIDUAL, THEORY

        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        names = [n for n in errors["plain"] if n != "none"]
        for i, name in enumerate(names):
            for shift, kind, colour in ((-0.2, "plain", PLAIN), (0.2, "residual", RESIDUAL)):
                value = errors[kind][name]
                if value is None:
                    left.text(i + shift, 2, "changes shape", rotation=90, ha="center", va="bottom", fontsize=8, color=THEORY)
                else:
                    left.bar(i + shift, 100 * value, 0.38, color=colour)
        for kind, colour in (("plain", PLAIN), ("residual", RESIDUAL)):
            left.axhline(100 * errors[kind]["none"], color=colour, linestyle="--", label=f"{kind}, all blocks there")
        left.axhline(90, color=THEORY, linewidth=0.8)
        left.text(len(names) - 0.5, 91, "chance", color=THEORY, ha="right", fontsize=9)
        left.set_xticks(range(len(names)), [n.removeprefix("layer") for n in names])
        left.set(xlabel="deleted block (stage.block)", ylabel="test error (%)", ylim=(0, 108))
        left.set_title("delete one block of a trained 20-layer net")
        left.legend(loc="upper left", ncols=2)
        count = len(norms) - 1
        share = [n / sum(norms) for n in norms]
        number = [math.comb(count, j) / 2**count for j in range(count + 1)]
        right.bar([j - 0.2 for j in range(count + 1)], number, 0.38, color=THEORY, label="paths of this length")
        right.bar([j + 0.2 for j in range(count + 1)], share, 0.38, color=RESIDUAL, label="gradient that they carry")
        right.set(xlabel="branches that a path takes", ylabel="share", title=f"{2**count} paths of the residual net")
        right.set_xticks(range(count + 1))
        right.legend(loc="upper right")
        right.set_ylim(0, 1.25 * max(*share, *number))

    return Result(TITLE, numbers, checks, paint, (12, 4.6))
