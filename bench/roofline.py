"""Roofline of the GPU kernels without a GPU: the floor of every launch, and what counts and machine code predict for it.

    python bench/roofline.py [--output bench/results/roofline.json] [--page docs/roofline.md]

Counts come from the PTX simulator of the tests (small launches of the launchers that ship, at two sizes each), machine
instructions, registers and loads in flight from ptxas and nvdisasm, numbers of blocks from the launchers at the real sizes.
Sites: ResNet-50 at 256 images, A100 SXM 80 GB and H100 SXM. It needs what `make test` needs: nvcc, a C++ compiler, triton. A
few minutes on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _results import RESULTS, save
from roof import page, picture
from roof.layers import convolutions, gradients, tails
from roof.model import CHIPS, MOST_ISSUE, MOST_RATIO, finalize, issue_share, streaming
from roof.sites import BATCH, Site, resnet50

REPOSITORY = Path(__file__).resolve().parents[1]
# kernel -> launcher whose workspace holds its partial results, or none
REDUCING = {"bn_act_stats": "fwd", "bn_act_bwd_reduce": "bwd", "bn_act_pair_reduce": "sums"}
MERGING = {"fwd": "bn_act_finalize_kernel", "bwd": "bn_act_bwd_finalize_kernel"}


def counts(*arguments: str, compiled: bool = False) -> Any:
    """What tests/ptxsim/sites.py prints, in a process of its own."""
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0" if compiled else "1"}
    command = [sys.executable, "-m", "ptxsim.sites", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def small_bytes(row: dict[str, Any], site: dict[str, Any]) -> float:
    """Bytes beside the tensors: partial results that a reduction writes, per-channel tables that a pass reads."""
    for stem, way in REDUCING.items():
        if row["kernel"].startswith(stem):
            return site["workspace"][way]
    records = {"add_act": 0, "bn_act_pair_bwd": 2}  # of 16 bytes a channel
    return 16.0 * site["shape"][1] * next((n for stem, n in records.items() if row["kernel"].startswith(stem)), 1)


def launches(found: dict[str, Any], sites: dict[Site, int]) -> Iterable[dict[str, Any]]:
    """Every streaming launch: kernel, site, chip, floor and prediction."""
    grids = {(s["dtype"], s["layout"], *s["shape"]): s for s in found["sites"]}
    for row in found["kernels"]:
        for (n, c, h, w, way), times in sites.items():
            site = grids.get((row["dtype"], row["layout"], n, c, h, w))
            if way != row["way"] or site is None:
                continue
            blocks = site["blocks"][row["kernel"]]
            for chip in CHIPS:
                figures = streaming(row, chip, n * c * h * w, blocks, small_bytes(row, site))
                yield {
                    **{name: row[name] for name in ("kernel", "call", "way", "layout", "dtype")}, "chip": chip.name,
                    "shape": [n, c, h, w], "times": times, "blocks": blocks, "issue_share": issue_share(row, chip), **figures,
                }  # fmt: skip


def per_kernel(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the network: predicted by floor with every launch as often as it occurs, and the worst site."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in ("chip", "dtype", "layout", "kernel", "call", "way"))].append(row)
    table = []
    for (chip, dtype, layout, kernel, call, way), mine in groups.items():
        total = {
            name: sum(r[name] * r["times"] for r in mine) for name in ("floor_us", "predicted_us", "memory_us", "issue_us")
        }
        ratios = [r["predicted_us"] / r["floor_us"] for r in mine]
        table.append({
            "chip": chip, "dtype": dtype, "layout": layout, "kernel": kernel, "call": call, "way": way, **total,
            "ratio": total["predicted_us"] / total["floor_us"], "worst_ratio": max(ratios), "best_ratio": min(ratios),
            "issue_share": mine[0]["issue_share"], "resident": mine[0]["resident"], "flight_kb": mine[0]["flight_kb"],
            "wanted_kb": mine[0]["wanted_kb"], "bytes_per_element": mine[0]["bytes"] / math.prod(mine[0]["shape"]),
            "launches": sum(r["times"] for r in mine),
            "within": sum(r["times"] for r in mine if r["predicted_us"] / r["floor_us"] <= MOST_RATIO),
        })  # fmt: skip
    return table


def judged(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the limits are for: a kernel over all its launches of a training step, or of inference, whatever the kind of site.

    table: per_kernel()'s. The shares of issue slots and of loads in flight are those of the worst kind.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in table:
        groups[tuple(row[name] for name in ("chip", "dtype", "layout", "kernel", "call"))].append(row)
    found = []
    for (chip, dtype, layout, kernel, call), mine in groups.items():
        floor, predicted = (sum(r[name] for r in mine) for name in ("floor_us", "predicted_us"))
        fewest = min(mine, key=lambda r: r["flight_kb"] / r["wanted_kb"])
        found.append({
            "chip": chip, "dtype": dtype, "layout": layout, "kernel": kernel, "call": call, "floor_us": floor,
            "predicted_us": predicted, "ratio": predicted / floor, "best_ratio": min(r["best_ratio"] for r in mine),
            "worst_ratio": max(r["worst_ratio"] for r in mine), "issue_share": max(r["issue_share"] for r in mine),
            "flight_kb": fewest["flight_kb"], "wanted_kb": fewest["wanted_kb"], "launches": sum(r["launches"] for r in mine),
        })  # fmt: skip
    return found


def causes(row: dict[str, Any]) -> list[str]:
    """Which limits a row of judged() misses: "loads", "issue", "small" (page.CAUSES in words); none if it meets them."""
    found = []
    if row["ratio"] > MOST_RATIO:
        waits = row["flight_kb"] < 0.95 * row["wanted_kb"]
        found.append("loads" if waits else "small")
    if row["issue_share"] > MOST_ISSUE:
        found.append("issue")
    return found


def operations(rows: list[dict[str, Any]], found: dict[str, Any], sites: dict[Site, int]) -> list[dict[str, Any]]:
    """Whole ops of a training step over the network, launches that merge partial results included."""
    grids = {(s["dtype"], s["layout"], *s["shape"]): s for s in found["sites"]}
    totals: dict[tuple[str, ...], dict[str, float]] = defaultdict(lambda: {"floor_us": 0.0, "predicted_us": 0.0})
    chips = {chip.name: chip for chip in CHIPS}
    for row in rows:
        if row["call"] != "train":
            continue
        way = "bwd" if "_bwd_" in row["kernel"] else "fwd"
        total = totals[row["chip"], row["dtype"], row["layout"], f"bn_act {'backward' if way == 'bwd' else 'forward'}"]
        total["floor_us"] += row["floor_us"] * row["times"]
        total["predicted_us"] += row["predicted_us"] * row["times"]
        if any(row["kernel"].startswith(stem) for stem in REDUCING):
            site = grids[(row["dtype"], row["layout"], *row["shape"])]
            # Channels of a block: 512 bytes of a row, or one.
            wide = 128 if row["dtype"] == "float32" else 256
            tiles = max(1, row["shape"][1] // wide) if row["layout"] == "nhwc" else row["shape"][1]
            merging = finalize(chips[row["chip"]], max(1, row["blocks"] // tiles), site["workspace"][way])
            total["predicted_us"] += merging * row["times"]
    return [
        {"chip": chip, "dtype": dtype, "layout": layout, "op": op, **total, "ratio": total["predicted_us"] / total["floor_us"]}
        for (chip, dtype, layout, op), total in totals.items()
    ]


def boxes(found: dict[str, Any]) -> list[dict[str, Any]]:
    """NMS by call and kernel: its floor is far below a launch, so what counts is launches, waits and issue."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found["nms"]:
        groups[row["call"], row["kernel"]].append(row)
    table = []
    for (call, kernel), rows in groups.items():
        for chip in CHIPS:
            issue = sum(r["ptx"] / min(r["blocks"], chip.processors) for r in rows) / (4 * chip.clock_ghz * 1e3)
            table.append({
                "chip": chip.name, "call": call, "kernel": kernel, "launches": len(rows), "issue_us": issue,
                "floor_us": sum(r["distinct"] for r in rows) / chip.bytes_per_us,
                "predicted_us": issue + len(rows) * (chip.launch_us + chip.ramp_us),
            })  # fmt: skip
    return table


