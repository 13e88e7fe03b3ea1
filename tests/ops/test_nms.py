"""nms: index for index torchvision's CPU result, from the C++ kernel and from the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _boxes import (
    BOXES,
    FLOATS,
    INF,
    NAN,
    ODD_THRESHOLDS,
    REGIMES,
    SCORES,
    make_boxes,
    make_scores,
    oracle,
)  # fmt: skip
from conftest import skip_unless_loaded
from hypothesis import given, settings
from hypothesis import strategies as st
from nms_fuzz import MANY, check, fuzz

from dl4ds_kernels import functional as F


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends with an NMS of their own."""
    skip_unless_loaded(request.param)
    return request.param


@pytest.fixture
def kernel_backend() -> str:
    """The backend whose kernel is tested."""
    skip_unless_loaded("cpu")
    return "cpu"


@pytest.mark.parametrize("seed", range(10))
def test_fuzz_equals_torchvision(kernel_backend: str, seed: int) -> None:
    assert fuzz(seed, 200, kernel_backend).suppressed > 1000


@pytest.mark.parametrize("seed", range(2))
def test_fuzz_reference_equals_torchvision(seed: int) -> None:
    assert fuzz(100 + seed, 100, "reference", sizes=(0, 1, 2, 5, 17, 64, 100)).suppressed > 100


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_fuzz_full(kernel_backend: str, seed: int) -> None:
    """10^6 cases; bench/results/nms_fuzz.json has the summary of a run of the driver."""
    assert fuzz(1000 + seed, 10_000, kernel_backend, MANY).suppressed > 10_000


def test_fuzz_summary_is_of_a_whole_run() -> None:
    summary = json.loads((Path(__file__).parents[2] / "bench/results/nms_fuzz.json").read_text())
    assert summary["cases"] >= 10**6 and summary["different"] == 0
    assert summary["kinds"]["threshold within 4 ulp of an IoU"] > 10**5


# Coordinates and scores as hypothesis finds them: few values, so that ties, touching and equal boxes are common.
_VALUES = st.one_of(st.integers(-3, 9).map(float), st.floats(width=32), st.sampled_from([0.5, 1 / 3, 1e-30, 3e38]))


@pytest.mark.parametrize("width", [32, 64])
def test_fuzz_hypothesis(kernel_backend: str, width: int) -> None:
    dtype = {32: torch.float32, 64: torch.float64}[width]

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(
        rows=st.lists(st.tuples(*[_VALUES] * 5), max_size=40),
        threshold=st.one_of(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]), st.floats(width=width)),
    )
    def run(rows: list[tuple[float, ...]], threshold: float) -> None:
        values = torch.tensor(rows, dtype=dtype).reshape(-1, 5)
        check(values[:, :4], values[:, 4], threshold, kernel_backend, "hypothesis")

    run()


@pytest.mark.parametrize("regime", list(REGIMES))
@pytest.mark.parametrize("n", [63, 64, 65, 4095, 4096, 4097])
def test_sizes_around_blocks(kernel_backend: str, n: int, regime: str) -> None:
    g = np.random.default_rng(n)
    check(make_boxes(g, n, regime), torch.tensor(g.random(n, dtype=np.float32)), 0.5, kernel_backend, regime)


@pytest.mark.parametrize("threshold", [*ODD_THRESHOLDS, 0.0, 0.5])
@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp64"])
def test_odd_thresholds(backend: str, threshold: float, dtype: torch.dtype) -> None:
    g = np.random.default_rng(7)
    for odd in (0.0, 0.2):
        check(make_boxes(g, 90, "integers", dtype, odd), make_scores(g, 90, dtype), threshold, backend, f"odd {odd}")


def test_few_boxes_and_degenerate_ones(backend: str) -> None:
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    assert F.nms(box[:0], torch.empty(0), 0.5, backend=backend).shape == (0,)
    assert F.nms(box, torch.tensor([NAN]), 0.5, backend=backend).tolist() == [0]
    # Points, inverted boxes and boxes with NaN or infinite coordinates overlap nothing: 0 / 0 is not above any threshold.
    for bad in ([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, NAN, 2.0], [-INF, -INF, INF, INF]):
        boxes = torch.tensor([bad, bad, [0.0, 0.0, 2.0, 2.0]])
        assert F.nms(boxes, torch.tensor([0.1, 0.3, 0.2]), 0.0, backend=backend).tolist() == [1, 2, 0]


