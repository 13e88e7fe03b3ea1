"""Counts of the kernels that convolve, in fp16, for bench/roofline.py: forward, input's gradient, end of a bottleneck block.

Each is one block of a 1x1 convolution at two or three sizes. From these follow the counts of a block, of a step of the main
loop (32 input channels of one tap) and, of an end of a block, of a chunk (64 output channels of the second product).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _cuda_launch as launchers
import torch

from ptxsim.counts import ARCHITECTURES, RELU, assembled
from ptxsim.report import Report

FOLDER = launchers.CSRC / "ops" / "conv_bn_act"
FEW, MANY = 128, 256  # channels


def _counted(source: str, reports: list[Report]) -> tuple[dict[str, float], dict[str, Any]]:
    """Counts of the last launch, which must be one block, and what ptxas says of its kernel."""
    report = reports[-1]
    c = report.counters
    assert c["blocks"] == 1, f"{report.kernel}: {c['blocks']} blocks"
    facts = {}
    for arch in ARCHITECTURES:
        used = assembled(FOLDER / source, arch)[1][report.kernel]
        facts[arch] = {**used, "shared": report.shared or used["shared"], "threads": report.block[0]}
    moved = 32 * (c["load_sectors"] + c["store_sectors"])
    return {"ptx": c["warp_instructions"], "mma": c["mma"], "waves": c["shared_waves"], "moved": moved}, facts


def _by_tiles(source: str, run: Callable[[str, int, int, int], list[Report]]) -> list[dict[str, Any]]:
    """run(tile, its pixels, its outputs, channels) -> reports."""
    import _cuda_conv as conv

    found: list[dict[str, Any]] = []
    if launchers.cutlass() is None:
        return found
    steps = (MANY - FEW) // 32
    for tile, (pixels, outputs) in conv.TILES.items():
        (few, _), (many, facts) = (_counted(source, run(tile, pixels, outputs, channels)) for channels in (FEW, MANY))
        per_step = {name: (many[name] - few[name]) / steps for name in few}
        per_block = {name: few[name] - FEW // 32 * per_step[name] for name in few}
        found.append(
            {"tile": tile, "pixels": pixels, "outputs": outputs, "per_block": per_block, "per_step": per_step, "facts": facts}
        )
    return found


def _map(channels: int, pixels: int) -> torch.Tensor:
    return torch.randn(1, channels, 8, pixels // 8).half().contiguous(memory_format=torch.channels_last)


def convolutions() -> list[dict[str, Any]]:
    """Forward, with BatchNorm and relu."""
    import _cuda_conv as conv

    def run(tile: str, pixels: int, outputs: int, channels: int) -> list[Report]:
        vectors = (torch.rand(outputs) + 0.5 for _ in range(4))
        weight = torch.randn(outputs, channels, 1, 1).half()
        args = (_map(channels, pixels), weight, None, *vectors, None, [1, 1], [0, 0], [1, 1])
        return conv.conv_bn_act_fwd(*args, activation=RELU, tile=tile)[1]

    return _by_tiles("conv_bn_act_fwd_float16.cu", run)


def gradients() -> list[dict[str, Any]]:
    """The input's gradient with another one added, through relu by its bits, and the sums of the BatchNorm in front."""
    import _cuda_dgrad as back

    def run(tile: str, pixels: int, outputs: int, channels: int) -> list[Report]:
        y = _map(outputs, pixels)
        bn = {"y": y, **{name: torch.rand(outputs) + 0.5 for name in ("mean", "rstd", "weight", "bias")}}
        bits = torch.randint(0, 256, (y.numel() // 8,), dtype=torch.uint8)
        weight = torch.randn(channels, outputs, 1, 1).half()
        return back.conv_dgrad(
            _map(channels, pixels), weight, (8, pixels // 8), [0, 0], [1, 1], added=_map(outputs, pixels), added_mask=bits,
            added_activation=RELU, bn=bn, activation=RELU, tile=tile,
        )[2]  # fmt: skip

    return _by_tiles("conv_bn_act_dgrad_float16.cu", run)


def tails() -> list[dict[str, Any]]:
    """The end of a bottleneck block, with a residual: one entry, or none without CUTLASS' headers."""
    import _cuda_tail as tail

    if launchers.cutlass() is None:
        return []

    def run(channels: int, outputs: int) -> tuple[dict[str, float], dict[str, Any]]:
        layers = [tail.random_layer(c, k, 1, torch.float16, RELU) for c, k in ((channels, 64), (64, outputs))]
        every = ([1, 1], [0, 0], [1, 1])
        reports = tail.conv_bn_act_tail(_map(channels, 64), *layers, _map(outputs, 64), *every)[1]
        return _counted("conv_bn_act_tail_float16.cu", reports)

    (few, _), (deep, _), (wide, facts) = run(FEW, 128), run(MANY, 128), run(FEW, 256)
    per_step = {name: (deep[name] - few[name]) / ((MANY - FEW) // 32) for name in few}
    per_chunk = {name: (wide[name] - few[name]) / 2 for name in few}
    per_block = {name: few[name] - FEW // 32 * per_step[name] - 2 * per_chunk[name] for name in few}
    return [{"per_block": per_block, "per_step": per_step, "per_chunk": per_chunk, "facts": facts}]
