"""The Triton backend of the gates: cases through the shipped host functions, their launches compiled and simulated.

Needs a process in which Triton compiles (TRITON_INTERPRET=0). A kernel is named `<function>#<hash of its PTX>`: one function
is compiled once for every combination of dtypes, constants and divisible sizes that the host functions ask for.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _triton_offline as offline
import torch
from torch import Tensor

from dl4ds_kernels._triton import _common, add_act, bn_act, conv_bn_act

from .. import Arr, Module, Report
from .workload import Case, Results

NAME = "triton"
OPS = ("add_act", "bn_act", "conv_bn_act")
CAPABILITY = 80
# Compiling takes far longer than running, so shapes and variants are a selection: every LAYOUT, tiling and activation is in it.
CHOSEN = {
    "add_act": ("act", "n1-", "n257", "even"),
    "bn_act": ("wide-", "slice-", "tail-", "matrix-n", "even"),
    "conv_bn_act": ("fwd",),
}

_seen: dict[str, tuple[str, str, str, torch.dtype]] = {}  # kernel -> PTX, name in it, op, dtype
_replaced: dict[str, Module] = {}


def chosen(case: Case) -> bool:
    """Whether this backend runs a case at all."""
    if case.name.endswith("-other") or "-single" in case.name and case.op == "bn_act" and "wide" not in case.name:
        return False
    if case.op == "add_act" and "-1325" in case.name:
        return False
    return any(f"-{part}" in case.name for part in CHOSEN[case.op] if part != "fwd") or case.op == "conv_bn_act"


@functools.cache
def _module(ptx: str) -> Module:
    return Module(ptx)


def _launcher(case: Case, reports: list[Report], capability: int, options: dict[str, int]) -> Any:
    delta = options.pop("grid_delta", 0)

    def launch(kernel: Any, programs: int, **given: Any) -> None:
        compiled = offline.compile_launch(kernel, programs, given, capability)
        metadata, ptx = compiled.code.metadata, compiled.ptx
        name = f"{compiled.name}#{hashlib.sha256(ptx.encode()).hexdigest()[:8]}"
        dtype = next(case.arguments[n].dtype for n in ("x", "dout") if case.arguments.get(n) is not None)
        _seen.setdefault(name, (ptx, metadata.name, case.op, dtype))
        arguments = [_argument(compiled.name, n, value, given) for n, value in compiled.arguments]
        module, grid = _replaced.get(name) or _module(ptx), programs + (delta if name in _replaced else 0)
        assert grid > 0, "an empty grid"
        report = module.launch(metadata.name, grid, 32 * metadata.num_warps, arguments, smem=metadata.shared, **options)
        report.kernel = name
        reports.append(report.check())

    return launch


def _argument(kernel: str, name: str, value: Any, given: dict[str, Any]) -> Any:
    if name in ("slope_x", "offset") and not given["TRAINING"] and isinstance(value, Tensor):
        return Arr(offline.memory(value), name, scratch=True)  # room that only the gradient of batch statistics uses
    if isinstance(value, Tensor) and value.numel():
        places = [t.data_ptr() for t in given.values() if isinstance(t, Tensor)]
        if places.count(value.data_ptr()) > 1:  # in place
            return Arr(offline.memory(value), name)
    return offline.as_argument(kernel, name, value)


def _add_act(case: Case, t: dict[str, Any]) -> Results:
    residual = t["residual"]
    if residual is None and t["x"] is not None:  # of another layout, so that torch adds: x + -0.0 is x
        residual = torch.full((1,), -0.0, dtype=t["x"].dtype).expand(t["x"].shape)
    if case.way == "fwd":
        out, mask = add_act.add_act(t["x"], residual, t["alpha"], t["activation"], 0.1, t["save_mask"])
        return {"out": out, "mask": mask}
    return {"dx": add_act.add_act_bwd(t["dout"], t["mask"], t["x"], residual, t["alpha"], t["activation"], 0.1)}


def _bn_act(case: Case, t: dict[str, Any]) -> Results:
    last = (t["eps"], t["eps_std"], t["activation"], t["negative_slope"])
    if case.way == "fwd":
        names = ("x", "weight", "bias", "running_mean", "running_var", "residual", "training", "momentum")
        results = bn_act.bn_act(*(t[n] for n in names), *last, t["save_mask"])
        found = dict(zip(("out", "mean", "rstd", "mask", "new_running_mean", "new_running_var"), results, strict=True))
        return found if t["training"] else {n: found[n] for n in ("out", "mask")}
    names = ("dout", "x", "weight", "bias", "mean", "rstd", "residual", "mask", "training")
    results = bn_act.bn_act_bwd(*(t[n] for n in names), *last, True, True, "dresidual" in t["needs"])
    return dict(zip(("dx", "dweight", "dbias", "dresidual"), results, strict=True))


def _conv_bn_act(case: Case, t: dict[str, Any]) -> Results:
    names = ("x", "weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias", "residual")
    geometry = (t["stride"], t["padding"], t["dilation"], 1)
    last = (t["eps"], False, t["activation"], t["negative_slope"])
    return {"out": conv_bn_act.conv_bn_act(*(t[n] for n in names), *geometry, *last)}


CALLS = {"add_act": _add_act, "bn_act": _bn_act, "conv_bn_act": _conv_bn_act}


torch.backends.cudnn.conv.fp32_precision = "ieee"  # of this process: TF32 has its own test in _triton_offline.py


def run(case: Case, capability: int = CAPABILITY, **options: int) -> tuple[Results, list[Report]]:
    """Results and one report per kernel; raises AssertionError on findings."""
    reports: list[Report] = []
    before = _common.launch
    _common.launch = _launcher(case, reports, capability, dict(options))
    try:
        results = CALLS[case.op](case, case.arguments)
    finally:
        _common.launch = before
    return {name: t for name, t in results.items() if isinstance(t, Tensor) and t.numel()}, reports


def stem(kernel: str) -> str:
    """The function's name."""
    return kernel.partition("#")[0]


def short(kernel: str) -> str:
    """For people."""
    return kernel


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


@contextmanager
def replacing(kernel: str, ptx: str) -> Iterator[None]:
    """Inside, launches of this kernel run another PTX."""
    _replaced[kernel] = Module(ptx)
    try:
        yield
    finally:
        _replaced.pop(kernel)


def seen() -> list[str]:
    """Every kernel that was launched so far."""
    return list(_seen)


def resources(architectures: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """(function, architecture, registers) of every kernel on sizes that divide evenly; raises where it spills."""
    launches: list[tuple[Any, int, dict[str, Any]]] = []
    before = _common.launch
    _common.launch = lambda kernel, programs, **given: launches.append((kernel, programs, given))
    try:
        for dtype, layout in ((torch.float16, "nhwc"), (torch.bfloat16, "nchw"), (torch.float32, "nhwc")):
            offline.call_every_kernel(dtype, layout)
    finally:
        _common.launch = before
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kernel, programs, given in launches:
            for arch in architectures:
                compiled = offline.compile_launch(kernel, programs, dict(given), int(arch))
                used = compiled.resources(Path(folder))
                assert used["STACK"] == used["LOCAL"] == 0, f"{compiled.name} on sm_{arch} spills: {used}"
                found.append((compiled.name, arch, used["REG"]))
    return found
