"""The gates, for tests and for the table in docs: findings, traffic, mutants, machine code. Each returns what is wrong."""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from .. import mutate, toolchain
from . import limits, measure, survivors
from .traffic import Traffic, traffic

MUTANTS_PER_OPERATOR = 2
LEAST_KILLED = 0.85  # of one kernel's mutants that are not shown to change nothing; over all kernels the table demands 95 %
# Of a kernel's instructions. The rest: 64-bit division, vector types that host code never passes, and with single accesses in
# NCHW the branch for a vector that ends in the next plane.
LEAST_COVERED = 0.65


def findings(backend: ModuleType, op: str, dtype: torch.dtype, modes: list[dict[str, int]] | None = None) -> list[str]:
    """Findings, results that are not the truth, and results that depend on the schedule or on when copies arrive."""
    try:
        return measure.schedule_dependence(backend, op, dtype, measure.MODES[1:] if modes is None else modes)
    except AssertionError as error:
        return [str(error)]


def moved(backend: ModuleType, op: str, dtype: torch.dtype) -> dict[str, list[Traffic]]:
    """Per function: the traffic of every launch of the even cases (16-byte instantiations)."""
    found: dict[str, list[Traffic]] = {}
    for base in measure.baseline(backend, op, dtype):
        for report in base.reports if base.case.even else []:
            if backend.is_vector(report.kernel) or limits.limits_of(backend.NAME, backend.stem(report.kernel)).small > 1e9:
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
    return problems


@dataclass
class Verdict:
    """What became of a kernel's mutants. explained: (mutant, why nothing can change); open: survivors without an argument."""

    kernel: str
    tried: int
    explained: list[tuple[mutate.Mutant, str]] = field(default_factory=list)
    open: list[mutate.Mutant] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Killed, of those that change anything."""
        return 1 - len(self.open) / max(1, self.tried - len(self.explained))

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.tried - len(self.explained) - len(self.open)} of {self.tried} mutants killed"]
        lines += [f"  no change: {m} ({why})" for m, why in self.explained] + [f"  SURVIVES: {m}" for m in self.open]
        return "\n".join(lines)


def mutants(backend: ModuleType, kernel: str, most: int = MUTANTS_PER_OPERATOR, seed: int = 0) -> Verdict:
    """Runs a kernel's mutants and looks for the arguments of those that survive."""
    hunt = measure.hunt(backend, kernel, most, seed)
    verdict = Verdict(backend.short(kernel), hunt.tried)
    for mutant in hunt.survivors:
        found = survivors.arguments_for(kernel, mutant)
        argument = next((a for a in found if not a.never or measure.never_differs(backend, kernel, mutant)), None)
        if argument:
            verdict.explained.append((mutant, argument.why))
        else:
            verdict.open.append(mutant)
    return verdict


# --- what ptxas and the disassembler say (CUDA; Triton's kernels are compiled by _triton_offline.py)

ARCHITECTURES = ("80", "90", "100", "120")


@functools.cache
def resources(backend: ModuleType, source: Path, arch: str) -> dict[str, dict[str, int]]:
    """Per kernel of a file: registers, stack, spill_stores, spill_loads."""
    facts: dict[str, dict[str, int]] = {}
    for part in re.split(r"Compiling entry function '", backend.cubin(source, arch)[1])[1:]:
        sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        facts[part[: part.index("'")]] = {
            "registers": int(re.search(r"Used (\d+) registers", part).group(1)),
            **dict(zip(("stack", "spill_stores", "spill_loads"), map(int, sizes), strict=True)),
        }
    return facts


def over_resources(backend: ModuleType, source: Path, arch: str) -> list[str]:
    """Kernels with a stack, spills or more registers than allowed."""
    problems = []
    for kernel, facts in resources(backend, source, arch).items():
        most = limits.limits_of(backend.NAME, backend.stem(kernel)).registers
        if facts["stack"] or facts["spill_stores"] or facts["spill_loads"] or facts["registers"] > most:
            problems.append(f"{backend.short(kernel)} on sm_{arch}: {facts}")
    return problems


def loops(listing: str) -> list[str]:
    """Bodies of the loops of one function's SASS: what lies between a branch back and its target."""
    lines = [m.groups() for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", listing)]
    found = []
    for i, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)*`?\(?(0x[0-9a-f]+)", text)
        if target and int(target.group(1), 16) < int(address, 16):
            first = next(j for j, (a, _) in enumerate(lines) if int(a, 16) >= int(target.group(1), 16))
            found.append("\n".join(t for _, t in lines[first : i + 1]))
    return found


def sass(backend: ModuleType, source: Path, arch: str) -> list[str]:
    """Local memory, atomics, and main loops without the 128-bit accesses that were promised."""
    tool = toolchain.cuda_tool("cuobjdump")
    assert tool is not None, "no cuobjdump (it comes with nvcc and with triton)"
    path, _ = backend.cubin(source, arch)
    listing = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    problems, functions = [], re.split(r"Function : ", listing)[1:]
    for text in functions:
        kernel = text.split()[0]
        most, name = limits.limits_of(backend.NAME, backend.stem(kernel)), backend.short(kernel)
        if re.search(r"\b(LDL|STL)\b", text):
            problems.append(f"{name} uses local memory")
        if re.search(r"\b(ATOM|ATOMG|ATOMS|RED|REDG)\.", text):
            problems.append(f"{name} uses atomics")
        if most.mma and not re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", text):
            problems.append(f"{name}: no tensor-core instruction")
        if backend.is_vector(kernel):
            bodies = loops(text)
            for wanted, pattern in ((most.wide_loads, r"\bLDG\.E[\w.]*\.128"), (most.wide_stores, r"\bSTG\.E[\w.]*\.128")):
                if wanted and not any(re.search(pattern, body) for body in bodies):
                    problems.append(f"{name} on sm_{arch}: no {pattern[2:5]} of 128 bits in a loop ({len(bodies)} loops)")
    if not functions:
        problems.append(f"{path}: no function")
    return problems
