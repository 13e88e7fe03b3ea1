"""The table of the models: parameters, multiply-adds, parity error, latency, speed-up, memory, and the accuracy of the papers.

    python bench/models/table.py [--only resnet50 unet …] [--family resnet] [--part parity | latency] [--missing]
                                 [--seconds 45] [--threads 2] [--no-peers] [--markdown] [--docs docs/models.md]

Parity: the largest difference of the fp32 outputs to the same network run by plain torch in fp64 (``backend="reference"``),
over the largest output, for our kernels by default, with ``exact=True``, and for plain torch in fp32. Weights are random and
seeded; BatchNorm statistics and parameters are away from 0 and 1. The tests compare the same networks with independent
implementations. The exit code is 1 where exact errs more than twice plain torch, or the default more than ``BOUND`` of the
largest output (or twice plain torch).

Latency: batch 1, CPU, inference, interleaved (median); stock is the same modules called one by one by torch (_stock.py), peers
are ONNX Runtime and OpenVINO. Some large nets run on smaller inputs (``SMALLER``). Memory: growth of the resident
set at its peak in a first call, prepacked weights included, parameters not.

Every part of every model is saved when it is done: ``--missing`` continues, ``--seconds`` starts nothing new after that long.
A whole run on two idle cores: ``--part parity`` some 4 minutes, ``--part latency --budget 2`` some 8.
Memory for the fp64 twin of the largest net: about 3.5 GB.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _results import RESULTS, markdown, save

import dl4ds_kernels as dk
from dl4ds_kernels import benchmark, models

# What papers and their authors' repositories report; none of it was measured here.
PAPER_REPORTED = {
    "alexnet_paper": "top-1/top-5 error 40.7/18.2 % (one net), 38.1/16.4 % (five nets)",
    "vgg16": "28.5/9.9 % (1 crop)",
    "vgg19": "24.4/7.1 % (multi-crop and dense)",
    "resnet18": "30.43/10.76 % (1 crop, fb.resnet.torch)",
    "resnet34": "26.73/8.74 % (1 crop, fb.resnet.torch)",
    "resnet50": "24.7/7.8 % (1 crop)",
    "resnet101": "23.6/7.1 % (1 crop)",
    "resnet152": "23.0/6.7 % (1 crop)",
    "resnet200": "21.8/6.0 % (320 crop)",
    "preact_resnet200": "21.66/5.79 % (1 crop), 20.1/4.8 % (320 crop)",
    "cifar_resnet20": "CIFAR-10 error 8.75 %",
    "cifar_resnet32": "7.51 %",
    "cifar_resnet44": "7.17 %",
    "cifar_resnet56": "6.97 %",
    "cifar_resnet110": "6.43 %",
    "cifar_resnet1202": "7.93 %",
    "cifar_preact164": "5.46 %",
    "cifar_preact1001": "4.92 %",
    "densenet121": "top-1 error 25.0 %",
    "densenet169": "23.6 %",
    "densenet201": "22.5 %",
    "densenet161": "22.2 %",
    "cifar_densenet40_k12": "CIFAR-10+ error 5.24 %",
    "cifar_densenet100_k12_bc": "4.51 %",
    "cifar_densenet250_k24_bc": "3.62 %",
    "cifar_densenet190_k40_bc": "3.46 %",
    "yolov1": "VOC 2007 mAP 63.4 at 45 frames a second (Titan X)",
    "unet": "IoU 92.03 % (PhC-U373), 77.56 % (DIC-HeLa)",
    "deconvnet": "VOC 2012 mean IoU 69.6 %",
    "hourglass8": "MPII PCKh@0.5 90.9 %",
}


BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
BOUND = 1e-5  # of the largest output: the default's documented bound (docs/models.md, tests/models/_parity.py)
# Inputs where the registered one takes many seconds a call on a small machine, and minutes in fp64.
SMALLER = {
    "unet": (1, 284, 284), "unet_bn": (3, 256, 256), "unet_bn_bilinear": (3, 256, 256), "unet3d": (3, 92, 92, 92),
}  # fmt: skip


def randomised(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """Seeded BatchNorm statistics and parameters, so that no layer is the identity; ``gain`` on the scales."""
    generator = torch.Generator().manual_seed(2015)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (m.running_mean, -0.2, 0.2),
                    (m.running_var, 0.7, 1.4),
                    (m.weight, 0.6 * gain, 1.4 * gain),
                    (m.bias, -0.2, 0.2),
                ):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def last(output: Any) -> Tensor:
    return output[-1] if isinstance(output, (list, tuple)) else output


def parity(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Errors of our kernels, by default and exact, and of plain torch in fp32, all against plain torch in fp64."""
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        for key in ("error", "exact_error"):
            if key == "exact_error":
                dk.optimize(model, exact=True, inplace=True)
            model(x)  # chooses the algorithms; the second call runs whole blocks
            outputs[key] = last(model(x)).double()
        dk.restore(model)
        with dk.backend("reference"):
            outputs["stock_error"] = last(model(x)).double()
            truth = last(copy.deepcopy(model).double()(x.double()))
    size = truth.abs().max()
    return {key: float((out - truth).abs().max() / size) for key, out in outputs.items()}


