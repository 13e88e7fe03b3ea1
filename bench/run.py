"""Regenerates bench/results and the README's tables: every op over its shapes, memory-bound ops, host overhead, the demo.

    python bench/run.py [--only add_act,membound,…] [--quick] [--results FOLDER]

Each part is one command of the package or one script here, run in its own process; its exit code counts. Run it on an idle
machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import readme
from _results import RESULTS

HERE = Path(__file__).resolve().parent


def parts(results: Path, quick: bool) -> dict[str, list[str]]:
    """name -> command line after the interpreter."""

    def bench(op: str, *more: str) -> list[str]:
        rest = ["--quick"] if quick else []
        return ["-m", "dl4ds_kernels", "bench", "--op", op, *more, *rest]

    def saved(name: str) -> str:
        return str(results / f"{name}.json")

    repeats = "3" if quick else "40"
    found = {}
    for op in ("add_act", "bn_act", "conv_bn_act"):
        for way, label in (("fwd", "inference"), ("fwd+bwd", "training")):
            name = f"{op}_{label}"
            compare = (
                "eager,eager_cl,compile"
                if op != "add_act"
                else "eager,eager_inplace,compile"
                if way == "fwd"
                else "eager,compile"
            )
            batch = "1" if way == "fwd" else "8"
            found[name] = bench(
                op, "--pass", way, "--batch", batch, "--compare", compare, "--layout", "nhwc", "--json", saved(name)
            )
    found["nms"] = bench("nms", "--json", saved("nms"))
    if not quick:
        found["models_cpu"] = [
            str(HERE / "models/cpu.py"), "--json", saved("models_cpu"), "--plot", str(results / "models_cpu.png"),
        ]  # fmt: skip
    small = ["--size", "16x14x14", "--batch", "2", "--rounds", "3"] if quick else []
    found["membound"] = [str(HERE / "membound.py"), "--json", saved("membound"), *small]
    found["overhead"] = [str(HERE / "overhead.py"), "--json", saved("overhead"), *(["--rounds", "5"] if quick else [])]
    for model in ("resnet18",) if quick else ("resnet18", "resnet50"):
        found[f"demo_{model}"] = ["-m", "dl4ds_kernels", "demo", "--model", model, "--repeats", repeats, "--exact", "--json"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated parts; default: all")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: does everything run?")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    known = parts(arguments.results, arguments.quick)
    chosen = arguments.only.split(",") if arguments.only else list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(known)}, got {unknown[0]!r}")
    failures = []
    for index, name in enumerate(chosen, start=1):
        print(f"[{index}/{len(chosen)}] {name}", flush=True)
        start = time.perf_counter()
        prints_json = name.startswith("demo_")
        done = subprocess.run([sys.executable, *known[name]], stdout=subprocess.PIPE if prints_json else None, text=True)
        if prints_json and done.stdout:
            (arguments.results / f"{name}.json").write_text(done.stdout)
        print(f"    {'done' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - start:.0f} s", flush=True)
        failures += [name] if done.returncode else []
    if arguments.results == RESULTS and not arguments.quick:
        readme.write(RESULTS, RESULTS.parents[1] / "README.md")
    if failures:
        print(f"failed: {', '.join(failures)}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
