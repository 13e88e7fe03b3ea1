"""The gates, for tests and for the table in docs: findings, traffic, mutants (machine code: machine.py). Each returns what is
wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType

import torch

from .. import mutate
from . import limits, measure, survivors
from .traffic import Traffic, traffic

MUTANTS_PER_OPERATOR = 2  # an op's MUTANTS_PER_OPERATOR goes first
LEAST_KILLED = 0.95  # of all kernels' mutants that are not shown to change nothing (the table demands it)
# Of one kernel's, a dozen or two; survivors are listed. A form that Triton compiles for given sizes sees few of the cases.
LEAST_KILLED_OF_ONE = {"cuda": 0.85, "triton": 0.6}
# Of a kernel's instructions. The rest: 64-bit division, vector types that host code never passes, and with single accesses in
# NCHW the branch for a vector that ends in the next plane.
LEAST_COVERED = 0.7


def findings(backend: ModuleType, op: str, dtype: torch.dtype, modes: list[dict[str, int]] | None = None) -> list[str]:
    """Findings, results that are not the truth, and results that depend on the schedule or on when copies arrive."""
    try:
        problems = measure.schedule_dependence(backend, op, dtype, measure.MODES[1:] if modes is None else modes)
        for capability in getattr(backend, "capabilities", lambda op: ())(op)[1:]:
            problems += measure.on_other_architecture(backend, op, dtype, capability)
        return problems
    except AssertionError as error:
        return [f"{op}, {dtype}: {error}"]


def moved(backend: ModuleType, op: str, dtype: torch.dtype) -> dict[str, list[Traffic]]:
    """Per function: the traffic of every launch of the even cases (16-byte instantiations)."""
    found: dict[str, list[Traffic]] = {}
    for base in measure.baseline(backend, op, dtype):
        for report in base.reports if base.case.even else []:
            if backend.is_vector(report.kernel):
                found.setdefault(backend.stem(report.kernel), []).append(traffic(base, report))
    return found


def over_limits(backend: ModuleType, op: str, dtype: torch.dtype) -> list[str]:
    """Launches that moved more than their kernel's limits allow."""
    problems = []
    for kernel, launches in moved(backend, op, dtype).items():
        most = limits.limits_of(backend.NAME, kernel)
        for t in launches:
            low, high = ("load", "store"), ("waves", "again", "instructions", *(("small",) if t.passes else ()))
            bad = [f"{n} {getattr(t, n):.3f} < {getattr(most, n)}" for n in low if getattr(t, n) < getattr(most, n)]
            bad += [f"{n} {getattr(t, n):.3f} > {getattr(most, n)}" for n in high if getattr(t, n) > getattr(most, n)]
            bad += [f"touches {name}" for name in t.passes if name not in most.tensors]
            bad += [f"{name}: {share:.3f} of its bytes" for name, share in t.passes.items() if share > 1.01]
            problems += [f"{kernel}, {dtype}: {', '.join(bad)}"] if bad else []
    return list(dict.fromkeys(problems))


def uncovered(backend: ModuleType, kernel: str) -> list[str]:
    """A kernel of whose instructions the cases execute too few."""
    executed, total = measure.coverage(backend, kernel)
    if executed >= LEAST_COVERED * total:
        return []
    return [f"{backend.short(kernel)}: only {executed} of {total} instructions executed"]


@dataclass
class Verdict:
    """What became of a kernel's mutants: those killed, and survivors with an argument (why) or without one (open)."""

    kernel: str
    operators: Counter[str]
    explained: list[tuple[mutate.Mutant, survivors.Argument]] = field(default_factory=list)
    open: list[mutate.Mutant] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """All of them."""
        return self.operators.total()

    @property
    def share(self) -> float:
        """Killed, of those that change anything."""
        equal = sum(why.equal for _, why in self.explained)
        return (self.tried - len(self.explained) - len(self.open)) / max(1, self.tried - equal)

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.tried - len(self.explained) - len(self.open)} of {self.tried} mutants killed"]
        for mutant, why in self.explained:
            lines.append(f"  {'changes nothing' if why.equal else 'not found'}: {mutant} ({why.why})")
        return "\n".join(lines + [f"  SURVIVES: {m}" for m in self.open])


def mutants_per_operator(op: str) -> int:
    """How many sites of each operator are tried in a kernel of this op."""
    return getattr(limits.ops()[op], "MUTANTS_PER_OPERATOR", MUTANTS_PER_OPERATOR)


def mutants(backend: ModuleType, kernel: str, seed: int = 0) -> Verdict:
    """Runs a kernel's mutants and looks for the arguments of those that survive."""
    hunt = measure.hunt(backend, kernel, mutants_per_operator(backend.op_of(kernel)), seed)
    verdict = Verdict(backend.short(kernel), hunt.operators)
    for mutant in hunt.survivors:
        found = survivors.arguments_for(kernel, mutant)
        argument = next((a for a in found if not a.never or measure.never_differs(backend, kernel, mutant)), None)
        if argument:
            verdict.explained.append((mutant, argument))
        elif not measure.killed(backend, kernel, mutant, rest=True):
            verdict.open.append(mutant)
    return verdict