def wrong(row: dict[str, Any]) -> str:
    """What is wrong with a row, nothing if nothing is."""
    ulp = torch.finfo(torch.float32).eps
    stock = 2 * row["stock_error"] + ulp
    found = []
    if not row["error"] <= max(BOUND, stock):
        found.append(f"error {row['error']:.1e}, allowed {max(BOUND, stock):.1e}")
    if not row.get("exact_error", 0.0) <= stock:
        found.append(f"exact error {row['exact_error']:.1e}, allowed {stock:.1e}")
    if row.get("latency", {}).get("wrong", {}).get("ours"):
        found.append("differs from stock where it is timed")
    return "; ".join(found)


def built(name: str) -> nn.Module:
    """The seeded model in eval."""
    torch.manual_seed(2015)
    # Hundreds of residual branches with gains around 1 overflow.
    return randomised(models.create(name), 0.2 if name.endswith(("1202", "1001")) else 1.0)


def parity_row(name: str) -> dict[str, Any]:
    """Counts and errors of one model."""
    info = models.model_info(name)
    model = built(name)
    size = SMALLER.get(name, info.input_size)
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(1))
    return {
        "name": name,
        "family": info.family,
        "parameters": models.count_parameters(model),
        "macs": models.macs(name),
        "input_size": list(info.input_size),
        "source": info.source,
        **parity(model, x),
        "paper_reported": PAPER_REPORTED.get(name),
    }


def latency_row(name: str, rounds: int, budget_s: float, peers: bool) -> dict[str, Any]:
    """Times and memory of one model."""
    from _latency import latency

    size = SMALLER.get(name, models.model_info(name).input_size)
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return latency(built(name), x, rounds, budget_s, peers)