def test_iou_exactly_at_the_threshold(backend: str) -> None:
    boxes = torch.tensor([[0.0, 0.0, 6.0, 1.0], [4.0, 0.0, 10.0, 1.0]])  # IoU 0.2; in float32 a little above the double 0.2
    scores = torch.tensor([0.9, 0.8])
    assert F.nms(boxes, scores, 0.2, backend=backend).tolist() == [0]
    assert F.nms(boxes.double(), scores.double(), 0.2, backend=backend).tolist() == [0, 1]
    assert F.nms(boxes, scores, float(np.float32(0.2)), backend=backend).tolist() == [0, 1]


def test_ties_and_nan_scores_keep_input_order(backend: str) -> None:
    boxes = torch.tensor([[10.0 * i, 0.0, 10.0 * i + 5, 5.0] for i in range(8)])
    scores = torch.tensor([0.5, NAN, 0.5, -0.0, 0.0, -NAN, INF, -INF])
    assert F.nms(boxes, scores, 0.5, backend=backend).tolist() == [1, 5, 6, 0, 2, 3, 4, 7]


@pytest.mark.parametrize("axis", [0, 1])
def test_boxes_one_subnormal_wide(kernel_backend: str, axis: int) -> None:
    """Their areas are ordinary numbers, but a fraction of their width is not: bounds made of it must not cut them off."""
    low = torch.arange(400, dtype=torch.float32).div(2, rounding_mode="floor") * 1e34
    zero = torch.zeros_like(low)
    boxes = torch.stack([zero, low, zero + 2.8e-45, low + 8e33], 1).repeat(2, 1)[:, [axis, 1 - axis, 2 + axis, 3 - axis]]
    assert check(boxes, torch.linspace(1, 0, 800), 0.8, kernel_backend, "subnormal width") == 600


