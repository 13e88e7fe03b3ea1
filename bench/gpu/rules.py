"""What every op must keep to on a GPU: no hidden synchronization, the same bits each time, capture in a CUDA graph.

A dry run makes the same calls on the CPU, where a graph is a second call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dl4ds_kernels import benchmark
from gpu.place import Place, rule_cases

REPEATS = 100
Call = Callable[[], dict[str, Tensor]]
DEPENDS_ON_DATA = "SKIP: the size of its output depends on the data, or it is plain torch; nms_padded is the form for graphs"


def calls(place: Place) -> Iterator[tuple[str, Call | str]]:
    """(name, call) of every op, backend and direction; a text instead of a call says why there is none."""
    for case, backend in rule_cases(place):
        module = benchmark.OPS[case.op]
        name = f"{case.op} {backend} {case.direction}"
        if case.op in benchmark.NMS and case.op != "nms_padded":
            yield name, DEPENDS_ON_DATA
            continue
        if why := place.missing(case.op, backend):
            yield name, f"SKIP: {why}"
            continue
        try:
            with torch.set_grad_enabled(case.backward):
                yield name, module.setup(case, backend).outputs
        except benchmark.Unavailable as reason:
            yield name, f"SKIP: {reason}"


@contextmanager
def _syncs_are_errors(place: Place) -> Iterator[None]:
    if place.is_dry:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_sync(place: Place, call: Call) -> str | None:
    """The host never waits for the device."""
    call()
    place.synchronize()
    with _syncs_are_errors(place):
        call()
    return None


def same_bits(place: Place, call: Call) -> str | None:
    """F47: a hundred calls give the same bits."""
    first = {name: t.clone() for name, t in call().items()}
    for i in range(REPEATS):
        for name, t in call().items():
            if not torch.equal(t, first[name]):
                return f"{name}: other bits in call {i + 2}"
    return None


def captured(place: Place, call: Call) -> str | None:
    """A replayed CUDA graph gives what the plain call gives."""
    expected = {name: t.clone() for name, t in call().items()}
    if place.is_dry:
        replayed = call()
    else:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # autotuning and allocation happen before the capture
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = call()
        for t in replayed.values():
            t.detach().zero_()
        graph.replay()
        torch.cuda.synchronize()
    wrong = [name for name, t in replayed.items() if not torch.equal(t, expected[name])]
    return f"{', '.join(wrong)}: a replayed graph gives another result" if wrong else None


RULES: dict[str, Callable[[Place, Call], str | None]] = {
    "no hidden synchronization": no_sync,
    f"same bits in {REPEATS} calls": same_bits,
    "CUDA graph": captured,
}


def run(place: Place, rule: str) -> dict[str, str]:
    """{call: "right", "SKIP: why" or what was wrong} under one of RULES."""
    results: dict[str, str] = {}
    for name, call in calls(place):
        if isinstance(call, str):
            results[name] = call
            continue
        try:
            with torch.set_grad_enabled(name.endswith("bwd")):
                results[name] = RULES[rule](place, call) or "right"
        except Exception as error:  # one broken call must not hide the others
            results[name] = f"{type(error).__name__}: {error}"
    return results