def _latency_cells(row: dict[str, Any]) -> list[str]:
    found = row.get("latency")
    if found is None:
        return [""] * 5
    if "speedup" not in found:
        return ["", "wrong", "", "", ""]
    times, peer = found["times"], found["best_peer"]
    size = "" if found["input"][1:] == row["input_size"] else f" ({' x '.join(map(str, found['input'][1:]))})"
    mib = found["peak_mib"]
    return [
        f"{times['ours']['median_ms']:.1f}{size}",
        f"{found['speedup']:.2f}x",
        "" if peer is None else f"{found['speedup_peer']:.2f}x {peer}",
        "" if mib["ours"] is None else f"{mib['ours']:.0f}",
        "" if mib["stock"] is None else f"{mib['stock']:.0f}",
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    header = [
        "model", "parameters", "GMACs", "input", "error, ours", "exact", "stock", "ms, ours", "against stock",
        "against best peer", "peak MiB, ours", "stock", "paper-reported",
    ]  # fmt: skip
    cells = [
        [
            f"`{r['name']}`",
            f"{r['parameters']:,}",
            f"{r['macs'] / 1e9:.3f}",
            " x ".join(map(str, r["input_size"])),
            f"{r['error']:.1e}",
            f"{r['exact_error']:.1e}" if "exact_error" in r else "",
            f"{r['stock_error']:.1e}",
            *_latency_cells(r),
            r["paper_reported"] or "",
        ]
        for r in rows
    ]
    return markdown(header, cells)


def page(document: dict[str, Any], text: str) -> str:
    """The documentation page ``text`` with its generated part made new."""
    machine = document["machine"]
    rows = document["rows"]
    timed = [r["latency"]["speedup"] for r in rows if "speedup" in r.get("latency", {})]
    peers = [r["latency"]["speedup_peer"] for r in rows if r.get("latency", {}).get("speedup_peer")]
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"--docs: expected a file with one line {BEGIN} and one line {END}")
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    text = (
        f"Measured {machine['date']} on {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}: batch 1,\n"
        "fp32, inference, random weights. Error: largest difference to fp64 over the largest output, by default, with\n"
        "`exact=True`, and of stock torch. The last column is **paper-reported** accuracy: no trained weights of these\n"
        "nets come with the package and none of it was measured here.\n\n" + table(rows)
    )  # fmt: skip
    if timed:
        text += (
            f"\nAgainst stock torch: {min(timed):.2f}x to {max(timed):.2f}x over {len(timed)} models, "
            f"{sum(t < 0.98 for t in timed)} of them below 0.98x."
        )
    if peers:
        text += (
            f"\nAgainst the better of ONNX Runtime and OpenVINO: {min(peers):.2f}x to {max(peers):.2f}x over {len(peers)} "
            f"models; {sum(p < 1 for p in peers)} are slower than the peer."
        )
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these models only")
    parser.add_argument("--family", help="one family only")
    parser.add_argument("--part", choices=("parity", "latency"), help="one part only; latency needs parity to be there")
    parser.add_argument("--missing", action="store_true", help="leave what the results file has")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so many seconds")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of timing a model")
    parser.add_argument("--no-peers", action="store_true", help="no ONNX Runtime, no OpenVINO")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS / "models.json")
    parser.add_argument("--markdown", action="store_true", help="print the table of the results file; run nothing")
    parser.add_argument("--docs", type=Path, help="renew the generated part of this documentation page too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    document = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"rows": []}
    found = {r["name"]: r for r in document["rows"]}
    start = time.monotonic()
    names = [] if arguments.markdown else arguments.only or models.list_models(arguments.family)
    for number, name in enumerate(names, 1):
        at = f"[{number}/{len(names)}, {time.monotonic() - start:.0f} s] {name}"
        if time.monotonic() - start > arguments.seconds:
            print("time is up; continue with --missing", file=sys.stderr)
            break
        if arguments.part != "latency" and not (arguments.missing and "exact_error" in found.get(name, {})):
            kept = found.get(name, {}).get("latency")
            found[name] = parity_row(name) | ({"latency": kept} if kept else {})
            errors = ", ".join(f"{key} {found[name][key]:.1e}" for key in ("error", "exact_error", "stock_error"))
            print(f"{at}: {errors}", file=sys.stderr, flush=True)
        if arguments.part != "parity" and name in found and not (arguments.missing and "latency" in found[name]):
            timed = latency_row(name, arguments.rounds, arguments.budget, not arguments.no_peers)
            found[name]["latency"] = timed
            ratios = f"{timed.get('speedup')}x stock, {timed.get('speedup_peer')}x {timed['best_peer']}"
            print(f"{at}: {ratios}", file=sys.stderr, flush=True)
        rows = [found[n] for n in models.list_models() if n in found]
        document = {"schema": 2, "machine": benchmark.machine(), "rows": rows}
        save(arguments.json, document)
    rows = document["rows"]
    print(table(rows), end="")
    if arguments.docs is not None:
        arguments.docs.write_text(page(document, arguments.docs.read_text()))
    faults = {r["name"]: wrong(r) for r in rows if wrong(r)}
    for name, what in faults.items():
        print(f"{name}: {what}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
