"""Foreign models (torchvision, timm, segmentation-models-pytorch, monai) before and after ``dk.optimize``, CPU inference.

    python bench/models/foreign.py [--only "tv resnet18" …] [--missing] [--seconds 45] [--rounds 15] [--threads 2]

Stock and optimized are interleaved in one process at batch 1. An optimized model whose output is further from the fp64 truth
than twice stock (and than 1e-4) gets no time. Results are saved model by model, so that a run may be broken off
and continued with ``--missing``; ``--seconds`` starts no further model after that long. The exit code is 1 if a result is wrong
or a model is slower than 0.98 of stock.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _results import RESULTS, markdown, save
from table import randomised

import dl4ds_kernels as dk
from dl4ds_kernels import benchmark

LIBRARIES = {"tv": "torchvision.models", "timm": "timm", "smp": "segmentation_models_pytorch", "monai": "monai.networks.nets"}
LIMIT, SLOWEST = 1e-4, 0.98

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn", "densenet121", "mobilenet_v2",
    "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0", "efficientnet_b0", "regnet_y_400mf", "googlenet", "inception_v3",
)  # fmt: skip
TIMM = (
    "resnet18", "resnet50", "seresnet50", "resnetv2_50", "densenet121", "mobilenetv2_100", "efficientnet_b0", "regnetx_004",
    "cspdarknet53", "darknet53", "hrnet_w18", "repvgg_a0", "dla34",
)  # fmt: skip
SMP = (("Unet", "resnet18"), ("Unet", "resnet34"), ("Unet", "resnet50"), ("FPN", "resnet18"), ("Linknet", "resnet18"),
       ("PSPNet", "resnet18"), ("DeepLabV3Plus", "resnet18"), ("MAnet", "resnet18"))  # fmt: skip
MONAI: dict[str, Callable[[Any], nn.Module]] = {
    "UNet": lambda lib: lib.UNet(2, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch", act="relu"),
    "UNet prelu": lambda lib: lib.UNet(2, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch"),
    "BasicUNet": lambda lib: lib.BasicUNet(2, 1, 2, norm="batch", act="relu"),
}


def entries() -> dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]]:
    """name -> (builder from the library, input shape)."""
    rows: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {}
    for name in TORCHVISION:
        extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = 299 if name == "inception_v3" else 224
        rows[f"tv {name}"] = (lambda lib, name=name, extra=extra: getattr(lib, name)(**extra), (1, 3, size, size))
    for name in ("fcn_resnet50", "deeplabv3_resnet50"):
        rows[f"tv {name}"] = (
            lambda lib, name=name: getattr(lib.segmentation, name)(weights=None, weights_backbone=None), (1, 3, 160, 160)
        )  # fmt: skip
    for name in TIMM:
        rows[f"timm {name}"] = (lambda lib, name=name: lib.create_model(name, pretrained=False), (1, 3, 224, 224))
    for kind, encoder in SMP:
        rows[f"smp {kind} {encoder}"] = (
            lambda lib, kind=kind, encoder=encoder: getattr(lib, kind)(encoder, encoder_weights=None, classes=2),
            (1, 3, 256, 256),
        )  # fmt: skip
    for name, build in MONAI.items():
        rows[f"monai {name}"] = (build, (1, 1, 256, 256))
    return rows


def first(output: Any) -> Tensor:
    """The tensor that is compared."""
    if isinstance(output, dict):
        return next(iter(output.values()))
    return output if isinstance(output, Tensor) else output[-1]


def row(name: str, rounds: int, budget_s: float) -> dict[str, Any]:
    """Errors, times and ratio of one model."""
    build, shape = entries()[name]
    library = LIBRARIES[name.split()[0]]
    try:
        lib = importlib.import_module(library)
    except ImportError as error:
        return {"name": name, "missing": f"{library}: {error}"}
    torch.manual_seed(2015)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = randomised(build(lib))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    fused = dk.optimize(stock)
    report = fused.dl4ds_report
    truth = first(copy.deepcopy(stock).double()(x.double()))
    errors = {key: benchmark.relative_error(first(net(x)), truth) for key, net in (("stock", stock), ("optimized", fused))}
    found: dict[str, Any] = {
        "name": name,
        "input": list(shape),
        "chains": len(report),
        "replaced": len(report.replaced),
        "kept": dict(Counter(r.reason for r in report.kept)),
        "error": {key: float(f"{error:.3g}") for key, error in errors.items()},
    }
    if errors["optimized"] > max(2 * errors["stock"], LIMIT):
        return found | {"wrong": f"error {errors['optimized']:.1e}"}
    calls = {"stock": lambda: stock(x), "optimized": lambda: fused(x)}
    timings = benchmark.measure(calls, rounds=rounds, min_sample_ms=1.0, budget_s=budget_s, settle_s=0.002)
    low, high = benchmark.speedup_range(timings["stock"], timings["optimized"])
    return found | {
        "rounds": len(timings["stock"].samples_ms),
        "candidates": {key: timing.as_dict() for key, timing in timings.items()},
        "ratio": round(benchmark.speedup(timings["stock"], timings["optimized"]), 3),
        "ratio_p20_p80": [round(low, 3), round(high, 3)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = []
    for r in rows:
        if "candidates" not in r:
            lines.append([r["name"], "", "", "", "", r.get("wrong") or r["missing"], ""])
            continue
        kept = ", ".join(f"{n} {reason}" for reason, n in r["kept"].items())
        times = [f"{r['candidates'][key]['median_ms']:.1f}" for key in ("stock", "optimized")]
        spread = "{:.2f} - {:.2f}".format(*r["ratio_p20_p80"])
        lines.append([r["name"], f"{r['replaced']} of {r['chains']}", kept, *times, f"{r['ratio']:.2f}x", spread])
    return markdown(["model", "replaced", "kept", "stock ms", "optimized ms", "speed-up", "p20 - p80"], lines)


def main() -> int:
    known = entries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help="these models only")
    parser.add_argument("--missing", action="store_true", help="only models that the results file does not have")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further model after so many seconds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of timing a model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS / "models_foreign.json")
    parser.add_argument("--markdown", action="store_true", help="print the table of the results file; run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {r["name"]: r for r in json.loads(arguments.json.read_text())["rows"]} if arguments.json.exists() else {}
    start = time.monotonic()
    for name in [] if arguments.markdown else arguments.only or known:
        if arguments.missing and name in found:
            continue
        if time.monotonic() - start > arguments.seconds:
            print("time is up; continue with --missing", file=sys.stderr)
            break
        with torch.no_grad():
            found[name] = row(name, arguments.rounds, arguments.budget)
        print(name, found[name].get("ratio") or found[name].get("wrong") or found[name]["missing"], file=sys.stderr, flush=True)
        save(arguments.json, {"schema": 1, "machine": benchmark.machine(), "rows": [found[n] for n in known if n in found]})
    rows = [found[n] for n in known if n in found]
    print(table(rows), end="")
    wrong = [r["name"] for r in rows if "wrong" in r]
    slow = [r["name"] for r in rows if r.get("ratio", 1.0) < SLOWEST]
    for names, what in ((wrong, "wrong results"), (slow, f"slower than {SLOWEST} of stock")):
        if names:
            print(f"{what}: {', '.join(names)}", file=sys.stderr)
    return int(bool(wrong or slow))


if __name__ == "__main__":
    sys.exit(main())
