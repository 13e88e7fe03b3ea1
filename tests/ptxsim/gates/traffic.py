"""What a launch moved, in the units of the limits: sectors against the fewest, re-reads, instructions, distinct bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import Report
from . import limits
from .measure import Baseline


@dataclass(frozen=True)
class Traffic:
    """One launch of one kernel.

    load, store: sectors needed at least, by sectors moved. waves: shared-memory waves per ideal wave. again: sectors moved by
    distinct sectors (1: nothing is fetched twice). instructions: of a warp, per 512 bytes of distinct traffic. passes: distinct
    bytes by size, for large tensors. small: distinct bytes of all other tensors by those of the large ones. element: distinct
    bytes per element of x (of dout in backward, of the largest where an op has neither).
    """

    load: float
    store: float
    waves: float
    again: float
    instructions: float
    passes: dict[str, float]
    small: float
    element: float


def traffic(base: Baseline, report: Report) -> Traffic:
    """Of one report of a case."""
    known = {n: t for n, t in {**base.case.arguments, **base.results}.items() if isinstance(t, Tensor)}
    touched = {name: t["read"] + t["written"] for name, t in report.tensors.items() if t["read"] + t["written"]}
    large = {name: size for name, size in touched.items() if name in limits.large_tensors() & known.keys()}
    sizes = {name: known[name].numel() * known[name].element_size() for name in large}
    moved = 32 * (report.counters["load_sectors"] + report.counters["store_sectors"])
    total = sum(touched.values())
    named = known.get("x", known.get("dout"))
    elements = named.numel() if named is not None else max((known[name].numel() for name in large), default=0)
    return Traffic(
        load=report.efficiency("load"),
        store=report.efficiency("store"),
        waves=report.bank_waves(),
        again=moved / max(total, 1),
        instructions=report.counters["warp_instructions"] * 512 / max(total, 1),
        passes={name: size / sizes[name] for name, size in large.items()},
        small=(total - sum(large.values())) / max(sum(large.values()), 1),
        element=total / max(elements, 1),
    )
