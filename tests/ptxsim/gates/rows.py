"""One row of results per kernel, kept in build/ptxsim/gates while the kernel's PTX, the cases and the simulator stay the same.

Tests never read rows; the table in docs is made from them, so that it does not repeat what a complete test run has just done.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import build, mutate
from . import checks, measure, survivors

Row = dict[str, Any]
HERE = Path(__file__).parent
INPUTS = sorted([*HERE.glob("workload*.py"), HERE / "measure.py", HERE.parent / "mutate.py", *build.CORE.glob("*")])


def file_of(backend: ModuleType, kernel: str) -> Path:
    """Where a kernel's row is kept."""
    ptx = mutate.kernel_text(backend.ptx_of_kernel(kernel), backend.entry(kernel))
    ptx = re.sub(r"(?m)^\s*\.file.*$", "", ptx)  # where the checkout lies
    key = build.digest(ptx, *INPUTS, str(checks.MUTANTS_PER_OPERATOR))
    return build.cache_folder() / "gates" / f"{backend.NAME}-{backend.stem(kernel)}-{key}.json"


def kernels(backend: ModuleType, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """CUDA: every instantiation. Triton: of every function and dtype the one with the most instructions executed."""
    if backend.NAME == "cuda":
        return sorted(backend.instantiations(), key=lambda k: (backend.op_of(k), str(backend.dtype_of(k)), k))
    found: dict[tuple[str, torch.dtype], list[str]] = defaultdict(list)
    for op in backend.OPS:
        for dtype in dtypes:
            measure.baseline(backend, op, dtype)
    for kernel in backend.seen():
        if any(not base.case.even for base, _ in measure.executed_by(backend, kernel)):
            found[backend.stem(kernel), backend.dtypes_of(kernel)[0]].append(kernel)
    return [max(same, key=lambda k: (measure.coverage(backend, k)[0], k)) for same in found.values()]


def row(backend: ModuleType, kernel: str, again: bool = False) -> Row:
    """Coverage and mutants of one kernel: from its file, or measured now and written there."""
    path = file_of(backend, kernel)
    if path.exists() and not again:
        return _with_todays_arguments(json.loads(path.read_text()), kernel)
    verdict = checks.mutants(backend, kernel)
    covered, total = measure.coverage(backend, kernel)
    found = {
        "backend": backend.NAME, "function": backend.stem(kernel), "kernel": backend.short(kernel), "covered": covered,
        "total": total, "tried": verdict.tried,
        "explained": [{"mutant": _plain(m), "why": why} for m, why in verdict.explained],
        "open": [_plain(m) for m in verdict.open],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1))
    return found


def _with_todays_arguments(found: Row, kernel: str) -> Row:
    """Arguments may have been added since (those that need no run)."""
    still = []
    for mutant in found["open"]:
        fitting = (a for a in survivors.ARGUMENTS if a.fits(kernel, mutant["operator"], mutant["place"]) and not a.never)
        argument = next(fitting, None)
        if argument:
            found["explained"].append({"mutant": mutant, "why": argument.why})
        else:
            still.append(mutant)
    return found | {"open": still}


def _plain(mutant: mutate.Mutant) -> Row:
    facts = asdict(mutant) | {"place": survivors.place_of(mutant), "file": mutant.file.rpartition("/")[2]}
    return {name: facts[name] for name in ("operator", "place", "file", "line", "before", "after")}
