"""The memory-bound ops on a 98 MB tensor, with default malloc and with reused pages, and their peak memory.

    python bench/membound.py [--rounds 20] [--json bench/results/membound.json]

``add_act`` forward and ``bn_act`` in training (forward and backward) on (32, 256, 56, 56) fp32 channels_last. Every op and
malloc setting has a child process: it forks once a provider for the peak memory, then times stock and ours interleaved. The
second malloc setting keeps freed pages for both sides, so that stock torch does not pay for page faults there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, markdown, save

from dl4ds_kernels import benchmark

MALLOC = {"default": {}, "reused pages": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}}
OPS = {"add_act": False, "bn_act": True}  # op -> with backward
STOCK = ("eager", "eager_inplace")
_SIZE, _BATCH = "256x56x56", 32


def _case(op: str, size: str, batch: int) -> benchmark.Case:
    return benchmark.Case(op, benchmark.OPS[op].select(size)[0], batch, "fp32", "nhwc", OPS[op], "cpu")


def _status_kib(field: str) -> int:
    """A field of /proc/self/status, such as VmHWM (peak resident memory), in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


def peak_memory(op: str, size: str, batch: int, provider: str) -> float:
    """MiB that five calls add, at their peak, to what the inputs occupy. Meant for a process of its own."""
    case = _case(op, size, batch)
    with torch.set_grad_enabled(case.backward):
        made = benchmark.OPS[op].setup(case, provider)
        benchmark.OPS[op].problem.cache_clear()
        ctypes.CDLL(None).malloc_trim(0)  # or the calls would live in pages that the preparation left behind
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident size
        before = _status_kib("VmRSS")
        for _ in range(5):
            made.fn()
        return round((_status_kib("VmHWM") - before) / 1024, 1)


def child(op: str, size: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Peak memory of each provider in a fork, then parity and interleaved timing here: the engine's rows and ``peak_mib``."""
    providers = [*STOCK, *benchmark.default_backends("cpu")]
    peaks = {}
    for provider in providers:  # before torch has started threads, which a fork would lose
        with multiprocessing.get_context("fork").Pool(1) as pool:
            peaks[provider] = pool.apply(peak_memory, (op, size, batch, provider))
    rows = benchmark.run_cases([_case(op, size, batch)], providers, benchmark.OPS[op], rounds=rounds)
    return [{**row.as_dict(), "peak_mib": peaks[row.provider]} for row in rows]


def run(size: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Rows: op, malloc, provider, times, ratio to eager, page faults, peak memory."""
    rows = []
    for op in OPS:
        for name, extra in MALLOC.items():
            command = [sys.executable, __file__, "--child", op, "--size", size, "--batch", str(batch), "--rounds", str(rounds)]
            done = subprocess.run(command, env={**os.environ, **extra}, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{op} with {name} malloc failed:\n{done.stderr}")
            rows += [{"malloc": name, **row} for row in json.loads(done.stdout.splitlines()[-1])]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    header = [
        "98 MB channels_last fp32",
        "malloc",
        "provider",
        "median ms",
        "p20 - p80",
        "faults a call",
        "GB/s",
        "vs eager",
        "peak MiB",
    ]
    cells = []
    for r in rows:
        head = [f"`{r['op']}` {r['direction']}", r["malloc"], f"ours ({r['provider']})" if r["ours"] else r["provider"]]
        if r["median_ms"] is None:
            cells.append([*head, r["status"], r["message"], "", "", "", ""])
            continue
        spread, ratio = f"{r['p20_ms']:.1f} - {r['p80_ms']:.1f}", f"{r['speedup']:.2f}x"
        cells.append(
            [
                *head,
                f"{r['median_ms']:.1f}",
                spread,
                f"{r['faults']:.0f}",
                f"{r['gbytes_per_s']:.1f}",
                ratio,
                f"{r['peak_mib']:.0f}",
            ]
        )
    return markdown(header, cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", default=_SIZE, help="CxHxW")
    parser.add_argument("--batch", type=int, default=_BATCH)
    parser.add_argument("--json", type=Path, default=RESULTS / "membound.json")
    parser.add_argument("--child", metavar="OP", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.size, arguments.batch, arguments.rounds)))
        return 0
    rows = run(arguments.size, arguments.batch, arguments.rounds)
    print(table(rows), end="")
    facts = {
        "schema": 1,
        "machine": benchmark.machine(),
        "size": arguments.size,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
    }
    save(arguments.json, {**facts, "rows": rows})
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
