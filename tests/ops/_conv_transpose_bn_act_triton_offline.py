"""The Triton kernel of conv_transpose_bn_act for GPUs, on a machine without one: inspected, and run on the PTX simulator."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _assert import no_worse_than_torch
from _triton_offline import (
    BF16,
    EPS,
    FP16,
    FP32,
    HALVES,
    WRITTEN,
    compile_launch,
    fp32_precision,
    launches,
    lay_out,
    name,
    reports,
    vectors,
    widened,
)  # fmt: skip
from ptxsim import Report
from torch import Tensor

from dl4ds_kernels._triton import _common, conv_transpose_bn_act

__all__ = ["fp32_precision", "launches", "reports"]
WRITTEN["conv_transpose_bn_act_kernel"] = {"out"}
# x (N, C, H, W), output channels, layout, dtype, BatchNorm or none.
CASES = [
    ((2, 16, 3, 6), 24, "nhwc", FP16, True),
    ((1, 33, 5, 3), 17, "nchw", BF16, True),
    ((2, 5, 3, 4), 3, "nhwc", FP32, False),
    ((1, 17, 4, 5), 33, "nchw", FP32, True),
    ((1, 24, 3, 5), 40, "cslice", FP16, False),
    ((2, 8, 4, 3), 70, "hwslice", FP16, True),
]


def call(x: Tensor, weight: Tensor, bias: Tensor, v: dict[str, Tensor] | None) -> Tensor:
    found = [None] * 4 if v is None else [v[n] for n in ("running_mean", "running_var", "weight", "bias")]
    return conv_transpose_bn_act.conv_transpose_bn_act(
        x, weight, bias, *found, [2, 2], [0, 0], [0, 0], [1, 1], 1, EPS, False, 1, 0.1
    )


def plain(x: Tensor, weight: Tensor, bias: Tensor, v: dict[str, Tensor] | None) -> Tensor:
    y = torch.conv_transpose2d(x, weight, bias, 2)
    if v is not None:
        y = torch.nn.functional.batch_norm(y, v["running_mean"], v["running_var"], v["weight"], v["bias"], False, 0.0, EPS)
    return torch.relu(y)


@pytest.mark.parametrize(("shape", "channels_out", "layout", "dtype", "norm"), CASES, ids=name)
def test_simulated(
    shape: tuple[int, ...], channels_out: int, layout: str, dtype: torch.dtype, norm: bool, reports: list[Report],
    fp32_precision: Callable[[str], None],
) -> None:  # fmt: skip
    fp32_precision("ieee")
    x = lay_out(torch.randn(shape).to(dtype), layout)
    weight = (torch.randn(shape[1], channels_out, 2, 2) / shape[1] ** 0.5).to(dtype)
    bias, v = torch.randn(channels_out).to(dtype), vectors(channels_out) if norm else None
    out = call(x, weight, bias, v)
    stock = plain(x, weight, bias, v)
    no_worse_than_torch(out, stock, plain(*widened(x, weight, bias, v)))
    assert out.stride() == stock.stride()
    assert reports[-1].kernel == "conv_transpose_bn_act_kernel"
    assert (reports[-1].counters["mma"] > 0) == (dtype in HALVES)


def test_wide_indices_give_the_same_bits(reports: list[Report], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(2, 17, 3, 4), torch.randn(17, 5, 2, 2), torch.randn(5)
    narrow = call(x, weight, bias, None)
    monkeypatch.setattr(_common, "INT32_LIMIT", 0)
    assert torch.equal(call(x, weight, bias, None), narrow)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_compile(capability: int, launches: list[Any], tmp_path: Path) -> None:
    """No spills; tensor cores and asynchronous copies in half precision, 16-byte stores in channels_last."""
    for dtype, layout in ((FP16, "nhwc"), (BF16, "nchw"), (FP32, "nhwc")):
        x = lay_out(torch.zeros(2, 128, 16, 16, dtype=dtype), layout)
        call(x, torch.zeros(128, 64, 2, 2, dtype=dtype), torch.zeros(64, dtype=dtype), vectors(64))
    seen = 0
    for kernel, programs, given in launches:
        compiled = compile_launch(kernel, programs, given, capability)
        if compiled.name != "conv_transpose_bn_act_kernel":
            continue
        seen += 1
        used = compiled.resources(tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= 255, used
        if given["x"].dtype in HALVES:
            assert re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.ptx) and "cp.async" in compiled.ptx
        if given["CHANNELS_LAST"]:
            assert re.search(r"st\.global[.\w:]*\.v4\.b32", compiled.ptx), "narrow stores"
    assert seen == 3
