"""Whole models, inference on the CPU: ours against eager, folded, torch.compile, ONNX Runtime, OpenVINO and ncnn, interleaved.

    python bench/models/cpu.py [--only resnet50-b1,…] [--rounds 15] [--threads 2] [--compile] [--json FILE] [--plot FILE]

Parity against fp64 comes first: a candidate whose error is above the limit gets no time. Peers that are not installed are named
with the reason. The floor of a model is its direct multiply-adds over the measured peak of the machine (a large fp32 matrix
product or convolution); Winograd goes below it. Every round takes one sample of each candidate in a fresh random order, after a
rest in which the threads of the one before stop spinning. --merge keeps the rows that FILE has and this run has not, so that a
table can be made in pieces on a shared machine. The peers are in dl4ds_kernels/benchmark/peers.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _results import models_table, save

import dl4ds_kernels as dk
from dl4ds_kernels import benchmark
from dl4ds_kernels.benchmark import peers as _peers

# name -> (model, batch, height and width, goal: times the best peer)
ROWS = {
    "vgg16-b1": ("vgg16", 1, 224, 1.75),
    "unet-b1": ("unet", 1, 256, 1.9),
    "resnet18-b1": ("resnet18", 1, 224, 1.4),
    "resnet18-b16": ("resnet18", 16, 224, 1.75),
    "resnet50-b1": ("resnet50", 1, 224, 1.15),
    "resnet50-b16": ("resnet50", 16, 224, 1.25),
    "densenet121-b1": ("densenet121", 1, 224, 1.2),
}
_LIMIT = 1e-4
_SETTLE_S = 0.05  # between two candidates: the threads of the one before stop spinning


class _UNet(nn.Module):
    """U-Net with base 32: four levels of two 3x3 conv-BN-ReLU each, max pooling, 2x2 transposed convolutions, concatenation."""

    def __init__(self, base: int = 32) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(5)]
        self.down = nn.ModuleList(self._double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[3::-1])
        self.merge = nn.ModuleList(self._double(2 * w, w) for w in widths[3::-1])
        self.head = nn.Conv2d(base, 2, 1)

    @staticmethod
    def _double(c_in: int, c_out: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for c in (c_in, c_out):
            layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(x)
            if level < 4:
                skips.append(x)
                x = torch.max_pool2d(x, 2)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def build(name: str) -> nn.Module:
    """The model in eval with seeded weights and BatchNorm statistics that are not the identity."""
    torch.manual_seed(0)
    model = (_UNet() if name == "unet" else getattr(torchvision.models, name)()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of the convolutions and linear layers, by the direct algorithm."""
    total = 0

    def count(module: nn.Module, inputs: Any, out: Tensor) -> None:
        nonlocal total
        # What one weight is used for: every output pixel, or (transposed) every input pixel.
        used = (
            inputs[0].numel() // inputs[0].shape[1] if isinstance(module, nn.ConvTranspose2d) else out.numel() // out.shape[1]
        )
        total += used * module.weight.numel()

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    hooks = [m.register_forward_hook(count) for m in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return total


def first_call_s(model: nn.Module, x: Tensor) -> float:
    """Seconds of ``dk.optimize`` and the first call together: planning, packing of all weights, one inference."""
    start = time.perf_counter()
    dk.optimize(model)(x)
    return time.perf_counter() - start


def candidates(
    model: nn.Module, x: Tensor, threads: int, with_compile: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """(name -> call, name -> why a peer is missing)."""
    last, x_last = copy.deepcopy(model).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    ours, exact = dk.optimize(model), dk.optimize(model, exact=True)
    found: dict[str, Callable[[], Any]] = {"eager": lambda: model(x), "eager channels_last": lambda: last(x_last)}
    peers, missing = _peers.make(model, x, threads, with_compile)
    return found | peers | {"ours": lambda: ours(x), "ours exact": lambda: exact(x)}, missing


def run(name: str, rounds: int, threads: int, with_compile: bool, peak: float) -> dict[str, Any]:
    """One row: errors, times and ratios."""
    kind, batch, size, goal = ROWS[name]
    model = build(kind)
    x = torch.randn(batch, 3, size, size)
    first = first_call_s(model, x)
    calls, missing = candidates(model, x, threads, with_compile)
    truth = copy.deepcopy(model).double()(x.double())
    errors = {key: benchmark.relative_error(torch.as_tensor(call()), truth) for key, call in calls.items()}
    wrong = {key: error for key, error in errors.items() if error > _LIMIT}
    limit = max(2 * errors["eager"], 1e-6)
    if errors["ours exact"] > limit:
        wrong["ours exact"] = errors["ours exact"]
    right = {key: call for key, call in calls.items() if key not in wrong}

    timings = benchmark.measure(right, rounds=rounds, min_sample_ms=1.0, budget_s=120, settle_s=_SETTLE_S, shuffle=0)
    flops = 2 * macs(model, x)
    floor = flops / peak / 1e6
    row: dict[str, Any] = {"name": name, "goal": goal, "threads": threads, "floor_ms": round(floor, 3)}
    row |= {"first_call_s": round(first, 3), "missing": missing, "wrong": wrong, "candidates": {}}
    for key, timing in timings.items():
        rate = flops / timing.median / 1e6
        row["candidates"][key] = timing.as_dict() | {
            "error": float(f"{errors[key]:.3g}"),
            "gflops": round(rate, 1),  # of direct work
            "of_peak": round(rate / peak, 3),
            "gap": round(timing.median / floor, 3),  # times the floor
        }
    others = {key: timing.median for key, timing in timings.items() if not key.startswith("ours")}
    best = min(others, key=others.__getitem__)
    row["best_peer"] = best
    for key in ("ours", "ours exact"):
        if key in timings:
            row[f"ratio_{key.replace(' ', '_')}"] = round(others[best] / timings[key].median, 3)
    return row


def plot(rows: list[dict[str, Any]], path: Path, machine: str) -> None:
    """Bars of speed relative to the best peer, with the 20th and 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(key for row in rows for key in row["candidates"]))
    figure, axes = plt.subplots(figsize=(max(7.0, 1.7 * len(rows) + 2), 4.2), layout="constrained")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        at, heights, low, high = [], [], [], []
        for position, row in enumerate(rows):
            if name not in row["candidates"]:
                continue
            best, found = row["candidates"][row["best_peer"]]["median_ms"], row["candidates"][name]
            at.append(position + (index - (len(names) - 1) / 2) * width)
            heights.append(best / found["median_ms"])
            low.append(best / found["median_ms"] - best / found["p80_ms"])
            high.append(best / found["p20_ms"] - best / found["median_ms"])
        axes.bar(at, heights, width, yerr=[low, high], label=name, error_kw={"elinewidth": 0.8})
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylabel("speed, best peer = 1")
    axes.set_title(f"Inference, fp32, {machine}", fontsize=10)
    axes.legend(ncols=min(6, len(names)), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated rows of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also time torch.compile (compiles for minutes)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="overview; one plot a model is put beside it")
    parser.add_argument("--merge", action="store_true", help="keep the rows of --json's file that this run has not")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(ROWS)
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(ROWS)}, got {unknown[0]!r}")
    torch.set_num_threads(arguments.threads)
    rows = []
    with torch.no_grad():
        peak = benchmark.peak_gflops()
        for name in chosen:
            rows.append(run(name, arguments.rounds, arguments.threads, arguments.compile, peak))
            print(models_table(rows[-1:]), flush=True)
    document = {"machine": benchmark.machine(), "peak_gflops": round(peak, 1), "rows": rows}
    if arguments.merge and arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        same = all(before["machine"].get(key) == document["machine"][key] for key in ("cpu", "threads", "torch"))
        if not same:
            parser.error(f"--merge: {arguments.json} is from another machine, thread count or torch")
        kept = {row["name"]: row for row in before["rows"]} | {row["name"]: row for row in rows}
        document["rows"] = [kept[name] for name in ROWS if name in kept]
    if arguments.json:
        save(arguments.json, document)
    if arguments.plot:
        machine = document["machine"]
        label = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
        plot(document["rows"], arguments.plot, label)
        for row in document["rows"]:
            plot([row], arguments.plot.with_stem(f"{arguments.plot.stem}_{row['name']}"), label)
    wrong = {row["name"]: row["wrong"] for row in rows if row["wrong"]}
    if wrong:
        print(f"wrong results, not timed: {wrong}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
