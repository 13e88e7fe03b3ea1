"""Gates over every CUDA kernel of the project: findings, traffic, registers, SASS, and seeded bugs.

The default run checks a share that rotates by the day (DL4DS_ROTATION=n chooses it); `-m full` checks everything.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import _cuda_launch as cuda
import pytest
import torch

from . import _workloads as work
from . import compile_cuda, mutate, toolchain
from .fixture import require_nvcc

pytestmark = pytest.mark.slow
ARCHITECTURES = ["80", "90", "100", "120"]
ROTATION = int(os.environ.get("DL4DS_ROTATION", time.time() // 86400))
MODES = [{}, {"schedule": 1}, {"schedule": 17}, {"lazy_copies": 0}]

# Registers per thread at 256 threads: 64 lets four blocks share a multiprocessor.
MOST_REGISTERS = 64
# Per kernel: least load and store efficiency of its 16-byte instantiations, most bank waves per ideal wave.
TRAFFIC = {
    "add_act_fwd_kernel": (0.99, 0.99, 1.0),
    "add_act_bwd_kernel": (0.99, 0.99, 1.0),
    "bn_act_stats_kernel_nhwc": (0.95, 0.95, 2.0),
    "bn_act_stats_kernel_nchw": (0.50, 0.95, 1.0),
    "bn_act_fwd_kernel_nhwc": (0.70, 0.99, 1.0),
    "bn_act_fwd_kernel_nchw": (0.75, 0.99, 1.0),
    "bn_act_bwd_reduce_kernel_nhwc": (0.95, 0.95, 2.0),
    "bn_act_bwd_reduce_kernel_nchw": (0.85, 0.95, 1.0),
    "bn_act_bwd_kernel_nhwc": (0.95, 0.99, 1.0),
    "bn_act_bwd_kernel_nchw": (0.75, 0.99, 1.0),
}
# Kernels of few values per block: nothing to load 16 bytes at a time.
SMALL = ("finalize",)
MUTANTS_PER_OPERATOR = 2
LEAST_KILLED = 0.70  # of the mutants in executed code; survivors are listed by the test, not all are explained yet


def rotating(values: list, share: int) -> list:
    """All values as pytest parameters; those outside today's share carry the `full` mark."""
    start = ROTATION * share % max(len(values), 1)
    today = {(start + i) % len(values) for i in range(share)} if values else set()
    marks = {False: [pytest.mark.full], True: []}
    return [pytest.param(v, marks=marks[i in today], id=_label(v)) for i, v in enumerate(values)]


def _label(value: object) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return "-".join(p.stem if isinstance(p, Path) else str(p).removeprefix("torch.") for p in parts)


@pytest.fixture(autouse=True)
def _needs_nvcc() -> None:
    require_nvcc()


def stem(kernel: str) -> str:
    """The function's own name in a mangled kernel name."""
    length, rest = re.match(r"_ZN5dl4ds(\d+)(.*)", kernel).groups()
    return rest[: int(length)]


def is_vector(kernel: str) -> bool:
    """Instantiations for 16-byte accesses carry their width as a template argument."""
    return "Li4E" in kernel or "Li8E" in kernel


SUITES = [(op, dtype) for op in work.OPS for dtype in work.DTYPES]


# --- what the simulator finds and counts


@pytest.mark.parametrize("suite", rotating(SUITES, 2))
def test_no_findings_and_equal_results(suite):
    """Clean under every schedule, with eager and lazy copies, and the same bits in all of them."""
    op, dtype = suite
    for case in work.cases(op, dtype):
        expected, _ = work.baseline(op, dtype)[case.name]
        for mode in MODES[1 + ROTATION % 3 :][:1] if op == "bn_act" else MODES[1:]:
            results, _ = case.run(mode)  # raises on findings
            for name, tensor in expected.items():
                bits = [cuda.memory_order(t).view(torch.uint8) for t in (results[name], tensor)]
                same = torch.equal(*bits)
                assert same, f"{case.name}: {name} depends on the schedule {mode}"


@pytest.mark.parametrize("suite", rotating(SUITES, 2))
def test_every_instantiation_is_reached(suite):
    op, dtype = suite
    reached = {report.kernel for _, reports in work.baseline(op, dtype).values() for report in reports}
    wanted = {
        k for source in work.sources() if source.parent.name == op for k in work.kernels(source) if work.dtype_of(k) == dtype
    }
    assert wanted <= reached, f"not launched: {sorted(wanted - reached)}"


