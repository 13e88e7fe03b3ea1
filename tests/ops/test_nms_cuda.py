"""The CUDA kernels of NMS, executed on the PTX simulator through the launcher and the host functions that ship.

Equal to torchvision's CUDA arithmetic, transcribed pair by pair in _nms_cuda.py; every launch is free of findings.
"""

from __future__ import annotations

from collections.abc import Callable

import _cuda_launch as cuda
import numpy as np
import pytest
import torch
from _boxes import make_boxes, make_scores
from _cuda_host import host
from _nms_cuda import fma, launch, padded_transcription, suppressed, transcription
from ptxsim.fixture import require_nvcc, require_simulator
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")
SOURCE = cuda.CSRC / "ops/nms/nms_fwd.cu"
REGIMES = ("clusters", "uniform", "integers", "mixed_scales", "huge", "subnormal")
THRESHOLDS = (0.5, 0.3, 1 / 3, 0.05, 0.7, 0.0, 1.0, 1.5, -0.5, -0.0, 1e-5, NAN, INF, 1e300)


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_simulator()
    require_nvcc()


def problem(
    seed: int, batch: int, n: int, regime: str, dtype: torch.dtype, classes: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    g = np.random.default_rng(seed)
    boxes = torch.stack([make_boxes(g, n, regime, dtype, odd=0.03) for _ in range(batch)])
    scores = torch.stack([make_scores(g, n, dtype) for _ in range(batch)])
    return boxes, scores, torch.tensor(g.integers(0, classes, (batch, n))) if classes else None


def check(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, threshold: float, score_threshold: float | None = None,
    max_output: int | None = None, **options: int,
) -> int:  # fmt: skip
    """Compare with the transcription; returns how many boxes were suppressed or left out."""
    most = scores.shape[1] if max_output is None else max_output
    keep, count, _ = launch(boxes, scores, classes, threshold, score_threshold, most, **options)
    expected = padded_transcription(boxes, scores, classes, threshold, score_threshold, most)
    assert torch.equal(count, expected[1]), f"threshold {threshold!r}"
    assert torch.equal(keep, expected[0]), f"threshold {threshold!r}"
    return scores.numel() - int(count.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 31, 32, 63, 64, 65, 127, 129, 300, 1023, 1024])
