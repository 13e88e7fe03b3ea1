"""Host overhead: what a call of ours costs on tensors so small that nothing else counts, against stock torch.

    python bench/overhead.py [--rounds 200] [--json bench/results/overhead.json] [--fail-above 1.3]

Forward calls with gradients off and on (the graph is recorded), and whole training steps with backward. Interleaved medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from _results import RESULTS, markdown, save
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import benchmark
from dl4ds_kernels import functional as F

_SHAPE = (1, 8, 4, 4)
Call = Callable[[], Any]


def _add_act(grad: bool) -> tuple[Call, Call]:
    x, residual = (torch.randn(_SHAPE, requires_grad=grad) for _ in range(2))
    return lambda: torch.relu(x + residual), lambda: F.add_act(x, residual)


def _bn_act(grad: bool, training: bool) -> tuple[Call, Call]:
    x = torch.randn(_SHAPE, requires_grad=grad)
    weight, bias = (torch.randn(_SHAPE[1], requires_grad=grad) for _ in range(2))
    mean, var = torch.zeros(_SHAPE[1]), torch.ones(_SHAPE[1])
    return (
        lambda: TF.relu(TF.batch_norm(x, mean, var, weight, bias, training)),
        lambda: F.bn_act(x, mean, var, weight, bias, training=training),
    )


def _sequence(grad: bool, training: bool) -> tuple[Call, Call]:
    """A replaced conv-bn-relu sequence against the same stock ``nn.Sequential``."""
    stock = nn.Sequential(nn.Conv2d(_SHAPE[1], 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).train(training)
    ours = dk.optimize(stock)
    x = torch.randn(_SHAPE, requires_grad=grad)
    return lambda: stock(x), lambda: ours(x)


def _backward(call: Callable[[], Tensor]) -> Call:
    dout = torch.ones_like(call())
    return lambda: call().backward(dout)


def pairs() -> dict[str, tuple[Call, Call]]:
    """name -> (stock, ours)."""
    found: dict[str, tuple[Call, Call]] = {}
    for grad in (False, True):
        suffix = f"grad {'on' if grad else 'off'}"
        found[f"add_act, {suffix}"] = _add_act(grad)
        for training in (False, True):
            mode = "train" if training else "eval"
            found[f"bn_act {mode}, {suffix}"] = _bn_act(grad, training)
            found[f"conv-bn-relu replaced, {mode}, {suffix}"] = _sequence(grad, training)
    training_pairs = {
        "add_act": _add_act(True), "bn_act train": _bn_act(True, True), "conv-bn-relu replaced, train": _sequence(True, True),
    }  # fmt: skip
    for name, (stock, ours) in training_pairs.items():
        found[f"{name}, forward + backward"] = (_backward(stock), _backward(ours))
    return found


def run(rounds: int) -> list[dict[str, Any]]:
    """Rows with microseconds a call and the ratio ours / stock."""
    rows = []
    for name, (stock, ours) in pairs().items():
        with torch.set_grad_enabled("off" not in name):
            timings = benchmark.measure({"stock": stock, "ours": ours}, rounds=rounds, warmup=200, min_sample_ms=1.0)
        s, o = timings["stock"], timings["ours"]
        rows.append(
            {
                "name": name,
                "stock_us": round(s.median * 1e3, 2),
                "ours_us": round(o.median * 1e3, 2),
                "ratio": round(o.median / s.median, 3),
                "ratio_best": round(o.best / s.best, 3),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    header = ["call on a (1, 8, 4, 4) tensor", "stock us", "ours us", "ours / stock", "by minimum"]
    cells = [
        [r["name"], f"{r['stock_us']:.1f}", f"{r['ours_us']:.1f}", f"{r['ratio']:.2f}", f"{r['ratio_best']:.2f}"] for r in rows
    ]
    return markdown(header, cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULTS / "overhead.json")
    parser.add_argument("--fail-above", type=float, help="exit 1 if a ratio by minimum is above this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # host time only: no thread pool to wake
    torch.manual_seed(0)
    rows = run(arguments.rounds)
    print(table(rows), end="")
    save(
        arguments.json,
        {"schema": 1, "machine": benchmark.machine(), "shape": list(_SHAPE), "rounds": arguments.rounds, "rows": rows},
    )
    worst = max(rows, key=lambda row: row["ratio_best"])
    print(f"highest ratio by minimum: {worst['ratio_best']:.2f} ({worst['name']})")
    return int(arguments.fail_above is not None and worst["ratio_best"] > arguments.fail_above)


if __name__ == "__main__":
    sys.exit(main())
