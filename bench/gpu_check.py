"""What to run on a machine with an NVIDIA GPU: are all kernels right, and how fast are they there?

    python bench/gpu_check.py [--json gpu_check.json] [--no-timing] [--batch 32]

1. ``python -m dl4ds_kernels info``.
2. Parity against fp64 of every op, backend, dtype and layout, forward and backward, on odd and on real shapes.
3. The rows of the fault checklist that need a GPU (gpu_faults.py): F19, F26, F47 to F50, F53.
4. Timings of ResNet-50's layers against eager and torch.compile.

The JSON file has the GPU's name; exit 0 only if everything was right. Without a GPU it says so in one line and exits 2.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_faults
import torch
from _results import save

from dl4ds_kernels import benchmark

PARITY_SHAPES = "1x1x1,3x7x5,63x7x5,64x1x1,129x13x17,256x28x28"
TIMED_SHAPES = "resnet50"
NO_GPU = 2


def _ours() -> list[str]:
    """Backends of ours that claim to run on the GPU here."""
    return [name for name in ("cuda", "triton", "auto") if benchmark.why_not(name, "cuda") is None]


def parity() -> list[benchmark.Row]:
    """Every op, backend, dtype and layout, forward and backward."""
    rows = []
    for op, module in benchmark.OPS.items():
        nms = op == "nms"
        layers = module.select("all" if nms else PARITY_SHAPES)
        axes = (
            layers,
            ("fp32", "fp64") if nms else ("fp32", "fp16", "bf16"),
            ("nchw",) if nms else ("nchw", "nhwc"),
            (False,) if nms else (False, True),
        )
        for layer, dtype, layout, backward in itertools.product(*axes):
            case = benchmark.Case(op, layer, 2, dtype, layout, backward, "cuda")
            rows += benchmark.run_cases([case], _ours(), module, time_it=False)
    return rows


def timings(batch: int, rounds: int) -> list[benchmark.Row]:
    """ResNet-50's layers in bf16 and fp32, channels_last, inference and training; NMS."""
    rows = []
    for op, module in benchmark.OPS.items():
        nms = op == "nms"
        axes = (
            module.select("all" if nms else TIMED_SHAPES),
            ("fp32",) if nms else ("fp32", "bf16"),
            (False,) if nms else (False, True),
        )
        for layer, dtype, backward in itertools.product(*axes):
            case = benchmark.Case(op, layer, batch, dtype, "nchw" if nms else "nhwc", backward, "cuda")
            providers = [name for name in module.STOCK if name != "eager_cl"] + [n for n in _ours() if n != "auto"]
            rows += benchmark.run_cases([case], providers, module, rounds=rounds)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def _report(title: str, rows: list[benchmark.Row]) -> int:
    """Print the failures of a part; how many there are."""
    bad = [row for row in rows if benchmark.failed(row)]
    for row in bad:
        print(f"  {row.op} {row.shape} {row.dtype} {row.layout} {row.direction} {row.provider}: {row.status}: {row.message}")
    print(f"{title}: {len(rows) - len(bad)} of {len(rows)} right")
    return len(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here; nothing was checked. Run this on a machine with an NVIDIA GPU.")
        return NO_GPU
    document: dict[str, Any] = {"schema": 1, "machine": benchmark.machine(), "gpu": torch.cuda.get_device_name()}
    print(document["gpu"])
    problems = subprocess.run([sys.executable, "-m", "dl4ds_kernels", "info"]).returncode != 0
    checked = parity()
    problems += _report("parity", checked)
    document["parity"] = [row.as_dict() for row in checked]
    document["faults"] = gpu_faults.run()
    for name, result in document["faults"].items():
        print(f"  {name}: {result}")
        problems += result != "right" and not result.startswith("SKIP")
    if not arguments.no_timing:
        timed = timings(arguments.batch, arguments.rounds)
        problems += _report("timed", timed)
        document["timings"] = [row.as_dict() for row in timed]
        for row in timed:
            if row.ours and row.speedup_best_stock is not None:
                name = f"{row.op} {row.case} {row.dtype} {row.direction} {row.provider}"
                ratios = f"{row.speedup:.2f}x eager, {row.speedup_best_stock:.2f}x the fastest stock"
                print(f"  {name}: {row.median_ms * 1e3:.1f} us, {ratios}")
    save(arguments.json, document)
    print(f"written: {arguments.json}")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
