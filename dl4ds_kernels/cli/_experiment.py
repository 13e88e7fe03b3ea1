"""The demo's measurement: stock and optimized model on one photo, parity against fp64, top-5 and speed, as one document."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

from .. import benchmark
from ..convert import optimize

EAGER, EAGER_CL, COMPILE, FROZEN, OURS = "eager", "eager channels_last", "torch.compile", "torch.compile frozen", "ours"
_DEFAULT_LIMIT = 1e-4  # without exact=True a faster algorithm may be chosen up to this error; see ARCHITECTURE, numerics
_FACTOR = 2.0
_FLOOR = 8 * torch.finfo(torch.float32).eps

Step = Callable[[str], None]
Runner = Callable[[Tensor], Tensor]


class _Frozen:
    """``torch.compile`` with Inductor's constant folding of weights, which it is silent about when it does not happen."""

    _PROOF = ("binary_folding_conv", "mkldnn_conv_weight_pack_matcher_count", "mkldnn_linear_weight_pack_matcher_count")

    def __init__(self, model: nn.Module) -> None:
        # A function of its own: Dynamo would serve the code compiled for the model's forward, which has the weights as inputs.
        self._compiled = torch.compile(lambda x: model(x), dynamic=False)
        self._ready = False

    def __call__(self, x: Tensor) -> Tensor:
        if not self._ready:
            before = self._folded()
            with torch._inductor.config.patch(freezing=True):
                self._compiled(x)
            if self._folded() == before:
                raise RuntimeError("Inductor did not freeze the weights")
            self._ready = True
        return self._compiled(x)

    def _folded(self) -> int:
        counters = torch._dynamo.utils.counters["inductor"]  # looked up each time: compiling replaces the counter
        return sum(counters[name] for name in self._PROOF)


def runners(stock: nn.Module, ours: nn.Module, device: str, with_compile: bool, frozen: bool) -> dict[str, Runner]:
    """name -> model call. Channels_last runners expect channels_last input, ours takes it as it comes."""
    last = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    found: dict[str, Runner] = {EAGER: stock, EAGER_CL: last}
    if with_compile:
        torch._dynamo.reset()
        found[COMPILE] = torch.compile(copy.deepcopy(last), dynamic=False)
    if frozen:
        found[FROZEN] = _Frozen(copy.deepcopy(last))
    found[OURS] = ours
    return found


def _input_for(name: str, x: Tensor) -> Tensor:
    return x if name in (EAGER, OURS) else x.contiguous(memory_format=torch.channels_last)


def parity(
    stock: nn.Module, calls: dict[str, Runner], inputs: list[Tensor], exact: bool, step: Step
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(errors of every runner against fp64 over all ``inputs``, logits of each on the first input; ``fp64`` is one of them)."""
    wide = copy.deepcopy(stock).double()
    truth = []
    for index, x in enumerate(inputs, start=1):
        step(f"fp64 reference, view {index} of {len(inputs)}")
        truth.append(wide(x.double()).cpu())
    errors: dict[str, float | None] = {}
    failures: dict[str, str] = {}
    logits = {"fp64": truth[0]}
    for name in list(calls):
        step(f"parity of {name}")
        try:
            outputs = [calls[name](_input_for(name, x)).cpu() for x in inputs]
        except Exception as error:
            if name == OURS:
                raise
            failures[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"  # e.g. no C++ compiler
            errors[name] = None
            del calls[name]
            continue
        logits[name] = outputs[0].double()
        errors[name] = max(benchmark.relative_error(y, t) for y, t in zip(outputs, truth, strict=True))
    own = max(errors[EAGER], errors[EAGER_CL])
    limit = max(_FACTOR * own, _FLOOR) if exact else max(_FACTOR * own, _DEFAULT_LIMIT)
    document = {
        "views": len(inputs),
        "errors": errors,
        "unavailable": failures,
        "stock_error": own,
        "ours_error": errors[OURS],
        "ratio": errors[OURS] / own if own else None,
        "limit": limit,
        "exact": exact,
        "ok": errors[OURS] <= limit,
    }
    return document, logits


def top5(logits: dict[str, Tensor], names: list[str], random_weights: bool) -> dict[str, Any]:
    """Top-5 classes of stock, ours and fp64 with probabilities, and whether they agree."""

    def label(index: int) -> str:
        name = names[index] if index < len(names) else f"class {index}"
        return f"class {index} ({name})" if random_weights else name

    found = {}
    for key, name in (("stock", EAGER), ("ours", OURS), ("fp64", "fp64")):
        probabilities = logits[name].double().softmax(1)[0]
        values, indices = probabilities.topk(min(5, probabilities.numel()))
        found[key] = [
            {"class": i, "label": label(i), "probability": p} for p, i in zip(values.tolist(), indices.tolist(), strict=True)
        ]
    order = {key: [row["class"] for row in rows] for key, rows in found.items()}
    shared = len(set(order["stock"]) & set(order["ours"]))
    return {
        **found,
        "agreement": shared,
        "of": len(order["stock"]),
        "same_order": order["stock"] == order["ours"],
        "same_as_fp64": order["fp64"] == order["ours"],
    }


def speed(calls: dict[str, Runner], x: Tensor, rounds: int, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Interleaved timing of all runners on one input; rows in order, ratios to the two eager baselines."""
    placed = {name: _input_for(name, x) for name in calls}
    timings = benchmark.measure(
        {name: (lambda call=call, y=placed[name]: call(y)) for name, call in calls.items()},
        rounds=rounds, min_sample_ms=5.0, device=x.device, advance=advance,
    )  # fmt: skip
    rows = []
    for name, timing in timings.items():
        low, high = benchmark.speedup_range(timing, timings[OURS])
        rows.append(
            {
                "name": name,
                **timing.as_dict(),
                "samples_ms": [round(s, 4) for s in timing.samples_ms],
                "ours_speedup": round(benchmark.speedup(timing, timings[OURS]), 3),
                "ours_speedup_p20": round(low, 3),
                "ours_speedup_p80": round(high, 3),
            }
        )
    return rows


def unchanged_state(stock: nn.Module, ours: nn.Module) -> dict[str, Any]:
    """Whether the optimized model has the stock model's state_dict keys, shapes and values."""
    a, b = stock.state_dict(), ours.state_dict()
    same = list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
    return {"keys": len(a), "unchanged": same, "same_type": type(stock) is type(ours)}


def experiment(
    stock: nn.Module,
    inputs: list[Tensor],
    names: list[str],
    *,
    random_weights: bool,
    exact: bool,
    device: str,
    rounds: int,
    with_compile: bool,
    frozen: bool,
    step: Step,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Everything the demo reports about ``stock`` on ``inputs`` (the first is the one that is timed)."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's advice is not the reader's concern; "nothing replaced" is in the report
        step("dk.optimize")
        stock, inputs = stock.to(device), [x.to(device) for x in inputs]
        ours = optimize(stock, exact=exact)
        calls = runners(stock, ours, device, with_compile, frozen)
        checked, logits = parity(stock, calls, inputs, exact, step)
        document = {
            "report": ours.dl4ds_report.to_dict(),
            "state_dict": unchanged_state(stock, ours),
            "parity": checked,
            "top5": top5(logits, names, random_weights),
            "speed": [],
        }
        if checked["ok"]:  # wrong numbers get no speed
            step("timing")
            document["speed"] = speed(calls, inputs[0], rounds, advance)
    return document
