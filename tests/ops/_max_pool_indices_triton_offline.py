"""The Triton kernels of max_pool_indices for GPUs, on a machine without one: inspected, and run on the PTX simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _offline import inspect_kernels
from _triton_offline import BF16, FP16, FP32, FP64, WRITTEN, launches, lay_out, name, reports
from ptxsim import Report
from torch import Tensor

from dl4ds_kernels._triton import _common, max_pool_indices

__all__ = ["launches", "reports"]
OWN = {"max_pool_kernel": {"out", "where"}, "max_unpool_kernel": {"out"}, "max_gather_kernel": {"dy"}}
WRITTEN.update(OWN)

# x (N, C, H, W), layout, dtype.
CASES = [
    ((2, 7, 6, 10), "nchw", FP32),
    ((2, 7, 6, 10), "nhwc", FP32),
    ((1, 16, 10, 18), "nhwc", FP16),
    ((1, 3, 8, 32), "nchw", FP16),
    ((2, 33, 6, 8), "nhwc", BF16),
    ((3, 5, 14, 22), "nchw", BF16),
    ((1, 3, 4, 10), "nhwc", FP64),
    ((2, 24, 6, 6), "cslice", FP32),
    ((2, 5, 6, 8), "hwslice", FP16),
    ((3, 5, 2, 2), "nchw", FP32),
]


def everything(x: Tensor, dout: Tensor, big: Tensor) -> tuple[Tensor, ...]:
    """Pooling, its gradient, unpooling and its gradient."""
    out, where = max_pool_indices.max_pool_indices(x)
    dx = max_pool_indices.max_pool_indices_bwd(dout, where)
    back = max_pool_indices.max_unpool(out, where)
    return out, where, dx, back, max_pool_indices.max_unpool_bwd(big, where)


def problem(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Few different values, so that equal maxima are common; gradients for pooling and unpooling."""
    n, c, h, w = shape
    x, big = (lay_out((torch.randn(shape) * 2).round().to(dtype), layout) for _ in range(2))
    return x, lay_out(torch.randn(n, c, h // 2, w // 2).to(dtype), layout), big


@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES, ids=name)
def test_simulated(shape: tuple[int, ...], layout: str, dtype: torch.dtype, reports: list[Report]) -> None:
    """Exactly torch's values, places and gradients."""
    x, dout, big = problem(shape, layout, dtype)
    out, where, dx, back, dy = everything(x, dout, big)
    leaf = x.detach().clone().requires_grad_()
    expected, index = TF.max_pool2d(leaf, 2, 2, return_indices=True)
    width = shape[3]
    assert torch.equal(out, expected) and torch.equal(where, (index // width % 2 * 2 + index % width % 2).to(torch.uint8))
    assert torch.equal(dx, torch.autograd.grad(expected, leaf, dout)[0])
    y = expected.detach().requires_grad_()
    unpooled = TF.max_unpool2d(y, index, 2, 2)
    assert torch.equal(back, unpooled) and torch.equal(dy, torch.autograd.grad(unpooled, y, big)[0])
    assert [report.kernel for report in reports] == ["max_pool_kernel", *["max_unpool_kernel"] * 2, "max_gather_kernel"]


def test_nan_infinity_and_zeros(reports: list[Report]) -> None:
    """All 5^4 windows of NaN, infinities and the two zeros, as planes and as pixels."""
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0])
    windows = torch.cartesian_prod(values, values, values, values).view(-1, 1, 2, 2)
    for x in (windows, windows.view(1, -1, 2, 2).contiguous(memory_format=torch.channels_last)):
        out, where = max_pool_indices.max_pool_indices(x)
        expected, index = TF.max_pool2d(x, 2, 2, return_indices=True)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(where, (index // 2 % 2 * 2 + index % 2).to(torch.uint8))


def test_traffic(reports: list[Report]) -> None:
    """Every sector is used whole, in both layouts."""
    for layout in ("nchw", "nhwc"):
        everything(*problem((2, 32, 16, 64), layout, FP16))
    for report in reports:
        assert report.efficiency("load") == report.efficiency("store") == 1.0, f"{report.kernel}\n{report.profile()}"


def test_wide_indices_give_the_same_bits(reports: list[Report], monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [problem((2, 5, 6, 14), layout, FP32) for layout in ("nchw", "nhwc")]
    narrow = [r for p in problems for r in everything(*p)]
    monkeypatch.setattr(_common, "INT32_LIMIT", 0)
    assert all(torch.equal(a, b) for a, b in zip((r for p in problems for r in everything(*p)), narrow, strict=True))


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_compile(capability: int, launches: list[Any], tmp_path: Path) -> None:
    for dtype, layout in ((FP16, "nhwc"), (BF16, "nchw"), (FP32, "nhwc"), (FP32, "nchw")):
        everything(*problem((2, 64, 16, 32), layout, dtype))
    assert inspect_kernels(launches, capability, tmp_path, set(OWN)) == set(OWN)
