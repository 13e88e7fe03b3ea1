"""Gates over every GPU kernel of the project: findings, fp64 truth, traffic, registers, machine code. Limits: gates/limits.py.

The default run checks a share that rotates by the day (DL4DS_ROTATION=n chooses it); `make test-full` checks everything.
"""

from __future__ import annotations

import pytest

from ptxsim.gates import checks, cuda, limits, measure, workload

from . import toolchain
from ._gate import ROTATION, rotating, where_triton_compiles
from .fixture import require_nvcc

SUITES = [(op, dtype) for op in cuda.OPS for dtype in workload.DTYPES]
BUILDS = [(source, arch) for source in cuda.SOURCES for arch in checks.ARCHITECTURES]
# One mode beside the baseline in the default run, all of them in the full one.
TODAY = [measure.MODES[1 + ROTATION % (len(measure.MODES) - 1)]]


def test_every_kernel_that_ships_has_limits() -> None:
    shipped = limits.shipped_kernels()
    assert {backend for backend, *_ in shipped} == {"cuda", "triton"}
    missing = []
    for backend, kernel, file in shipped:
        try:
            limits.limits_of(backend, kernel)
        except LookupError as error:
            missing.append(f"{file}: {error}")
    assert not missing, "\n".join(missing)
    names = {(backend, kernel) for backend, kernel, _ in shipped}
    stale = [k for k, v in {**limits.LIMITS, **limits.TRITON_NAMES}.items() if (v.backend, k) not in names]
    assert not stale, f"limits of kernels that are no longer there: {stale}"
    assert all((limits.REPOSITORY / test).exists() for test in limits.ELSEWHERE.values())


@pytest.fixture
def _nvcc() -> None:
    require_nvcc()


@pytest.mark.slow
@pytest.mark.usefixtures("_nvcc")
@pytest.mark.parametrize("suite", rotating(SUITES, 1))
def test_cuda_results_and_traffic(suite: tuple, request: pytest.FixtureRequest) -> None:
    """Right, clean and the same bits under other schedules; every instantiation launched; no more moved than allowed."""
    op, dtype = suite
    full = request.config.getoption("-m") == ""
    assert checks.findings(cuda, op, dtype, None if full else TODAY) == []
    assert checks.over_limits(cuda, op, dtype) == []
    reached = {report.kernel for base in measure.baseline(cuda, op, dtype) for report in base.reports}
    wanted = {k for k in cuda.instantiations() if cuda.op_of(k) == op and dtype in cuda.dtypes_of(k)}
    assert wanted <= reached, f"not launched: {sorted(map(cuda.short, wanted - reached))}"
    for kernel in wanted:
        covered, total = measure.coverage(cuda, kernel)
        assert covered >= checks.LEAST_COVERED * total, f"{cuda.short(kernel)}: {covered} of {total} instructions executed"


@pytest.mark.slow
@pytest.mark.usefixtures("_nvcc")
@pytest.mark.parametrize("built", rotating(BUILDS, 1))
def test_cuda_machine_code(built: tuple) -> None:
    """ptxas: no spill, no stack, registers; SASS: 128-bit accesses in the main loops, no local memory, no atomics."""
    source, arch = built
    assert set(checks.resources(cuda, source, arch)) == {k for k, file in cuda.instantiations().items() if file == source}
    assert checks.over_resources(cuda, source, arch) == []
    if toolchain.cuda_tool("cuobjdump") is None:
        pytest.skip("no cuobjdump (it comes with nvcc and with triton)")
    assert checks.sass(cuda, source, arch) == []


TRITON_SUITES = [
    ("add_act", "float16"), ("bn_act", "float16"), ("conv_bn_act", "float16"), ("add_act", "bfloat16"), ("bn_act", "float32"),
    ("conv_bn_act", "bfloat16"), ("add_act", "float32"), ("conv_bn_act", "float32"), ("bn_act", "bfloat16"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("suite", rotating(TRITON_SUITES, 1))
def test_triton_results_and_traffic(suite: tuple, request: pytest.FixtureRequest) -> None:
    """The same for the Triton kernels, compiled for sm_80, and conv_bn_act (wgmma) for sm_90 too."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    op, dtype = suite
    modes = measure.MODES[1:] if request.config.getoption("-m") == "" else TODAY
    where_triton_compiles(f"""
import torch
from ptxsim.gates import checks, measure, triton, workload
problems = checks.findings(triton, {op!r}, torch.{dtype}, {modes!r}) + checks.over_limits(triton, {op!r}, torch.{dtype})
if {op!r} == "conv_bn_act":
    for case in workload.cases({op!r}, torch.{dtype}):
        for lazy in (0, 1):
            results, _ = triton.run(case, capability=90, lazy_copies=lazy)
            wrong = workload.wrong(results, case.truth(), torch.{dtype}, torch.float32)
            problems += [f"sm_90, {{case.name}}: {{wrong}}"] if wrong else []
assert not problems, chr(10).join(problems)
""")
