"""The limits of every kernel that ships, one `Limits` each: the list LIMITS of the kernel's workload_<op>.py.

Traffic limits hold for the `even` cases of 16-byte instantiations: vectors of C values and tails weigh little there.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Limits:
    """Of one kernel: the name of its function in the sources, and its backend ("cuda" or "triton").

    tensors: the large ones it may touch, each byte at most once (the unique-byte ceiling is their size). small: most distinct
    bytes of everything else, by theirs. load, store: least share of moved sectors that the requests needed. waves: most
    shared-memory waves per ideal wave. again: most sectors moved per distinct sector. instructions: most warp instructions per
    512 distinct bytes (an A100 issues about 150 in the time it moves them). registers: of a thread, on every architecture.
    wide_loads, wide_stores: 128-bit accesses in the main loops (SASS). mma: tensor-core instructions for 16-bit types.
    note: for the table.
    """

    kernel: str
    backend: str
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


def small_work(kernel: str, backend: str, **more: object) -> Limits:
    """Limits of kernels over partial results or lists: a few values an item, nothing to load 16 bytes at a time."""
    free = {"small": float("inf"), "again": 4.0, "instructions": float("inf"), "store": 0.5}
    return Limits(kernel, backend, **{**free, "wide_loads": False, "wide_stores": False, **more})


@functools.cache
def ops() -> dict[str, ModuleType]:
    """op -> its module workload_<op>.py."""
    names = sorted(path.stem for path in HERE.glob("workload_*.py"))
    return {name.removeprefix("workload_"): importlib.import_module(f"{__package__}.{name}") for name in names}


@functools.cache
def all_limits() -> dict[tuple[str, str], Limits]:
    """(backend, kernel) -> its limits."""
    return {(found.backend, found.kernel): found for module in ops().values() for found in module.LIMITS}


def module_of(kernel: str) -> ModuleType:
    """The entry that a Triton kernel belongs to (host functions of other ops may launch it too)."""
    return next(m for m in ops().values() if any((f.backend, f.kernel) == ("triton", kernel) for f in m.LIMITS))


def limits_of(backend: str, kernel: str) -> Limits:
    """The entry of a kernel; LookupError with what to do if there is none."""
    found = all_limits().get((backend, kernel))
    if found is None:
        where = HERE.relative_to(REPOSITORY)
        raise LookupError(f"{kernel} ({backend}) has no gates: add Limits for it to LIMITS in {where}/workload_<op>.py")
    return found


@functools.cache
def large_tensors() -> frozenset[str]:
    """Names of the tensors that any kernel moves as a whole; the rest are per-channel vectors and partial results."""
    return frozenset(name for found in all_limits().values() for name in found.tensors)


def shipped_kernels() -> list[tuple[str, str, str]]:
    """(backend, kernel, file) of every __global__ function in csrc and every @triton.jit function called *_kernel."""
    found = []
    for path in sorted([*REPOSITORY.glob("csrc/**/*.cuh"), *REPOSITORY.glob("csrc/**/*.cu")]):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*(?:\([^)]*\)[^)]*)*\)\s*)?(\w+)\s*\(", text)
        found += [("cuda", name, str(path.relative_to(REPOSITORY))) for name in names]
    for path in sorted(REPOSITORY.glob("dl4ds_kernels/_triton/*.py")):
        names = re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", path.read_text())
        found += [("triton", name, str(path.relative_to(REPOSITORY))) for name in names]
    return found
