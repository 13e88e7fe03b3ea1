"""ImageNet history (slides 10, 21, 50): published errors beside what these networks cost here, on this machine.

Errors are the papers' own and never measured here; parameters and multiply-adds are counted on our models; latencies are
measured, our fused model and torchvision's stock one interleaved, and only after both agree.

References: Krizhevsky et al., 2012; Simonyan and Zisserman, 2015; He et al., 2015 and 2016; Huang et al., 2017.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import models
from ..benchmark import measure, relative_error, speedup
from ._result import Check, Result

TITLE = "ImageNet history: published errors, and what the networks cost on this machine"


class Entry(NamedTuple):
    """One network: its year, the errors (%) of its paper, how they were evaluated, and the exact number of parameters."""

    label: str
    name: str
    year: int
    top1: float
    top5: float | None
    evaluation: str
    parameters: int


ENTRIES = (
    Entry("AlexNet", "alexnet_paper", 2012, 38.1, 16.4, "mean of five networks, 10 patches each", 60_965_224),
    Entry("VGG-19", "vgg19", 2014, 23.7, 6.8, "two networks, multi-crop and dense", 143_667_240),
    Entry("ResNet-152", "resnet152", 2015, 21.4, 5.7, "10-crop", 60_192_808),
    Entry("ResNet-200", "preact_resnet200", 2016, 20.1, 4.8, "one 320 crop, pre-activation", 64_666_152),
    Entry("DenseNet-161", "densenet161", 2017, 22.2, None, "one crop, the authors' code", 28_681_000),
)


def _pair(name: str, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """Our model and torchvision's with the same weights (None without torchvision or for a net it has not)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ours = models.create(name).eval()
    if importlib.util.find_spec("torchvision") is None:
        return ours, None
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        return ours, None
    with torch.device("meta"):
        stock = torchvision.models.get_model(name, weights=None)
    stock.load_state_dict(ours.state_dict(), assign=True)
    return ours, stock.eval()


def cost(entry: Entry, seed: int, rounds: int) -> dict[str, Any]:
    """Latency (ms, median) of one picture at the net's own size, ours and stock, and their largest relative difference."""
    ours, stock = _pair(entry.name, seed)
    x = torch.randn(1, *models.model_info(entry.name).input_size, generator=torch.Generator().manual_seed(seed))
    found: dict[str, Any] = {"error": None, "stock_ms": None, "speedup": None}
    with torch.no_grad():
        if stock is not None:
            found["error"] = relative_error(ours(x), stock(x))
        calls = {"ours": lambda: ours(x), **({"stock": lambda: stock(x)} if stock is not None else {})}
        times = measure(calls, rounds=rounds, warmup=2)
    found["ours_ms"] = times["ours"].median
    if stock is not None:
        found |= {"stock_ms": times["stock"].median, "speedup": speedup(times["stock"], times["ours"])}
    return found


def run(seed: int = 0, quick: bool = False) -> Result:
    """The table; ``quick`` measures the latency of the last row only."""
    rows = {}
    for entry in ENTRIES:
        meta = models.build_on_meta(entry.name).eval()
        row = entry._asdict() | {"counted": models.count_parameters(meta), "macs": models.macs(entry.name)}
        if not quick or entry is ENTRIES[-1]:
            row |= cost(entry, seed, 3 if quick else 15)
        rows[entry.label] = row
    checks = [Check(f"parameters of {k}", r["counted"], r["parameters"], r["parameters"]) for k, r in rows.items()]
    checks += [Check(f"{k}: ours against stock", r["error"], high=1e-4) for k, r in rows.items() if r.get("error") is not None]

    def paint(figure: Any) -> None:
        from ._style import RESIDUAL, THEORY

        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        record = float("inf")
        line: list[tuple[int, float]] = []
        for entry in ENTRIES:
            macs = rows[entry.label]["macs"]
            left.scatter(entry.year, entry.top1, s=40 + 12 * macs / 1e9, color=RESIDUAL, alpha=0.75, zorder=3)
            below = entry.label == "ResNet-200"
            place = {"xytext": (11, -26 if below else 6), "textcoords": "offset points", "fontsize": 9}
            left.annotate(f"{entry.label}\n{entry.top1} %", (entry.year, entry.top1), **place)
            if entry.top1 < record:
                record = entry.top1
                line.append((entry.year, record))
        line.append((ENTRIES[-1].year, record))
        left.step([y for y, _ in line], [e for _, e in line], where="post", color=RESIDUAL, linewidth=1.5)
        left.set(xlim=(2011.5, 2018.6), ylim=(15, 42), xlabel="year", ylabel="top-1 error (%), from the papers")
        left.set_title("error; the disc's area grows with the multiply-adds")
        measured = [(k, r) for k, r in rows.items() if r.get("ours_ms")]
        longest = max(max(r["ours_ms"], r["stock_ms"] or 0) for _, r in measured)
        for i, (_, row) in enumerate(measured):
            if row["stock_ms"]:
                right.barh(
                    i - 0.2, row["stock_ms"], 0.38, color=THEORY, label="stock torch" if i == len(measured) - 1 else None
                )
                right.text(row["stock_ms"] + 0.01 * longest, i - 0.2, f"{row['stock_ms']:.0f} ms", va="center", fontsize=9)
            right.barh(i + 0.2, row["ours_ms"], 0.38, color=RESIDUAL, label="ours" if i == len(measured) - 1 else None)
            text = f"{row['ours_ms']:.0f} ms" + (f"  ({row['speedup']:.2f}x)" if row["speedup"] else "  (no stock model)")
            right.text(row["ours_ms"] + 0.01 * longest, i + 0.2, text, va="center", fontsize=9)
        names = [f"{k}\n{r['counted'] / 1e6:.1f} M, {r['macs'] / 1e9:.1f} GMACs" for k, r in measured]
        right.set_yticks(range(len(measured)), names)
        right.set_ylim(len(measured) - 0.4, -0.6)
        right.set_xlim(0, 1.3 * longest)
        right.set(xlabel=f"ms a picture, CPU, {torch.get_num_threads()} threads")
        right.set_title("latency, measured")
        right.legend(loc="lower right")
        right.grid(axis="y", visible=False)

    return Result(TITLE, {"rows": rows, "threads": torch.get_num_threads()}, checks, paint, (12.5, 4.8))
