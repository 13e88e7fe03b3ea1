"""What the kernels cost at sizes of a real network: counts of small simulated launches, fitted and carried over.

Every launch is simulated at two sizes. Its counts are `per_warp * warps + per_vector * vectors` (vectors: 16 bytes a lane, one
warp), exactly so for these kernels, whose main loops do the same for each vector. sites.py has what real sizes need.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import _cuda_launch as launchers
import _cuda_pair as pair
import torch

from ptxsim import Report, build, sass, toolchain
from ptxsim.gates.machine import ptxas_facts

ARCHITECTURES = ("80", "90")
CHANNELS = 64
STREAMS = ("x", "residual", "out", "mask", "dout", "dx", "dresidual")  # tensors; all else is per channel or partial
RELU, NONE = 1, 0


def source_of(kernel: str) -> Path:
    """The .cu file of a kernel of bn_act or add_act."""
    folder = "add_act" if "add_act" in kernel else "bn_act"
    op, way = folder, "bwd" if "_bwd_" in kernel else "fwd"
    if "bn_act_pair" in kernel:
        op, way = "bn_act_pair", "sums" if "reduce" in kernel else way
    return launchers.CSRC / "ops" / folder / f"{op}_{way}.cu"


ptx_of = launchers.ptx_of


@functools.cache
def assembled(source: Path, arch: str) -> tuple[Path, dict[str, dict[str, int]]]:
    """The cubin that ptxas makes of the simulated PTX for an architecture; per kernel registers, shared bytes and spills."""
    text = ptx_of(source)
    tool = toolchain.cuda_tool("ptxas")
    assert tool is not None, "no ptxas beside nvcc"

    def make(folder: Path) -> None:
        ptx, options = folder / "code.ptx", ("--generate-line-info", "-O3", "-v")
        ptx.write_text(text)
        command = [tool, f"-arch=sm_{arch}", *options, str(ptx), "-o", str(folder / "code.cubin")]
        (folder / "messages.txt").write_text(build.run(command))

    key = build.digest(text, arch, toolchain.compiler_version(toolchain.nvcc()))
    folder = build.cached("roofline", key, ["code.cubin", "messages.txt"], make)
    return folder / "code.cubin", ptxas_facts((folder / "messages.txt").read_text())


# ------------------------------------------------------------------------------------------------- small launches, two sizes


def _vectors(channels: int) -> list[torch.Tensor]:
    return [torch.rand(channels) + 0.5 for _ in range(4)]


def _laid_out(lines: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """nhwc: (1, 64, lines, 1); nchw: (lines, 2, 32, 32)."""
    if layout == "nhwc":
        return torch.randn(1, CHANNELS, lines, 1).to(dtype).contiguous(memory_format=torch.channels_last)
    return torch.randn(lines, 2, 32, 32).to(dtype)


def _sizes(dtype: torch.dtype, layout: str, part: str) -> tuple[int, int]:
    """Lines of two tensors: 5 and 9 whole steps of one block's reduction; 8 and 16 of two blocks' elementwise loop."""
    width = 16 // dtype.itemsize
    if layout == "nhwc":
        lines = 256 // (CHANNELS // width)  # that a block takes in a step
        return (5 * lines, 9 * lines) if part == "reduce" else (16 * lines, 32 * lines)
    planes = 256 * width // 1024  # of one channel
    return (5 * planes, 9 * planes) if part == "reduce" else (8 * planes, 16 * planes)


def bn_act(way: str, dtype: torch.dtype, layout: str, lines: int) -> list[Report]:
    """Forward and backward of a site: plain, residual (with a mask), or linear (the downsampling branch)."""
    x, dout, residual = (_laid_out(lines, dtype, layout) for _ in range(3))
    vectors, code = _vectors(x.shape[1]), NONE if way == "linear" else RELU
    added = residual if way == "residual" else None
    mask = torch.zeros(x.numel() // 8, dtype=torch.uint8) if added is not None else None
    forward = launchers.bn_act_fwd(x, *vectors, added, code, save_mask=mask is not None)[1]
    needs = ("dx", "dweight", "dbias") + (("dresidual",) if mask is not None else ())
    return forward + launchers.bn_act_bwd(dout, x, *vectors, None, mask, code, needs=needs)[1]


def bn_eval(way: str, dtype: torch.dtype, layout: str, lines: int) -> list[Report]:
    """Inference."""
    x, residual = (_laid_out(lines, dtype, layout) for _ in range(2))
    added = residual if way == "residual" else None
    return launchers.bn_act_fwd(x, *_vectors(x.shape[1]), added, NONE if way == "linear" else RELU, training=False)[1]


def add_act(way: str, dtype: torch.dtype, layout: str, lines: int) -> list[Report]:
    """add_act forward and backward with its mask."""
    x, residual, dout = (_laid_out(lines, dtype, layout) for _ in range(3))
    mask = torch.zeros(x.numel() // 8, dtype=torch.uint8)
    forward = launchers.add_act_fwd(x, residual, 1.0, RELU, 0.1, True)[2]
    return forward + launchers.add_act_bwd(dout, mask, None, None, 1.0, RELU, 0.1)[1]


def bn_act_pair(way: str, dtype: torch.dtype, layout: str, lines: int) -> list[Report]:
    """The end of a block with a projection, forward and backward with its mask."""
    x, residual, dout = (_laid_out(lines, dtype, layout) for _ in range(3))
    weight, bias, mean, rstd = _vectors(x.shape[1])
    norm = pair.Norm(mean, rstd, weight, bias, dweight=bias)
    results, forward = pair.pair_fwd(x, residual, norm, norm, RELU, save_mask=True)
    maps = dout, results["mask"], x, residual, norm, norm
    return forward + pair.pair_sums(*maps, RELU)[1] + pair.pair_bwd(*maps, bias, RELU)[1]


# name -> (call, ways)
CALLS: dict[str, tuple[Callable[..., list[Report]], tuple[str, ...]]] = {
    "train": (bn_act, ("plain", "residual", "linear")),
    "eval": (bn_eval, ("plain", "residual", "linear")),
    "add_act": (add_act, ("residual",)),
    "pair": (bn_act_pair, ("linear",)),  # sites: those of the projection's BatchNorm
}


def _measured(report: Report, elements: int, dtype: torch.dtype) -> dict[str, Any]:
    ptx, source = ptx_of(source_of(report.kernel)), source_of(report.kernel)
    found = {arch: sass.dynamic(assembled(source, arch)[0], ptx, report) for arch in ARCHITECTURES}
    counters = report.counters
    streams = {n: t["read"] + t["written"] for n, t in report.tensors.items() if n in STREAMS and t["read"] + t["written"]}
    return {
        "warps": report.grid[0] * report.block[0] // 32, "vectors": elements * dtype.itemsize / 512,
        "ptx": counters["warp_instructions"], "moved": 32 * (counters["load_sectors"] + counters["store_sectors"]),
        "waves": counters["shared_waves"], "streams": streams, "reads": sum(report.tensors[n]["read"] > 0 for n in streams),
        **{f"sass{arch}": d.instructions for arch, d in found.items()}, **{f"wide{arch}": d.wide for arch, d in found.items()},
        "wide": found["80"].counted, "flight": {arch: d.flight for arch, d in found.items()},
    }  # fmt: skip


def _stem(kernel: str) -> str:
    return re.search(r"((?:bn|add)_act_\w*kernel(?:_n\w\w\w)?)I", kernel).group(1)


def fit(small: dict[str, Any], large: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Counts as per_warp and per_vector, from two launches; ValueError if they cannot be told apart or are negative."""
    w0, v0, w1, v1 = small["warps"], small["vectors"], large["warps"], large["vectors"]
    determinant = w0 * v1 - w1 * v0
    if abs(determinant) < 1e-9 * max(w0 * v1, 1):
        raise ValueError(f"two launches of the same proportions: {w0}, {v0} and {w1}, {v1}")
    found = {}
    for name in ("ptx", "moved", "waves", "wide", *(f"{kind}{arch}" for kind in ("sass", "wide") for arch in ARCHITECTURES)):
        a, b = small[name], large[name]
        found[name] = {"per_warp": (a * v1 - b * v0) / determinant, "per_vector": (w0 * b - w1 * a) / determinant}
        if found[name]["per_vector"] < 0:
            raise ValueError(f"{name}: {found[name]}: fewer for more")
    return found


