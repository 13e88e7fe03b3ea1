"""The CUDA backend of the gates: cases through the launchers that ship, kernels by their mangled names."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import _cuda_launch as launchers
import torch

from .. import Module, Report, compile_cuda
from . import limits
from .workload import Case, Results

NAME = "cuda"
# These files of conv_bn_act hold no kernel, and without CUTLASS' headers the op has none at all.
NO_KERNEL = ("conv_bn_act_fwd", "conv_bn_act_tail")
SOURCES = [s for s in launchers.SOURCES if s.parent.name != "conv_bn_act" or (launchers.cutlass() and s.stem not in NO_KERNEL)]
WORKLOADS = [path.stem.removeprefix("workload_") for path in sorted(Path(__file__).parent.glob("workload_*.py"))]


def op_of_source(source: Path) -> str:
    """Whose cases reach a file's kernels: its folder's op, or the workload that its own name begins with (the longest)."""
    return max((op for op in WORKLOADS if f"{source.stem}_".startswith(f"{op}_")), key=len, default=source.parent.name)


OPS = tuple(dict.fromkeys(map(op_of_source, SOURCES)))
# What a mangled name says of the type of the tensors; kernels that name none of them serve fp32, among others.
TYPES = {
    "If": torch.float32, "I6__half": torch.float16, "I13__nv_bfloat16": torch.bfloat16, "Id": torch.float64,
    "Float32Rule": torch.float32, "Float64Rule": torch.float64, "Float16Rule": torch.float16, "Im": torch.float64,
}  # fmt: skip
NAMES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}


def run(case: Case, **options: int) -> tuple[Results, list[Report]]:
    """Results and one report per kernel; raises AssertionError on findings."""
    with launchers.small_grids() if case.few_blocks else nullcontext():
        return limits.ops()[case.op].cuda(case, options)


def chosen(case: Case) -> bool:
    """Whether this backend runs a case at all."""
    return getattr(limits.ops()[case.op], "cuda_runs", lambda case: True)(case)


ptx_of = launchers.ptx_of


@functools.cache
def instantiations() -> dict[str, Path]:
    """Mangled names of all kernels, and their files."""
    return {name: source for source in SOURCES for name in Module(ptx_of(source)).kernels}


def stem(kernel: str) -> str:
    """The function's own name in a mangled kernel name (of namespace dl4ds or one within it)."""
    rest = kernel.removeprefix("_ZN5dl4ds")
    while True:
        length, tail = re.match(r"(\d+)(.*)", rest).groups()
        name, rest = tail[: int(length)], tail[int(length) :]
        if not rest[:1].isdigit():
            return name


def short(kernel: str) -> str:
    """The name with its template arguments, for people: `add_act_fwd_kernel<half, 8>`."""
    width = re.search(r"Li(\d+)E", kernel)
    return f"{stem(kernel)}<{NAMES[dtype_of(kernel)]}{f', {width.group(1)}' if width else ''}>"


def dtype_of(kernel: str) -> torch.dtype:
    """The element type in a mangled kernel name (finalize kernels name their accumulator, NMS kernels their rule or key)."""
    return next((dtype for mark, dtype in TYPES.items() if mark in kernel), torch.float32)


def is_vector(kernel: str) -> bool:
    """Instantiations for 16-byte accesses carry their width as a template argument; NMS kernels have one form each."""
    return "Li4E" in kernel or "Li8E" in kernel or "Li1E" not in kernel


@functools.lru_cache(maxsize=2)
def _parsed(ptx: str) -> Module:
    return Module(ptx)


@contextmanager
def replacing(kernel: str, ptx: str) -> Iterator[None]:
    """Inside, launches of this kernel run another PTX of the same name."""
    with _parsed(ptx).replacing(kernel):
        yield


def entry(kernel: str) -> str:
    """The kernel's name in its PTX."""
    return kernel


def ptx_of_kernel(kernel: str) -> str:
    """The module that holds a kernel."""
    return ptx_of(instantiations()[kernel])


def op_of(kernel: str) -> str:
    """The op that a kernel belongs to."""
    return op_of_source(instantiations()[kernel])


def dtypes_of(kernel: str) -> tuple[torch.dtype, ...]:
    """The element type of the tensors with which it is examined (others may reach the same code too)."""
    return (dtype_of(kernel),)


@functools.cache
def _listings(source: Path, arch: str) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    from . import machine

    path, messages = compile_cuda(source, "cubin", arch, [launchers.CSRC], launchers.FLAGS)
    return machine.ptxas_facts(messages), machine.disassembled(path)


def machine_code(arch: str, only: Path | None = None) -> Iterator[tuple[str, str, torch.dtype, dict[str, int], str]]:
    """(kernel, name for people, dtype, resources, SASS) of every kernel, of one file or of all."""
    for source in [only] if only else SOURCES:
        facts, listings = _listings(source, arch)
        assert set(facts) == set(listings), "ptxas and the disassembler know different kernels"
        for kernel, resources in facts.items():
            yield kernel, short(kernel), dtype_of(kernel), resources, listings[kernel]
