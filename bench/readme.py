"""Writes the measured tables: a summary into README.md (between its results markers), all of them into bench/results/README.md.

    python bench/readme.py [--results FOLDER] [--readme FILE]

Only what lies in the results folder is written; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import membound
import overhead
from _results import RESULTS, markdown, models_table

BEGIN, END = "<!-- results:begin", "<!-- results:end -->"


def _machine(document: dict[str, Any]) -> str:
    m = document["machine"]
    return f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, {m['date']}"


def models(documents: list[dict[str, Any]]) -> str:
    """One row a model of the demo's results."""
    names = ("eager", "eager channels_last", "torch.compile", "ours")
    header = [
        "fp32, batch 1, one photo",
        *(f"{n} ms" for n in names),
        "vs channels_last",
        "vs compile",
        "error, ours",
        "error, stock",
    ]
    rows = []
    for document in documents:
        speed = {row["name"]: row for row in document["speed"]}
        times = [f"{speed[n]['median_ms']:.1f}" if n in speed else "-" for n in names]
        ratios = [f"{speed[n]['ours_speedup']:.2f}x" if n in speed else "-" for n in ("eager channels_last", "torch.compile")]
        errors = [f"{document['parity'][key]:.1e}" for key in ("ours_error", "stock_error")]
        rows.append([document["model"], *times, *ratios, *errors])
    return markdown(header, rows)


def host(document: dict[str, Any]) -> str:
    """One sentence on the host overhead."""
    ratios = [row["ratio_best"] for row in document["rows"]]
    return (
        f"Host overhead of a call on a tiny tensor, ours / stock: {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} "
        "kinds of call ([table](bench/results/README.md#host-overhead)).\n"
    )


def kernels(document: dict[str, Any]) -> str:
    """Every timed row of one op."""
    header = ["case", "pass", "provider", "median ms", "p20 - p80", "vs first", "vs fastest", "error"]
    rows = []
    for r in document["rows"]:
        case = f"{r['case']} {r['shape']} {r['dtype']} {r['layout']}"
        head = [case, r["direction"], f"ours ({r['provider']})" if r["ours"] else r["provider"]]
        if r["median_ms"] is None:
            rows.append([*head, r["status"], "", "", "", ""])
            continue
        ratios = ["-" if r[key] is None else f"{r[key]:.2f}x" for key in ("speedup", "speedup_best_stock")]
        rows.append([*head, f"{r['median_ms']:.3f}", f"{r['p20_ms']:.3f} - {r['p80_ms']:.3f}", *ratios, f"{r['error']:.0e}"])
    return markdown(header, rows)


def nms(document: dict[str, Any]) -> str:
    """NMS against its peers, the sizes from 1,000 boxes on, and the goals."""
    times = {(r["regime"], r["n"], r["provider"]): r["median_ms"] for r in document["rows"]}
    peers = ["torchvision", "lsnms", "powerboxes", "powerboxes rtree", "cv2"]
    rows = []
    for regime, n in dict.fromkeys((r["regime"], r["n"]) for r in document["rows"] if r["n"] >= 1000):
        of = [times.get((regime, n, name)) for name in ("ours", *peers, "sort")]
        best = min(t for t in of[1:-1] if t is not None)
        cells = ["-" if t is None else f"{t:.2f}" for t in of]
        rows.append([f"{regime} {n:,}", *cells, f"{of[1] / of[0]:.1f}x", f"{best / of[0]:.1f}x"])
    header = ["boxes, ms", "ours", *peers, "one sort", "vs torchvision", "vs best peer"]
    goals = "".join(f"- {'met' if g['met'] else 'MISSED'}: {g['goal']}: {g['figures']}\n" for g in document["goals"])
    return f"![NMS: time against the number of boxes](nms.png)\n\n{markdown(header, rows)}\n{goals}"


def write(results: Path, readme: Path) -> None:
    """Rewrite both files from ``results``; ValueError if the README has no markers."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    demos = [document for name, document in found.items() if name.startswith("demo_")]
    summary, full = [], ["# Results\n\nWritten by `python bench/readme.py` from the JSON files beside this page.\n"]
    if demos:
        summary += [
            f"{_machine(demos[0])}; medians, interleaved in one process; error: max |y - fp64| / max |fp64|.\n",
            models(demos),
        ]
        full += ["## Models\n", _machine(demos[0]) + "\n", models(demos)]
    if "models_cpu" in found:
        document = found["models_cpu"]
        lead = (
            f"Whole models, fp32, {_machine(document)}; ratios: the best of all peers over ours; direct floor: multiply-adds "
            f"at the {document['peak_gflops']:.0f} GFLOP/s that stock torch reaches at best (`python bench/models/cpu.py`).\n"
        )
        summary += [lead, models_table(document["rows"])]
        full += ["## Whole models against the peers\n", lead, models_table(document["rows"])]
    if "membound" in found:
        table = membound.table(found["membound"]["rows"])
        summary.append(table)
        full += ["## Memory-bound ops\n", _machine(found["membound"]) + "\n", table]
    if "overhead" in found:
        summary.append(host(found["overhead"]))
        full += ["## Host overhead\n", _machine(found["overhead"]) + "\n", overhead.table(found["overhead"]["rows"])]
    if "nms" in found:
        full += ["## Non-maximum suppression\n", _machine(found["nms"]) + "\n", nms(found["nms"])]
    for name, document in found.items():
        if "op" in document:
            full += [f"## {name}\n", _machine(document) + "\n", kernels(document)]
    text = readme.read_text()
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"{readme}: expected the markers {BEGIN} … --> and {END}")
    start = text.index("\n", begin) + 1
    readme.write_text(text[:start] + "\n".join(summary) + text[end:])
    (results / "README.md").write_text("\n".join(full))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=RESULTS.parents[1] / "README.md")
    arguments = parser.parse_args()
    write(arguments.results, arguments.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
