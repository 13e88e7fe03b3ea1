"""Triton kernels compiled offline for sm_80: right numbers, no findings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import Arr, Module, aligned

triton = pytest.importorskip("triton", reason="triton is not installed")

from . import _triton_samples as samples  # noqa: E402
from .triton_kernels import compile_triton  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCHEDULES = (0, 1, 17)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1000, 1024, 37])
def test_elementwise(dtype, n):
    kernel = compile_triton(
        samples.scale_shift_relu,
        {"x": f"*{dtype}", "scale": "*fp32", "shift": "*fp32", "out": f"*{dtype}", "n": "i32"},
        {"C": 8, "BLOCK": 256},
    )
    torch.manual_seed(0)
    x, scale, shift = aligned(torch.randn(n).to(DTYPES[dtype])), torch.randn(8), torch.randn(8)
    out = aligned(torch.zeros_like(x))
    args = [
        Arr(x, "x", read_only=True),
        Arr(scale, "scale", read_only=True),
        Arr(shift, "shift", read_only=True),
        Arr(out, "out", output=True),
        n,
    ]
    module = Module(kernel.ptx)
    for schedule in SCHEDULES:
        module.launch(kernel.name, -(-n // 256), kernel.threads, args, smem=kernel.shared, schedule=schedule).check()
    c = torch.arange(n) % 8
    want = (x.double() * scale.double()[c] + shift.double()[c]).clamp(min=0)
    limit = torch.finfo(DTYPES[dtype]).eps * want + 1e-6
    assert bool(((out.double() - want).abs() <= limit).all())


@pytest.mark.parametrize("warps", [1, 4])
def test_row_softmax(warps):
    rows, columns = 5, 300
    kernel = compile_triton(samples.softmax, {"x": "*fp32", "out": "*fp32", "columns": "i32"}, {"BLOCK": 512}, num_warps=warps)
    x, out = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32), np.zeros((rows, columns), np.float32)
    module = Module(kernel.ptx)
    for schedule in SCHEDULES:
        module.launch(
            kernel.name,
            rows,
            kernel.threads,
            [Arr(x, "x", read_only=True), Arr(out, "out", output=True), columns],
            smem=kernel.shared,
            schedule=schedule,
        ).check()
    want = torch.softmax(torch.from_numpy(x).double(), 1).numpy()
    assert np.allclose(out, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_product(dtype, lazy):
    """tl.dot: cp.async pipeline, ldmatrix, mma.sync."""
    m, n, k = 70, 128, 128
    blocks = {"BM": 64, "BN": 64, "BK": 32}
    signature = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    kernel = compile_triton(samples.matrix_product, signature, blocks,
                            ("a", "b", "c", "N", "K"), num_warps=4, num_stages=3)  # fmt: skip
    torch.manual_seed(0)
    a, b, c = (
        aligned(torch.randn(m, k).to(DTYPES[dtype])),
        aligned(torch.randn(k, n).to(DTYPES[dtype])),
        aligned(torch.zeros(m, n)),
    )
    args = [Arr(a, "a", read_only=True), Arr(b, "b", read_only=True), Arr(c, "c", output=True), m, n, k]
    report = (
        Module(kernel.ptx)
        .launch(kernel.name, (-(-m // 64), n // 64), kernel.threads, args, smem=kernel.shared, schedule=5, lazy_copies=lazy)
        .check()
    )
    limit = 0.1 if dtype == "fp32" else 1e-4  # fp32 operands are rounded to TF32
    assert float((c.double() - a.double() @ b.double()).abs().max()) < limit
    assert report.counters["mma"] > 0 and report.counters["async_copies"] > 0
