"""The Triton kernel of three-way addition for GPUs, on a machine without one: inspected, and run on the PTX simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _assert import no_worse_than_torch
from _offline import inspect_kernels
from _triton_offline import BF16, FP16, FP32, FP64, SLOPE, WRITTEN, away_from_kinks, launches, name, reports
from ptxsim import Report

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._triton import _common, add_act

__all__ = ["launches", "reports"]
WRITTEN["add3_act_kernel"] = {"out", "mask"}
CASES = [("relu", FP16), ("relu6", BF16), ("leaky_relu", FP32), ("none", FP32), ("silu", FP16), ("relu", FP64)]


@pytest.mark.parametrize(("activation", "dtype"), CASES, ids=name)
def test_simulated(activation: str, dtype: torch.dtype, reports: list[Report]) -> None:
    code = ACTIVATION_CODES[activation]
    x, y, z, dout = (torch.randn(2, 5, 7, 31).mul(3).to(dtype) for _ in range(4))
    dout = away_from_kinks(dout, 0.5 * (x.double() + y.double() + z.double()), activation)

    def plain(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = operands[0].detach().requires_grad_()
        out = apply_activation(0.5 * (leaf + operands[1] + operands[2]), code, SLOPE)
        return out.detach(), torch.autograd.grad(out, leaf, operands[3])[0]

    stock, truth = plain(x, y, z, dout), plain(*(t.double() for t in (x, y, z, dout)))
    out, mask = add_act.add3_act(x, y, z, 0.5, code, SLOPE, True)
    no_worse_than_torch(out, stock[0], truth[0], "out")
    if mask.numel() or code == 0:
        dx = add_act.add_act_bwd(dout, mask if mask.numel() else None, None, None, 0.5, code, SLOPE)
        no_worse_than_torch(dx, stock[1], truth[1], "dx")
    assert reports[0].kernel == "add3_act_kernel"


def test_traffic_and_wide_indices(reports: list[Report], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, z = (torch.randn(2, 32, 8, 8).half() for _ in range(3))
    out, mask = add_act.add3_act(x, y, z, 1.0, 1, SLOPE, True)
    assert reports[0].efficiency("load") == 1.0 and reports[0].efficiency("store") > 0.9  # beside them a few mask bytes
    monkeypatch.setattr(_common, "INT32_LIMIT", 0)
    wide = add_act.add3_act(x, y, z, 1.0, 1, SLOPE, True)
    assert torch.equal(wide[0], out) and torch.equal(wide[1], mask)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_compile(capability: int, launches: list[Any], tmp_path: Path) -> None:
    for dtype in (FP16, BF16, FP32):
        x = torch.zeros(4, 64, 16, 16, dtype=dtype)
        add_act.add3_act(x, x.clone(), x.clone(), 1.0, 1, SLOPE, True)
    own = {"add3_act_kernel"}
    assert inspect_kernels(launches, capability, tmp_path, own) == own