@pytest.mark.parametrize("suite", rotating(SUITES, 2))
def test_traffic(suite):
    """Sectors against the ideal, and bank waves, of the instantiations that promise 16-byte accesses."""
    op, dtype = suite
    for name, (_, reports) in work.baseline(op, dtype).items():
        for report in reports:
            kernel = stem(report.kernel)
            if kernel not in TRAFFIC or not is_vector(report.kernel):
                continue
            load, store, waves = TRAFFIC[kernel]
            got = report.efficiency("load"), report.efficiency("store"), report.bank_waves()
            assert got[0] >= load and got[1] >= store and got[2] <= waves, f"{kernel} in {name}: {got}"


def test_every_kernel_has_traffic_limits():
    kernels = {stem(k) for source in work.sources() for k in work.kernels(source)}
    assert {k for k in kernels if not any(s in k for s in SMALL)} == set(TRAFFIC)


# --- what ptxas and the disassembler say


def cubin(source: Path, arch: str) -> tuple[Path, dict[str, dict[str, int]]]:
    """The compiled file and, per kernel: registers, stack, spill_stores, spill_loads."""
    path, messages = compile_cuda(source, "cubin", arch, [cuda.CSRC], cuda.FLAGS)
    facts: dict[str, dict[str, int]] = {}
    for part in re.split(r"Compiling entry function '", messages)[1:]:
        name = part[: part.index("'")]
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        facts[name] = {
            "registers": int(re.search(r"Used (\d+) registers", part).group(1)),
            "stack": stack,
            "spill_stores": stores,
            "spill_loads": loads,
        }
    return path, facts


BUILDS = [(source, arch) for source in work.sources() for arch in ARCHITECTURES]


@pytest.mark.parametrize("built", rotating(BUILDS, 1))
def test_registers_and_spills(built):
    _, facts = cubin(*built)
    assert set(facts) == set(work.kernels(built[0]))
    for kernel, f in facts.items():
        assert f["stack"] == f["spill_stores"] == f["spill_loads"] == 0, f"{kernel}: {f}"
        assert f["registers"] <= MOST_REGISTERS, f"{kernel}: {f}"


@pytest.mark.parametrize("built", rotating(BUILDS, 1))
def test_sass(built):
    """128-bit loads in vector kernels and 128-bit stores where they write activations, no local memory, no float atomics."""
    tool = toolchain.cuda_tool("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump (it comes with nvcc and with triton)")
    path, _ = cubin(*built)
    listing = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : ", listing)[1:]
    assert len(functions) == len(work.kernels(built[0]))
    for text in functions:
        kernel = text.split()[0]
        assert not re.search(r"\b(LDL|STL)\b", text), f"{kernel} uses local memory"
        assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED|REDG)\.", text), f"{kernel} uses atomics"
        if is_vector(kernel):
            assert re.search(r"\bLDG\.E[\w.]*\.128", text), f"{kernel}: no 128-bit load"
            if re.search(r"(fwd|bwd)_kernel", stem(kernel)):
                assert re.search(r"\bSTG\.E[\w.]*\.128", text), f"{kernel}: no 128-bit store"


# --- seeded bugs


KERNELS = (
    [(source, kernel) for source in work.sources() for kernel in work.kernels(source)]
    if toolchain.nvcc() and toolchain.cxx()
    else []
)


@pytest.mark.parametrize("target", rotating(KERNELS, 1))
def test_mutants_are_killed(target):
    """Every operator applied to the kernel's executed code: the simulator reports it or the numbers change."""
    source, kernel = target
    op, dtype, ptx = source.parent.name, work.dtype_of(kernel), work.ptx_of(source)
    _, executed = work.representatives(kernel, op, dtype)
    assert not work.killed(kernel, mutate.kernel_text(ptx, kernel), op, dtype), "the unchanged kernel must survive"
    found = mutate.mutants(ptx, kernel, executed, MUTANTS_PER_OPERATOR)
    survivors = [m for m in found if not work.killed(kernel, m.ptx, op, dtype)]
    assert len(found) >= 10
    ratio = 1 - len(survivors) / len(found)
    listing = "\n  ".join(map(str, survivors))
    print(f"{kernel}: {len(found) - len(survivors)} of {len(found)} mutants killed; survivors:\n  {listing}")
    assert ratio >= LEAST_KILLED, f"{len(survivors)} of {len(found)} survive:\n  {listing}"
