"""The Triton kernels of NMS for GPUs, on a machine without one; test_nms_triton.py runs this file in a process of its own.

As tests/_triton_offline.py, whose helpers it uses: compiled as Triton's launcher would, inspected, run on the PTX simulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _boxes import make_boxes, make_scores
from _nms_cuda import padded_transcription, transcription
from _triton_offline import compile_launch, launches, memory
from ptxsim import Arr, Module, Report

from dl4ds_kernels._triton import _common, nms

__all__ = ["launches"]
# What a kernel changes: parts of it, so it is neither read-only nor a result that must be complete.
CHANGED = {"nms_mask_kernel": "mask", "nms_decide_kernel": "keep", "nms_push_kernel": "alive"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Report]]:
    """Launches run on the simulator; at the end of the test all of them must have been clean."""
    collected: list[Report] = []
    modules: dict[str, Module] = {}

    def launch(kernel: Any, programs: int, **given: Any) -> None:
        compiled = compile_launch(kernel, programs, given, 80)
        arguments = [
            Arr(memory(v), name, read_only=CHANGED[compiled.name] != name) if isinstance(v, torch.Tensor) else v
            for name, v in compiled.arguments
        ]
        metadata = compiled.code.metadata
        module = modules.setdefault(compiled.ptx, Module(compiled.ptx))
        collected.append(
            module.launch(metadata.name, programs, 32 * metadata.num_warps, arguments, smem=metadata.shared, stop=False)
        )

    monkeypatch.setattr(_common, "launch", launch)
    yield collected
    errors = [f"{report.kernel}: {error}" for report in collected for error in report.errors]
    assert not errors, "\n".join(errors[:5])


def problem(n: int, dtype: torch.dtype, regime: str = "clusters") -> tuple[torch.Tensor, ...]:
    g = np.random.default_rng(n)
    return make_boxes(g, n, regime, dtype, odd=0.02), make_scores(g, n, dtype), torch.tensor(g.integers(0, 3, n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["clusters", "integers", "mixed_scales"])
def test_equals_the_cuda_rule(regime: str, dtype: torch.dtype, reports: list[Report]) -> None:
    boxes, scores, classes = problem(150, dtype, regime)
    for threshold in (0.5, 1 / 3):
        assert torch.equal(nms.nms(boxes, scores, threshold), transcription(boxes, scores, threshold))
    assert torch.equal(nms.batched_nms(boxes, scores, classes, 0.5), transcription(boxes, scores, 0.5, classes))


def test_chunks(reports: list[Report]) -> None:
    boxes, scores, classes = problem(1500, torch.float32)
    assert torch.equal(nms.nms(boxes, scores, 0.5), transcription(boxes, scores, 0.5))
    assert torch.equal(nms.batched_nms(boxes, scores, classes, 0.5), transcription(boxes, scores, 0.5, classes))


def test_padded(reports: list[Report]) -> None:
    boxes, scores, classes = (t.view(2, 60, *t.shape[1:]) for t in problem(120, torch.float32))
    for score_threshold, max_output in ((0.0, 9), (0.3, 100), (float("-inf"), 60)):
        expected = padded_transcription(boxes, scores, classes, 0.4, score_threshold, max_output)
        got = nms.nms_padded(boxes, scores, classes, 0.4, score_threshold, max_output)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_compile(dtype: torch.dtype, capability: int, launches: list[Any], tmp_path: Path) -> None:
    """Nothing spilled, no contraction but the one that is written, exact division."""
    boxes, scores, classes = problem(1100, dtype)
    nms.batched_nms(boxes, scores, classes, 0.5)
    seen = set()
    for kernel, programs, given in launches:
        compiled = compile_launch(kernel, programs, given, capability)
        used = compiled.resources(tmp_path)
        seen.add(compiled.name)
        assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= 255, f"{compiled.name}: {used}"
        if compiled.name != "nms_decide_kernel":
            size = "f64" if dtype == torch.float64 else "f32"
            assert f"div.rn.{size}" in compiled.ptx and "div.full" not in compiled.ptx
            fused = compiled.ptx.count(f"fma.rn.{size}") + compiled.ptx.count("fma.rn.f32x2")  # sm_100 has two in one
            assert fused == compiled.ptx.count(f"div.rn.{size}")
    assert seen == set(CHANGED)
