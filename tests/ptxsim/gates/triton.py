"""The Triton backend of the gates: cases through the shipped host functions, their launches compiled and simulated.

Needs a process in which Triton compiles (TRITON_INTERPRET=0). A kernel is named `<function>#<hash of its PTX>`: one function
is compiled once for every combination of dtypes, constants and divisible sizes that the host functions ask for.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import _triton_offline as offline
import torch
from torch import Tensor

from dl4ds_kernels._triton import _bn_reduce, _common

from .. import Arr, Module, Report
from . import limits, machine, workload
from .workload import Case, Results

NAME = "triton"
OPS = tuple(op for op, module in limits.ops().items() if hasattr(module, "triton"))
CAPABILITY = 80

_seen: dict[str, tuple[str, str, str, torch.dtype]] = {}  # kernel -> PTX, name in it, op, dtype
_replaced: dict[str, Module] = {}


def chosen(case: Case) -> bool:
    """Whether this backend runs a case at all."""
    return getattr(limits.ops()[case.op], "triton_runs", lambda case: True)(case)


def capabilities(op: str) -> tuple[int, ...]:
    """Architectures for which an op's kernels are compiled to be run."""
    return getattr(limits.ops()[op], "CAPABILITIES", (CAPABILITY,))


@functools.cache
def _module(ptx: str) -> Module:
    return Module(ptx)


def _argument(kernel: str, name: str, value: Any, given: dict[str, Any]) -> Any:
    """Tensors are read-only or results that must be written completely, unless the op's entry says that parts may change."""
    if not isinstance(value, Tensor):
        return value
    if not value.numel():
        return 0
    limits.limits_of(NAME, kernel)  # or says what to do
    module, bytes_ = limits.module_of(kernel), offline.memory(value)
    places = [t.data_ptr() for t in given.values() if isinstance(t, Tensor)]
    in_place = places.count(value.data_ptr()) > 1
    if in_place or getattr(module, "changed", lambda *_: False)(kernel, name, given):
        return Arr(bytes_, name)
    written = name in module.WRITTEN.get(kernel, ())
    return Arr(bytes_, name, read_only=not written, output=written)


def _simulated(case: Case, reports: list[Report], capability: int, options: dict[str, int]) -> Callable[..., None]:
    delta = options.pop("grid_delta", 0)

    def launch(kernel: Any, programs: int, **given: Any) -> None:
        compiled = offline.compile_launch(kernel, programs, given, capability)
        metadata, ptx = compiled.code.metadata, compiled.ptx
        name = f"{compiled.name}#{hashlib.sha256(ptx.encode()).hexdigest()[:8]}"
        _seen.setdefault(name, (ptx, metadata.name, case.op, case.dtype))
        arguments = [_argument(compiled.name, n, value, given) for n, value in compiled.arguments]
        module, grid = _replaced.get(name) or _module(ptx), programs + (delta if name in _replaced else 0)
        assert grid > 0, "an empty grid"
        report = module.launch(metadata.name, grid, 32 * metadata.num_warps, arguments, smem=metadata.shared, **options)
        report.kernel = name
        reports.append(report.check())

    return launch


@contextmanager
def _launching(launch: Callable[..., None]) -> Iterator[None]:
    before, _common.launch = _common.launch, launch
    try:
        yield
    finally:
        _common.launch = before


@contextmanager
def small_grids(warps: int) -> Iterator[None]:
    """Inside, launches are made for a device that so many warps fill: programs make several steps, as of a large tensor."""
    before = _common.WARPS, _bn_reduce.WARPS
    _common.WARPS = _bn_reduce.WARPS = warps
    try:
        yield
    finally:
        _common.WARPS, _bn_reduce.WARPS = before


def run(case: Case, capability: int = CAPABILITY, **options: int) -> tuple[Results, list[Report]]:
    """Results and one report per kernel; raises AssertionError on findings."""
    reports: list[Report] = []
    # 64 warps are to an even case what the GPU is to a layer of 100 million elements.
    grids = small_grids(64 if case.even else 4) if case.few_blocks else nullcontext()
    with grids, _launching(_simulated(case, reports, capability, dict(options))):
        results = limits.ops()[case.op].triton(case)
    return {name: t for name, t in results.items() if isinstance(t, Tensor) and t.numel()}, reports


def stem(kernel: str) -> str:
    """The function's name."""
    return kernel.partition("#")[0]


def short(kernel: str) -> str:
    """For people: the function, and the dtype of the first call that launched this form of it."""
    return f"{stem(kernel)}<{str(_seen[kernel][3]).removeprefix('torch.')}>"


def entry(kernel: str) -> str:
    """The kernel's name in its PTX."""
    return _seen[kernel][1]


def ptx_of_kernel(kernel: str) -> str:
    """Its PTX."""
    return _seen[kernel][0]


def op_of(kernel: str) -> str:
    """The op whose host function launches it."""
    return _seen[kernel][2]


def dtypes_of(kernel: str) -> tuple[torch.dtype, ...]:
    """The dtype of the first call that launched it."""
    return (_seen[kernel][3],)


def is_vector(kernel: str) -> bool:
    """Every kernel moves whole vectors where sizes allow."""
    return True


@functools.lru_cache(maxsize=2)
def _parsed(ptx: str) -> Module:
    return Module(ptx)


@contextmanager
def replacing(kernel: str, ptx: str) -> Iterator[None]:
    """Inside, launches of this kernel run another PTX."""
    _replaced[kernel] = _parsed(ptx)
    try:
        yield
    finally:
        _replaced.pop(kernel)


def seen() -> list[str]:
    """Every kernel that was launched so far."""
    return list(_seen)


@functools.cache
def _compiled(op: str, arch: str) -> list[tuple[str, torch.dtype, dict[str, int], str]]:
    """(function, dtype, resources, SASS) of every launch of the even cases, whose sizes divide as in real networks."""
    found: dict[str, tuple[str, torch.dtype, dict[str, int], str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in workload.DTYPES[:3]:
            for case in workload.cases(op, dtype):
                if not case.even or not chosen(case):
                    continue

                def launch(kernel: Any, programs: int, dtype: torch.dtype = dtype, **given: Any) -> None:
                    compiled = offline.compile_launch(kernel, programs, given, int(arch))
                    key = hashlib.sha256(compiled.code.asm["cubin"]).hexdigest()
                    if key not in found:
                        used = compiled.resources(Path(folder))
                        facts = {"registers": used["REG"], "stack": used["STACK"] + used["LOCAL"]}
                        facts |= {"spill_stores": used["LOCAL"], "spill_loads": used["LOCAL"]}
                        (sass,) = machine.disassembled(Path(folder) / "kernel.cubin").values()
                        found[key] = (compiled.name, dtype, facts, sass)

                with _launching(launch):
                    limits.ops()[op].triton(case)
    return list(found.values())


def machine_code(arch: str, only: str | None = None) -> Iterator[tuple[str, str, torch.dtype, dict[str, int], str]]:
    """(kernel, name for people, dtype, resources, SASS) of every kernel, of one op or of all."""
    for op in [only] if only else OPS:
        for function, dtype, facts, sass in _compiled(op, arch):
            yield function, f"{function}<{str(dtype).removeprefix('torch.')}>", dtype, facts, sass
