"""Gates over every GPU kernel of the project: findings, fp64 truth, traffic, registers, machine code. Limits: LIMITS of
gates/workload_<op>.py.

The default run checks every op in one dtype, which rotates by the day (DL4DS_ROTATION=n chooses it); `make test-full` checks
everything.
"""

from __future__ import annotations

import pytest

from ptxsim.gates import checks, cuda, limits, machine, measure, workload

from . import toolchain
from ._gate import ROTATION, rotating, where_triton_compiles
from .fixture import require_nvcc, require_simulator

BUILDS = [(source, arch) for source in cuda.SOURCES for arch in machine.ARCHITECTURES]
TRITON_OPS = [op for op, module in limits.ops().items() if hasattr(module, "triton")]
TRITON_BUILDS = [(op, arch) for op in TRITON_OPS for arch in machine.ARCHITECTURES]
# One schedule beside the baseline in the default run (copies delivered at once), all of them in the full one.
TODAY = [measure.MODES[3 if ROTATION % 2 else 5]]


def suites(ops: list[str]) -> list:
    """(op, dtype): each op with one dtype a day, the others in the full run."""
    today = {(op, workload.DTYPES[(ROTATION + i) % len(workload.DTYPES)]) for i, op in enumerate(ops)}
    every = [(op, dtype) for op in ops for dtype in workload.DTYPES]
    marks = [[] if suite in today else [pytest.mark.full] for suite in every]
    names = [f"{op}-{str(dtype).removeprefix('torch.')}" for op, dtype in every]
    return [pytest.param(s, marks=m, id=n) for s, m, n in zip(every, marks, names, strict=True)]


def test_every_kernel_that_ships_has_gates() -> None:
    shipped = limits.shipped_kernels()
    assert {backend for backend, *_ in shipped} == {"cuda", "triton"}
    missing = []
    for backend, kernel, file in shipped:
        try:
            limits.limits_of(backend, kernel)
        except LookupError as error:
            missing.append(f"{file}: {error}")
    assert not missing, "\n".join(missing)
    stale = limits.all_limits().keys() - {(backend, kernel) for backend, kernel, _ in shipped}
    assert not stale, f"limits of kernels that are no longer there: {stale}"


@pytest.fixture
def _nvcc() -> None:
    require_nvcc()
    require_simulator()


@pytest.mark.slow
@pytest.mark.usefixtures("_nvcc")
@pytest.mark.parametrize("suite", suites(list(cuda.OPS)))
def test_cuda_results_and_traffic(suite: tuple, request: pytest.FixtureRequest) -> None:
    """Right, clean and the same bits under other schedules; every instantiation launched; no more moved than allowed."""
    op, dtype = suite
    full = request.config.getoption("-m") == ""
    assert checks.findings(cuda, op, dtype, None if full else TODAY) == []
    assert checks.over_limits(cuda, op, dtype) == []
    reached = {report.kernel for base in measure.baseline(cuda, op, dtype) for report in base.reports}
    wanted = {k for k in cuda.instantiations() if cuda.op_of(k) == op and dtype in cuda.dtypes_of(k)}
    assert wanted <= reached, f"not launched: {sorted(map(cuda.short, wanted - reached))}"
    assert [problem for kernel in sorted(wanted) for problem in checks.uncovered(cuda, kernel)] == []


@pytest.mark.slow
@pytest.mark.usefixtures("_nvcc")
@pytest.mark.parametrize("built", rotating(BUILDS, 1))
def test_cuda_machine_code(built: tuple) -> None:
    """ptxas: no spill, no stack, registers; SASS: 128-bit accesses in the main loops, no local memory, no atomics."""
    source, arch = built
    if machine.tool() is None:
        pytest.skip("no cuobjdump (it comes with nvcc and with triton)")
    assert machine.problems(cuda, arch, source) == []
    assert {k for k, *_ in cuda.machine_code(arch, source)} == {
        k for k, file in cuda.instantiations().items() if file == source
    }


@pytest.mark.slow
@pytest.mark.parametrize("suite", suites(TRITON_OPS))
def test_triton_results_and_traffic(suite: tuple, request: pytest.FixtureRequest) -> None:
    """The same for the Triton kernels, compiled for sm_80, and where Triton emits wgmma for sm_90 too."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    op, dtype = suite
    if toolchain.cxx() is None:
        pytest.skip("the PTX simulator needs a C++ compiler")
    modes = None if request.config.getoption("-m") == "" else TODAY
    where_triton_compiles(f"""
import torch
from ptxsim.gates import checks, measure, triton
problems = checks.findings(triton, {op!r}, {dtype}, {modes!r}) or checks.over_limits(triton, {op!r}, {dtype})
assert not problems, chr(10).join(problems)
launched = {{triton.stem(report.kernel) for base in measure.baseline(triton, {op!r}, {dtype}) for report in base.reports}}
gated = {{found.kernel for found in triton.limits.ops()[{op!r}].LIMITS if found.backend == "triton"}}
assert gated <= launched or not launched, f"not launched: {{gated - launched}}"
""")


@pytest.mark.slow
@pytest.mark.parametrize("built", rotating(TRITON_BUILDS, 1))
def test_triton_machine_code(built: tuple) -> None:
    """The machine code of the Triton kernels, on sizes that divide evenly."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    if machine.tool() is None:
        pytest.skip("no cuobjdump (it comes with nvcc and with triton)")
    op, arch = built
    where_triton_compiles(f"""
from ptxsim.gates import machine, triton
problems = machine.problems(triton, {arch!r}, {op!r})
assert not problems, chr(10).join(problems)
""")
