"""Running the gates' cases on a backend (`cuda` or `triton`): baseline, schedules, coverage, mutants.

A backend module has `run(case, **options)`, `instantiations()`, `ptx_of_kernel(kernel)`, `entry(kernel)`, `op_of(kernel)`,
`dtypes_of(kernel)` and `replacing(kernel, ptx)`; kernels are named as in its reports.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch

from .. import Report, SimulatorError, mutate
from . import workload
from .workload import Case, Results

# Schedules and delivery of asynchronous copies; the first is what everything is compared with.
MODES = [{"schedule": s, "lazy_copies": lazy} for s in (0, 1, 17) for lazy in (1, 0)]
SEARCH = {"budget": 1 << 22, "max_reports": 1, "traffic": 0}  # options while mutants are run: only kill or not matters


MOST_CASES = 80  # that a mutant must survive


@dataclass
class Baseline:
    """One case with the unchanged kernels."""

    case: Case
    results: Results
    reports: list[Report]
    executed: dict[str, frozenset[int]] = field(default_factory=dict)  # kernel -> instructions

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
    """Results that are not the same bits under other schedules and copy deliveries; raises AssertionError on findings."""
    problems = []
    for base in baseline(backend, op, dtype):
        for mode in modes:
            results, _ = backend.run(base.case, traffic=0, **mode)
            for name, want in base.results.items():
                same = torch.equal(results[name].nan_to_num(123.0), want.nan_to_num(123.0))
                if not same or not torch.equal(results[name].isnan(), want.isnan()):
                    problems.append(f"{base.case.name}: {name} depends on {mode}")
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


def killed(backend: ModuleType, kernel: str, mutant: mutate.Mutant) -> str:
    """How a mutant is found out by a case that executes the change, on the cheap ones first ("" if it survives)."""
    # Where a guard is false in all lanes the instruction does not count as executed, but it was reached from the one before.
    reached = {mutant.index - 1, mutant.index}
    cases = [base for base, lines in executed_by(backend, kernel) if mutant.index < 0 or reached & lines]
    if len(cases) > MOST_CASES:  # the cheap half of what is tried, and as many spread over the rest
        rest = cases[MOST_CASES // 2 :]
        cases = cases[: MOST_CASES // 2] + rest[:: -(-len(rest) // (MOST_CASES // 2))]
    for mode in ({}, {"schedule": 17, "lazy_copies": 0}):
        for base in cases if not mode else cases[:2]:
            try:
                with backend.replacing(kernel, mutant.ptx):
                    results, _ = backend.run(base.case, grid_delta=mutant.grid_delta, **SEARCH, **mode)
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
    return ptx is not None and not killed(backend, kernel, replace(mutant, ptx=ptx))


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
    tried: int = 0
    survivors: list[mutate.Mutant] = field(default_factory=list)


def hunt(backend: ModuleType, kernel: str, most: int, seed: int = 0) -> Hunt:
    """Runs a kernel's mutants; the unchanged kernel must survive."""
    unchanged = mutate.Mutant("none", 0, "", "", mutate.kernel_text(backend.ptx_of_kernel(kernel), backend.entry(kernel)))
    assert not (how := killed(backend, kernel, unchanged)), f"the unchanged kernel does not survive: {how}"
    result = Hunt(kernel)
    for mutant in mutants_of(backend, kernel, most, seed):
        result.tried += 1
        if not killed(backend, kernel, mutant):
            result.survivors.append(mutant)
    return result