@pytest.mark.parametrize("regime", ["sparse", "clusters", "all_scales"])
def test_threads_do_not_change_the_result(kernel_backend: str, regime: str) -> None:
    g = np.random.default_rng(3)
    n = 40_000  # well inside what several threads share
    boxes, scores = make_boxes(g, n, regime), torch.tensor(g.integers(0, n // 2, n) / n)
    scores = scores.to(boxes)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(F.nms(boxes, scores, 0.3, backend=kernel_backend))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    sample = scores.sort(descending=True, stable=True)[1][:3000].sort()[
        0
    ]  # NMS of the best scores is the beginning of NMS of all
    best = F.nms(boxes[sample], scores[sample], 0.3, backend=kernel_backend)
    assert torch.equal(sample[best], results[0][: best.numel()])


def test_parallel_segment_equals_torchvision(kernel_backend: str) -> None:
    g = np.random.default_rng(4)
    n = 17_000
    boxes = make_boxes(g, n, "sparse", odd=0.001)
    check(boxes, torch.tensor(g.random(n, dtype=np.float32)), 0.1, kernel_backend, "sparse 17000")


@pytest.mark.parametrize("n", [100_000, 400_000])
def test_many_boxes(kernel_backend: str, n: int) -> None:
    g = np.random.default_rng(5)
    centres = g.uniform(0, 4000, (100, 2))[g.integers(0, 100, n)] + g.normal(0, 3, (n, 2))
    sides = 200 * np.exp(g.normal(0, 0.02, (n, 2)))
    boxes = torch.tensor(np.concatenate([centres - sides / 2, centres + sides / 2], 1), dtype=torch.float32)
    assert check(boxes, torch.tensor(g.random(n, dtype=np.float32)), 0.6, kernel_backend, "many") > n // 2


@pytest.mark.slow
def test_same_bits_with_every_instruction_set(kernel_backend: str) -> None:
    """The 16-byte kernels, which this machine would not choose by itself."""
    code = "from nms_fuzz import fuzz; print(fuzz(77, 100, 'cpu').suppressed > 1000)"
    env = {**os.environ, "DL4DS_CPU_ISA": "baseline", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_strided_inputs_are_read_and_left_alone(backend: str) -> None:
    g = np.random.default_rng(6)
    boxes, scores = make_boxes(g, 200, "uniform"), torch.tensor(g.random(200, dtype=np.float32))
    expected = oracle(boxes, scores, 0.4)
    wide = torch.full((400, 7), NAN)
    wide[::2, 1:5] = boxes
    column = torch.full((200, 3), NAN)
    column[:, 1] = scores
    before = wide.clone(), column.clone()
    assert torch.equal(F.nms(wide[::2, 1:5], column[:, 1], 0.4, backend=backend), expected)
    assert torch.equal(F.nms(boxes.t().contiguous().t(), scores, 0.4, backend=backend), expected)
    assert torch.equal(wide.nan_to_num(), before[0].nan_to_num()) and torch.equal(column.nan_to_num(), before[1].nan_to_num())


def test_inputs_that_require_grad(backend: str) -> None:
    g = np.random.default_rng(8)
    boxes, scores = make_boxes(g, 50, "uniform").requires_grad_(), torch.rand(50, requires_grad=True)
    keep = F.nms(boxes, scores, 0.4, backend=backend)
    assert not keep.requires_grad and torch.equal(keep, oracle(boxes.detach(), scores.detach(), 0.4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    g = np.random.default_rng(9)
    boxes, scores = make_boxes(g, 300, "uniform", dtype), torch.rand(300).to(dtype)
    assert torch.equal(F.nms(boxes, scores, 0.4, backend=backend), oracle(boxes.float(), scores.float(), 0.4))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = F.nms(boxes, scores.float(), 0.4, backend="cpu") if backend == "cpu" else None
        assert mixed is None or torch.equal(mixed, torch.ops.torchvision.nms(boxes, scores.float(), 0.4))


BAD_CALLS = {
    "boxes-1d": (BOXES[0], SCORES, r"nms: boxes: expected shape \(N, 4\), got \(4,\)"),
    "boxes-3-columns": (BOXES[:, :3], SCORES, r"nms: boxes: expected shape \(N, 4\), got \(4, 3\)"),
    "boxes-3d": (BOXES[None], SCORES, r"nms: boxes: expected shape \(N, 4\), got \(1, 4, 4\)"),
    "scores-too-few": (BOXES, SCORES[:3], r"nms: scores: expected shape \(4,\), one per box, got \(3,\)"),
    "scores-2d": (BOXES, SCORES[None], r"nms: scores: expected shape \(4,\), one per box, got \(1, 4\)"),
    "scores-dtype": (BOXES, SCORES.double(), r"nms: scores: expected dtype torch.float32 like boxes, got torch.float64"),
    "boxes-int": (BOXES.int(), SCORES.int(), r"nms: boxes: expected a float32.* got torch.int32"),
    "boxes-complex": (BOXES.cfloat(), SCORES, r"nms: boxes: expected a float32.* got torch.complex64"),
    "scores-meta": (BOXES, SCORES.to("meta"), r"nms: scores: expected a tensor on cpu like boxes, got meta"),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_bad_input_is_a_runtime_error(backend: str, name: str) -> None:
    boxes, scores, message = BAD_CALLS[name]
    if backend == "reference" and name not in ("boxes-1d", "boxes-3-columns", "boxes-3d"):
        pytest.skip("the reference computes whatever broadcasts")
    with pytest.raises(RuntimeError, match=message):
        F.nms(boxes, scores, 0.5, backend=backend)


def test_bad_input_to_the_op_itself(kernel_backend: str) -> None:
    ops = torch.ops.dl4ds_kernels
    for boxes, scores in ((BOXES[0], SCORES), (BOXES[:, :3], SCORES), (BOXES, SCORES[:3]), (BOXES, SCORES.double())):
        with pytest.raises(RuntimeError, match="nms: (boxes|scores): expected"):
            ops.nms(boxes, scores, 0.5)
    with pytest.raises(RuntimeError, match="batched_nms: classes: expected"):
        ops.batched_nms(BOXES, SCORES, torch.zeros(3, dtype=torch.int64), 0.5)
    with pytest.raises(RuntimeError, match="batched_nms: classes: expected dtype int64"):
        ops.batched_nms(BOXES, SCORES, torch.zeros(4, dtype=torch.int32), 0.5)
    with pytest.raises(RuntimeError, match="nms_padded: max_output: expected at least 0"):
        ops.nms_padded(BOXES[None], SCORES[None], None, 0.5, 0.0, -1)


@pytest.mark.parametrize("boxes", [[[0, 0, 1, 1]], np.zeros((1, 4)), None])
def test_not_a_tensor_is_a_type_error(boxes: object) -> None:
    with pytest.raises(TypeError, match="nms: boxes: expected a Tensor, got"):
        F.nms(boxes, SCORES[:1], 0.5)
