"""Seeded bugs in every kernel that ships: each is found by the simulator or by the numbers, or shown to change nothing.

The default run takes one CUDA instantiation and one Triton kernel a day; `make test-full` takes all. Which instantiations a
file has says its PTX: collecting the tests compiles nothing.
`python -m tests.ptxsim gates --kernel NAME` does the same for a person.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ptxsim.gates import checks, cuda, limits

from . import toolchain
from ._gate import ROTATION, rotating, where_triton_compiles
from .fixture import require_nvcc, require_simulator

pytestmark = pytest.mark.slow
TRITON = [(op, found.kernel) for op, module in limits.ops().items() for found in module.LIMITS if found.backend == "triton"]


@pytest.mark.parametrize("source", rotating(cuda.SOURCES, 1))
def test_cuda(source: Path, request: pytest.FixtureRequest) -> None:
    require_nvcc()
    require_simulator()
    kernels = sorted(kernel for kernel, file in cuda.instantiations().items() if file == source)
    assert kernels, "a file without kernels"
    if "not full" in request.config.getoption("-m"):
        kernels = [kernels[ROTATION // len(cuda.SOURCES) % len(kernels)]]
    for kernel in kernels:
        verdict = checks.mutants(cuda, kernel)
        print(verdict)
        assert verdict.tried >= 8, kernel  # a small kernel has few sites
        assert verdict.share >= checks.LEAST_KILLED_OF_ONE["cuda"], str(verdict)


@pytest.mark.parametrize("kernel", rotating(TRITON, 1))
def test_triton(kernel: tuple[str, str]) -> None:
    """Of each function one compiled form, in fp16: see rows.kernels."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    if toolchain.cxx() is None:
        pytest.skip("the PTX simulator needs a C++ compiler")
    op, function = kernel
    print(
        where_triton_compiles(f"""
import torch
from ptxsim.gates import checks, rows, triton
(kernel,) = [k for k in rows.kernels(triton, {op!r}, torch.float16) if triton.stem(k) == {function!r}]
verdict = checks.mutants(triton, kernel)
print(verdict)
assert verdict.tried >= 10 and verdict.share >= checks.LEAST_KILLED_OF_ONE["triton"], str(verdict)
""")
    )
