"""The table of the models: parameters, multiply-adds, parity error, and the accuracy that papers report.

    python bench/models/table.py [--only resnet50 unet …] [--family resnet] [--json bench/results/models.json] [--markdown]

Parity: the largest difference of the fp32 outputs to the same network run by plain torch in fp64 (``backend="reference"``),
over the largest output, for our kernels and for plain torch in fp32. Weights are random and seeded; BatchNorm statistics and
parameters are away from 0 and 1. The full test suite compares the same networks with independent implementations. Nothing is
timed here. Memory for the fp64 twin of the largest net: about 3.5 GB.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
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


def randomised(model: nn.Module) -> nn.Module:
    """Seeded BatchNorm statistics and parameters, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(2015)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (m.running_mean, -0.2, 0.2),
                    (m.running_var, 0.7, 1.4),
                    (m.weight, 0.6, 1.4),
                    (m.bias, -0.2, 0.2),
                ):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def last(output: Any) -> Tensor:
    return output[-1] if isinstance(output, (list, tuple)) else output


def parity(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Error of our kernels and of plain torch in fp32, both against plain torch in fp64."""
    with torch.no_grad():
        ours = last(model(x)).double()
        with dk.backend("reference"):
            stock = last(model(x)).double()
            truth = last(copy.deepcopy(model).double()(x.double()))
    size = truth.abs().max()
    return float((ours - truth).abs().max() / size), float((stock - truth).abs().max() / size)


def row(name: str) -> dict[str, Any]:
    """One line of the table."""
    info = models.model_info(name)
    torch.manual_seed(2015)
    model = randomised(models.create(name))
    x = torch.randn(1, *info.input_size, generator=torch.Generator().manual_seed(1))
    ours, stock = parity(model, x)
    return {
        "name": name,
        "family": info.family,
        "parameters": models.count_parameters(model),
        "macs": models.macs(name),
        "input_size": list(info.input_size),
        "source": info.source,
        "error": ours,
        "stock_error": stock,
        "paper_reported": PAPER_REPORTED.get(name),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown; latency and memory come from the model benchmark."""
    header = ["model", "parameters", "GMACs", "input", "error, ours", "error, stock", "paper-reported"]
    cells = [
        [
            f"`{r['name']}`",
            f"{r['parameters']:,}",
            f"{r['macs'] / 1e9:.3f}",
            " x ".join(map(str, r["input_size"])),
            f"{r['error']:.1e}",
            f"{r['stock_error']:.1e}",
            r["paper_reported"] or "",
        ]
        for r in rows
    ]
    return markdown(header, cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these models only")
    parser.add_argument("--family", help="one family only")
    parser.add_argument("--json", type=Path, default=RESULTS / "models.json")
    parser.add_argument("--markdown", action="store_true", help="print the table of the results file; run nothing")
    arguments = parser.parse_args()
    known = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    if not arguments.markdown:
        found = {r["name"]: r for r in known}
        for name in arguments.only or models.list_models(arguments.family):
            found[name] = row(name)
            print(f"{name}: {found[name]['error']:.1e} (stock {found[name]['stock_error']:.1e})", file=sys.stderr)
            known = [found[n] for n in models.list_models() if n in found]
            save(arguments.json, {"schema": 1, "machine": benchmark.machine(), "rows": known})
    print(table(known), end="")
    # Twice stock's own error is the rule; a result that stock gets by luck may be a few ulp off.
    wrong = [r["name"] for r in known if r["error"] > 2 * r["stock_error"] + 1e-6]
    if wrong:
        print(f"error above twice stock's: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
