"""batched_nms and nms_padded: the loop over classes and images, in one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _boxes import BOXES, FLOATS, INF, NAN, SCORES, classwise_oracle, make_boxes, make_scores, oracle
from conftest import skip_unless_loaded
from torchvision.ops import batched_nms as trick

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


@pytest.mark.parametrize("ids", ["few", "80", "huge", "one", "all", "int32", "uint8", "bool", "float", "nan"])
@pytest.mark.parametrize("n", [40, 700, 5000])
def test_batched_equals_the_loop_over_classes(backend: str, n: int, ids: str) -> None:
    if backend == "reference" and (n > 700 or ids == "all"):
        pytest.skip("the reference is slow by design")
    g = np.random.default_rng(n)
    for regime in ("clusters", "uniform") if n < 5000 else ("clusters",):
        boxes, scores = make_boxes(g, n, regime, odd=0.02), make_scores(g, n)
        classes = {
            "few": lambda: g.integers(-2, 3, n), "80": lambda: g.integers(0, 80, n), "one": lambda: np.full(n, 7),
            "huge": lambda: g.choice([-(2**63), -1, 10**9, 2**63 - 1], n), "all": lambda: g.permutation(n),
            "int32": lambda: g.integers(-5, 5, n).astype(np.int32), "uint8": lambda: g.integers(0, 9, n).astype(np.uint8),
            "bool": lambda: g.random(n) < 0.5, "float": lambda: g.choice([0.5, -1.0, 1e30, -0.0, 0.0], n),
            "nan": lambda: g.choice([0.5, NAN], n),
        }[ids]()  # fmt: skip
        idxs = torch.tensor(classes)
        got = F.batched_nms(boxes, scores, idxs, 0.5, backend=backend)
        assert torch.equal(got, classwise_oracle(boxes, scores, idxs, 0.5))


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.0, NAN])
def test_batched_odd_thresholds(backend: str, threshold: float) -> None:
    g = np.random.default_rng(1)
    boxes, scores, idxs = make_boxes(g, 200, "integers", odd=0.1), make_scores(g, 200), torch.tensor(g.integers(0, 4, 200))
    got = F.batched_nms(boxes, scores, idxs, threshold, backend=backend)
    assert torch.equal(got, classwise_oracle(boxes, scores, idxs, threshold))


def test_batched_many_boxes_and_threads(kernel_backend: str) -> None:
    g = np.random.default_rng(2)
    n = 60_000
    boxes, scores = make_boxes(g, n, "clusters"), torch.tensor(g.random(n, dtype=np.float32))
    idxs = torch.tensor(g.zipf(1.5, n) % 90)  # classes of very different sizes
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(F.batched_nms(boxes, scores, idxs, 0.5, backend=kernel_backend))
    assert torch.equal(*results)
    assert torch.equal(results[0], classwise_oracle(boxes, scores, idxs, 0.5))


def test_batched_is_exact_where_the_coordinate_trick_is_not(backend: str) -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.0, 1.25, 1.0], [0.0, 0.0, 3e7, 1.0]])
    scores, idxs = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([5, 5, 0])
    assert F.batched_nms(boxes, scores, idxs, 0.5, backend=backend).tolist() == [0, 2]  # IoU 0.6
    assert trick(boxes, scores, idxs, 0.5).tolist() != [0, 2]


def test_batched_empty_takes_anything() -> None:
    keep = F.batched_nms(torch.empty((0, 4)), None, None, None)
    assert keep.shape == (0,) and keep.dtype == torch.int64


def test_batched_errors(backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"batched_nms: idxs: expected shape \(4,\) like scores, got \(3,\)"):
        F.batched_nms(BOXES, SCORES, torch.zeros(3), 0.5, backend=backend)
    with pytest.raises(TypeError, match="batched_nms: idxs: expected a Tensor, got list"):
        F.batched_nms(BOXES, SCORES, [0, 0, 0, 0], 0.5, backend=backend)


# ---- nms_padded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16], ids=["fp32", "fp64", "fp16"])
@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize("shape", [(0, 7), (1, 0), (1, 300), (3, 90), (2, 900)])
def test_padded_equals_the_reference(
    kernel_backend: str, shape: tuple[int, int], classes: int | None, dtype: torch.dtype
) -> None:
    g = np.random.default_rng(11)
    batch, n = shape
    boxes = make_boxes(g, batch * n, "clusters", dtype, odd=0.02).view(batch, n, 4)
    scores = torch.tensor(g.normal(0.3, 0.4, (batch, n))).to(dtype).masked_fill(torch.rand(batch, n) < 0.05, NAN)
    ids = None if classes is None else torch.tensor(g.integers(0, classes, (batch, n)))
    for score_threshold, max_output in ((0.0, 20), (0.5, 7), (-INF, 10_000), (INF, 3), (0.0, 0)):
        options = {"iou_threshold": 0.4, "score_threshold": score_threshold, "max_output": max_output}
        keep, count = F.nms_padded(boxes, scores, ids, **options, backend=kernel_backend)
        expected = F.nms_padded(boxes, scores, ids, **options, backend="reference")
        assert keep.shape == (batch, max_output) and count.shape == (batch,) and keep.dtype == count.dtype == torch.int64
        assert torch.equal(keep, expected[0]) and torch.equal(count, expected[1])


def test_padded_is_nms_with_filler(backend: str) -> None:
    g = np.random.default_rng(12)
    boxes, scores = make_boxes(g, 150, "uniform"), torch.rand(150) + 0.01
    expected = oracle(boxes, scores, 0.3)
    keep, count = F.nms_padded(boxes[None], scores[None], iou_threshold=0.3, max_output=150, backend=backend)
    assert count.tolist() == [expected.numel()]
    assert torch.equal(keep[0, : expected.numel()], expected) and (keep[0, expected.numel() :] == -1).all()


def test_padded_errors(backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"nms_padded: boxes: expected shape \(B, N, 4\), got \(4, 4\)"):
        F.nms_padded(BOXES, SCORES, iou_threshold=0.5, max_output=2, backend=backend)
    with pytest.raises(RuntimeError, match=r"nms_padded: class_ids: expected shape \(1, 4\) like scores"):
        F.nms_padded(BOXES[None], SCORES[None], torch.zeros(4), iou_threshold=0.5, max_output=2, backend=backend)
    with pytest.raises(RuntimeError, match="nms_padded: max_output|negative"):
        F.nms_padded(BOXES[None], SCORES[None], iou_threshold=0.5, max_output=-1, backend=backend)
