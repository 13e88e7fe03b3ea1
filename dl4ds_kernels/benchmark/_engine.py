"""Runs cases: parity against fp64 first, then interleaved timing of the providers that passed.

A provider whose numbers are wrong gets no speed: its row says how wrong it is and :func:`failed` is true for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ._case import OURS, Case, Problem, Run, Unavailable, parity_only, why_not
from ._timing import Timing, measure, speedup, speedup_range

# Largest error that stock torch itself may have before it is no yardstick any more (TF32 convolutions included).
_STOCK_LIMIT = {"fp64": 1e-9, "fp32": 5e-3, "fp16": 5e-2, "bf16": 1e-1}
_FACTOR = 2.0  # ours may be this many times as far from fp64 as stock torch
_FLOOR_EPS = 4.0  # ... or this many rounding steps of the output's largest value, where stock torch was lucky


@dataclass
class Row:
    """One provider on one case. ``status``: ok, wrong, error, unavailable, or parity (checked, deliberately not timed)."""

    op: str
    case: str
    shape: str
    dtype: str
    layout: str
    direction: str
    device: str
    provider: str
    ours: bool
    status: str
    message: str = ""
    error: float | None = None  # max |result - fp64| / max |fp64|, worst output
    limit: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    best_ms: float | None = None
    faults: float | None = None
    gbytes_per_s: float | None = None
    gflop_per_s: float | None = None
    speedup: float | None = None  # against the first stock provider that ran
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    speedup_best_stock: float | None = None  # against the fastest stock provider

    def as_dict(self) -> dict[str, Any]:
        """For JSON and CSV."""
        return asdict(self)


def failed(row: Row) -> bool:
    """Whether a row must make the command fail: wrong numbers, or an exception in our own code."""
    return row.status == "wrong" or (row.status in ("error", "unavailable") and row.ours)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """``max |got - truth| / max |truth|``; NaN for a stray NaN, infinity for a wrong shape; 0 or 1 for integers."""
    if got.shape != truth.shape:
        return float("inf")
    if not truth.is_floating_point():
        return 0.0 if torch.equal(got.cpu(), truth.cpu()) else 1.0
    if truth.numel() == 0:
        return 0.0
    difference = (got.detach().cpu().double() - truth).abs().max().item()
    return difference / max(truth.abs().max().item(), torch.finfo(torch.float64).tiny)


def errors(outputs: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each output of ``truth``; a missing one is infinitely wrong."""
    return {name: relative_error(outputs[name], t) if name in outputs else float("inf") for name, t in truth.items()}


def limits(case: Case, stock: Mapping[str, float], truth: Mapping[str, Tensor], floor: float = 0.0) -> dict[str, float]:
    """Allowed error of each output: twice stock torch's own, at least ``floor`` and a few rounding steps; 0 for integers."""
    floor = max(floor, _FLOOR_EPS * torch.finfo(case.torch_dtype).eps)
    allowed = {}
    for name, t in truth.items():
        allowed[name] = max(_FACTOR * stock[name], floor) if t.is_floating_point() else 0.0
    return allowed


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _worst(found: Mapping[str, float], allowed: Mapping[str, float]) -> str:
    """The output that is furthest above its limit (NaN counts as above)."""

    def excess(name: str) -> float:
        value = found[name]
        return float("inf") if value != value else value / max(allowed[name], 1e-300)

    return max(found, key=excess)


def _row(case: Case, provider: str, status: str, **more: Any) -> Row:
    shape = case.layer.describe(case.batch)
    return Row(
        case.op, case.layer.name, shape, case.dtype, case.layout, case.direction, case.device, provider, provider in OURS,
        status, **more,
    )  # fmt: skip


def _gate(case: Case, provider: str, run: Run, made: Problem, stock: Mapping[str, float], floor: float) -> Row:
    """The parity row of one provider."""
    found = errors(run.outputs(), made.truth)
    if provider == "eager":
        allowed = {name: _STOCK_LIMIT[case.dtype] if t.is_floating_point() else 0.0 for name, t in made.truth.items()}
    else:
        allowed = limits(case, stock, made.truth, floor)
    worst = _worst(found, allowed)
    row = _row(case, provider, "ok", error=found[worst], limit=allowed[worst])
    if not found[worst] <= allowed[worst]:
        row.status = "wrong"
        row.message = f"{worst}: error {found[worst]:.2e} against fp64 is above {allowed[worst]:.2e}: no speed is given"
    return row


