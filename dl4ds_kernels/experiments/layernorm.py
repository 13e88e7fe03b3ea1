"""BatchNorm and LayerNorm (slides 45, 46): which values share their mean and variance.

BatchNorm: all samples and places of one channel, so that samples are coupled. LayerNorm: all channels and places of one sample,
so that the batch plays no part, in training or eval, down to a batch of one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets import textures
from ..functional import bn_act
from ._result import Check, Result

TITLE = "BatchNorm couples the samples of a batch, LayerNorm does not"
CHANNELS = 12


def normalise(kind: str, x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) without scale and shift; "batch" or "layer"."""
    return bn_act(x, None, None, training=True, activation="none") if kind == "batch" else F.layer_norm(x, x.shape[1:])


def _moments(x: Tensor, dims: tuple[int, ...]) -> float:
    """How far means are from 0 and variances from 1, at most."""
    x = x.double()
    return float(max(x.mean(dims).abs().max(), (x.var(dims, unbiased=False) - 1).abs().max()))


def _refuses_one_value() -> int:
    try:
        normalise("batch", torch.ones(1, CHANNELS, 1, 1))
    except ValueError:
        return 1
    return 0


def run(seed: int = 0, quick: bool = False) -> Result:
    """The same picture in several batches through both normalisations."""
    batches, size = (6 if quick else 24), 8
    pictures, _ = textures(batches * (size - 1) + 1, size=8, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CHANNELS, 3, 3, 3, generator=generator) * (2 / 27) ** 0.5
    features = F.conv2d(pictures, weight, padding=1)
    sample, others = features[:1], features[1:].split(size - 1)
    outputs = {k: torch.stack([normalise(k, torch.cat((sample, o)))[0] for o in others]) for k in ("batch", "layer")}
    change = {k: float((v - v[:1]).abs().max()) for k, v in outputs.items()}
    whole = features[:size]
    normal = {k: normalise(k, whole) for k in ("batch", "layer")}
    alone = normalise("layer", sample)[0]
    checks = [
        Check("LayerNorm: largest change by companions", change["layer"], high=1e-6),
        Check("LayerNorm: largest change alone in the batch", float((alone - outputs["layer"][0]).abs().max()), high=1e-6),
        Check("BatchNorm: largest change by companions", change["batch"], low=0.3),
        Check("BatchNorm: mean 0, variance 1 of each channel", _moments(normal["batch"], (0, 2, 3)), high=1e-3),
        Check("LayerNorm: mean 0, variance 1 of each sample", _moments(normal["layer"], (1, 2, 3)), high=1e-3),
        Check("BatchNorm refuses one value a channel (ValueError)", _refuses_one_value(), 1, 1),
    ]
    numbers = {"change_by_companions": change}

    def paint(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        from ._style import FAINT, INK, PLAIN, RESIDUAL

        axes = figure.subplots(1, 3, width_ratios=(0.8, 0.8, 1.4))
        for ax, kind, colour, title in (
            (axes[0], "batch", PLAIN, "BatchNorm"),
            (axes[1], "layer", RESIDUAL, "LayerNorm"),
        ):
            for n in range(6):
                for c in range(6):
                    shared = c == 2 if kind == "batch" else n == 2
                    ax.add_patch(Rectangle((c, n), 1, 1, facecolor=colour if shared else FAINT, edgecolor="white", linewidth=2))
            ax.set(xlim=(0, 6), ylim=(6, 0), xticks=[], yticks=[], aspect="equal", xlabel="channels", ylabel="samples")
            ax.set_title(f"{title}:\nshare mean and variance")
            for side in ax.spines.values():
                side.set_visible(False)
        ax, place = axes[2], (3, 4, 4)
        for kind, colour in (("batch", PLAIN), ("layer", RESIDUAL)):
            values = outputs[kind][:, place[0], place[1], place[2]].tolist()
            ax.plot(range(1, len(values) + 1), values, "o-", color=colour, label=f"{kind.capitalize()}Norm", linewidth=1)
        ax.set(xlabel="batch (the same picture with other companions)", ylabel="its output at one place")
        ax.set_title("one picture in many batches")
        ax.tick_params(colors=INK)
        ax.legend()

    return Result(TITLE, numbers, checks, paint, (12, 4.0))