def test_one_block_per_image(n: int, dtype: torch.dtype) -> None:
    """Images solved in shared memory, sort included."""
    regime = REGIMES[(n + DTYPES.index(dtype)) % len(REGIMES)]
    check(*problem(n, 2, n, regime, dtype), THRESHOLDS[n % 6])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_thresholds(threshold: float, dtype: torch.dtype) -> None:
    for i, regime in enumerate(REGIMES):
        check(*problem(i, 1, 70, regime, dtype), threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds_at_an_iou(dtype: torch.dtype) -> None:
    """The quotient as it is, and its neighbours up to 4 units away: where a test without a division could go wrong."""
    g = np.random.default_rng(5)
    suppressed_in_all = 0
    for case in range(40):
        regime = ("clusters", "uniform", "integers")[case % 3]
        boxes, scores = make_boxes(g, 48, regime, dtype), torch.tensor(g.permutation(48) / 48).to(dtype)
        wide = boxes.double()
        wh = (torch.minimum(wide[0, 2:], wide[1:, 2:]) - torch.maximum(wide[0, :2], wide[1:, :2])).clamp(min=0)
        inter = wh.prod(1)
        area = (wide[:, 2:] - wide[:, :2]).prod(1)
        iou = (inter / (area[0] + area[1:] - inter)).float().numpy()
        iou = iou[(iou > 0) & (iou < 1)]
        threshold = g.choice(iou) if iou.size else np.float32(0.5)
        for _ in range(g.integers(0, 5)):
            threshold = np.nextafter(threshold, np.float32(g.integers(0, 2)))
        suppressed_in_all += check(boxes[None], scores[None], None, float(threshold))
    assert suppressed_in_all > 100


def test_near_the_threshold_in_ulps() -> None:
    """Pairs made so that the rounded quotient lies within 4 ulp of the threshold; about half on each side."""
    g = np.random.default_rng(6)
    n = 1000
    a = np.concatenate([np.zeros((n, 2)), g.uniform(1, 100, (n, 2))], 1).astype(np.float32)
    hits = []
    for i in range(0, n, 2):
        b = a[i].copy()
        b[2] *= np.float32(g.uniform(0.2, 0.9))  # inside a: the quotient is near the ratio of the widths
        ratio = np.float32(b[2] * b[3]) / np.float32(a[i, 2] * a[i, 3])
        threshold = ratio
        for _ in range(int(g.integers(0, 5))):
            threshold = np.nextafter(threshold, np.float32(g.integers(0, 2)))
        expected = bool(suppressed(a[i], b[None], float(threshold), False)[0])
        hits.append(expected)
        if i % 40 == 0:
            boxes = torch.tensor(np.stack([a[i], b]))[None]
            count = launch(boxes, torch.tensor([[2.0, 1.0]]), None, float(threshold))[1]
            assert int(count) == 2 - expected
    assert 0.1 < np.mean(hits) < 0.9


def test_threshold_is_narrowed_to_float() -> None:
    """IoU exactly float32(0.3): the CPU rule compares 0.3f with the double 0.3 and suppresses, the CUDA rule does not."""
    a, b = [0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 3.0, 1.0]
    boxes, scores = torch.tensor([[a, b]]), torch.tensor([[0.9, 0.8]])
    assert launch(boxes, scores, None, 0.3)[1].tolist() == [2]
    assert launch(boxes, scores, None, float(np.nextafter(np.float32(0.3), np.float32(0))))[1].tolist() == [1]
    assert torch.ops.torchvision.nms(boxes[0], scores[0], 0.3).tolist() == [0]


def test_order() -> None:
    """NaN first, ties by index, the zeros tie: torch's stable descending order, in every dtype."""
    boxes = torch.tensor([[10.0 * i, 0.0, 10.0 * i + 5, 5.0] for i in range(8)])[None]
    scores = torch.tensor([[0.5, NAN, 0.5, -0.0, 0.0, -NAN, INF, -INF]])
    for dtype in DTYPES:
        keep, _, _ = launch(boxes.to(dtype), scores.to(dtype), None, 0.5)
        assert keep.tolist() == [[1, 5, 6, 0, 2, 3, 4, 7]]
        many = torch.cat([boxes + 100 * k for k in range(300)], 1).to(dtype)  # the radix sort
        keep, _, _ = launch(many, scores.repeat(1, 300).to(dtype), None, 0.5)
        assert torch.equal(keep[0], scores.to(dtype).repeat(1, 300)[0].sort(stable=True, descending=True)[1])


LARGE = [
    (1025, "clusters", torch.float32), (1500, "integers", torch.float64), (2047, "uniform", torch.float16),
    (2048, "mixed_scales", torch.float32), (2049, "clusters", torch.bfloat16), (2500, "sparse", torch.float64),
]  # fmt: skip


@pytest.mark.parametrize(("n", "regime", "dtype"), LARGE, ids=str)
def test_rounds(n: int, regime: str, dtype: torch.dtype) -> None:
    """More boxes than a block holds: radix sort, bit mask, later chunks."""
    check(*problem(n, 1, n, regime, dtype), 0.4)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4095, 4096, 4097])
def test_around_4096(n: int) -> None:
    assert check(*problem(n, 1, n, "clusters", torch.float32), 0.5) > n // 2
    boxes, scores, _ = problem(n, 1, n, "sparse", torch.float32)
    check(boxes, scores, None, 0.3)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [4095, 4096, 4097, 10_000])
def test_large_in_every_dtype(n: int, dtype: torch.dtype) -> None:
    for regime in ("clusters", "all_scales", "uniform"):
        check(*problem(n, 1, n, regime, dtype, classes=5 if regime == "all_scales" else 0), 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "n", "classes"), [(3, 200, 4), (1, 1100, 3), (2, 1300, 90), (1, 2600, 2)])
def test_classes(batch: int, n: int, classes: int, dtype: torch.dtype) -> None:
    """Small bins (a block each) and large ones (rounds) in one call; several images."""
    if n > 1300 and dtype in (torch.float16, torch.float64):
        pytest.skip("bins of this size are one of float32's and bfloat16's cases")
    check(*problem(n, batch, n, "clusters", dtype, classes), 0.5)


@pytest.mark.parametrize("n", [300, 1300])
def test_any_class_ids(n: int) -> None:
    """Classes that share a bin, negative ids and the limits of int64: none suppresses another."""
    boxes, scores, _ = problem(7, 1, n, "clusters", torch.float32)
    g = np.random.default_rng(8)
    twins = [5, 4 + 4096, 7 + 2 * 4096]  # 5 = 4 ^ 1 = 7 ^ 2
    ids = torch.tensor(g.choice([*twins, -1, 0, 2**63 - 1, -(2**63), 10**9], (1, n)))
    check(boxes, scores, torch.tensor(g.choice(twins, (1, n))), 0.5)
    check(boxes, scores, ids, 0.5)