def _yardstick(case: Case, module: Any, made: Problem) -> dict[str, float]:
    """Stock torch's own error of each output: of eager, and of eager on channels_last where that differs.

    The library sums in another order there: a convolution of a channels_last map can be ten times as far from fp64.
    """
    found = errors(module.setup(case, "eager").outputs(), made.truth)
    for other in ("eager_cl", "channels_last"):
        if other in getattr(module, "STOCK", ()) and case.layout == "nchw":
            last = errors(module.setup(case, other).outputs(), made.truth)
            found = {name: max(error, last[name]) for name, error in found.items()}
    return found


def run_case(
    case: Case,
    providers: Sequence[str],
    module: Any,
    *,
    rounds: int = 30,
    time_it: bool = True,
    advance: Callable[[], None] | None = None,
) -> list[Row]:
    """Rows of ``providers`` on one case, in their order.

    Args:
        module: the op's file in ``ops/`` (or anything with its ``problem(case)`` and ``setup(case, provider)``).
        rounds: samples a provider. time_it: False stops after the parity gate.
        advance: called once a timing round.
    """
    rows: dict[str, Row] = {}
    ready: dict[str, Run] = {}
    with torch.set_grad_enabled(case.backward):
        try:
            made = module.problem(case)
            stock = _yardstick(case, module, made)  # timed or not
        except Unavailable as reason:
            return [_row(case, provider, "unavailable", message=str(reason)) for provider in providers]
        except Exception as error:
            message = f"stock torch cannot run this case: {_first_line(error)}"
            return [_row(case, provider, "unavailable", message=message) for provider in providers]
        for provider in providers:
            reason = why_not(provider, case.device)
            if reason:
                rows[provider] = _row(case, provider, "unavailable", message=reason)
                continue
            try:
                floor = module.floor(case, provider) if hasattr(module, "floor") else 0.0
                rows[provider] = _gate(case, provider, module.setup(case, provider), made, stock, floor)
                if rows[provider].status == "ok" and parity_only(provider, case.device):
                    rows[provider].status, rows[provider].message = "parity", "numbers checked; an interpreter has no speed"
                elif rows[provider].status == "ok" and time_it:
                    ready[provider] = module.setup(case, provider)
            except Unavailable as reason:
                rows[provider] = _row(case, provider, "unavailable", message=str(reason))
            except Exception as error:  # one provider's failure must not hide the others' rows
                rows[provider] = _row(case, provider, "error", message=_first_line(error))
        if ready:
            calls = {name: run.fn for name, run in ready.items()}
            settle = getattr(module, "SETTLE_S", 0.0) if case.device == "cpu" else 0.0
            timings = measure(calls, rounds=rounds, device=case.device, settle_s=settle, advance=advance)
            _fill(rows, ready, timings)
    return [rows[provider] for provider in providers]


def _fill(rows: dict[str, Row], ready: Mapping[str, Run], timings: Mapping[str, Timing]) -> None:
    """Write timings and ratios into the rows."""
    stock = [timings[name] for name in timings if not rows[name].ours]
    first, fastest = (stock[0], min(stock, key=lambda t: t.median)) if stock else (None, None)
    for name, timing in timings.items():
        row, run = rows[name], ready[name]
        for key, value in timing.as_dict().items():
            setattr(row, key, value)
        seconds = timing.median * 1e-3
        row.gbytes_per_s = round(run.bytes / seconds / 1e9, 2)
        row.gflop_per_s = round(run.flops / seconds / 1e9, 1) if run.flops else None
        if first is not None:
            row.speedup = round(speedup(first, timing), 3)
            row.speedup_p20, row.speedup_p80 = (round(q, 3) for q in speedup_range(first, timing))
            row.speedup_best_stock = round(speedup(fastest, timing), 3)


def run_cases(
    cases: Iterable[Case],
    providers: Sequence[str],
    module: Any,
    *,
    rounds: int = 30,
    time_it: bool = True,
    started: Callable[[Case], None] | None = None,
    advance: Callable[[], None] | None = None,
) -> list[Row]:
    """All rows of all cases; ``started`` is called before each case."""
    rows: list[Row] = []
    try:
        for case in cases:
            if started is not None:
                started(case)
            rows += run_case(case, providers, module, rounds=rounds, time_it=time_it, advance=advance)
    finally:
        module.problem.cache_clear()  # gigabytes of fp64 truth, for large shapes
    return rows
