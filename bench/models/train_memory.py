"""Peak resident memory of training steps on the CPU: ours against eager NCHW and eager channels_last, a process each.

    python bench/models/train_memory.py [--only resnet18,…] [--repeats 3] [--threads 2] [--no-efficient]
                                        [--json FILE] [--docs docs/cpu-engine.md]

Models, batches and steps are those of ``bench/models/train.py``. Every process imports the same modules, notes its resident
size, builds one candidate, does one step and then three more; reported is the highest resident size of the steps, as the kernel
counts it, less that of the imports: parameters, gradients, momentum, activations, scratch, and what an allocator holds
back. Candidates alternate, the median of the repeats counts. Ours ``efficient`` is the same model with
``memory_efficient=True``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from _results import RESULTS, markdown, save

from dl4ds_kernels import benchmark

CANDIDATES = ("eager", "channels_last", "ours", "efficient")
STEPS = 3
BEGIN, END = "<!-- train-memory:begin -->", "<!-- train-memory:end -->"


def status_mib(field: str) -> float:
    """A size of /proc/self/status: VmRSS (resident now) or VmHWM (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) / 1024


def child(name: str, candidate: str) -> dict[str, float]:
    """In a process of its own: peaks of the whole run and of the steps behind the first."""
    imports = status_mib("VmRSS")
    step = train.stepper(name, candidate)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building has left: ours is built beside the model whose weights it takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    step()
    first = status_mib("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        step()
    steady = status_mib("VmHWM")
    return {"mib": max(first, steady) - imports, "steady_mib": steady - imports, "imports_mib": imports}


def measured(name: str, candidates: tuple[str, ...], repeats: int, threads: int) -> dict[str, Any]:
    """Medians over ``repeats`` rounds of one process for every candidate."""
    found: dict[str, list[dict[str, float]]] = {c: [] for c in candidates}
    for _ in range(repeats):
        for c in candidates:
            call = [sys.executable, __file__, "--child", f"{name},{c}", "--threads", str(threads)]
            done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
            found[c].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name} {c}: {found[c][-1]}", file=sys.stderr, flush=True)
    peaks = {c: {key: round(statistics.median(r[key] for r in runs), 1) for key in runs[0]} for c, runs in found.items()}
    best = min(("eager", "channels_last"), key=lambda c: peaks[c]["mib"])
    ratios = {c: round(peaks[c]["mib"] / peaks[best]["mib"], 3) for c in candidates if c in ("ours", "efficient")}
    batch, size, _ = train.ROWS[name]
    return {"model": name, "batch": batch, "size": size, "peaks": peaks, "best_stock": best, "ratios": ratios}


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        peaks, ratios = r["peaks"], r["ratios"]
        shown = [f"{peaks[c]['mib']:.0f}" if c in peaks else "–" for c in CANDIDATES]
        lines.append(
            [f"{r['model']}, {r['batch']} x {r['size']} x {r['size']}", *shown]
            + [f"{ratios[c]:.2f}x" if c in ratios else "–" for c in ("ours", "efficient")]
        )
    names = ("eager NCHW", "eager channels_last", "ours", "ours, `memory_efficient`")
    ratio = "of the better eager"
    return markdown(["peak MiB of training steps", *names, f"ours {ratio}", f"efficient {ratio}"], lines)


def page(document: dict[str, Any], text: str) -> str:
    """The page with its generated part made new."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"--docs: expected a file with one line {BEGIN} and one line {END}")
    machine = document["machine"]
    head = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}; "
        "fp32, SGD with momentum; written by\n`bench/models/train_memory.py --docs`.\n\n"
    )
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    return f"{before}{BEGIN}\n{head}{table(document['rows'])}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(train.ROWS), help="models with commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-efficient", action="store_true", help="leave memory_efficient=True out")
    parser.add_argument("--json", type=Path, default=RESULTS / "train_memory.json")
    parser.add_argument("--docs", type=Path, help="renew the generated part of this documentation page too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(child(*options.child.split(","))))
        return 0
    candidates = CANDIDATES[:3] if options.no_efficient else CANDIDATES
    kept = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    rows = {r["model"]: r for r in kept}
    for name in options.only.split(","):
        # The U-Net is a stock one, optimized; it has no block to compute again.
        rows[name] = measured(name, candidates[:3] if name == "unet" else candidates, options.repeats, options.threads)
    document = {"schema": 1, "machine": benchmark.machine(), "rows": [rows[n] for n in train.ROWS if n in rows]}
    save(options.json, document)
    print(table(document["rows"]))
    if options.docs is not None:
        options.docs.write_text(page(document, options.docs.read_text()))
    return int(any(r["ratios"]["ours"] >= 1 for r in document["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
