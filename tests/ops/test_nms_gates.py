"""Seeded bugs in the CUDA kernels of NMS: the simulator reports them, or the indices change.

The default run takes one kernel, another one every day (DL4DS_ROTATION=n chooses it); ``-m full`` takes all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from _boxes import make_boxes
from _nms_cuda import launch
from ptxsim import Module, SimulatorError, mutate, toolchain
from ptxsim import _workloads as work
from ptxsim.fixture import require_nvcc, require_simulator
from ptxsim.test_gates import LEAST_KILLED, rotating

pytestmark = pytest.mark.slow
SOURCE = work.cuda.CSRC / "ops/nms/nms_fwd.cu"
# (boxes, images, classes, regime, score threshold, max_output): one block an image; sorted, with large bins; with small ones.
CASES = (
    (200, 2, 0, "sparse", None, 200), (180, 2, 3, "uniform", -0.4, 180), (90, 1, 0, "uniform", float("inf"), 8),
    (150, 1, 0, "integers", -0.1, 20),
    (2060, 1, 0, "sparse", -0.45, 2100), (1100, 2, 0, "clusters", 0.1, 20), (1200, 2, 2, "clusters", -0.3, 1300),
)  # fmt: skip


def nms_cases(dtype: torch.dtype) -> list[work.Case]:
    cases = []
    for n, batch, classes, regime, score_threshold, max_output in CASES:
        g = np.random.default_rng(n)
        boxes = torch.stack([make_boxes(g, n, regime, dtype, odd=0.01) for _ in range(batch)])
        scores = torch.tensor(g.integers(-n // 2, n // 2, (batch, n)) / n).to(dtype)  # ties, both signs
        scores[0, :6] = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), -float("inf"), -float("nan")])
        boxes[0, :6] = torch.arange(6)[:, None] * 100 + torch.tensor([0, 0, 5, 5])  # apart: their order shows
        ids = torch.tensor(np.where(g.random((batch, n)) < 0.85, 0, g.integers(1, 5000, (batch, n)))) if classes else None

        def run(options, boxes=boxes, scores=scores, ids=ids, score_threshold=score_threshold, max_output=max_output):
            keep, count, reports = launch(boxes, scores, ids, 0.5, score_threshold, max_output, **options)
            return {"keep": keep, "count": count}, reports

        cases.append(work.Case(f"nms-n{n}-{regime}", run))
    return cases


def kernels() -> list[str]:
    """Those that a call on float32 boxes launches."""
    if not (toolchain.nvcc() and toolchain.cxx()):
        return []
    other = re.compile(r"I(6__half|13__nv_bfloat16|d|m)E|Float(16|64)Rule")
    return [kernel for kernel in work.kernels(SOURCE) if not other.search(kernel)]


@pytest.fixture(autouse=True)
def _workload(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require_simulator()
    require_nvcc()
    monkeypatch.setitem(work.OPS, "nms", nms_cases)
    yield


def test_every_kernel_is_reached() -> None:
    reports = itertools.chain(*(reports for _, reports in work.baseline("nms", torch.float32).values()))
    assert {report.kernel for report in reports} == set(kernels())


def killed(kernel: str, ptx: str) -> str:
    """How a mutant is found out by any of the cases ("" if it survives)."""
    try:
        module = Module(ptx)
    except SimulatorError as error:
        return f"does not load: {error}"
    for case in work.cases("nms", torch.float32):
        expected, reports = work.baseline("nms", torch.float32)[case.name]
        if all(report.kernel != kernel for report in reports):
            continue
        try:
            with module.replacing(kernel):
                results, _ = case.run({"budget": 1 << 20, "max_reports": 1})
        except AssertionError as error:  # findings, or an error code of the launcher
            return f"{case.name}: {str(error).strip().splitlines()[0]}"
        if wrong := work.outcome(results, expected):
            return f"{case.name}: {wrong}"
    return ""


# Left out: mutants of these loop over block sums without end, a minute each (of the scan's 11 two survived, of large's one).
ENDLESS = re.compile("nms_(scan|large|output)_kernel")


@pytest.mark.parametrize("kernel", rotating([k for k in kernels() if not ENDLESS.search(k)], 1))
def test_mutants_are_killed(kernel: str) -> None:
    ptx = work.ptx_of(SOURCE)
    _, executed = work.representatives(kernel, "nms", torch.float32)
    assert not killed(kernel, mutate.kernel_text(ptx, kernel)), "the unchanged kernel must survive"
    found = mutate.mutants(ptx, kernel, executed, 1)
    survivors = [m for m in found if not killed(kernel, m.ptx)]
    assert len(found) >= 5
    ratio = 1 - len(survivors) / len(found)
    listing = "\n  ".join(map(str, survivors))
    print(f"{kernel}: {len(found) - len(survivors)} of {len(found)} mutants killed; survivors:\n  {listing}")
    assert ratio >= LEAST_KILLED, f"{len(survivors)} of {len(found)} survive:\n  {listing}"
