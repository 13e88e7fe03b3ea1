"""Seeded fuzz driver: ``F.nms`` against torchvision on the CPU, index for index.

    python tests/ops/nms_fuzz.py --cases 1000000 --jobs 2 --out bench/results/nms_fuzz.json

Every case is a function of (seed, case number). Boxes are of a regime (_boxes.py: overlapping, sparse, fractions, all
scales, subnormal, near overflow), some with coordinates not finite or inverted; scores have ties and NaN; thresholds are
usual, odd, or an IoU that occurs among the boxes, moved by at most 4 units in the last place. The default suite runs a
share, ``-m full`` 10^6.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from _boxes import FLOATS, ODD_THRESHOLDS, REGIMES, SIZES, THRESHOLDS, make_boxes, make_scores, oracle, threshold_at_an_iou
from torch import Tensor

from dl4ds_kernels import functional as F

BLOCK = 5000  # cases of one seed
MANY = (1, 2, 5, 16, 17, 33, 40, 64, 65, 100, 129, 200, 513, 600)


@dataclass
class Tally:
    """What a run has seen."""

    cases: int = 0
    boxes: int = 0
    suppressed: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.cases += other.cases
        self.boxes += other.boxes
        self.suppressed += other.suppressed
        self.seen += other.seen


def check(boxes: Tensor, scores: Tensor, threshold: float, backend: str, what: str) -> int:
    """Compare with torchvision; returns how many boxes were suppressed."""
    expected = oracle(boxes, scores, threshold)
    got = F.nms(boxes, scores, threshold, backend=backend)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected), f"{what}: threshold {threshold!r}: kept {got.numel()}, torchvision {expected.numel()}"
    return boxes.shape[0] - expected.numel()


def fuzz(seed: int, cases: int, backend: str, sizes: tuple[int, ...] = SIZES) -> Tally:
    """``cases`` random calls; AssertionError, naming seed and case, at the first that differs."""
    g = np.random.default_rng(seed)
    tally = Tally()
    for case in range(cases):
        dtype = FLOATS[int(g.random() < 0.3)]
        n, regime = int(g.choice(sizes)), str(g.choice(list(REGIMES)))
        odd = float(g.choice([0.0, 0.0, 0.05, 0.2]))
        boxes = make_boxes(g, n, regime, dtype, odd=odd)
        scores = make_scores(g, n, dtype)
        draw = g.random()
        kind = "usual" if draw < 0.5 else "random" if draw < 0.9 else "odd"
        threshold = float(g.choice({"usual": THRESHOLDS, "odd": ODD_THRESHOLDS}[kind]) if kind != "random" else g.random())
        if g.random() < 0.3 and (near := threshold_at_an_iou(g, boxes)):
            threshold, kind = near, "within 4 ulp of an IoU"
        tally.suppressed += check(boxes, scores, threshold, backend, f"seed {seed} case {case} {regime} n={n} {dtype}")
        tally.cases += 1
        tally.boxes += n
        tally.seen.update((f"threshold {kind}", f"boxes {regime}", str(dtype).removeprefix("torch.")))
        tally.seen["with odd coordinates"] += odd > 0
    return tally


def _block(seed: int, cases: int) -> Tally:
    torch.set_num_threads(1)
    return fuzz(seed, cases, "cpu", MANY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=10_000, help="of the first block")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON summary; one that is there is continued with the next seeds")
    options = parser.parse_args()
    total, start = Tally(), time.perf_counter()
    before = json.loads(options.out.read_text()) if options.out and options.out.exists() else None
    if before:
        total = Tally(before["cases"], before["boxes"], before["suppressed"], Counter(before["kinds"]))
        options.seed, options.cases = before["next_seed"], options.cases - before["cases"]
    sizes = [min(BLOCK, options.cases - done) for done in range(0, options.cases, BLOCK)]
    with ProcessPoolExecutor(options.jobs) as pool:
        for tally in pool.map(_block, range(options.seed, options.seed + len(sizes)), sizes):
            total.add(tally)
            print(f"\r{total.cases} cases equal, {time.perf_counter() - start:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    import torchvision

    summary = {
        "what": "dl4ds_kernels.functional.nms (backend cpu) equals torchvision.ops.nms, index for index",
        "cases": total.cases, "different": 0, "boxes": total.boxes, "suppressed": total.suppressed,
        "first_seed": before["first_seed"] if before else options.seed, "next_seed": options.seed + len(sizes),
        "cases_per_seed": BLOCK, "seconds": round(time.perf_counter() - start) + (before["seconds"] if before else 0),
        "kinds": dict(sorted(total.seen.items())), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "machine": platform.machine(),
    }  # fmt: skip
    text = json.dumps(summary, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
