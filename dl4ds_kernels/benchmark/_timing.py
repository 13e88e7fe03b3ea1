"""Interleaved timing: every round takes one sample of every candidate, so that drift of the machine hits all alike.

A sample is the mean of enough calls to last ``min_sample_ms``; what is reported are the median and the 20th and 80th
percentile over rounds, in milliseconds a call. On the CPU the clock is ``perf_counter`` and page faults are counted beside it;
on a GPU each call is bracketed by events after the L2 cache has been overwritten.
"""

from __future__ import annotations

import gc
import math
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_L2_BYTES = 256 * 2**20  # more than any current GPU's L2
_MIN_ROUNDS = 5


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile (0 to 1) of ``values`` with linear interpolation; ValueError for no values."""
    if not values:
        raise ValueError("quantile: expected at least one value, got none")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Timing:
    """Samples of one candidate: milliseconds a call, one sample a round; page faults a call (0 on a GPU)."""

    samples_ms: tuple[float, ...]
    faults: float
    calls: int

    @property
    def median(self) -> float:
        return quantile(self.samples_ms, 0.5)

    @property
    def p20(self) -> float:
        return quantile(self.samples_ms, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.samples_ms, 0.8)

    @property
    def best(self) -> float:
        return min(self.samples_ms)

    def as_dict(self) -> dict[str, float]:
        """Rounded figures for JSON."""
        figures = {"median_ms": self.median, "p20_ms": self.p20, "p80_ms": self.p80, "best_ms": self.best}
        return {key: float(f"{value:.5g}") for key, value in figures.items()} | {"faults": round(self.faults, 1)}


def speedup(base: Timing, ours: Timing) -> float:
    """How many times faster ``ours`` is: ratio of the medians."""
    return base.median / ours.median


def speedup_range(base: Timing, ours: Timing) -> tuple[float, float]:
    """20th and 80th percentile of the ratio within a round; the two samples of a round lie side by side in time."""
    ratios = [b / o for b, o in zip(base.samples_ms, ours.samples_ms, strict=True)]
    return quantile(ratios, 0.2), quantile(ratios, 0.8)


class _CpuClock:
    def sample(self, fn: Callable[[], Any], calls: int) -> tuple[float, float]:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        elapsed = time.perf_counter() - start
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return elapsed * 1e3 / calls, faults / calls


class _CudaClock:
    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_L2_BYTES // 4, dtype=torch.int32, device=device)

    def sample(self, fn: Callable[[], Any], calls: int) -> tuple[float, float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, stop in events:
            self._flush.zero_()  # also keeps the GPU busy while the host launches, so that host time is not measured
            start.record()
            fn()
            stop.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in events) / calls, 0.0


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    min_sample_ms: float = 2.0,
    device: torch.device | str = "cpu",
    budget_s: float = 60.0,
    settle_s: float = 0.0,
    shuffle: int | None = None,
    advance: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time ``candidates`` (name -> call without arguments) against each other.

    Args:
        rounds: samples a candidate. warmup: untimed calls a candidate before the first round.
        min_sample_ms: a sample repeats the call until it lasts about that long.
        device: where the calls run; "cuda" times with events and a flushed L2.
        budget_s: no further round starts after so many seconds, once there are five.
        settle_s: rest before every sample, for candidates whose idle threads spin a while; then one untimed call, so that
            every candidate is timed with its own threads awake and its own data in cache.
        shuffle: seed of a fresh random order in every round; None rotates the order by one a round.
        advance: called once a round, for a progress bar.

    Returns:
        name -> :class:`Timing`, in the order of ``candidates``.
    """
    if rounds < 1:
        raise ValueError(f"measure: rounds: expected at least 1, got {rounds}")
    device = torch.device(device)
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    calls = {}
    for name, fn in candidates.items():
        for _ in range(warmup):
            fn()
        once = min(clock.sample(fn, 1)[0] for _ in range(2))
        calls[name] = max(1, min(10_000, math.ceil(min_sample_ms / max(once, 1e-6))))
    names, dice = list(candidates), None if shuffle is None else random.Random(shuffle)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    start = time.perf_counter()
    with _no_garbage_collection():
        for index in range(rounds):
            if index >= _MIN_ROUNDS and time.perf_counter() - start > budget_s:
                break
            shift = index % len(names) if names else 0
            order = names[shift:] + names[:shift]  # no candidate always begins a round
            if dice is not None:
                dice.shuffle(order)  # nor does it always follow the same neighbour, whose data fill the caches
            for name in order:
                if settle_s:
                    time.sleep(settle_s)
                    candidates[name]()
                samples[name].append(clock.sample(candidates[name], calls[name]))
            if advance is not None:
                advance()
    return {
        name: Timing(tuple(t for t, _ in taken), quantile([f for _, f in taken], 0.5), calls[name])
        for name, taken in samples.items()
    }
