"""``DL4DS_AUTOTUNE=1`` on CUDA: which kernels a convolution layer takes, by timing instead of by the model.

The C++ part asks :func:`choose` at each call that one of our kernels could serve: a layer forward, the input's gradient of one,
the end of a bottleneck block (_cuda_candidates.py). The answer is one of the candidates: what the kernel replaces, always
(cuDNN and the passes behind it, or two layers), and the kernel with each tile, number of slices or parts that applies. It comes
from this process, from the file of _autotune.py, or from timing now: on tensors of the call's sizes, with CUDA events, after a
warm-up, candidates in turn, L2 emptied before each sample, medians compared. The kernel is taken where it needs less than 97 %
of the time of what it replaces.

Nothing is timed while a graph is captured, under deterministic algorithms, while tracing, or while torch reports
synchronizations: then the static table of the model (conv_bn_act_plan.h) decides, and deterministic algorithms never use times.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import _autotune
from ._cuda_candidates import LIBRARY, Call, Kind
from ._version import __version__

UNDECIDED = -1
_WARM_UP, _ROUNDS = 3, 11
_HOPELESS = 2.0  # times the fastest of the warm-up: not timed any further


class Cuda:
    """The current device: its name, what forbids timing, operands and samples."""

    def machine(self) -> str:
        """What times are comparable within: GPU, architecture, and versions of the code that ran."""
        return _machine(torch.cuda.current_device())

    def forbids(self) -> str | None:
        """Why nothing can be timed now, or None."""
        if torch.cuda.is_current_stream_capturing():
            return "capture"
        return "synchronizations are reported" if torch.cuda.get_sync_debug_mode() else None

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Normal numbers in channels_last, from a generator of their own."""
        generator = torch.Generator("cuda").manual_seed(0)
        t = torch.empty(*shape, device="cuda", dtype=dtype)
        t = t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        return t.normal_(generator=generator)

    def sample(self, call: Callable[[], Any]) -> float:
        """Microseconds of one call on the current stream, with an L2 cache that holds other things."""
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        torch.empty(2 * max(size, 1 << 22), dtype=torch.uint8, device="cuda").zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)


@cache
def _machine(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    versions = f"dl4ds_kernels {__version__}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {versions}"


device: Any = Cuda()  # tests put another clock here


class _State(threading.local):
    forced: tuple[str, int] | None = None  # what is being timed: a kind's name and a candidate
    asking: bool = False  # dk.explain: never times
    why: str = ""  # of the last answer on this thread
    times: Mapping[int, float] = {}


_state = _State()
_failed: set[tuple[str, str]] = set()  # (machine, key) whose operands did not fit beside the model, in this process


@contextmanager
def asking() -> Iterator[_State]:
    """Inside, nothing is timed; ``why`` and ``times`` of the state tell of the last question."""
    before = _state.asking, _state.why, _state.times
    _state.asking, _state.why, _state.times = True, "", {}
    try:
        yield _state
    finally:
        _state.asking, _state.why, _state.times = before


@contextmanager
def _force(kind: Kind, code: int) -> Iterator[None]:
    before, _state.forced = _state.forced, (kind.name, code)
    try:
        yield
    finally:
        _state.forced = before


def choose(kind: Kind, values: Sequence[int]) -> int:
    """A candidate's number for a call, or UNDECIDED: the model's. ``values``: of the kind's fields.

    Candidates may themselves be calls that ask about another kind (two layers instead of a block's end): that is settled first.
    """
    if _state.forced is not None and _state.forced[0] == kind.name:
        return _state.forced[1]
    call = dict(zip(kind.fields, values, strict=True))
    _state.times = {}
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        _state.why = "deterministic"
        return UNDECIDED
    machine, key, codes = device.machine(), kind.key(call), kind.candidates(call)
    with _autotune.lock:
        times = _autotune.known(machine, key)
        if not times.keys() >= set(codes):
            _state.why = _why_not(machine, key)
            if _state.why:
                return UNDECIDED
            try:
                times = times | time_candidates(kind, call, codes)
            except torch.OutOfMemoryError:
                _failed.add((machine, key))
                _state.why = "no memory"
                return UNDECIDED
            _autotune.keep(machine, key, times)
    _state.why, _state.times = "measured", {code: times[code] for code in codes}
    return _autotune.best_of(times, codes, LIBRARY)


def _why_not(machine: str, key: str) -> str:
    if _state.asking:
        return device.forbids() or "not measured yet"
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "tracing"
    return device.forbids() or ("no memory" if (machine, key) in _failed else "")


def time_candidates(kind: Kind, call: Call, codes: Sequence[int]) -> _autotune.Times:
    """Median microseconds of every candidate: a warm-up, then samples in turn; hopeless ones keep the time of their warm-up."""
    run = kind.runner(device, call)

    def calls(code: int) -> Callable[[], Any]:
        def once() -> None:
            with _force(kind, code):
                run(code)

        return once

    # Neither the user's modes and autograd nor autocast see these calls.
    with torch.no_grad(), _disable_current_modes(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        warm = {code: min(device.sample(calls(code)) for _ in range(_WARM_UP)) for code in codes}
        limit = _HOPELESS * min(warm.values())
        hopeful = [code for code in codes if warm[code] <= limit]
        samples: dict[int, list[float]] = {code: [] for code in hopeful}
        for index in range(_ROUNDS):
            for code in hopeful if index % 2 else reversed(hopeful):
                samples[code].append(device.sample(calls(code)))
    return {code: statistics.median(samples[code]) if code in samples else warm[code] for code in codes}
