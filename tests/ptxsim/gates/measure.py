"""Running the gates' cases on a backend (`cuda` or `triton`): baseline, schedules, coverage, mutants.

A backend module has `run(case, **options)`, `instantiations()`, `ptx_of_kernel(kernel)`, `entry(kernel)`, `op_of(kernel)`,
`dtypes_of(kernel)` and `replacing(kernel, ptx)`; kernels are named as in its reports.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch

from .. import Report, SimulatorError, mutate
from . import workload
from .workload import Case, Results

# Schedules and delivery of asynchronous copies; the first is what everything is compared with.
MODES = [{"schedule": s, "lazy_copies": lazy} for s in (0, 1, 17) for lazy in (1, 0)]
SEARCH = {"max_reports": 1, "traffic": 0}  # options while mutants are run: only kill or not matters
MOST_CASES = 24  # that a mutant must survive before anybody looks for an argument (without one: all of them)


@dataclass
class Baseline:
    """One case with the unchanged kernels."""

    case: Case
    results: Results
    reports: list[Report]
    executed: dict[str, frozenset[int]] = field(default_factory=dict)  # kernel -> instructions

    @property
    def asynchronous(self) -> bool:
        """Whether its kernels copy (or multiply) asynchronously."""
        return any(report.counters["async_copies"] or report.counters["mma"] for report in self.reports)

    @property
    def patience(self) -> int:
        """Warp instructions of one launch after which a mutant has run away."""
        return 50_000 + 4 * max((report.counters["warp_instructions"] for report in self.reports), default=0)

    @property
    def cost(self) -> int:
        """Instructions of all its kernels."""
        return sum(report.counters["warp_instructions"] for report in self.reports)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """In which a backend computes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def baseline(backend: ModuleType, op: str, dtype: torch.dtype) -> list[Baseline]:
    """Every case of an op and dtype, cheapest first; raises AssertionError on findings and results that are not the truth."""
    found = []
    for case in workload.cases(op, dtype):
        if not backend.chosen(case):
            continue
        results, reports = backend.run(case)
        wrong = workload.wrong(results, case.truth(), dtype, accumulator(dtype))
        assert not wrong, f"{op}, {dtype}, {case.name}: {wrong}"
        executed: dict[str, set[int]] = {}
        for report in reports:
            executed.setdefault(report.kernel, set()).update(line["index"] for line in report.lines)
            if not case.even:
                report.lines = []
        found.append(Baseline(case, results, reports, {k: frozenset(v) for k, v in executed.items()}))
    return sorted(found, key=lambda b: b.cost)


def schedule_dependence(backend: ModuleType, op: str, dtype: torch.dtype, modes: list[dict[str, int]]) -> list[str]:
    """Results that are not the same bits under other schedules and copy deliveries; raises AssertionError on findings.

    A case without asynchronous copies runs alike whenever they are delivered, so it is run once per schedule.
    """
    problems, seen = [], set()
    for base in baseline(backend, op, dtype):
        for mode in modes:
            if not base.asynchronous and (base.case.name, mode["schedule"]) in seen | {(base.case.name, 0)}:
                continue
            seen.add((base.case.name, mode["schedule"]))
            results, _ = backend.run(base.case, traffic=0, **mode)
            problems += [f"{base.case.name}: {name} depends on {mode}" for name in different_bits(results, base.results)]
    return problems


def different_bits(results: Results, expected: Results) -> list[str]:
    """Names of results that are not the same bits (any NaN is like any other)."""
    found = []
    for name, want in expected.items():
        got = results[name]
        same = torch.equal(got.nan_to_num(123.0), want.nan_to_num(123.0))
        if not same or not torch.equal(got.isnan(), want.isnan()):
            found.append(name)
    return found


def on_other_architecture(backend: ModuleType, op: str, dtype: torch.dtype, capability: int) -> list[str]:
    """Results that are not the truth when compiled for another architecture, copies late and at once."""
    problems = []
    for base in baseline(backend, op, dtype):
        for lazy in (1, 0):
            results, _ = backend.run(base.case, capability=capability, lazy_copies=lazy, traffic=0)
            wrong = workload.wrong(results, base.case.truth(), dtype, accumulator(dtype))
            problems += [f"sm_{capability}, {base.case.name}: {wrong}"] if wrong else []
    return problems


