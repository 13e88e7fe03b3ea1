"""What to run on a machine with an NVIDIA GPU: are all kernels right, and how fast are they there?

    python bench/gpu_check.py [--report gpu_check] [--no-timing] [--no-sanitizer] [--batch 32]
    python bench/gpu_check.py --dry-run          # no GPU: the same calls on the CPU, kernels on the simulator, nothing timed

1. ``python -m dl4ds_kernels info``.
2. Parity against fp64 of every op, backend, dtype and layout, forward and backward, on odd and on real shapes.
   The ways of a convolution: library, fused kernel, with statistics (conv_bn_act_train), chosen by timing (DL4DS_AUTOTUNE=1);
   gradients of blocks with sums and additions in the convolution's epilogue.
3. Rules: no hidden synchronization, the same bits in 100 calls (F47), capture in a CUDA graph.
4. The rows of the fault checklist that need a GPU: F19, F26, F48 to F50, F53.
5. compute-sanitizer over every op (where it is installed).
6. Ceilings of the GPU, ResNet-50's layers and whole models against eager, channels_last, torch.compile and TensorRT.

Writes REPORT.json and REPORT.html; please send both. Exit 0: everything was right; 1: not; 2: no GPU here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import save
from gpu import faults, page, routes, rules, sanitizer, simulated, speed
from gpu.place import Place, parity_cases

from dl4ds_kernels import benchmark

NO_GPU = 2


def _info() -> dict[str, str]:
    done = subprocess.run([sys.executable, "-m", "dl4ds_kernels", "info"], capture_output=True, text=True)
    print(done.stdout)
    return {"python -m dl4ds_kernels info": "right" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]}


def _parity(place: Place) -> list[benchmark.Row]:
    rows = []
    for case in parity_cases(place):
        backends = [name for name in place.backends() if place.missing(case.op, name) is None]
        rows += benchmark.run_cases([case], backends, benchmark.OPS[case.op], time_it=False)
    return rows


def _missing(place: Place) -> dict[str, str]:
    """Backends without a kernel of their own, by op."""
    pairs = [(op, backend) for op in benchmark.OPS for backend in place.backends()]
    return {f"{op} {backend}": f"SKIP: {why}" for op, backend in pairs if (why := place.missing(op, backend))}


def _of_rows(rows: list[benchmark.Row]) -> dict[str, str]:
    """What is wrong by name, what stock torch cannot run, and one line with the count of what is right."""
    found: dict[str, str] = {}
    for row in rows:
        if row.message.startswith("stock torch cannot run"):
            found[f"{row.op} {row.dtype}"] = f"SKIP: {row.message}"
        elif benchmark.failed(row):
            name = f"{row.op} {row.shape} {row.dtype} {row.layout} {row.direction} {row.provider}"
            found[name] = f"{row.status}: {row.message}"
    return found | {f"{sum(row.status in ('ok', 'parity') for row in rows)} of {len(rows)} rows": "right"}


Found = dict[str, str]
Part = Callable[[dict[str, Any]], Found]  # takes the report, may add figures to it


def _parity_part(place: Place) -> Part:
    def part(document: dict[str, Any]) -> Found:
        rows = _parity(place)
        document["parity"] = [row.as_dict() for row in rows]
        return _of_rows(rows) | _missing(place)

    return part


def _timed_calls(place: Place, options: argparse.Namespace) -> Part:
    def part(document: dict[str, Any]) -> Found:
        if not place.is_dry:
            document["ceilings"] = speed.ceilings()
        rows = speed.ops(place, 1 if place.is_dry else options.batch, options.rounds)
        document["timings"] = [row.as_dict() for row in rows]
        return _of_rows(rows)

    return part


def _timed_models(place: Place, options: argparse.Namespace) -> Part:
    def part(document: dict[str, Any]) -> Found:
        document["models"] = speed.models(place, options.rounds)
        return {
            f"{row['model']} batch {row['batch']} {way}": "right" if found["status"] == "ok" else found["status"]
            for row in document["models"]
            for way, found in row["ways"].items()
        }

    return part


def parts(place: Place, options: argparse.Namespace) -> dict[str, Part]:
    """What is checked, in order. What can poison the CUDA context (faults, the sanitizer's processes) is not first."""
    every: dict[str, Part] = {
        "info": lambda _: _info(),
        "parity against fp64": _parity_part(place),
        "ways of a convolution": lambda _: routes.run(place),
        **{rule: lambda _, rule=rule: rules.run(place, rule) for rule in rules.RULES},
        "faults": lambda _: faults.run(place.is_dry),
    }
    if not options.no_sanitizer:
        every["compute-sanitizer"] = lambda _: sanitizer.run(place.is_dry)
    if place.is_dry and not options.no_simulator:
        every["PTX simulator"] = lambda _: simulated.run()
    if not options.no_timing:
        every |= {"timed calls": _timed_calls(place, options), "models": _timed_models(place, options)}
    return every


def check(place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """The whole report; ``checks`` holds, by part, what was checked and what came of it.

    A part that raises is a problem of the report, not its end, and what is known is on disk after every part: on a rented GPU
    an illegal access in one kernel must not cost the figures of the others.
    """
    gpu = "none (dry run on the CPU)" if place.is_dry else torch.cuda.get_device_name()
    document: dict[str, Any] = {"schema": 2, "machine": benchmark.machine(), "gpu": gpu, "dry_run": place.is_dry, "checks": {}}
    every = parts(place, options)
    print(f"{gpu}: {len(every)} parts", flush=True)
    for i, (name, part) in enumerate(every.items(), 1):
        print(f"[{i}/{len(every)}] {name} ...", flush=True)
        start = time.monotonic()
        try:
            found = part(document)
        except Exception as error:
            found = {"the part itself": f"raised {type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"}
        document["checks"][name] = found
        document.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        wrong = sum(map(page.is_wrong, found.values()))
        print(f"      {document['seconds'][name]:.0f} s, {f'{wrong} WRONG' if wrong else 'right'}", flush=True)
        write(options.report, document)
    return document


def write(report: Path, document: dict[str, Any]) -> None:
    save(report.with_suffix(".json"), document)
    report.with_suffix(".html").write_text(page.render(document))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("gpu_check"), help="file name without its ending")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU and the simulator; nothing is timed")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--no-simulator", action="store_true", help="dry run without the simulator (minutes)")
    parser.add_argument("--only-parity-small", action="store_true", help="what the sanitizer runs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        print("gpu_check: torch sees no CUDA device here; nothing was checked. Run this on a machine with an NVIDIA GPU.")
        return NO_GPU
    place = Place("cpu" if options.dry_run else "cuda", small=options.only_parity_small)
    if options.only_parity_small:
        found = _of_rows(_parity(place))
        print(found)
        return int(any(page.is_wrong(text) for text in found.values()))
    document = check(place, options)
    problems = [(part, name, text) for part, name, text in page.results(document) if page.is_wrong(text)]
    for part, name, text in problems:
        print(f"WRONG  {part}: {name}: {text}")
    print(f"{len(problems)} problems. Written: {options.report}.json, {options.report}.html")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
