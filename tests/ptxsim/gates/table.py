"""docs/kernel-gates.md: kernels by gates, from measurements made now (and rows.py for the mutants)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from types import ModuleType
from typing import Any

import torch

from .. import build
from . import checks, limits, rows

HEAD = """# Kernels and their gates

Made by `make gates` from tests/ptxsim/gates: every kernel runs on the PTX simulator through the host code that ships. Each line
is one kernel with all its instantiations (dtype, vector width); limits stand in `tests/ptxsim/gates/limits.py`.

- **runs**: calls with fp64 truth, each under {modes} combinations of schedule and copy delivery; all are free of findings and
  give the same bits. **code**: share of the instructions that they execute.
- **loads, stores**: sectors needed by sectors moved. **waves**: shared-memory waves by the fewest. **again**: sectors moved by
  distinct sectors. **instr**: warp instructions per 512 distinct bytes. The worst launch of even sizes / the limit.
- **bytes**: distinct bytes per element of a 16-bit x: measured / ceiling (each of its tensors once).
- **regs**: most registers on sm_80, 90, 100, 120; no stack, no spill, no local memory, no atomics on any.
- **mutants**: seeded bugs found / tried, less those shown to change nothing.
"""


def measured(backend: ModuleType, dtypes: tuple[torch.dtype, ...], known: bool = False) -> dict[str, Any]:
    """Everything of one backend that the table needs. known: no new mutants; kernels without a row are counted."""
    kinds: dict[str, dict[str, Any]] = defaultdict(lambda: {"launches": [], "rows": [], "registers": {}})
    problems: list[str] = []
    missing = 0
    for kernel in rows.kernels(backend, dtypes):
        if known and not rows.file_of(backend, kernel).exists():
            missing += 1
        else:
            kinds[backend.stem(kernel)]["rows"].append(rows.row(backend, kernel))
    runs: Counter[str] = Counter()
    for op in backend.OPS:
        for dtype in dtypes:
            for base in rows.measure.baseline(backend, op, dtype):
                runs.update({backend.stem(report.kernel) for report in base.reports})
            problems += checks.over_limits(backend, op, dtype)
            if dtype == torch.float64:
                continue
            for stem, launches in checks.moved(backend, op, dtype).items():
                kinds[stem]["launches"] += [{**vars(t), "half": dtype.itemsize == 2} for t in launches]
    if backend.NAME == "cuda":
        for source in dict.fromkeys(backend.instantiations().values()):
            for arch in checks.ARCHITECTURES:
                problems += checks.over_resources(backend, source, arch) + checks.sass(backend, source, arch)
                for kernel, facts in checks.resources(backend, source, arch).items():
                    registers = kinds[backend.stem(kernel)]["registers"]
                    registers[arch] = max(registers.get(arch, 0), facts["registers"])
    else:
        for stem, arch, used in backend.resources(checks.ARCHITECTURES):
            kinds[stem]["registers"][arch] = max(kinds[stem]["registers"].get(arch, 0), used)
    return {"kinds": kinds, "problems": problems, "runs": runs, "missing": missing}


def line(backend: str, stem: str, found: dict[str, Any], runs: int) -> str:
    """One line of the table."""
    most, launches, mine = limits.limits_of(backend, stem), found["launches"], found["rows"]

    def worst(name: str, least: bool = False) -> str:
        values = [t[name] for t in launches]
        limit = getattr(most, name)
        if not values or limit == float("inf"):
            return "–"
        digits = 0 if name == "instructions" else 2
        return f"{(min if least else max)(values):.{digits}f} / {limit:g}"

    halves = [t for t in launches if t["half"] and t["passes"]]
    ceiling = max((sum(1 / 8 if n == "mask" else 2 for n in t["passes"]) for t in halves), default=0)
    most_bytes = max((t["element"] for t in halves), default=0)
    tried = sum(r["tried"] - len(r["explained"]) for r in mine)
    open_ = sum(len(r["open"]) for r in mine)
    covered, total = sum(r["covered"] for r in mine), sum(r["total"] for r in mine)
    registers = ", ".join(str(found["registers"].get(arch, "–")) for arch in checks.ARCHITECTURES)
    cells = [
        f"`{stem}`", backend, len(mine), runs, f"{100 * covered / max(total, 1):.0f} %", worst("load", True),
        worst("store", True),
        worst("waves"), worst("again"), worst("instructions"),
        f"{most_bytes:.2f} / {ceiling:.2f}" if halves and not most.mma else "–", f"{registers} / {most.registers}",
        f"{tried - open_} / {tried}, {sum(len(r['explained']) for r in mine)} equal",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def render(parts: dict[str, dict[str, Any]]) -> str:
    """The page."""
    out = [HEAD.format(modes=len(rows.measure.MODES))]
    titles = "kernel|backend|compiled forms|runs|code|loads|stores|waves|again|instr|bytes|regs|mutants"
    out += ["| " + titles.replace("|", " | ") + " |", "|---" * 2 + "|---:" * 11 + "|"]
    for backend, part in parts.items():
        out += [line(backend, stem, found, part["runs"][stem]) for stem, found in part["kinds"].items()]
    every = [row for part in parts.values() for found in part["kinds"].values() for row in found["rows"]]
    tried, equal = sum(r["tried"] for r in every), sum(len(r["explained"]) for r in every)
    open_ = [(r["kernel"], m) for r in every for m in r["open"]]
    share = 1 - len(open_) / max(1, tried - equal)
    out += [
        f"\n{tried} mutants of {len(every)} compiled kernels by {len(rows.mutate.OPERATORS) + 1} operators: "
        f"{tried - equal - len(open_)} found, {equal} shown to change nothing, {len(open_)} open: {100 * share:.1f} % killed.\n"
    ]
    missing = sum(part["missing"] for part in parts.values())
    if missing:
        out += [f"Mutants of {missing} more compiled kernels have not been run since their last change.\n"]
    problems = [p for part in parts.values() for p in part["problems"]]
    out += [f"**Not met:** {problem}\n" for problem in problems]
    notes = [(s, limits.limits_of(b, s).note) for b, part in parts.items() for s in part["kinds"]]
    out += ["## Notes\n"] + [f"- `{stem}`: {note}" for stem, note in notes if note]
    out += ["\n## Survivors that change nothing, by argument\n"]
    reasons = Counter((m["why"], m["mutant"]["operator"]) for r in every for m in r["explained"])
    grouped: dict[str, list[str]] = defaultdict(list)
    for (why, operator), count in reasons.most_common():
        grouped[why].append(f"{operator} {count}")
    out += [f"- {why}: {', '.join(found)}" for why, found in grouped.items()]
    if open_:
        out += ["\n## Survivors without an argument\n"]
        out += [f"- `{k}`: {m['operator']} at {m['place']}: `{m['before']}` -> `{m['after'] or '(removed)'}`" for k, m in open_]
    return "\n".join(out) + "\n"


def collect(name: str, known: bool = False) -> dict[str, Any]:
    """Measurements of a backend, in a process where Triton compiles or (for the rest) is interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if name == "triton" else "1"}
    command = [sys.executable, "-m", "tests.ptxsim", "gates", "--measure", name, *(["--known"] if known else [])]
    done = subprocess.run(command, cwd=build.REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {name} failed")
    return json.loads(done.stdout.splitlines()[-1])
