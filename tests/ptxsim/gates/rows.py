"""Measurements kept in build/ptxsim/gates while nothing that they depend on changes, so that an interrupted run goes on.

A row per kernel (coverage and mutants) and one per op and dtype (findings, traffic). Tests never read them; the table in docs
is made from them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import Report, build, mutate
from . import checks, limits, measure, survivors, workload

Row = dict[str, Any]
HERE = Path(__file__).parent
SIMULATOR = [HERE / "measure.py", HERE / "workload.py", HERE.parent / "mutate.py", *sorted(build.CORE.glob("*"))]
LAUNCHERS = HERE.parents[1] / "_cuda_launch.py"
until = float("inf")  # time.time() after which nothing new is measured


class NotRun(Exception):
    """A measurement that is not kept, and for which no time is left."""


def in_time() -> None:
    """Raises NotRun when the time is up."""
    if time.time() > until:
        raise NotRun


@functools.cache
def _digest(backend: ModuleType, op: str, dtype: torch.dtype, even: bool) -> str:
    """A hash of all that the cases of a backend (with or without the even ones) hand to kernels."""
    h = hashlib.sha256()
    for case in workload.cases(op, dtype):
        if case.even and not even or not backend.chosen(case):
            continue
        h.update(repr((case.way, case.name, case.few_blocks, case.even)).encode())
        for name, value in case.arguments.items():
            h.update(name.encode())
            if isinstance(value, Tensor):
                h.update(repr((value.dtype, value.shape, value.stride())).encode())
                h.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            else:
                h.update(repr(value).encode())
    return h.hexdigest()


def _kept(name: str, key: str, make: Callable[[], Row]) -> Row:
    path = build.cache_folder() / "gates" / f"{name}-{key}.json"
    if not path.exists():
        in_time()
        path.parent.mkdir(parents=True, exist_ok=True)
        row = make()
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(row, indent=1))
        temporary.rename(path)
    return json.loads(path.read_text())


def _code(ptx: str) -> str:
    """Without what a comment in a source or the place of the checkout changes."""
    ptx = re.sub(r"(?m)^\t?\.section[^{]*\{[^}]*\}", "", ptx)
    return re.sub(r"(?m)^\s*(\.file|\.loc).*$|//.*$", "", ptx)


def kernels(backend: ModuleType, op: str, dtype: torch.dtype) -> list[str]:
    """Whose mutants are run. CUDA: every instantiation. Triton: of every function one form.

    That is, of the forms that a call (not an even one: mutants are not run on these) gives to several programs, where there are
    such, one that calls of at least eight sizes launch or, without such, of the most: another form is the same function with
    other constants, and what is launched for one size only never takes the loops and tails of others. Of these, of a function
    that any case launches with few blocks, one whose programs repeat most of what they execute: they take their loop. Of these
    the one that executes most code.
    """
    if backend.NAME == "cuda":
        mine = [k for k in backend.instantiations() if backend.op_of(k) == op and dtype in backend.dtypes_of(k)]
        return sorted(mine, key=backend.short)
    found: dict[str, list[str]] = defaultdict(list)
    small = [base for base in measure.baseline(backend, op, dtype) if not base.case.even]
    reports = [(report, len(base.executed[report.kernel])) for base in small for report in base.reports]
    spread = {report.kernel for report, _ in reports if math.prod(report.grid) > 1}
    walking = {backend.stem(report.kernel) for base in small if base.case.few_blocks for report in base.reports}
    looping = {
        r.kernel
        for r, executed in reports
        if backend.stem(r.kernel) in walking and r.counters["warp_instructions"] > 1.5 * executed * _warps(r)
    }
    for kernel in backend.seen():
        if backend.op_of(kernel) == op and backend.dtypes_of(kernel) == (dtype,) and measure.executed_by(backend, kernel):
            found[backend.stem(kernel)].append(kernel)

    def rank(kernel: str) -> tuple[bool, int, bool, int, str]:
        calls = [base.case.arguments for base, _ in measure.executed_by(backend, kernel)]
        sizes = {tuple(t.shape for t in given.values() if isinstance(t, Tensor)) for given in calls}
        return kernel in spread, min(8, len(sizes)), kernel in looping, measure.coverage(backend, kernel)[0], kernel

    return [max(same, key=rank) for same in found.values()]


def _warps(report: Report) -> int:
    return math.prod(report.grid) * -(-math.prod(report.block) // 32)


def kernel_row(backend: ModuleType, kernel: str) -> Row:
    """Coverage and mutants of one kernel."""

    def make() -> Row:
        verdict = checks.mutants(backend, kernel)
        covered, total = measure.coverage(backend, kernel)
        return {
            "backend": backend.NAME, "function": backend.stem(kernel), "kernel": backend.short(kernel), "mangled": kernel,
            "covered": covered, "total": total, "tried": verdict.tried, "operators": verdict.operators,
            "explained": [{"mutant": _plain(m), "why": a.why, "equal": a.equal} for m, a in verdict.explained],
            "open": [_plain(m) for m in verdict.open], "uncovered": checks.uncovered(backend, kernel),
        }  # fmt: skip

    ptx = _code(mutate.kernel_text(backend.ptx_of_kernel(kernel), backend.entry(kernel)))
    cases = [_digest(backend, backend.op_of(kernel), dtype, False) for dtype in backend.dtypes_of(kernel)]
    key = build.digest(ptx, *SIMULATOR, *cases, str(checks.mutants_per_operator(backend.op_of(kernel))))
    return with_todays_arguments(_kept(f"{backend.NAME}-{backend.stem(kernel)}", key, make), kernel)


def suite_row(backend: ModuleType, op: str, dtype: torch.dtype) -> Row:
    """Findings, truth, schedules and traffic of all cases of an op and dtype."""

    def make() -> Row:
        problems = checks.findings(backend, op, dtype)
        runs: Counter[str] = Counter()
        launches: dict[str, list[Row]] = {}
        if not problems:
            problems = checks.over_limits(backend, op, dtype)
            for base in measure.baseline(backend, op, dtype):
                runs.update({backend.stem(report.kernel) for report in base.reports})
            for stem, found in checks.moved(backend, op, dtype).items():
                launches[stem] = [{**vars(t), "half": dtype.itemsize == 2} for t in found]
        return {"problems": problems, "runs": runs, "launches": launches}

    if backend.NAME == "cuda":
        sources = [build.digest(_code(backend.ptx_of(s))) for s in backend.SOURCES if backend.op_of_source(s) == op] + [
            LAUNCHERS
        ]
    else:
        import triton

        sources = [*sorted(limits.REPOSITORY.glob("dl4ds_kernels/_triton/*.py")), HERE / "triton.py", triton.__version__]
    gates = [HERE / f"{name}.py" for name in ("checks", "traffic", f"workload_{op}")]
    key = build.digest(*sources, *SIMULATOR, *gates, _digest(backend, op, dtype, True))
    return _kept(f"{backend.NAME}-suite-{op}-{str(dtype).removeprefix('torch.')}", key, make)


def with_todays_arguments(found: Row, kernel: str) -> Row:
    """Arguments may have been added or withdrawn since (those that need no run)."""
    explained, still = [], []
    for old in [*found["explained"], *({"mutant": mutant, "why": ""} for mutant in found["open"])]:
        mutant = old["mutant"]
        if mutant["place"].endswith(": "):  # measured where the source was not found
            mutant |= {"place": survivors.place(mutant["file"], mutant["line"])}
        fitting = [a for a in survivors.ARGUMENTS if a.fits(kernel, mutant["operator"], mutant["place"], mutant["before"])]
        argument = next((a for a in fitting if not a.never or a.why == old["why"]), None)
        if argument:
            explained.append({"mutant": mutant, "why": argument.why, "equal": argument.equal})
        else:
            still.append(mutant)
    return found | {"explained": explained, "open": still}


def _plain(mutant: mutate.Mutant) -> Row:
    facts = asdict(mutant) | {"place": survivors.place_of(mutant), "file": mutant.file.rpartition("/")[2]}
    return {name: facts[name] for name in ("operator", "place", "file", "line", "index", "before", "after")}