def kernels(dtypes: tuple[torch.dtype, ...], layouts: tuple[str, ...], names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """One row for each kernel, dtype and kind of call: fitted counts, registers, shared memory, loads in flight."""
    for name, layout, dtype in ((n, la, d) for n in names for la in layouts for d in dtypes):
        call, ways = CALLS[name]
        if name == "add_act" and layout != layouts[0]:
            continue
        for way in ways:
            rows: dict[str, list[dict[str, Any]]] = {}
            for part in ("reduce", "elements") if name in ("train", "pair") else ("elements",):
                for lines in _sizes(dtype, layout, part):
                    with nullcontext() if part == "reduce" else launchers.small_grids():
                        reports = call(way, dtype, layout, lines)
                    elements = _laid_out(lines, dtype, layout).numel()
                    for report in reports:
                        reduces = "stats" in report.kernel or "reduce" in report.kernel
                        merges = "finalize" in report.kernel or "table" in report.kernel
                        if not merges and reduces == (part == "reduce"):
                            rows.setdefault(report.kernel, []).append(_measured(report, elements, dtype))
            for kernel, (small, large) in rows.items():
                facts = {arch: assembled(source_of(kernel), arch)[1][kernel] for arch in ARCHITECTURES}
                yield {
                    "kernel": _stem(kernel), "call": name, "way": way, "layout": layout,
                    "dtype": str(dtype).removeprefix("torch."), "counts": fit(small, large), "facts": facts,
                    "flight": large["flight"], "reads": large["reads"],
                    "stream_bytes_per_vector": sum(large["streams"].values()) / large["vectors"],
                    "stream_read_share": _read_share(large),
                }  # fmt: skip


def _read_share(row: dict[str, Any]) -> float:
    written = sum(size for name, size in row["streams"].items() if name in ("out", "dx", "dresidual"))
    return 1 - written / sum(row["streams"].values())