def windows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """local_response_norm (Triton) on AlexNet's two sites at 256 images."""
    table = []
    for row in rows:
        size = 2 if row["dtype"] == "float16" else 4
        passes = {"lrn_kernel": 2, "lrn_bwd_ratio_kernel": 2, "lrn_bwd_gather_kernel": 1}[row["kernel"]]
        for chip in CHIPS:
            for channels, side in ((96, 55), (256, 27)):
                elements = BATCH * channels * side * side
                times = {
                    "memory_us": row["distinct"] * elements / chip.bytes_per_us,
                    "issue_us": row["ptx"] * elements / chip.issue_per_us,
                    "l1_us": row["moved"] * elements / (64 * chip.processors * chip.clock_ghz * 1e3),
                }  # fmt: skip
                bound = max(times, key=times.__getitem__)
                table.append({
                    "chip": chip.name, "kernel": row["kernel"], "layout": row["layout"], "dtype": row["dtype"],
                    "shape": [BATCH, channels, side, side], "floor_us": passes * size * elements / chip.bytes_per_us, **times,
                    "predicted_us": times[bound] + chip.launch_us + chip.ramp_us, "bound": bound.removesuffix("_us"),
                })  # fmt: skip
    return table


def model(found: dict[str, Any], lrn: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole document from counts."""
    sites, layers = resnet50()
    rows = list(launches(found, sites))
    table = per_kernel(rows)
    limits = judged(table)
    names = ("chip", "dtype", "layout", "kernel", "call", "ratio", "issue_share")
    missed = [{**{name: row[name] for name in names}, "causes": causes(row)} for row in limits if causes(row)]
    return {
        "schema": 1, "chips": [vars(chip) for chip in CHIPS], "batch": BATCH, "kernels": table, "limits": limits,
        "operations": operations(rows, found, sites),
        "convolutions": convolutions(found, layers), "gradients": gradients(found, layers), "tails": tails(found),
        "nms": boxes(found), "windows": windows(lrn), "missed": missed,
        "counts": found,
    }  # fmt: skip


def rounded(value: Any) -> Any:
    """Six digits of every number."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "roofline.json")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "roofline.md")
    parser.add_argument("--again", action="store_true", help="the page and the picture from the counts of --output")
    options = parser.parse_args()
    if options.again:
        before = json.loads(options.output.read_text())
        found, lrn = before["counts"], before["lrn"]
    else:
        sites = sorted({tuple(site[:4]) for site in resnet50()[0]})
        asked = {"sites": sites, "dtypes": ["float16", "bfloat16", "float32"], "layouts": ["nhwc", "nchw"]}
        found = counts(json.dumps({**asked, "names": ["train", "eval", "add_act", "pair"]}))
        lrn = counts("windows", compiled=True)
    document = rounded({**model(found, lrn), "lrn": lrn})
    save(options.output, document)
    options.page.write_text(page.render(document))
    picture.draw(document, options.page.with_suffix(".png"))
    page.show(document)
    print(f"{options.output}, {options.page}: {len(document['missed'])} rows miss a limit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
