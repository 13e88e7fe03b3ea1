"""Calls of NMS: images of one block and of several rounds, classes in small and large bins, filters, ties, special values.

The truth is torchvision's CUDA arithmetic, transcribed pair by pair in tests/ops/_nms_cuda.py; results are equal or wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..report import Report
from .limits import Limits, small_work
from .workload import Case, Results, Truth

sys.path.append(str(Path(__file__).resolve().parents[2] / "ops"))  # as pytest does for the tests of NMS
from _boxes import make_boxes, make_scores
from _nms_cuda import launch, padded_transcription

_CHEAP = {"wide_loads": False, "wide_stores": False}  # scalar keys and counters: 4 or 8 bytes a thread, whole sectors
_ANY = float("inf")
LIMITS = [
    Limits(
        "nms_image_kernel",
        "cuda",
        load=0.07,
        store=0.9,
        waves=1.3,
        again=8.0,
        instructions=_ANY,
        registers=96,
        **_CHEAP,
        note="bound by the sort and the pair tests in shared memory; each box is fetched once, by rank: half a sector",
    ),
    Limits("nms_keys_kernel", "cuda", **_CHEAP),
    Limits(
        "nms_count_kernel",
        "cuda",
        store=0.45,
        waves=4.0,
        again=1.2,
        **_CHEAP,
        note="a counter per digit and tile, stored digit by digit; lanes add to counters of scattered digits",
    ),
    Limits("nms_scan_kernel", "cuda", instructions=_ANY, **_CHEAP, note="a block an image over 256 counters a tile"),
    Limits(
        "nms_scatter_kernel",
        "cuda",
        load=0.9,
        store=0.2,
        waves=4.3,
        again=3.0,
        **_CHEAP,
        note="stores go where the digits send them; the L2 cache joins them to sectors",
    ),
    Limits("nms_classes_kernel", "cuda", load=0.4, again=1.5, **_CHEAP, note="classes are fetched by rank"),
    Limits(
        "nms_gather_kernel",
        "cuda",
        load=0.17,
        store=0.5,
        again=4.0,
        **_CHEAP,
        note="boxes are fetched by rank; flags are single bytes and bins begin here and there",
    ),
    Limits("nms_large_kernel", "cuda", again=1.5, instructions=_ANY, **_CHEAP, note="a block an image over its bins"),
    Limits(
        "nms_bins_kernel",
        "cuda",
        store=0.1,
        waves=1.5,
        again=30.0,
        instructions=_ANY,
        registers=96,
        **_CHEAP,
        note="bound by the pair tests in shared memory; a kept box stores one byte",
    ),
    Limits(
        "nms_mask_kernel",
        "cuda",
        load=0.55,
        waves=1.1,
        again=_ANY,
        instructions=_ANY,
        registers=96,
        **_CHEAP,
        note="bound by the pair tests; in a round with nothing left every block reads the same few counters",
    ),
    Limits(
        "nms_decide_kernel",
        "cuda",
        load=0.8,
        store=0.5,
        again=_ANY,
        instructions=_ANY,
        **_CHEAP,
        note="a chain of dependent words of bits; in a round with nothing left every block reads the same few counters",
    ),
    Limits(
        "nms_push_kernel",
        "cuda",
        again=8.5,
        instructions=_ANY,
        registers=96,
        **_CHEAP,
        note="bound by the pair tests; blocks share the boxes just kept",
    ),
    Limits(
        "nms_output_kernel",
        "cuda",
        load=0.17,
        store=0.35,
        again=3.6,
        instructions=165,
        **_CHEAP,
        note="kept indices are fetched and stored eight apart in a warp",
    ),
    small_work(
        "nms_mask_kernel",
        "triton",
        load=0.5,  # fp64; the other types 0.6
        store=0.12,
        again=50.0,
        registers=128,
        note="bound by the pair tests; each program stores one word of 64 rows that lie a row apart",
    ),
    small_work("nms_decide_kernel", "triton", note="one warp an image, box after box"),
    small_work(
        "nms_push_kernel",
        "triton",
        again=160.0,
        registers=128,
        note="bound by the pair tests; programs share the boxes just kept",
    ),
]
MUTANTS_PER_OPERATOR = 1  # a call of more than 1024 boxes is a chain of some twenty launches, all of which are simulated
WRITTEN: dict[str, set[str]] = {}


def changed(kernel: str, name: str, given: dict[str, Any]) -> bool:
    """What a Triton kernel writes parts of."""
    return name == {"nms_mask_kernel": "mask", "nms_decide_kernel": "keep", "nms_push_kernel": "alive"}[kernel]


def _operands(t: dict[str, Any]) -> list[Any]:
    return [t[n] for n in ("boxes", "scores", "classes", "threshold", "score_threshold", "max_output")]


def cuda(case: Case, options: dict[str, int]) -> tuple[Results, list[Report]]:
    """The call through the launcher that ships."""
    keep, count, reports = launch(*_operands(case.arguments), **options)
    return {"keep": keep, "count": count}, reports


def triton(case: Case) -> Results:
    """The call through the host functions of the Triton backend."""
    from dl4ds_kernels._triton import nms

    boxes, scores, classes, threshold, score_threshold, most = _operands(case.arguments)
    if score_threshold is not None:
        keep, count = nms.nms_padded(boxes, scores, classes, threshold, score_threshold, most)
        return {"keep": keep, "count": count}
    keep, count = torch.full((boxes.shape[0], most), -1), torch.zeros(boxes.shape[0], dtype=torch.int64)
    for b in range(boxes.shape[0]):
        kept = (
            nms.nms(boxes[b], scores[b], threshold)
            if classes is None
            else nms.batched_nms(boxes[b], scores[b], classes[b], threshold)
        )[:most]
        keep[b, : len(kept)], count[b] = kept, len(kept)
    return {"keep": keep, "count": count}


def triton_runs(case: Case) -> bool:
    """Two rounds suffice there but for one call of three: torch sorts, and there are no bins."""
    _, n, _ = case.arguments["boxes"].shape
    return 0 < n <= 1324 or n in (2100, 4096)


# batch, boxes, regime, classes (a number, or a key of class_ids), IoU threshold, score threshold, max_output
CALLS = [
    (2, 0, "clusters", 0, 0.5, None, 3), (1, 1, "clusters", 0, 0.5, None, 1), (2, 7, "integers", 0, 1 / 3, None, 7),
    (1, 33, "clusters", 3, 0.5, 0.2, 40), (2, 64, "uniform", 0, 0.3, None, 64), (1, 65, "integers", 2, 0.25, -1.0, 9),
    (1, 130, "mixed_scales", 0, 0.5, None, 130), (1, 130, "huge", 0, 0.5, None, 130),
    (1, 140, "subnormal", 0, 0.3, None, 140), (1, 200, "clusters", "any", 0.5, None, 200),
    (1, 200, "clusters", 0, float("nan"), None, 200), (1, 90, "integers", 0, -0.5, None, 90),
    (1, 300, "integers", 0, 0.5, 0.0, 300), (1, 513, "sparse", 4, 0.05, None, 513),
    (1, 400, "every", 0, 0.3, None, 400), (1, 1100, "every", 0, 0.5, None, 1100), (2, 1030, "integers", 0, 0.4, 0.1, 50),
    (1, 1200, "sparse", 4, 0.5, None, 1200), (1, 1120, "every", 3, 0.3, None, 1120),
    (1, 1080, "clusters", "any", 0.5, 0.0, 1080),
    (1, 1324, "clusters", "full bin", 0.6, -1.0, 700), (1, 1300, "clusters", "large bin", 0.6, None, 1300),
    (1, 2100, "every", 0, 1 / 3, None, 2100), (1, 2300, "every", "large bins", 0.5, None, 2300),
    # Every number of boxes in the last word of bits, and boxes whose sides and overlaps must be rounded.
    *((1, n, "sparse", 0, 0.5, None, n) for n in range(67, 96)), (1, 600, "corners", 0, 0.9, None, 600),
    (1, 1090, "corners", 0, 0.9, None, 1090), (1, 1050, "corners", 4, 0.9, None, 1050),
    # Every number of items that a warp sorts in its last round.
    *((1, n, "sparse", 0, 0.5, None, 2) for n in (1080, 1130, 1160, 1220, 1275)),
]  # fmt: skip


def class_ids(kind: int | str, batch: int, n: int, g: np.random.Generator) -> Tensor | None:
    """That many classes (0: none); any: ids that share a bin, negative and huge ones; or most boxes in one bin."""
    if kind == 0:
        return None
    if kind == "any":
        return torch.tensor(g.choice([5, 4 + 4096, 7 + 2 * 4096, -1, 0, 2**63 - 1, -(2**63), 10**9, 2**40 + 3], (batch, n)))
    if kind == "full bin":  # as many as one block solves, and the bins around it
        return torch.tensor(g.permuted(np.tile(np.r_[np.full(1024, 7), np.arange(n - 1024) % 3 * 4], (batch, 1)), axis=1))
    if kind == "large bins":
        return torch.tensor(g.choice([40, 2047, *range(3)], (batch, n), p=[0.475, 0.475, 0.02, 0.02, 0.01]))
    if kind == "large bin":
        return torch.tensor(np.where(g.random((batch, n)) < 0.1, g.integers(0, 3, (batch, n)), 4095))
    return torch.tensor(g.integers(0, kind, (batch, n)) ** 2)


def some_boxes(g: np.random.Generator, n: int, regime: str, dtype: torch.dtype, even: bool) -> Tensor:
    """(n, 4): a regime of _boxes.py, corners (sides of many digits), or every: a part of each regime in one image."""
    if regime == "corners":
        return torch.tensor(np.concatenate([g.uniform(0, 1, (n, 2)), g.uniform(100, 200, (n, 2))], 1)).to(dtype)
    if regime == "every":
        kinds = ("sparse", "clusters", "corners", "huge", "integers", "subnormal", "mixed_scales")
        parts = [some_boxes(g, n // len(kinds) + 1, kind, dtype, even) for kind in kinds]
        return torch.cat(parts)[torch.tensor(g.permutation(len(kinds) * (n // len(kinds) + 1))[:n])]
    return make_boxes(g, n, regime, dtype, odd=0.0 if even else 0.03)


def call(batch: int, n: int, regime: str, classes: int | str, threshold: float, least: float | None, most: int,
         dtype: torch.dtype, even: bool = False) -> Case:  # fmt: skip
    """One case; boxes and scores with special values among them, but for even ones."""
    g = np.random.default_rng(1000 * n + batch)
    boxes = torch.stack([some_boxes(g, n, regime, dtype, even) for _ in range(batch)])
    scores = torch.stack([make_scores(g, n, dtype) for _ in range(batch)])
    if even or least is not None:
        scores = torch.tensor(g.permutation(2 * batch * n)[: batch * n].reshape(batch, n) / (batch * n) - 1).to(dtype)
        scores[:, 5::37] = 0.5 if even else float("nan")
    ids = class_ids(classes, batch, n, g)
    arguments = {
        "boxes": boxes, "scores": scores, "classes": ids, "threshold": threshold, "score_threshold": least, "max_output": most,
    }  # fmt: skip

    def truth() -> Truth:
        keep, count = padded_transcription(boxes, scores, ids, threshold, least, most)
        return {"keep": (keep, 0.0), "count": (count, 0.0)}

    label = f"{'even-' if even else ''}{batch}x{n}-{regime}-{classes}-{'all' if least is None else 'filter'}"
    return Case("nms", "fwd", label, arguments, truth, few_blocks=n > 2000 and not even, even=even)


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype."""
    found = [call(*values, dtype) for values in CALLS]
    found += [call(1, 1024, "sparse", 0, 0.5, None, 1024, dtype, even=True)]
    return found + [call(1, 4096, "sparse", classes, 0.5, 0.0, 4096, dtype, even=True) for classes in (0, 8)]