def executed_by(backend: ModuleType, kernel: str) -> list[tuple[Baseline, frozenset[int]]]:
    """The small cases that launch a kernel, cheapest first, and the instructions of it that they execute."""
    op = backend.op_of(kernel)
    return [
        (base, base.executed[kernel])
        for dtype in backend.dtypes_of(kernel)
        for base in baseline(backend, op, dtype)
        if kernel in base.executed and not base.case.even
    ]


def coverage(backend: ModuleType, kernel: str) -> tuple[int, int]:
    """Instructions of a kernel that any case executes, and all it has."""
    executed = frozenset().union(*(lines for _, lines in executed_by(backend, kernel)))
    return len(executed), mutate.statement_count(backend.ptx_of_kernel(kernel), backend.entry(kernel))


def killed(backend: ModuleType, kernel: str, mutant: mutate.Mutant, rest: bool = False) -> str:
    """How a mutant is found out by a case that executes the change, on the cheap ones first ("" if it survives).

    Tries MOST_CASES of the cases, the two cheapest in another schedule too; with `rest` those that are left after that.
    """
    # Where a guard is false in all lanes the instruction does not count as executed, but it was reached from the one before.
    reached = {mutant.index - 1, mutant.index}
    cases = [base for base, lines in executed_by(backend, kernel) if mutant.index < 0 or reached & lines]
    cheap, others = cases[: MOST_CASES // 2], cases[MOST_CASES // 2 :]
    spread = others[:: -(-len(others) // (MOST_CASES // 2)) or 1]
    if rest:
        tried = {base.case.name for base in cheap + spread}
        runs = [(base, {}) for base in others if base.case.name not in tried]
    else:
        runs = [(base, {}) for base in cheap + spread] + [(base, {"schedule": 17, "lazy_copies": 0}) for base in cheap[:2]]
    for base, mode in runs:
        try:
            with backend.replacing(kernel, mutant.ptx):
                results, _ = backend.run(base.case, grid_delta=mutant.grid_delta, limit=base.patience, **SEARCH, **mode)
        except SimulatorError as error:
            return f"{base.case.name}: {error}"
        except AssertionError as error:  # findings, or an error code of the launcher
            return f"{base.case.name}: {str(error).strip().splitlines()[0]}"
        wrong = workload.same_as(results, base.results)
        if wrong:
            return f"{base.case.name}: {wrong}"
    return ""


def never_differs(backend: ModuleType, kernel: str, mutant: mutate.Mutant) -> bool:
    """Whether the changed comparison or conversion gives the unchanged value in every lane of every case."""
    alone = mutate.kernel_text(backend.ptx_of_kernel(kernel), backend.entry(kernel))
    ptx = mutate.probe(mutant, alone)
    if ptx is None:
        return False
    trapping = replace(mutant, ptx=ptx)
    return not killed(backend, kernel, trapping) and not killed(backend, kernel, trapping, rest=True)


def mutants_of(backend: ModuleType, kernel: str, most: int, seed: int = 0) -> list[mutate.Mutant]:
    """Mutants in the code that the cases execute, and launches with a block more or less."""
    ptx, entry = backend.ptx_of_kernel(kernel), backend.entry(kernel)
    executed = frozenset().union(*(lines for _, lines in executed_by(backend, kernel)))
    alone = mutate.kernel_text(ptx, entry)
    grids = [mutate.Mutant("wrong_grid", 0, "blocks", f"blocks {d:+d}", alone, grid_delta=d) for d in (-1, 1)]
    return mutate.mutants(ptx, entry, executed, most, seed) + grids


@dataclass
class Hunt:
    """What became of a kernel's mutants."""

    kernel: str
    operators: Counter[str] = field(default_factory=Counter)  # mutants tried, by operator
    survivors: list[mutate.Mutant] = field(default_factory=list)


def hunt(backend: ModuleType, kernel: str, most: int, seed: int = 0) -> Hunt:
    """Runs a kernel's mutants; the unchanged kernel must survive."""
    unchanged = mutate.Mutant("none", 0, "", "", mutate.kernel_text(backend.ptx_of_kernel(kernel), backend.entry(kernel)))
    assert not (how := killed(backend, kernel, unchanged)), f"the unchanged kernel does not survive: {how}"
    result = Hunt(kernel)
    for mutant in mutants_of(backend, kernel, most, seed):
        result.operators[mutant.operator] += 1
        if not killed(backend, kernel, mutant):
            result.survivors.append(mutant)
    return result
