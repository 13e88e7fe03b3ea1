"""Seeded bugs in every kernel that ships: each is found by the simulator or by the numbers, or shown to change nothing.

The default run takes one CUDA instantiation a day and one Triton kernel; `make test-full` takes all.
`python -m tests.ptxsim gates --kernel NAME` does the same for a person.
"""

from __future__ import annotations

import pytest

from ptxsim.gates import checks, cuda

from . import toolchain
from ._gate import rotating, where_triton_compiles

pytestmark = pytest.mark.slow
KERNELS = sorted(cuda.instantiations()) if toolchain.nvcc() and toolchain.cxx() else []
TRITON = [
    "add_act_kernel", "add_act_bwd_kernel", "bn_apply_kernel", "bn_bwd_apply_kernel", "bn_stats_partial_kernel",
    "bn_bwd_partial_kernel", "bn_stats_merge_kernel", "bn_bwd_merge_kernel", "bn_fold_kernel", "conv_bn_act_kernel",
]  # fmt: skip


@pytest.mark.parametrize("kernel", rotating(KERNELS, 1))
def test_cuda(kernel: str) -> None:
    verdict = checks.mutants(cuda, kernel)
    print(verdict)
    assert verdict.tried >= 20
    assert verdict.share >= checks.LEAST_KILLED, str(verdict)


@pytest.mark.parametrize("function", rotating(TRITON, 1))
def test_triton(function: str) -> None:
    """Of each function the compiled form of which the cases execute most."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    op = "conv_bn_act" if function[:2] in ("co",) or "fold" in function else function.split("_")[0] + "_act"
    print(
        where_triton_compiles(f"""
import torch
from ptxsim.gates import checks, measure, triton
measure.baseline(triton, {op!r}, torch.float16)
kernels = [k for k in triton.seen() if triton.stem(k) == {function!r}]
verdict = checks.mutants(triton, max(kernels, key=lambda k: (measure.coverage(triton, k)[0], k)))
print(verdict)
assert verdict.tried >= 15 and verdict.share >= checks.LEAST_KILLED, str(verdict)
""")
    )
