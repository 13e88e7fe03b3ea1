"""A training step on the CPU: ours against eager NCHW, eager channels_last and torch.compile, interleaved; losses first.

    python bench/models/train.py [--only resnet18,…] [--rounds 7] [--threads 2] [--compile] [--json FILE]

Parity: the losses of ``--steps`` SGD steps from the same weights on the same batches. The largest difference to eager may be at
most three times the largest difference between eager with one thread and with two. A model that fails gets no time. Peak memory
is measured by train_memory.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _results import markdown, save

import dl4ds_kernels as dk
from dl4ds_kernels import benchmark, models

# name -> (batch, height and width, classes)
ROWS = {"resnet18": (16, 112, 1000), "resnet50": (16, 112, 1000), "unet": (2, 256, 2), "densenet121": (16, 112, 1000)}
CANDIDATES = ("eager", "channels_last", "compile", "ours")
_FLOOR = 1e-5  # two fp32 runs differ by this much of the loss even where eager happens to agree with itself


class StockUNet(nn.Module):
    """Same-padded U-Net of stock layers, base 32: conv-BN-ReLU twice a level, max pooling, up-convolutions, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        widths = [32 << level for level in range(5)]
        self.down = nn.ModuleList(self._double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[3::-1])
        self.merge = nn.ModuleList(self._double(2 * w, w) for w in widths[3::-1])
        self.head = nn.Conv2d(32, 2, 1)

    @staticmethod
    def _double(a: int, b: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for c in (a, b):
            layers += [nn.Conv2d(c, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((skips.pop(), up(x)), 1))
        return self.head(x)


def stock(name: str) -> nn.Module:
    torch.manual_seed(0)
    return StockUNet() if name == "unet" else torchvision.models.get_model(name, weights=None)


def build(name: str, candidate: str) -> nn.Module:
    """A model in training with the same weights for every candidate."""
    model = stock(name).train()
    if candidate != "eager":
        model = model.to(memory_format=torch.channels_last)
    if candidate in ("ours", "efficient") and name != "unet":
        # The package's own model: whole blocks as one op where they are.
        ours = models.create(name, **({"memory_efficient": True} if candidate == "efficient" else {}))
        ours.load_state_dict(model.state_dict())
        return ours.to(memory_format=torch.channels_last).train()
    if candidate == "ours":
        return dk.optimize(model)
    return torch.compile(model, dynamic=False) if candidate == "compile" else model


def batches(name: str, count: int, channels_last: bool) -> list[tuple[Tensor, Tensor]]:
    n, side, classes = ROWS[name]
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(count):
        x = torch.randn(n, 3, side, side, generator=generator)
        y = torch.randint(classes, (n, side, side) if name == "unet" else (n,), generator=generator)
        found.append((x.contiguous(memory_format=torch.channels_last) if channels_last else x, y))
    return found


def stepper(name: str, candidate: str, count: int = 1) -> Callable[[], float]:
    """One call: forward, backward, SGD with momentum; gives the loss."""
    model, data = build(name, candidate), batches(name, count, candidate != "eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    turn = 0

    def step() -> float:
        nonlocal turn
        x, y = data[turn % len(data)]
        turn += 1
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def losses(name: str, candidate: str, steps: int, threads: int) -> list[float]:
    torch.set_num_threads(threads)
    step = stepper(name, candidate, steps)
    return [step() for _ in range(steps)]


def parity(name: str, steps: int, threads: int) -> dict[str, Any]:
    """Largest difference of the losses to eager, ours and eager's own between one and two threads."""
    eager = losses(name, "eager", steps, threads)
    own = max(abs(a - b) for a, b in zip(losses(name, "eager", steps, 1 if threads > 1 else 2), eager, strict=True))
    ours, last = (
        max(abs(a - b) for a, b in zip(losses(name, c, steps, threads), eager, strict=True)) for c in ("ours", "channels_last")
    )
    torch.set_num_threads(threads)
    limit = max(3 * own, _FLOOR * max(eager))
    return {"steps": steps, "ours": ours, "channels_last": last, "eager_threads": own, "limit": limit, "ok": ours <= limit}


def row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"model": name, "batch": ROWS[name][0], "size": ROWS[name][1]}
    found["parity"] = parity(name, options.steps, options.threads) if options.steps else None
    candidates = [c for c in CANDIDATES if c != "compile" or options.compile]
    if found["parity"] is None or found["parity"]["ok"]:
        calls = {c: stepper(name, c) for c in candidates}
        timings = benchmark.measure(
            calls, rounds=options.rounds, warmup=1, min_sample_ms=1.0, budget_s=options.budget, shuffle=0
        )
        found["ms"] = {c: t.as_dict() for c, t in timings.items()}
        best = min(t.median for c, t in timings.items() if c != "ours")
        found["best_peer"] = min((t.median, c) for c, t in timings.items() if c != "ours")[1]
        found["speedup"] = best / timings["ours"].median
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: medians in ms, the best peer over ours, differences of the losses."""
    lines = []
    for r in rows:
        times = [f"{r['ms'][c]['median_ms']:.0f}" if c in r.get("ms", {}) else "–" for c in CANDIDATES]
        p = r["parity"]
        lines.append(
            [
                f"{r['model']} b{r['batch']} {r['size']}", *times, f"{r['speedup']:.2f}x" if "speedup" in r else "wrong",
                f"{p['ours']:.1e} / {p['channels_last']:.1e} / {p['eager_threads']:.1e}" if p else "–",
            ]
        )  # fmt: skip
    return markdown(
        [
            "step",
            *(f"{c} ms" for c in CANDIDATES),
            "best peer / ours",
            "loss: ours / channels_last / eager 1-2 threads",
        ],
        lines,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ROWS), help="models with commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=20, help="of the parity check; 0 leaves it out (then nothing is shown as right)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of timing a model, from five rounds on")
    parser.add_argument("--compile", action="store_true", help="also torch.compile (minutes of compiling)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row(name, options) for name in options.only.split(",")]
    print(table(rows))
    if options.json:
        save(options.json, {"schema": 1, "machine": benchmark.machine(), "rows": rows})
    else:
        print(json.dumps(rows, default=str), file=sys.stderr)
    return 0 if all(r["parity"] is None or r["parity"]["ok"] for r in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
