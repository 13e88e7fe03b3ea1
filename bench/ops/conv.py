"""Single convolution layers on the CPU: every algorithm of ours beside every peer, with errors, GFLOP/s, floor and gap.

    python bench/ops/conv.py [--only resnet18,vgg16.conv2_2,…] [--batches 1,16] [--threads 1,2] [--rounds 11] [--compile]
                             [--json FILE] [--plot FILE] [--docs FILE]

A layer is a convolution with BatchNorm and ReLU, in inference and fp32. "ours" is ``dk.optimize`` on the three stock modules,
which takes the algorithm that the cost model names (column "takes"); "ours exact" the same with ``exact=True``. Besides, every
algorithm that can run the layer is forced, timed and compared with fp64, also those that are not chosen: the table shows where
the choice was wrong. Peers are those of whole models (dl4ds_kernels/benchmark/peers.py), but a layer alone hides what they do
between layers. Errors are the largest difference to fp64 over the largest output. A wrong candidate (above ``LIMIT``; exact:
above twice eager's in the less exact of its two layouts) gets no time. GFLOP/s count direct multiply-adds, so that Winograd may
be above the peak; the floor is direct work at the measured peak. One process a thread count; every round takes one sample of
each in a fresh random order.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _results import markdown, save

import dl4ds_kernels as dk
from dl4ds_kernels import _packing, benchmark
from dl4ds_kernels.benchmark import peers
from dl4ds_kernels.benchmark._shapes import Layer

LAYERS = [
    Layer("resnet18.layer1", 64, 56, 56, 64), Layer("resnet18.layer2", 128, 28, 28, 128),
    Layer("resnet18.layer3", 256, 14, 14, 256), Layer("resnet18.layer4", 512, 7, 7, 512),
    Layer("resnet18.down", 128, 28, 28, 256, stride=2),
    Layer("resnet50.stem", 3, 224, 224, 64, kernel=7, stride=2),
    Layer("resnet50.layer1.conv1", 256, 56, 56, 64, kernel=1), Layer("resnet50.layer1.conv3", 64, 56, 56, 256, kernel=1),
    Layer("resnet50.layer3.conv1", 1024, 14, 14, 256, kernel=1), Layer("resnet50.layer4.conv3", 512, 7, 7, 2048, kernel=1),
    Layer("vgg16.conv1_2", 64, 224, 224, 64), Layer("vgg16.conv2_2", 128, 112, 112, 128),
    Layer("vgg16.conv4_2", 512, 28, 28, 512), Layer("vgg16.conv5_1", 512, 14, 14, 512),
    Layer("unet.down0", 32, 256, 256, 32), Layer("unet.up1", 128, 128, 128, 64), Layer("densenet121.growth", 128, 28, 28, 32),
]  # fmt: skip
LIMIT = 1e-4  # of the largest output: the documented bound of the algorithms that exact=True leaves out
BEGIN, END = "<!-- conv:begin -->", "<!-- conv:end -->"
OURS = ("ours", "ours exact")
STOCK = ("eager", "eager channels_last")


def build(layer: Layer) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU with seeded weights and statistics that are not the identity."""
    torch.manual_seed(0)
    conv = nn.Conv2d(layer.C, layer.C_out, layer.kernel, layer.stride, layer.padding, bias=False)
    bn = nn.BatchNorm2d(layer.C_out)
    for vector, low in ((bn.running_mean, -0.1), (bn.running_var, 0.5), (bn.weight.data, 0.5), (bn.bias.data, -0.5)):
        vector.uniform_(low, low + 1)
    return nn.Sequential(conv, bn, nn.ReLU()).eval()


