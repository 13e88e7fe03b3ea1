"""The Triton kernel of bn_act_into for GPUs, on a machine without one: inspected, and run on the PTX simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import no_worse_than_torch
from _offline import inspect_kernels
from _triton_offline import BF16, EPS, FP16, FP32, FP64, WRITTEN, compile_launch, launches, lay_out, memory, name, vectors
from ptxsim import Arr, Module, Report

from dl4ds_kernels._triton import _common, bn_act

__all__ = ["launches"]
KERNEL = "bn_apply_into_kernel"
WRITTEN[KERNEL] = {"out"}
CASES = [
    ((2, 24, 3, 5), "nhwc", FP16),
    ((2, 17, 3, 5), "cslice", BF16),
    ((1, 5, 4, 3), "nchw", FP32),
    ((1, 300, 3, 2), "cslice", FP32),
    ((1, 3, 2, 5), "nhwc", FP64),
]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launches run on the simulator. ``out`` is a slice: what lies beside it is neither complete nor read-only."""
    collected: list[Report] = []

    def launch(kernel: Any, programs: int, **given: Any) -> None:
        compiled = compile_launch(kernel, programs, given, 80)
        arguments = [
            Arr(memory(v), n, read_only=n not in WRITTEN[compiled.name]) if isinstance(v, torch.Tensor) else v
            for n, v in compiled.arguments
        ]
        metadata = compiled.code.metadata
        module, threads = Module(compiled.ptx), 32 * metadata.num_warps
        collected.append(module.launch(metadata.name, programs, threads, arguments, smem=metadata.shared, stop=False))

    monkeypatch.setattr(_common, "launch", launch)
    yield collected
    errors = [f"{report.kernel}: {error}" for report in collected for error in report.errors]
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES, ids=name)
def test_simulated(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, wide: bool, reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(_common, "INT32_LIMIT", 0)
    n, c, h, w = shape
    x, v = lay_out(torch.randn(shape).to(dtype), layout), vectors(c, FP64 if dtype == FP64 else FP32)
    buffer = torch.full((n, h, w, c + 5), 7.0, dtype=dtype).movedim(-1, 1)
    out = buffer[:, 3 : 3 + c]
    bn_act.bn_act_into(x, v["weight"], v["bias"], v["running_mean"], v["running_var"], out, EPS, False, 1, 0.0)

    def plain(x: torch.Tensor, v: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.relu(TF.batch_norm(x, v["running_mean"], v["running_var"], v["weight"], v["bias"], False, 0.0, EPS))

    no_worse_than_torch(out, plain(x, v), plain(x.double(), {k: t.double() for k, t in v.items()}))
    assert (torch.cat((buffer[:, :3], buffer[:, 3 + c :]), 1) == 7).all(), "wrote beside its slice"
    assert reports[-1].kernel == KERNEL


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_compile(capability: int, launches: list[Any], tmp_path: Path) -> None:
    for dtype in (FP16, BF16, FP32):
        x, v = lay_out(torch.zeros(2, 64, 16, 16, dtype=dtype), "nhwc"), vectors(64)
        buffer = torch.zeros(2, 16, 16, 192, dtype=dtype).movedim(-1, 1)
        bn_act.bn_act_into(
            x, v["weight"], v["bias"], v["running_mean"], v["running_var"], buffer[:, 64:128], EPS, False, 1, 0.0
        )
    own = [found for found in launches if found[0].__name__ == KERNEL]
    assert inspect_kernels(own, capability, tmp_path, {KERNEL}) == {KERNEL}
