"""What BatchNorm does to a sample depends on its batch (slides 39 to 43): companions, noise, leaked labels, invariances.

In training, the output for one picture changes with the other pictures of the batch; the noise falls as 1 / sqrt(batch size);
batches sorted by class shift it by class, so that statistics tell the label. In eval nothing depends on the batch. Scaling the
weights in front of BatchNorm, or adding a bias there, changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..datasets import textures
from ..modules import ConvBNAct2d
from ._result import Check, Result, near

TITLE = "BatchNorm in training: a sample's output depends on its companions"
CHANNELS = 16


def _outputs(layer: nn.Module, sample: Tensor, companions: list[Tensor]) -> Tensor:
    """(trials, C): the sample's mean output of each channel in batches with each set of companions."""
    with torch.no_grad():
        return torch.stack([layer(torch.cat((sample, c)))[0].mean((1, 2)) for c in companions])


def parameter_count(layers: int, channels: int) -> int:
    """Trainable values of BatchNorm in a net of ``layers`` convolutions with ``channels`` each: 2 K C."""
    net = nn.Sequential(*(ConvBNAct2d(channels, channels, 3, padding=1) for _ in range(layers)))
    return sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())


def invariance(layer: ConvBNAct2d, x: Tensor) -> dict[str, float]:
    """Largest change of the training output when the weights are tripled and when a bias of 1 is added before BatchNorm."""
    with torch.no_grad():
        out = layer(x)
        weight, bias = layer.conv.weight.detach().clone(), layer.conv.bias.detach().clone()
        layer.conv.weight.mul_(3)
        tripled = layer(x)
        layer.conv.weight.copy_(weight)
        layer.conv.bias.add_(1)
        shifted = layer(x)
        layer.conv.bias.copy_(bias)
    layer.zero_grad()
    layer(x).square().sum().backward()
    gradient = float(layer.conv.bias.grad.abs().max() / layer.conv.weight.grad.abs().max())
    return {"weights": float((tripled - out).abs().max()), "bias": float((shifted - out).abs().max()), "gradient": gradient}


def run(seed: int = 0, quick: bool = False) -> Result:
    """Outputs of one picture in many batches: random companions of several batch sizes, companions of one class, eval."""
    trials, sizes = (60, (4, 16, 64)) if quick else (200, (4, 8, 16, 32, 64, 128))
    x, y = textures(4000, size=16, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = ConvBNAct2d(3, CHANNELS, 3, padding=1, bias=True, activation="relu", momentum=None)
    sample = x[:1]

    def random_batches(size: int, count: int) -> list[Tensor]:
        return [x[torch.randint(1, len(x), (size - 1,), generator=generator)] for _ in range(count)]

    noise = {}
    for size in sizes:
        outputs = _outputs(layer, sample, random_batches(size, trials))
        noise[size] = float(outputs.std(0).mean())
    logs = torch.tensor([[math.log(s), math.log(v)] for s, v in noise.items()])
    centred = logs - logs.mean(0)
    slope = float((centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum())
    random = _outputs(layer, sample, random_batches(32, trials))
    members = [torch.where(y == k)[0][1:] for k in range(10)]
    batches = [[x[m[torch.randint(len(m), (31,), generator=generator)]] for _ in range(8)] for m in members]
    by_class = torch.stack([_outputs(layer, sample, b) for b in batches])  # (10, 8, C)
    channel = int((by_class.mean(1).std(0) / random.std(0)).argmax())
    # Of the spread over single-class batches, the part that the class explains; chance would leave about 1 / 8 of it.
    explained = float(by_class[..., channel].mean(1).var(unbiased=False) / by_class[..., channel].var(unbiased=False))
    layer.eval()
    evaluated = _outputs(layer, sample, random_batches(32, 10))
    layer.train()
    changes = invariance(layer, x[:64])
    checks = [
        Check("noise over batch size, slope in log-log", slope, -0.65, -0.35),
        Check("eval: largest change by companions", float((evaluated - evaluated[:1]).abs().max()), high=1e-5),
        Check("training: spread by companions (batch 32)", float(random.std(0).mean()), low=1e-3),
        Check("sorted batches: share of the spread that the class explains", explained, low=0.6),
        Check("weights tripled: largest change", changes["weights"], high=1e-3),
        Check("bias added: largest change", changes["bias"], high=1e-4),
        Check("gradient of that bias, relative", changes["gradient"], high=1e-4),
        near("BatchNorm parameters of 5 layers of 16 channels", parameter_count(5, 16), 2 * 5 * 16, 0.0),
    ]
    numbers = {"noise": noise, "slope": slope, "explained_by_class": explained, "invariance": changes}

    def paint(figure: Any) -> None:
        from matplotlib import colormaps

        from ._style import INK, PLAIN, THEORY

        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        left.hist(random[:, channel].tolist(), bins=25, color=THEORY, alpha=0.55, label="random companions")
        top = left.get_ylim()[1]
        for k in range(10):
            values = by_class[k, :, channel].tolist()
            height = -(k + 1) * top / 16
            left.plot(values, [height] * len(values), ".", color=colormaps["tab10"](k), markersize=6)
            left.text(max(values), height, f"  class {k}", fontsize=7, va="center", color=colormaps["tab10"](k))
        left.axhline(0, color=INK, linewidth=0.8)
        left.axvline(float(evaluated[0, channel]), color=PLAIN, linewidth=2, label="eval: always the same")
        left.set(xlabel="output of one channel for the same picture", ylabel="batches")
        left.set_yticks([t for t in left.get_yticks() if t >= 0])
        left.set_ylim(-0.72 * top, 1.05 * top)
        left.set_title("above: random batches of 32; below: batches of one class")
        left.legend(loc="upper right")
        right.plot(list(noise), list(noise.values()), "o-", color=PLAIN, label=f"measured, slope {slope:.2f}")
        first = next(iter(noise))
        theory = [noise[first] * (first / s) ** 0.5 for s in noise]
        right.plot(list(noise), theory, "--", color=THEORY, label=r"$1/\sqrt{\mathrm{batch}}$")
        right.set(xscale="log", yscale="log", xlabel="batch size", ylabel="standard deviation of the output")
        right.set_title("noise from random companions")
        right.set_xticks(list(noise), [str(s) for s in noise])
        right.set_yticks(list(noise.values()), [f"{v:.3f}" for v in noise.values()])
        right.minorticks_off()
        right.legend()

    return Result(TITLE, numbers, checks, paint, (11.5, 4.6))