def forced(module: nn.Sequential, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every algorithm that can run the layer, by its name."""
    conv, bn = module[0], module[1]
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    vectors = (bn.running_mean, bn.running_var, bn.weight.detach(), bn.bias.detach())
    weight, last = conv.weight.detach(), x.contiguous(memory_format=torch.channels_last)
    found: dict[str, Callable[[], Tensor]] = {}
    for code in _packing.candidates(last, weight, *geometry, False):
        pack = _packing.pack(last, weight, *geometry, code)
        found[_packing.ALGORITHMS[code]] = lambda code=code, pack=pack: _packing.convolve(
            last, weight, pack, code, geometry, vectors
        )
    return found


def run(layer: Layer, batch: int, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    """Errors, times and ratios of one layer."""
    module = build(layer)
    x = torch.randn(batch, layer.C, layer.H, layer.W)
    last, x_last = copy.deepcopy(module).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    ours, exact = dk.optimize(module), dk.optimize(module, exact=True)
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: module(x), "eager channels_last": lambda: last(x_last)}
    others, missing = peers.make(module, x, torch.get_num_threads(), options.compile)
    algorithms = forced(module, x)
    calls |= others | {"ours": lambda: ours(x_last), "ours exact": lambda: exact(x_last)} | algorithms
    truth = copy.deepcopy(module).double()(x.double())
    errors = {key: benchmark.relative_error(torch.as_tensor(call()), truth) for key, call in calls.items()}
    # Stock torch's own error depends on its choice: oneDNN in channels_last adds all products of an output one after the other,
    # as our direct convolution does; in NCHW, and with one thread, it may take a blocked product. The floor is the tests'.
    stock_error = max(errors["eager"], errors["eager channels_last"])
    limits = dict.fromkeys(calls, LIMIT) | {"ours exact": max(2 * stock_error, 2e-6)}
    wrong = {key: error for key, error in errors.items() if error > limits[key]}
    right = {key: call for key, call in calls.items() if key not in wrong}
    timings = benchmark.measure(right, rounds=options.rounds, min_sample_ms=1.0, budget_s=30, settle_s=0.02, shuffle=0)

    work = 2 * batch * layer.C * layer.C_out * layer.kernel**2 * layer.H_out * layer.W_out
    floor = work / peak / 1e6
    geometry = (module[0].stride, module[0].padding, module[0].dilation, 1)
    codes = {way: _packing.choose(x_last, module[0].weight, *geometry, way != "ours") for way in OURS}
    found = {
        key: timing.as_dict()
        | {
            "error": float(f"{errors[key]:.3g}"),
            "gflops": round(work / timing.median / 1e6, 1),
            "gap": round(timing.median / floor, 3),
        }
        for key, timing in timings.items()
    }
    stock = {key: timings[key].median for key in timings if key not in OURS and key not in algorithms}
    best = min(stock, key=stock.__getitem__)
    forced_times = {key: timings[key].median for key in algorithms if key in timings}
    return {
        "layer": layer.name, "batch": batch, "threads": torch.get_num_threads(), "floor_ms": float(f"{floor:.4g}"),
        "takes": {way: _packing.ALGORITHMS[code] for way, code in codes.items()}, "algorithms": list(algorithms),
        "fastest_algorithm": min(forced_times, key=forced_times.__getitem__), "missing": missing, "wrong": wrong,
        "candidates": found, "best_peer": best,
        "ratio": {way: round(stock[best] / timings[way].median, 3) for way in OURS if way in timings},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """A line a layer: our time, rate and gap, the best peer, and the algorithm taken (and the fastest where it is another)."""
    lines = []
    for row in rows:
        mine, best = row["candidates"].get("ours"), row["candidates"][row["best_peer"]]
        taken, fastest = row["takes"]["ours"], row["fastest_algorithm"]
        lines.append([
            f"{row['layer']} b{row['batch']}, {row['threads']} thr.",
            f"{mine['median_ms']:.3f}" if mine else "wrong", f"{mine['gflops']:.0f}" if mine else "-", f"{row['floor_ms']:.3f}",
            taken + ("" if taken == fastest else f" (fastest: {fastest})"),
            f"{row['best_peer']} {best['median_ms']:.3f}",
            *(f"{row['ratio'][way]:.2f}x" if way in row["ratio"] else "wrong" for way in OURS),
        ])  # fmt: skip
    return markdown(["layer", "ours ms", "GFLOP/s", "direct floor ms", "takes", "best peer ms", "ours", "exact"], lines)


def errors_table(rows: list[dict[str, Any]]) -> str:
    """Largest error against fp64, over the largest output, of eager and of every algorithm; one line a layer and batch."""
    names = [n for n in _packing.ALGORITHMS.values() if any(n in row["algorithms"] for row in rows)]
    lines, seen = [], set()
    for row in rows:
        if (row["layer"], row["batch"]) not in seen:  # results do not depend on the number of threads
            seen.add((row["layer"], row["batch"]))
            found = {key: f"{value['error']:.1e}" for key, value in row["candidates"].items()} | {
                key: f"{error:.1e}, not taken" for key, error in row["wrong"].items()
            }
            lines.append([f"{row['layer']} b{row['batch']}", *(found.get(name, "-") for name in [*STOCK, *names])])
    return markdown(["layer", *STOCK, *names], lines)


def plot(rows: list[dict[str, Any]], path: Path, machine: str) -> None:
    """GFLOP/s of ours, exact and the best peer, a group a layer, with the peak of direct work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(0.55 * len(rows) + 3, 4.4), layout="constrained")
    for index, (name, key) in enumerate((("ours", "ours"), ("ours exact", "ours exact"), ("best peer", None))):
        heights = [row["candidates"].get(key or row["best_peer"], {"gflops": 0.0})["gflops"] for row in rows]
        axes.bar([i + (index - 1) * 0.28 for i in range(len(rows))], heights, 0.28, label=name)
    axes.plot(range(len(rows)), [row["peak"] for row in rows], "k_", markersize=14, label="peak of direct work")
    labels = [f"{row['layer']} b{row['batch']} t{row['threads']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=7)
    axes.margins(x=0.01)
    axes.set_ylabel("GFLOP/s of direct work")
    axes.set_title(f"Convolution + BatchNorm + ReLU, fp32, {machine}", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def write_docs(path: Path, document: dict[str, Any]) -> None:
    """Both tables between the marks of a page."""
    machine = document["machine"]
    said = (
        f"{machine['cpu']}, torch {machine['torch']}, {machine['date']}; medians; ratios are the best peer's time over ours. "
        "Written by `bench/ops/conv.py --docs`.\n"
    )
    inside = "\n".join([BEGIN, said, table(document["rows"]), "Errors against fp64:\n", errors_table(document["rows"]), END])
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(before + inside + rest.partition(END)[2])


def here(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of this process's number of threads."""
    torch.set_num_threads(int(options.threads))
    wanted = options.only.split(",") if options.only else [""]
    chosen = [layer for layer in LAYERS if any(layer.name.startswith(name) for name in wanted)]
    rows = []
    with torch.no_grad():
        peak = benchmark.peak_gflops()
        for layer in chosen:
            for batch in map(int, options.batches.split(",")):
                rows.append(run(layer, batch, options, peak) | {"peak": round(peak, 1)})
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"comma-separated beginnings of {', '.join(la.name for la in LAYERS)}")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--threads", default=str(torch.get_num_threads()), help="comma-separated; a process for each")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile, default and freezing (compiles for minutes)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--docs", type=Path, help="a page with the marks of the tables")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        save(options.child, {"rows": here(options)})
        return 0
    unknown = [n for n in options.only.split(",") if not any(layer.name.startswith(n) for layer in LAYERS)]
    if unknown:
        parser.error(f"--only: expected beginnings of {', '.join(la.name for la in LAYERS)}, got {unknown[0]!r}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads.split(","):
            file = Path(folder) / f"{threads}.json"
            same = ["--only", options.only, "--batches", options.batches, "--rounds", str(options.rounds)]
            same += ["--compile"] if options.compile else []
            subprocess.run([sys.executable, __file__, *same, "--threads", threads, "--child", str(file)], check=True)
            rows += json.loads(file.read_text())["rows"]
    document = {"schema": 1, "machine": benchmark.machine(), "rows": rows}
    print(table(rows), errors_table(rows), sep="\n")
    if options.json:
        save(options.json, document)
    if options.plot:
        plot(rows, options.plot, f"{document['machine']['cpu']}, torch {document['machine']['torch']}")
    if options.docs:
        write_docs(options.docs, document)
    wrong = {f"{row['layer']} b{row['batch']}": row["wrong"] for row in rows if row["wrong"]}
    if wrong:
        print(f"wrong results, not timed: {wrong}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
