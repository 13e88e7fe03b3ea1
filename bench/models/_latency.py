"""Latency and peak memory of one of the package's models against the same modules in plain torch and against runtimes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dl4ds_kernels import benchmark
from dl4ds_kernels.benchmark import peers as _peers
from dl4ds_kernels.benchmark._stock import plain_torch, stock_twin

PEERS = {name: _peers.RUNTIMES[name] for name in ("onnxruntime", "openvino")}
LIMIT = 2e-4  # of the largest output: no time for what is wrong by more
# Exported graphs are copied several times; and a thousand layers take minutes to export.
_PEER_PARAMETERS, _PEER_MODULES = 150_000_000, 1500


def first(output: Any) -> Tensor:
    """The tensor that is compared: of several outputs the last."""
    return output if isinstance(output, Tensor) else output[-1]


def peak_mib(call: Callable[[], Any]) -> float | None:
    """By how much the resident memory grows at its peak during a first call; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        call()
        return round((_status("VmHWM") - before) / 1024, 1)
    except (OSError, AttributeError, StopIteration):
        call()
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def latency(model: nn.Module, x: Tensor, rounds: int, budget_s: float, peers: bool) -> dict[str, Any]:
    """Times, ratios and memory of ``model`` in eval; parity with the stock run comes first."""
    twin = stock_twin(model)

    def stock() -> Tensor:
        with plain_torch():
            return first(twin(x))

    def ours() -> Tensor:
        return first(model(x))

    found: dict[str, Any] = {"input": list(x.shape), "peak_mib": {"stock": peak_mib(stock), "ours": peak_mib(ours)}}
    truth = stock().double()
    calls: dict[str, Callable[[], Any]] = {"stock": stock, "ours": ours}
    missing: dict[str, str] = {}
    if not peers:
        missing = dict.fromkeys(PEERS, "not asked for")
    elif sum(p.numel() for p in model.parameters()) > _PEER_PARAMETERS or len(list(model.modules())) > _PEER_MODULES:
        missing = dict.fromkeys(PEERS, "too large to export here")
    else:
        with plain_torch():
            found_peers, missing = _peers.build(PEERS, twin, x, torch.get_num_threads())
        calls |= found_peers
    errors = {name: benchmark.relative_error(torch.as_tensor(call()), truth) for name, call in calls.items()}
    wrong = {name: error for name, error in errors.items() if not error <= LIMIT}
    timings = benchmark.measure(
        {name: call for name, call in calls.items() if name not in wrong},
        rounds=rounds, warmup=1, min_sample_ms=1.0, budget_s=budget_s, settle_s=0.005,
    )  # fmt: skip
    medians = {name: timing.median for name, timing in timings.items()}
    others = {name: time for name, time in medians.items() if name not in ("ours", "stock")}
    best = min(others, key=others.__getitem__, default=None)
    found |= {
        "rounds": len(timings["stock"].samples_ms),
        "times": {name: timing.as_dict() for name, timing in timings.items()},
        "wrong": {name: float(f"{error:.3g}") for name, error in wrong.items()},
        "missing": missing,
        "best_peer": best,
    }
    if "ours" in medians:
        found["speedup"] = round(medians["stock"] / medians["ours"], 3)
        found["speedup_peer"] = None if best is None else round(others[best] / medians["ours"], 3)
    return found
