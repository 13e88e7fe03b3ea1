"""The Triton kernels of upsample_add for GPUs, on a machine without one: compiled and inspected, run on the PTX simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import no_worse_than_torch
from _offline import inspect_kernels
from _triton_offline import BF16, FP16, FP32, FP64, WRITTEN, launches, lay_out, name, reports
from ptxsim import Report

from dl4ds_kernels._triton import _common, upsample_add

__all__ = ["launches", "reports"]
OWN = {"upsample_add_kernel": {"out"}, "upsample_add_bwd_kernel": {"dlow"}}
WRITTEN.update(OWN)

# low (N, C, H, W), layout, dtype: odd sizes, rows of whole vectors, one channel, one pixel.
CASES = [
    ((2, 7, 3, 5), "nchw", FP32),
    ((2, 7, 3, 5), "nhwc", FP32),
    ((1, 16, 5, 9), "nhwc", FP16),
    ((1, 3, 4, 16), "nchw", FP16),
    ((2, 33, 3, 4), "nhwc", BF16),
    ((3, 5, 7, 11), "nchw", BF16),
    ((1, 3, 2, 5), "nhwc", FP64),
    ((2, 24, 3, 3), "cslice", FP32),
    ((2, 5, 3, 4), "hwslice", FP16),
    ((3, 5, 1, 1), "nchw", FP32),
    ((1, 1, 9, 300), "nchw", FP32),
]


def problem(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    n, c, h, w = shape
    low = lay_out(torch.randn(shape).to(dtype), layout)
    skip, dout = (lay_out(torch.randn(n, c, 2 * h, 2 * w).to(dtype), layout) for _ in range(2))
    return low, skip, dout


@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES, ids=name)
def test_simulated(shape: tuple[int, ...], layout: str, dtype: torch.dtype, reports: list[Report]) -> None:
    low, skip, dout = problem(shape, layout, dtype)
    out, dlow = upsample_add.upsample_add(low, skip), upsample_add.upsample_add_bwd(dout)
    stock = skip + TF.interpolate(low, scale_factor=2.0, mode="nearest")
    assert torch.equal(out, stock), "one rounding of an exact sum"
    leaf, wide = low.clone().requires_grad_(), low.double().requires_grad_()
    (want,) = torch.autograd.grad(TF.interpolate(leaf, scale_factor=2.0, mode="nearest"), leaf, dout)
    (truth,) = torch.autograd.grad(TF.interpolate(wide, scale_factor=2.0, mode="nearest"), wide, dout.double())
    no_worse_than_torch(dlow, want, truth, "dlow")
    assert [report.kernel for report in reports] == list(OWN)


def test_traffic(reports: list[Report]) -> None:
    """Every sector is used whole, in both layouts."""
    for layout in ("nchw", "nhwc"):
        low, skip, dout = problem((2, 32, 8, 16), layout, FP16)
        upsample_add.upsample_add(low, skip)
        upsample_add.upsample_add_bwd(dout)
    for report in reports:
        assert report.efficiency("load") == report.efficiency("store") == 1.0, f"{report.kernel}\n{report.profile()}"


def test_wide_indices_give_the_same_bits(reports: list[Report], monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [problem((2, 5, 3, 7), layout, FP32) for layout in ("nchw", "nhwc")]

    def results() -> list[torch.Tensor]:
        return [r for p in problems for r in (upsample_add.upsample_add(*p[:2]), upsample_add.upsample_add_bwd(p[2]))]

    narrow = results()
    monkeypatch.setattr(_common, "INT32_LIMIT", 0)
    assert all(torch.equal(a, b) for a, b in zip(results(), narrow, strict=True))


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_compile(capability: int, launches: list[Any], tmp_path: Path) -> None:
    for dtype, layout in ((FP16, "nhwc"), (BF16, "nchw"), (FP32, "nhwc"), (FP32, "nchw")):
        low, skip, dout = problem((2, 64, 8, 16), layout, dtype)
        upsample_add.upsample_add(low, skip)
        upsample_add.upsample_add_bwd(dout)
    assert inspect_kernels(launches, capability, tmp_path, set(OWN)) == set(OWN)
