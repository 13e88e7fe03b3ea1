"""The Triton kernels of local_response_norm for GPUs, on a machine without one: inspected, and run on the PTX simulator."""

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
from torch import Tensor

from dl4ds_kernels import reference
from dl4ds_kernels._triton import _common, local_response_norm

__all__ = ["launches", "reports"]
OWN = {"lrn_kernel": {"out"}, "lrn_bwd_ratio_kernel": {"direct", "through"}, "lrn_bwd_gather_kernel": {"dx"}}
WRITTEN.update(OWN)
PAPER = (5, 5e-4, 0.75, 2.0)
CASES = [
    ((2, 7, 3, 5), "nchw", FP32, PAPER),
    ((2, 7, 3, 5), "nhwc", FP32, (4, 0.5, 0.75, 1.0)),
    ((1, 96, 3, 5), "nhwc", FP16, PAPER),
    ((1, 20, 4, 16), "nchw", BF16, (5, 1.0, 0.5, 1.0)),
    ((1, 5, 3, 4), "nhwc", FP64, (3, 0.3, 1.0, 1.0)),
    ((2, 9, 3, 4), "cslice", FP32, (20, 0.5, 0.6, 1.5)),
    ((2, 9, 3, 4), "hwslice", FP32, (3, 0.5, 2.0, 1.5)),
]


def both(x: Tensor, dout: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    return (
        local_response_norm.local_response_norm(x, *settings),
        local_response_norm.local_response_norm_bwd(dout, x, *settings),
    )


def stock(x: Tensor, dout: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """torch's own; where it has no kernel (half precision on the CPU) the reference."""
    leaf = x.detach().contiguous().requires_grad_()
    function = reference.local_response_norm if x.dtype in (FP16, BF16) else TF.local_response_norm
    out = function(leaf, *settings)
    return out.detach(), torch.autograd.grad(out, leaf, dout)[0]


@pytest.mark.parametrize(("shape", "layout", "dtype", "settings"), CASES, ids=name)
def test_simulated(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, settings: tuple[Any, ...], reports: list[Report]
) -> None:
    x, dout = (lay_out(torch.randn(shape).mul(3).to(dtype), layout) for _ in range(2))
    want, truth = stock(x, dout, settings), stock(x.double(), dout.double(), settings)
    for result, other, exact, label in zip(both(x, dout, settings), want, truth, ("out", "dx"), strict=True):
        no_worse_than_torch(result, other, exact, label)
    assert [report.kernel for report in reports] == list(OWN)


def test_nan_and_infinity(reports: list[Report]) -> None:
    x = lay_out(torch.randn(1, 12, 2, 3), "nhwc")
    x[0, 3, 0, 1], x[0, 8, 1, 2] = float("nan"), float("inf")
    out = local_response_norm.local_response_norm(x, *PAPER)
    torch.testing.assert_close(out, TF.local_response_norm(x, *PAPER), equal_nan=True)


def test_wide_indices_give_the_same_bits(reports: list[Report], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [[lay_out(torch.randn(2, 7, 3, 5), layout) for _ in range(2)] for layout in ("nchw", "nhwc")]
    narrow = [r for x, dout in pairs for r in both(x, dout, PAPER)]
    monkeypatch.setattr(_common, "INT32_LIMIT", 0)
    assert all(torch.equal(a, b) for a, b in zip((r for p in pairs for r in both(*p, PAPER)), narrow, strict=True))


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_compile(capability: int, launches: list[Any], tmp_path: Path) -> None:
    for dtype, layout in ((FP16, "nhwc"), (BF16, "nchw"), (FP32, "nhwc"), (FP32, "nchw")):
        x, dout = (lay_out(torch.zeros(2, 96, 16, 16, dtype=dtype), layout) for _ in range(2))
        both(x, dout, PAPER)
    assert inspect_kernels(launches, capability, tmp_path, set()) == set(OWN)
