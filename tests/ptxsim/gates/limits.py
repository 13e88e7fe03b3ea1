"""The limits of every kernel that ships: one entry each. A new kernel joins with an entry here and a workload_<op>.py.

Traffic limits hold for the `even` cases of 16-byte instantiations: vectors of C values and tails weigh little there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
# Ops whose kernels work on sorted boxes, not on rows of a tensor: their limits stand in a test of their own.
ELSEWHERE = {"nms": "tests/ops/test_nms_cuda_cost.py"}


@dataclass(frozen=True)
class Limits:
    """Of one kernel.

    tensors: the large ones it may touch, each byte at most once (the unique-byte ceiling is their size). small: most distinct
    bytes of everything else, by theirs. load, store: least share of moved sectors that the requests needed. waves: most
    shared-memory waves per ideal wave. again: most sectors moved per distinct sector. instructions: most warp instructions per
    512 distinct bytes (an A100 issues about 150 in the time it moves them). registers: of a thread, on every architecture.
    wide_loads, wide_stores: 128-bit accesses in the main loops (SASS). mma: tensor-core instructions. note: for the table.
    """

    backend: str
    op: str
    tensors: tuple[str, ...] = ()
    small: float = 0.05
    load: float = 0.95
    store: float = 0.99
    waves: float = 1.0
    again: float = 1.1
    instructions: float = 150
    registers: int = 64
    wide_loads: bool = True
    wide_stores: bool = True
    mma: bool = False
    note: str = ""


def _merge(backend: str, op: str, **more: object) -> Limits:
    """Kernels over partial results: a few values a channel, nothing to load 16 bytes at a time."""
    free = {"small": float("inf"), "again": 4.0, "instructions": float("inf"), "store": 0.5}
    return Limits(backend, op, **{**free, "wide_loads": False, "wide_stores": False, **more})


_FORWARD, _ADD = ("x", "residual", "out", "mask"), ("dout", "mask", "x", "residual", "dx")
_SUMS, _GRADIENT = ("dout", "x", "residual", "mask"), ("dout", "x", "residual", "mask", "dx", "dresidual")
_CACHED = "per-channel vectors are read again for every vector of x, from the L1 cache"
LIMITS: dict[str, Limits] = {
    "add_act_fwd_kernel": Limits("cuda", "add_act", _FORWARD, small=0.01, instructions=90),
    "add_act_bwd_kernel": Limits("cuda", "add_act", _ADD, small=0.01, instructions=70),
    "bn_act_stats_kernel_nhwc": Limits(
        "cuda", "bn_act", ("x",), waves=2.0, instructions=155, wide_stores=False,
        note="at five rows a thread; bf16 costs two instructions more a value than fp16",
    ),
    "bn_act_stats_kernel_nchw": Limits(
        "cuda", "bn_act", ("x",), again=1.3, load=0.9, instructions=235, wide_stores=False,
        note="two windows a thread, then a merge over the block: half of the count, less in longer planes",
    ),
    "bn_act_finalize_kernel": _merge("cuda", "bn_act"),
    "bn_act_fwd_kernel_nhwc": Limits("cuda", "bn_act", _FORWARD, instructions=95),
    "bn_act_fwd_kernel_nchw": Limits("cuda", "bn_act", _FORWARD, instructions=110),
    "bn_act_bwd_reduce_kernel_nhwc": Limits("cuda", "bn_act", _SUMS, waves=1.6, instructions=130, wide_stores=False),
    "bn_act_bwd_reduce_kernel_nchw": Limits(
        "cuda", "bn_act", _SUMS, again=1.15, instructions=190, wide_stores=False, note="as the statistics in NCHW",
    ),
    "bn_act_bwd_finalize_kernel": _merge("cuda", "bn_act"),
    "bn_act_bwd_kernel_nhwc": Limits("cuda", "bn_act", _GRADIENT, again=1.5, instructions=85, note=_CACHED),
    "bn_act_bwd_kernel_nchw": Limits("cuda", "bn_act", _GRADIENT, instructions=105),
    "add_act_kernel": Limits("triton", "add_act", _FORWARD, small=0.01, store=0.94, instructions=90, registers=72),
    "bn_stats_partial_kernel": Limits("triton", "bn_act", ("x",), small=0.1, waves=1.1, instructions=250, registers=128),
    "bn_stats_merge_kernel": _merge("triton", "bn_act", registers=255),
    "bn_fold_kernel": _merge("triton", "bn_act", registers=255),
    "bn_apply_kernel": Limits("triton", "bn_act", _FORWARD, load=0.75, again=1.6, instructions=75, registers=72, note=_CACHED),
    "bn_bwd_partial_kernel": Limits("triton", "bn_act", _SUMS, load=0.9, again=1.3, instructions=110, registers=128),
    "bn_bwd_merge_kernel": _merge("triton", "bn_act", registers=255),
    "bn_bwd_apply_kernel": Limits(
        "triton", "bn_act", _GRADIENT, load=0.7, again=1.7, instructions=75, registers=72, note=_CACHED,
    ),
    "conv_bn_act_kernel": Limits(
        "triton", "conv_bn_act", ("x", "residual", "out"), small=7.0, load=0.33, waves=2.0, again=8.0, instructions=1500,
        registers=255, mma=True, note="bound by arithmetic: x is read once a tap and tile, weights once a tile of pixels",
    ),
}  # fmt: skip
# Triton functions with the name of a CUDA kernel.
TRITON_NAMES = {"add_act_bwd_kernel": Limits("triton", "add_act", _ADD, small=0.01, load=0.94, instructions=80, registers=72)}


def limits_of(backend: str, kernel: str) -> Limits:
    """The entry of a kernel; LookupError with what to do if there is none."""
    found = TRITON_NAMES.get(kernel) if backend == "triton" and kernel in TRITON_NAMES else LIMITS.get(kernel)
    if found is None or found.backend != backend:
        raise LookupError(f"{kernel} ({backend}) has no limits: add an entry to {Path(__file__).relative_to(REPOSITORY)}")
    return found


def shipped_kernels() -> list[tuple[str, str, str]]:
    """(backend, kernel, file) of every __global__ function in csrc and every @triton.jit function called *_kernel."""
    found = []
    for path in sorted([*REPOSITORY.glob("csrc/**/*.cuh"), *REPOSITORY.glob("csrc/**/*.cu")]):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*(?:\([^)]*\)[^)]*)*\)\s*)?(\w+)\s*\(", text)
        if path.parent.name not in ELSEWHERE:
            found += [("cuda", name, str(path.relative_to(REPOSITORY))) for name in names]
    for path in sorted(REPOSITORY.glob("dl4ds_kernels/_triton/*.py")):
        names = re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", path.read_text())
        if path.stem not in ELSEWHERE:
            found += [("triton", name, str(path.relative_to(REPOSITORY))) for name in names]
    return found
