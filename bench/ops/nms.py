"""NMS against its peers on the CPU: torchvision, lsnms, powerboxes, cv2 and ours, interleaved; and what the plot shows.

    python bench/ops/nms.py [--sizes 100,1000] [--budget 0.6] [--json bench/results/nms.json] [--plot bench/results/nms.png]

Four regimes: heavy (most boxes overlap), sparse (hardly any do), clustered (50 boxes an object, as a detector's) and 80 classes
of clustered boxes. Ours must keep torchvision's boxes; a peer that keeps others is marked with *. "sort" is one stable torch
sort of the scores. Slow calls get fewer samples; cv2 takes part up to 5,000 boxes.
Exit code 1 if a result is wrong or a goal at the end of this file is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dl4ds_kernels import benchmark
from dl4ds_kernels import functional as F

RESULTS = Path(__file__).resolve().parents[1] / "results"
SIZES = (100, 300, 1000, 3000, 5000, 10_000, 20_000, 50_000)
THRESHOLD, CLASSES = 0.5, 80
REGIMES = {
    "heavy": "heavy overlap: most boxes are dropped",
    "sparse": "sparse: nearly all are kept",
    "clustered": "clustered: 50 boxes an object",
    "classes": "clustered, 80 classes (batched_nms)",
}
COLORS = {
    "ours": "tab:red", "torchvision": "tab:blue", "lsnms": "tab:green", "powerboxes": "tab:orange",
    "powerboxes rtree": "tab:brown", "cv2": "tab:purple", "sort": "0.5",
}  # fmt: skip
PEERS = ("torchvision", "lsnms", "powerboxes", "powerboxes rtree")


def boxes_of(regime: str, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 4) float32 boxes, (n,) scores that all differ, (n,) class ids."""
    g = np.random.default_rng(n)
    spread = {"heavy": (80, 20 * n**0.5, 0), "sparse": (10, 50 * n**0.5, 0)}
    side, image, objects = spread.get(regime, (60, 1000, max(n // 50, 1)))
    centre = g.uniform(0, image, (objects or n, 2))
    if objects:
        centre = centre[g.integers(0, objects, n)] + g.normal(0, 0.08 * side, (n, 2))
    half = side * (0.35 + 0.3 * g.random((n, 2)))
    boxes = np.concatenate([centre - half, centre + half], 1).astype(np.float32)
    return boxes, ((1 + g.permutation(n)) / n).astype(np.float32), g.integers(0, CLASSES, n)


def providers(regime: str, n: int) -> dict[str, Callable[[], Any]]:
    """The calls to time, inputs in the form each library wants; those not installed are left out."""
    import torchvision

    found = {name for name in ("lsnms", "powerboxes", "cv2") if importlib.util.find_spec(name)}
    boxes, scores, ids = boxes_of(regime, n)
    wide, wide_scores = boxes.astype(np.float64), scores.astype(np.float64)
    t_boxes, t_scores, t_ids = map(torch.from_numpy, (boxes, scores, ids))
    sides = np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1)
    calls: dict[str, Callable[[], Any]] = {}
    if regime == "classes":
        calls["ours"] = lambda: F.batched_nms(t_boxes, t_scores, t_ids, THRESHOLD)
        calls["torchvision"] = lambda: torchvision.ops.batched_nms(t_boxes, t_scores, t_ids, THRESHOLD)
        if "lsnms" in found:
            import lsnms

            calls["lsnms"] = lambda: lsnms.nms(wide, wide_scores, THRESHOLD, class_ids=ids)
        if "cv2" in found and n <= 5000:
            import cv2

            calls["cv2"] = lambda: cv2.dnn.NMSBoxesBatched(sides, scores, ids, 0.0, THRESHOLD)
    else:
        calls["ours"] = lambda: F.nms(t_boxes, t_scores, THRESHOLD)
        calls["torchvision"] = lambda: torchvision.ops.nms(t_boxes, t_scores, THRESHOLD)
        if "lsnms" in found:
            import lsnms

            calls["lsnms"] = lambda: lsnms.nms(wide, wide_scores, THRESHOLD)
        if "powerboxes" in found:
            import powerboxes

            calls["powerboxes"] = lambda: powerboxes.nms(boxes, wide_scores, THRESHOLD, -1.0)
            calls["powerboxes rtree"] = lambda: powerboxes.rtree_nms(wide, wide_scores, THRESHOLD, -1.0)
        if "cv2" in found and n <= 5000:
            import cv2

            calls["cv2"] = lambda: cv2.dnn.NMSBoxes(sides, scores, 0.0, THRESHOLD)
    calls["sort"] = lambda: t_scores.sort(stable=True, descending=True)
    return calls


def measure(regime: str, n: int, budget: float) -> list[dict[str, Any]]:
    """A row per provider; samples of all of them alternate."""
    calls = providers(regime, n)
    kept = {name: np.sort(np.asarray(call()).ravel()) for name, call in calls.items() if name != "sort"}
    rows, quota, repeats = {}, {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        rows[name] = {"regime": regime, "n": n, "provider": name, "kept": len(kept.get(name, ()))}
        rows[name]["equal"] = name == "sort" or bool(np.array_equal(kept[name], kept["torchvision"]))
        repeats[name] = max(1, int(0.002 / max(once, 1e-7)))  # at least 2 ms a sample
        quota[name] = int(min(30, max(3, budget / max(once * repeats[name], 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(quota.values())):
        for name, call in calls.items():
            if turn < quota[name]:
                start = time.perf_counter()
                for _ in range(repeats[name]):
                    call()
                samples[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    for name, row in rows.items():
        row["median_ms"] = round(float(np.median(samples[name])), 5)
        row["min_ms"], row["samples"] = round(min(samples[name]), 5), len(samples[name])
    return list(rows.values())


def _memory_of(regime: str, connection: Any) -> None:
    call = providers(regime, 100_000)["ours"]
    providers(regime, 100)["ours"]()  # threads and pools exist before the count begins
    ctypes.CDLL(None).malloc_trim(0)  # or the call would live in pages that the preparation left behind
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now

    def status(field: str) -> int:
        return int(next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field)).split()[1])

    before = status("VmRSS")
    call()
    connection.send((status("VmHWM") - before) / 1024)


def peak_memory(regime: str) -> float:
    """MiB that a call on 100,000 boxes adds at its peak, in a process of its own."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_memory_of, args=(regime, send))
    process.start()
    process.join()
    return round(receive.recv(), 1)


def goals(rows: list[dict[str, Any]], memory: dict[str, float]) -> list[tuple[str, bool, str]]:
    """(goal, met, figures) for every goal that the run has rows for."""
    times = {(r["regime"], r["n"], r["provider"]): r["median_ms"] for r in rows}
    sizes, checked = sorted({r["n"] for r in rows}), []

    def add(goal: str, least: float, peers: tuple[str, ...], regimes: tuple[str, ...], at: list[int]) -> None:
        ratios = {
            f"{g} {n}": min(times[g, n, p] for p in peers if (g, n, p) in times) / times[g, n, "ours"]
            for g in regimes for n in at if any((g, n, p) in times for p in peers)
        }  # fmt: skip
        if ratios:
            worst = min(ratios, key=ratios.__getitem__)
            checked.append(
                (goal, ratios[worst] >= least, f"worst {ratios[worst]:.2f}x ({worst}), best {max(ratios.values()):.1f}x")
            )

    single = ("heavy", "sparse", "clustered")
    add("never slower than torchvision", 1.0, ("torchvision",), tuple(REGIMES), sizes)
    add("N >= 1,000: never slower than the best peer", 1.0, PEERS, tuple(REGIMES), [n for n in sizes if n >= 1000])
    add("N >= 5,000: 1.5x lsnms", 1.5, ("lsnms",), single, [n for n in sizes if n >= 5000])
    add("heavy 5,000: 4x torchvision", 4.0, ("torchvision",), ("heavy",), [n for n in sizes if n == 5000])
    add("sparse 10,000: 35x torchvision", 35.0, ("torchvision",), ("sparse",), [n for n in sizes if n == 10_000])
    add("80 classes, 20,000: 3x torchvision", 3.0, ("torchvision",), ("classes",), [n for n in sizes if n == 20_000])
    if memory:
        text = ", ".join(f"{regime} {mib} MiB" for regime, mib in memory.items())
        checked.append(("100,000 boxes: under 32 MB extra", max(memory.values()) * 2**20 < 32e6, text))
    return checked


def plot(rows: list[dict[str, Any]], path: Path, subtitle: str) -> None:
    """Time against N, a panel per regime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(REGIMES), figsize=(17, 4.8), sharey=True, layout="constrained")
    for axis, (regime, title) in zip(panels, REGIMES.items(), strict=True):
        for name, color in COLORS.items():
            points = [(r["n"], r["median_ms"]) for r in rows if r["regime"] == regime and r["provider"] == name]
            if points:
                style = {"ours": "o-", "sort": ":"}.get(name, "x-")
                width = 2.4 if name == "ours" else 1.2
                axis.loglog(*zip(*points, strict=True), style, color=color, linewidth=width, markersize=5, label=name)
        axis.set(title=title, xlabel="boxes")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    panels[0].set_ylabel("ms a call (median)")
    figure.suptitle(f"Non-maximum suppression on the CPU, IoU threshold {THRESHOLD}; {subtitle}")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--regimes", default=",".join(REGIMES))
    parser.add_argument("--budget", type=float, default=0.6, help="seconds for a provider and case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for regime in options.regimes.split(","):
        if regime not in REGIMES:
            parser.error(f"--regimes: expected {', '.join(REGIMES)}, got {regime!r}")
        for n in map(int, options.sizes.split(",")):
            rows += measure(regime, n, options.budget)
            mine = [r for r in rows if (r["regime"], r["n"]) == (regime, n)]
            text = "  ".join(f"{r['provider']} {r['median_ms']:.3f}{'' if r['equal'] else '*'}" for r in mine)
            print(f"{regime:10} {n:6}  {text}", flush=True)
    memory = {g: peak_memory(g) for g in REGIMES if g in options.regimes} if Path("/proc/self/clear_refs").exists() else {}
    checked = goals(rows, memory)
    wrong = [r for r in rows if r["provider"] == "ours" and not r["equal"]]
    for goal, met, figures in checked:
        print(f"{'met   ' if met else 'MISSED'}  {goal}: {figures}")
    sort = {(r["regime"], r["n"]): r["median_ms"] for r in rows if r["provider"] == "sort"}
    distance = [r["median_ms"] / sort[r["regime"], r["n"]] for r in rows if r["provider"] == "ours"]
    print(f"distance to one sort: {min(distance):.1f}x to {max(distance):.1f}x, median {np.median(distance):.1f}x")
    machine = benchmark.machine()
    if options.json:
        report = {
            "machine": machine, "iou_threshold": THRESHOLD, "rows": rows, "peak_extra_mib_at_100000": memory,
            "goals": [dict(zip(("goal", "met", "figures"), goal, strict=True)) for goal in checked],
            "distance_to_one_sort": {"min": min(distance), "max": max(distance), "median": float(np.median(distance))},
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot, f"{machine.get('cpu', '')}, {torch.get_num_threads()} threads")
    if wrong:
        print("WRONG: ours differs from torchvision on", [(r["regime"], r["n"]) for r in wrong])
    return int(bool(wrong) or not all(met for _, met, _ in checked))


if __name__ == "__main__":
    sys.exit(main())
