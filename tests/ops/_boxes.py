"""What the NMS tests share: torchvision as the oracle, ordinary boxes, and inputs made to break a shortcut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="torchvision is the oracle of these tests")
from torchvision.ops.boxes import _batched_nms_vanilla

FLOATS = (torch.float32, torch.float64)
# Two tensors that fit each other, for the error tests.
BOXES, SCORES = torch.rand(4, 4), torch.rand(4)
INF, NAN = float("inf"), float("nan")
# Values put into single coordinates and scores: not finite, signed zeros, subnormal, near overflow of a product or a sum.
SPECIAL = (NAN, INF, -INF, 0.0, -0.0, 1e38, -1e38, 3e38, 1e-45, 1e-38, 1e30, 1e-20)
SIZES = (0, 1, 2, 5, 15, 16, 17, 31, 63, 64, 65, 100, 257, 511, 512, 513, 600, 1000)
THRESHOLDS = (0.5, 0.3, 0.7, 1 / 3, 2 / 3, 0.0, 1e-5, 1e-4, 0.05, 0.9, 0.99)
ODD_THRESHOLDS = (-0.5, -1e-9, -0.0, 1.0, 1.5, NAN, INF, -INF, 1e-300, 1e300)


def _around(centres: np.ndarray, sides: np.ndarray) -> np.ndarray:
    return np.concatenate([centres - sides / 2, centres + sides / 2], 1)


def _uniform(g: np.random.Generator, n: int) -> np.ndarray:
    return _around(g.uniform(0, 100, (n, 2)), g.uniform(1, 40, (n, 2)))


def _integers(g: np.random.Generator, n: int) -> np.ndarray:
    corner = g.integers(0, 12, (n, 2))  # IoUs are simple fractions: many lie exactly at a threshold
    return np.concatenate([corner, corner + g.integers(0, 8, (n, 2))], 1).astype(np.float64)


def _sizes_of_all_scales(g: np.random.Generator, n: int) -> np.ndarray:
    return _around(g.uniform(0, 3000, (n, 2)), np.exp(g.uniform(0, 6, (n, 1)) + g.normal(0, 0.4, (n, 2))))


def _clusters(g: np.random.Generator, n: int) -> np.ndarray:
    centres = g.uniform(0, 500, (max(1, n // 20), 2))
    chosen = centres[g.integers(0, len(centres), n)] + g.normal(0, 2, (n, 2))
    return _around(chosen, 30 * np.exp(g.normal(0, 0.2, (n, 2))))


def _sparse(g: np.random.Generator, n: int) -> np.ndarray:
    return _around(g.uniform(0, 40 * max(n, 1) ** 0.5, (n, 2)), g.uniform(5, 25, (n, 2)))


def _far_away(g: np.random.Generator, n: int) -> np.ndarray:
    return _around(g.uniform(0, 1e6, (n, 2)), g.uniform(0, 1, (n, 2)) * 10 ** g.uniform(0, 5, (n, 2)))


def _one_scale(low: float, high: float):
    def make(g: np.random.Generator, n: int) -> np.ndarray:
        scale = 10.0 ** g.uniform(low, high)
        return _around(g.integers(0, 8, (n, 2)) * scale, g.integers(1, 9, (n, 2)) * scale)

    return make


def _mixed_scales(g: np.random.Generator, n: int) -> np.ndarray:
    scale = 10.0 ** g.uniform(-25, 20, (n, 1))
    return _around(g.uniform(-1, 1, (n, 2)) * scale, np.abs(g.normal(0, 1, (n, 2))) * scale)


REGIMES = {
    "uniform": _uniform,
    "integers": _integers,
    "all_scales": _sizes_of_all_scales,
    "clusters": _clusters,
    "sparse": _sparse,
    "far_away": _far_away,
    "subnormal": _one_scale(-42, -18),
    "huge": _one_scale(15, 37),
    "mixed_scales": _mixed_scales,
}


def make_boxes(g: np.random.Generator, n: int, regime: str, dtype: torch.dtype = torch.float32, odd: float = 0.0) -> Tensor:
    """(n, 4) boxes. ``odd``: the share of coordinates replaced by SPECIAL values; half as many boxes are inverted."""
    boxes = torch.tensor(REGIMES[regime](g, n)).to(dtype)
    if odd and n:
        boxes = torch.where(torch.tensor(g.random((n, 1)) < odd / 4), boxes[:, [2, 1, 0, 3]], boxes)
        boxes = torch.where(torch.tensor(g.random((n, 1)) < odd / 4), boxes[:, [2, 3, 0, 1]], boxes)
        boxes = torch.where(torch.tensor(g.random((n, 4)) < odd), torch.tensor(g.choice(SPECIAL, (n, 4))).to(dtype), boxes)
    return boxes


def make_scores(g: np.random.Generator, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n,) scores: distinct, few values (ties), with SPECIAL values, or only zeros of both signs and NaN."""
    kind = g.integers(0, 4)
    if kind == 0:
        scores = g.random(n)
    elif kind == 1:
        scores = g.integers(0, 5, n) / 4
    elif kind == 2:
        scores = np.where(g.random(n) < 0.1, g.choice(SPECIAL, n), g.normal(0, 1, n))
    else:
        scores = g.choice([0.0, -0.0, NAN, -NAN, 1e-45, -1e-45], n)
    return torch.tensor(scores).to(dtype)


def threshold_at_an_iou(g: np.random.Generator, boxes: Tensor) -> float | None:
    """An IoU that occurs among the boxes, or a neighbour of it at most 4 steps away in the boxes' dtype or 1 in double."""
    b = boxes[:8]
    wh = (torch.minimum(b[:, None, 2:], b[:, 2:]) - torch.maximum(b[:, None, :2], b[:, :2])).clamp(min=0)
    area = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    inter = wh[..., 0] * wh[..., 1]
    iou = (inter / (area[:, None] + area - inter)).flatten()
    iou = iou[(iou > 0) & (iou < 1)].numpy()
    if not iou.size:
        return None
    value = g.choice(iou)
    for _ in range(g.integers(0, 5)):
        value = np.nextafter(value, value.dtype.type(g.integers(0, 2)))
    return float(value) if g.random() < 0.5 else float(np.nextafter(np.float64(value), float(g.integers(0, 2))))


# ---- oracles ----------------------------------------------------------------------------------------------------------

oracle = torch.ops.torchvision.nms


def classwise_oracle(boxes: Tensor, scores: Tensor, idxs: Tensor, threshold: float) -> Tensor:
    """torchvision's class-by-class loop, with its final unstable sort replaced by a stable one."""
    rows = _batched_nms_vanilla(boxes, scores, idxs, threshold).sort()[0]
    return rows[scores[rows].sort(stable=True, descending=True)[1]]
