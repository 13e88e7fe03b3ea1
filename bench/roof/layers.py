"""Rows of the kernels that convolve: forward, the input's gradient, the end of a bottleneck block."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .model import CHIPS, Chip, block_end, convolution
from .sites import Layer


def _best(tiles: list[dict[str, Any]], *sizes: Any) -> tuple[dict[str, float], str]:
    """The tile that this model likes best."""
    tried = [(convolution(tile, *sizes), tile["tile"]) for tile in tiles]
    return min(tried, key=lambda pair: pair[0]["predicted_us"])


def convolutions(found: dict[str, Any], layers: dict[Layer, int]) -> list[dict[str, Any]]:
    """Every convolution that the fused kernel can serve, each with the tile that this model likes best."""
    table = []
    for (n, c, h, w, outputs, kernel, stride, residual), times in layers.items():
        if c % 8 or not found["convolutions"]:
            continue
        rows = n * (-(-h // stride)) * (-(-w // stride))
        for chip in CHIPS:
            sizes = (chip, rows, outputs, c, kernel**2, n * c * h * w, 2 if residual else 1, int(residual))
            figures, tile = _best(found["convolutions"], *sizes)
            table.append({
                "chip": chip.name, "layer": f"{c} to {outputs}, {kernel}x{kernel}/{stride} at {h}x{w}", "residual": residual,
                "times": times, "tile": tile, **figures,
            })  # fmt: skip
    return table


def gradients(found: dict[str, Any], layers: dict[Layer, int]) -> list[dict[str, Any]]:
    """The input's gradient of every stride-1 convolution behind a BatchNorm: with its sums, and what a shortcut adds.

    Beside gradient and argument (and what is added) move a bit an element for each mask and two floats a channel and tile.
    The filter is turned by a kernel of its own first.
    """
    table = []
    alike: Counter[Layer] = Counter()
    for layer, times in layers.items():
        alike[(*layer[:-1], False)] += times  # a residual behind the convolution is no matter of its gradient
    for (n, c, h, w, outputs, kernel, stride, _), times in alike.items():
        if c % 8 or stride != 1 or not found["gradients"]:
            continue
        added = kernel == 1 and outputs < c  # the first convolution of a block, which reads the block's input
        for chip in CHIPS:
            # The counted launch adds a map by its bits and makes the side of relu again from y. A block's input has bits for
            # that too; inside a block nothing is added.
            maps, again = (3 + 2 / 16, 1 / 16) if added else (2.0, -1 - 1 / 16)
            figures, tile = _best(found["gradients"], chip, n * h * w, c, outputs, kernel**2, n * outputs * h * w, maps, again)
            turned = chip.launch_us + chip.ramp_us + 4.0 * c * outputs * kernel**2 / chip.bytes_per_us
            figures["predicted_us"] += turned
            table.append({
                "chip": chip.name, "layer": f"{c} to {outputs}, {kernel}x{kernel} at {h}x{w}", "added": added, "times": times,
                "tile": tile, "turn_us": turned, **figures,
            })  # fmt: skip
    return table


def tails(found: dict[str, Any]) -> list[dict[str, Any]]:
    """ResNet-50's first stage, 3x3 to 64 channels and 1x1 to 256, for few images: one kernel beside two."""
    table: list[dict[str, Any]] = []
    if not found["tails"]:
        return table
    side, middle, columns = 56, 64, 256
    for images in (1, 2, 4, 8):
        rows = images * side * side
        for chip in CHIPS:
            parts = min((1, 2, 4), key=lambda p: _tail(found, chip, rows, p)["predicted_us"])
            first, _ = _best(found["convolutions"], chip, rows, middle, middle, 9, rows * middle, 1)
            second, _ = _best(found["convolutions"], chip, rows, columns, middle, 1, rows * middle, 2, 1)
            table.append({
                "chip": chip.name, "images": images, "parts": parts, **_tail(found, chip, rows, parts),
                "apart_us": first["predicted_us"] + second["predicted_us"],
            })  # fmt: skip
    return table


def _tail(found: dict[str, Any], chip: Chip, rows: int, parts: int) -> dict[str, float]:
    return block_end(found["tails"][0], chip, rows, 256, 64, 9, rows * 64, parts)
