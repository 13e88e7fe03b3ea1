"""soft_nms, diou_nms, matrix_nms and darknet_nms against their papers' formulas, written out box by box in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _boxes import make_boxes
from torch import Tensor

from dl4ds_kernels import functional as F

Row = list[float]


def iou(a: Row, b: Row) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0.0) * max(h, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def diou(a: Row, b: Row) -> float:
    d2 = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    c2 = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    return iou(a, b) - d2 / c2


def problem(n: int, seed: int = 0, regime: str = "clusters") -> tuple[Tensor, Tensor, Tensor]:
    g = np.random.default_rng(seed)
    boxes = make_boxes(g, n, regime, torch.float64)
    return boxes, torch.tensor(g.permutation(n) / max(n, 1) * 0.9 + 0.05), torch.tensor(g.integers(0, 3, n))


def soft_nms_by_the_paper(
    boxes: list[Row], scores: Row, ids: list[int], method: str, nt: float, sigma: float, least: float
) -> tuple[list[int], Row]:
    """Figure 2 of the paper, with the rescoring of its equations and a cut-off for the end."""
    left, scores, keep, final = list(range(len(boxes))), list(scores), [], []
    while left:
        m = max(left, key=lambda i: scores[i])
        if scores[m] <= least:
            break
        left.remove(m)
        keep.append(m)
        final.append(scores[m])
        for i in left:
            u = iou(boxes[m], boxes[i])
            if ids[i] == ids[m]:
                scores[i] *= (1 - u if u >= nt else 1.0) if method == "linear" else math.exp(-(u**2) / sigma)
    return keep, final


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 60])
def test_soft_nms(n: int, classes: bool, method: str) -> None:
    for seed, (nt, sigma, least) in enumerate(((0.3, 0.5, 0.001), (0.5, 0.3, 0.2))):
        boxes, scores, ids = problem(n, seed)
        keep, final = F.soft_nms(
            boxes, scores, ids if classes else None, method=method, iou_threshold=nt, sigma=sigma, score_threshold=least
        )
        flat = ids.tolist() if classes else [0] * n
        expected = soft_nms_by_the_paper(boxes.tolist(), scores.tolist(), flat, method, nt, sigma, least)
        assert keep.tolist() == expected[0]
        torch.testing.assert_close(final, torch.tensor(expected[1], dtype=torch.float64))
        assert n < 60 or not torch.equal(final, scores[keep]), "some score must have decayed"


def test_soft_nms_gradient_and_limits() -> None:
    boxes, scores, _ = problem(12)
    scores = scores.requires_grad_()
    torch.autograd.gradcheck(lambda s: F.soft_nms(boxes, s, score_threshold=0.0)[1], (scores,))
    keep, final = F.soft_nms(boxes, scores, sigma=1e9)  # a Gaussian that decays nothing: all boxes by score
    assert torch.equal(keep, scores.sort(descending=True)[1]) and torch.allclose(final, scores[keep])
    assert F.soft_nms(boxes, torch.full_like(scores, math.nan))[0].numel() == 0


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.2, -0.3])
@pytest.mark.parametrize("n", [0, 1, 80])
def test_diou_nms(n: int, threshold: float, classes: bool) -> None:
    boxes, scores, ids = problem(n, 3)
    rows, left, expected = boxes.tolist(), scores.sort(descending=True)[1].tolist(), []
    while left:
        m, *rest = left
        expected.append(m)
        left = [i for i in rest if not (diou(rows[m], rows[i]) > threshold and (not classes or ids[i] == ids[m]))]
    assert F.diou_nms(boxes, scores, threshold, ids if classes else None).tolist() == expected


def test_diou_keeps_what_nms_drops() -> None:
    """Two boxes of nearly the same IoU with the first, about 1/2: the one with a shifted centre stays."""
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0], [0.6, 0.6, 3.4, 3.4]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert F.nms(boxes, scores, 0.48).tolist() == [0]
    assert F.diou_nms(boxes, scores, 0.48).tolist() == [0, 1]


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("n", [0, 1, 50])
def test_matrix_nms(n: int, classes: bool, method: str) -> None:
    boxes, scores, ids = problem(n, 4)
    rows, order = boxes.tolist(), scores.sort(descending=True)[1].tolist()
    sigma, expected = 2.0, scores.clone()

    def f(u: float) -> float:
        return 1 - u if method == "linear" else math.exp(-sigma * u * u)

    def overlap(i: int, j: int) -> float:
        return iou(rows[order[i]], rows[order[j]]) if not classes or ids[order[i]] == ids[order[j]] else 0.0

    for j in range(n):
        decay = 1.0
        for i in range(j):
            if not classes or ids[order[i]] == ids[order[j]]:
                decay = min(decay, f(overlap(i, j)) / f(max((overlap(k, i) for k in range(i)), default=0.0)))
        expected[order[j]] *= decay
    got = F.matrix_nms(boxes, scores, ids if classes else None, method=method, sigma=sigma)
    torch.testing.assert_close(got, expected)


def test_matrix_nms_gradient_and_duplicates() -> None:
    boxes, scores, _ = problem(8, 5)
    torch.autograd.gradcheck(lambda b, s: F.matrix_nms(b, s), (boxes.requires_grad_(), scores.requires_grad_()))
    same = torch.tensor([[0.0, 0.0, 2.0, 2.0]]).repeat(3, 1)
    assert F.matrix_nms(same, torch.tensor([0.9, 0.8, 0.7]), method="linear").tolist() == pytest.approx([0.9, 0.0, 0.0])


@pytest.mark.parametrize("n", [0, 1, 98])
@pytest.mark.parametrize("threshold", [0.4, 0.5])
def test_darknet_nms(threshold: float, n: int) -> None:
    """do_nms_sort: for each class, by descending probability, zero the later ones that overlap."""
    g = np.random.default_rng(n)
    boxes = make_boxes(g, n, "clusters", torch.float64)
    probs = torch.tensor(g.random((n, 20)) * (g.random((n, 20)) < 0.6))
    objectness = torch.tensor((g.random(n) < 0.9).astype(float))
    rows, expected = boxes.tolist(), (probs * (objectness != 0)[:, None]).tolist()
    for k in range(20):
        order = sorted(range(n), key=lambda i: -expected[i][k])
        for at, i in enumerate(order):
            if expected[i][k] == 0:
                continue
            for j in order[at + 1 :]:
                if iou(rows[i], rows[j]) > threshold:
                    expected[j][k] = 0.0
    got = F.darknet_nms(boxes, probs, threshold, objectness)
    assert torch.equal(got, torch.tensor(expected, dtype=torch.float64).reshape(n, 20))
    assert n < 98 or 0 < int((got > 0).sum()) < int((probs > 0).sum())


def test_darknet_nms_lets_a_box_stay_for_another_class() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9]])
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.3]], requires_grad=True)
    got = F.darknet_nms(boxes, probs, 0.4)
    assert torch.equal(got, torch.tensor([[0.9, 0.0], [0.0, 0.3]]))
    assert torch.equal(torch.autograd.grad(got.sum(), probs)[0], torch.eye(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    boxes, scores, _ = problem(30)
    boxes, scores = boxes.to(dtype), (scores * 0.5).to(dtype)
    assert torch.equal(F.diou_nms(boxes, scores, 0.4), F.diou_nms(boxes.float(), scores.float(), 0.4))
    assert F.soft_nms(boxes, scores)[1].dtype == F.matrix_nms(boxes, scores).dtype == dtype


BAD = torch.rand(4, 3), torch.rand(4)


@pytest.mark.parametrize("function", [F.soft_nms, F.matrix_nms, lambda b, s: F.diou_nms(b, s, 0.5)])
def test_errors(function: object) -> None:
    with pytest.raises(RuntimeError, match=r"_nms: boxes: expected shape \(N, 4\), got \(4, 3\)"):
        function(*BAD)
    with pytest.raises(RuntimeError, match=r"_nms: scores: expected shape \(4,\), one per box, got \(3,\)"):
        function(torch.rand(4, 4), torch.rand(3))
    with pytest.raises(TypeError, match="_nms: boxes: expected a Tensor, got list"):
        function([[0, 0, 1, 1]], torch.rand(1))


def test_more_errors() -> None:
    boxes, scores = torch.rand(4, 4), torch.rand(4)
    with pytest.raises(ValueError, match="soft_nms: method: expected 'linear' or 'gaussian', got 'hard'"):
        F.soft_nms(boxes, scores, method="hard")
    with pytest.raises(ValueError, match="soft_nms: sigma: expected a number above 0, got 0"):
        F.soft_nms(boxes, scores, sigma=0)
    with pytest.raises(ValueError, match="matrix_nms: method"):
        F.matrix_nms(boxes, scores, method="hard")
    with pytest.raises(RuntimeError, match="darknet_nms: probs: expected shape"):
        F.darknet_nms(boxes, scores, 0.4)
    with pytest.raises(RuntimeError, match="soft_nms: idxs: expected shape"):
        F.soft_nms(boxes, scores, torch.zeros(3))