@pytest.mark.parametrize(("batch", "n", "classes"), [(3, 150, 0), (2, 150, 5), (2, 1200, 0), (1, 2400, 0), (2, 1200, 3)])
def test_padded(batch: int, n: int, classes: int) -> None:
    """Score thresholds, NaN scores left out, few and no outputs; images end in different rounds."""
    boxes, scores, ids = problem(n, batch, n, "clusters", torch.float32, classes)
    scores[0] = torch.linspace(-1, 1, n)
    for score_threshold, max_output in ((0.0, 20), (0.5, 7), (-INF, n + 70), (INF, 3), (NAN, 5), (0.0, 0), (-0.9, n)):
        check(boxes, scores, ids, 0.4, score_threshold, max_output)


def test_every_schedule_gives_the_same() -> None:
    """No finding and the same indices whatever the order of blocks and warps."""
    for classes in (0, 4):
        boxes, scores, ids = problem(9, 2, 1400, "clusters", torch.float32, classes)
        results = [launch(boxes, scores, ids, 0.5, schedule=s)[0] for s in (0, 1, 17)]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    boxes, scores, ids = problem(9, 1, 200, "clusters", torch.float32, 4)
    assert torch.equal(launch(boxes, scores, ids, 0.5)[0], launch(boxes, scores, ids, 0.5, schedule=3)[0])


# ---- the host functions, through the dispatcher


def test_host_functions() -> None:
    boxes, scores, ids = problem(11, 2, 90, "clusters", torch.float32, 3)
    assert torch.equal(host()("nms", boxes[0], scores[0], 0.5), transcription(boxes[0], scores[0], 0.5))
    keep = host()("batched_nms", boxes[0], scores[0], ids[0], 0.5)
    assert torch.equal(keep, transcription(boxes[0], scores[0], 0.5, ids[0]))
    for classes in (None, ids):
        got = host()("nms_padded", boxes, scores, classes, 0.5, 0.1, 30)
        expected = padded_transcription(boxes, scores, classes, 0.5, 0.1, 30)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    strided = torch.stack([boxes, boxes], -1)[..., 0]
    assert torch.equal(host()("nms_padded", strided, scores, None, 0.5, 0.1, 30)[0],
                       host()("nms_padded", boxes, scores, None, 0.5, 0.1, 30)[0])  # fmt: skip
    large = problem(12, 1, 1300, "clusters", torch.float32)
    assert torch.equal(host()("nms", large[0][0], large[1][0], 0.5), transcription(large[0][0], large[1][0], 0.5))


def test_host_functions_of_nothing() -> None:
    assert host()("nms", torch.empty(0, 4), torch.empty(0), 0.5).shape == (0,)
    keep, count = host()("nms_padded", torch.empty(0, 5, 4), torch.empty(0, 5), None, 0.5, 0.0, 3)
    assert keep.shape == (0, 3) and count.shape == (0,)
    keep, count = host()("nms_padded", torch.empty(2, 0, 4), torch.empty(2, 0), None, 0.5, 0.0, 3)
    assert keep.tolist() == [[-1] * 3] * 2 and count.tolist() == [0, 0]


B, S = torch.rand(4, 4), torch.rand(4)
WRONG: dict[str, Callable[[], object]] = {
    r"nms: boxes: expected shape \(N, 4\)": lambda: host()("nms", B[:, :3], S, 0.5),
    r"nms: boxes: not implemented for": lambda: host()("nms", B.int(), S.int(), 0.5),
    r"nms: scores: expected one per box": lambda: host()("nms", B, S[:3], 0.5),
    r"nms: scores: expected dtype float32 like boxes, got float64": lambda: host()("nms", B, S.double(), 0.5),
    r"batched_nms: classes: expected dtype int64": lambda: host()("batched_nms", B, S, torch.zeros(4).int(), 0.5),
    r"batched_nms: classes: expected the shape": lambda: host()("batched_nms", B, S, torch.zeros(3).long(), 0.5),
    r"nms_padded: max_output: expected at least 0": lambda: host()("nms_padded", B[None], S[None], None, 0.5, 0.0, -1),
}


@pytest.mark.parametrize("message", WRONG)
def test_messages(message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        WRONG[message]()


def test_fma_of_the_transcription() -> None:
    """float32: against exact rational arithmetic."""
    from fractions import Fraction

    g = np.random.default_rng(1)
    for _ in range(2000):
        a, b = (np.float32(g.normal() * 10.0 ** g.integers(-3, 4)) for _ in range(2))
        c = np.float32(-float(a) * float(b) * g.choice([1.0, 0.5, 1 + 2.0**-22, 1e-7, 3e7]))
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        got = fma(np.array([a]), np.array([b]), np.array([c]))[0]
        below, above = np.nextafter(got, np.float32(-INF)), np.nextafter(got, np.float32(INF))
        assert all(abs(Fraction(float(got)) - exact) <= abs(Fraction(float(v)) - exact) for v in (below, above))
