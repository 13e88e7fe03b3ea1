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
from .limits import ELSEWHERE
from .workload import Case, Results

NAME = "cuda"
SOURCES = [source for source in launchers.SOURCES if source.parent.name not in ELSEWHERE]
OPS = tuple(dict.fromkeys(source.parent.name for source in SOURCES))
TYPES = {"If": torch.float32, "I6__half": torch.float16, "I13__nv_bfloat16": torch.bfloat16, "Id": torch.float64}


def run(case: Case, **options: int) -> tuple[Results, list[Report]]:
    """Results and one report per kernel; raises AssertionError on findings."""
    arguments = {name: value for name, value in case.arguments.items()}
    with launchers.small_grids() if case.few_blocks else nullcontext():
        if case.op == "add_act":
            names = ("x", "residual", "alpha", "activation")
            if case.way == "fwd":
                out, mask, reports = launchers.add_act_fwd(
                    *(arguments[n] for n in names), 0.1, arguments["save_mask"], **options
                )
                return {"out": out} | ({} if mask is None else {"mask": mask}), reports
            dx, reports = launchers.add_act_bwd(
                arguments["dout"], arguments["mask"], *(arguments[n] for n in names), 0.1, **options
            )
            return {"dx": dx}, reports
        return getattr(launchers, f"{case.op}_{case.way}")(**arguments, options=options)


def chosen(case: Case) -> bool:
    """Whether this backend runs a case at all."""
    return True


@functools.cache
def ptx_of(source: Path) -> str:
    """PTX of a project file, as the host library embeds it."""
    return compile_cuda(source, "ptx", includes=[launchers.CSRC], flags=launchers.FLAGS)[0].read_text()


@functools.cache
def instantiations() -> dict[str, Path]:
    """Mangled names of all kernels, and their files."""
    return {name: source for source in SOURCES for name in Module(ptx_of(source)).kernels}


def stem(kernel: str) -> str:
    """The function's own name in a mangled kernel name."""
    length, rest = re.match(r"_ZN5dl4ds(\d+)(.*)", kernel).groups()
    return rest[: int(length)]


def short(kernel: str) -> str:
    """The name with its template arguments, for people: `add_act_fwd_kernel<half, 8>`."""
    names = {"If": "float", "I6__half": "half", "I13__nv_bfloat16": "bfloat16", "Id": "double"}
    mark = next(m for m in names if m in kernel)
    width = re.search(r"Li(\d+)E", kernel)
    return f"{stem(kernel)}<{names[mark]}{f', {width.group(1)}' if width else ''}>"


def dtype_of(kernel: str) -> torch.dtype:
    """The element type in a mangled kernel name (finalize kernels name their accumulator)."""
    return next(dtype for mark, dtype in TYPES.items() if mark in kernel)


def is_vector(kernel: str) -> bool:
    """Instantiations for 16-byte accesses carry their width as a template argument."""
    return "Li4E" in kernel or "Li8E" in kernel


@contextmanager
def replacing(kernel: str, ptx: str) -> Iterator[None]:
    """Inside, launches of this kernel run another PTX of the same name."""
    with Module(ptx).replacing(kernel):
        yield


def entry(kernel: str) -> str:
    """The kernel's name in its PTX."""
    return kernel


def ptx_of_kernel(kernel: str) -> str:
    """The module that holds a kernel."""
    return ptx_of(instantiations()[kernel])


def op_of(kernel: str) -> str:
    """The op that a kernel belongs to."""
    return instantiations()[kernel].parent.name


def dtypes_of(kernel: str) -> tuple[torch.dtype, ...]:
    """The element types of the tensors that reach it."""
    if "finalize" in kernel and dtype_of(kernel) == torch.float32:
        return (torch.float32,)  # (half and bfloat16 reach it too: the same code and types)
    return (dtype_of(kernel),)


def cubin(source: Path, arch: str) -> tuple[Path, str]:
    """The compiled file and what ptxas said."""
    return compile_cuda(source, "cubin", arch, [launchers.CSRC], launchers.FLAGS)
