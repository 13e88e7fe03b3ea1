"""docs/kernel-gates.md: kernels by gates, from measurements (rows.py keeps them)."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from types import ModuleType
from typing import Any

from .. import build
from . import checks, limits, machine, rows, workload

HEAD = """# Kernels and their gates

Made by `make gates` from tests/ptxsim/gates: every kernel runs on the PTX simulator through the host code that ships. Each line
is one kernel with all its instantiations (dtype, vector width); limits stand in `tests/ptxsim/gates/workload_<op>.py`.

- **runs**: calls with fp64 truth (NMS: torchvision's arithmetic), each under {schedules} schedules, and with asynchronous
  copies delivered at once and as late as they may; all are free of findings and give the same bits. **code**: share of the
  instructions that they execute.
- **loads, stores**: sectors needed by sectors moved. **waves**: shared-memory waves by the fewest. **again**: sectors moved by
  distinct sectors. **instr**: warp instructions per 512 distinct bytes. The worst launch of even sizes / the limit.
- **bytes**: distinct bytes per element of a 16-bit x: measured / ceiling (each of its tensors once).
- **regs**: most registers on sm_80, 90, 100, 120; no stack, no spill, no local memory, no atomics on any.
- **mutants**: seeded bugs found / tried, less those shown to change nothing ("equal"), in all forms of the kernel that were
  mutated (CUDA: every instantiation; Triton: of every dtype, of the forms that calls of most sizes launch, one that takes its
  loop and executes most).
"""


def measured(backend: ModuleType) -> dict[str, Any]:
    """Everything of one backend that the table needs, and what there was no time for (rows.until), quick parts first."""
    kinds: dict[str, dict[str, Any]] = defaultdict(lambda: {"launches": [], "rows": [], "registers": {}})
    runs: Counter[str] = Counter()
    problems: list[str] = []
    missing: list[str] = []
    start = time.time()

    def say(what: str) -> None:
        print(f"{time.time() - start:5.0f} s: {backend.NAME}, {what}", file=sys.stderr, flush=True)

    def look(arch: str) -> None:
        try:
            rows.in_time()
        except rows.NotRun:
            missing.append(f"{backend.NAME}: registers and machine code of sm_{arch}")
            return
        found = machine.problems(backend, arch)
        problems.extend(found)
        for kernel, _, _, used, _ in backend.machine_code(arch):
            registers = kinds[backend.stem(kernel)]["registers"]
            registers[arch] = max(registers.get(arch, 0), used["registers"])
        say(f"machine code of sm_{arch}" + "".join(f"\n  {problem}" for problem in found))

    clean = []
    for dtype, op in itertools.product(workload.DTYPES, backend.OPS):  # where time is short, rather every op than every dtype
        if not any(backend.chosen(case) for case in workload.cases(op, dtype)):
            continue
        what = f"{op}, {dtype}"
        try:
            suite = rows.suite_row(backend, op, dtype)
        except rows.NotRun:
            missing.append(f"{backend.NAME}, {what}: findings, truth, traffic and mutants")
            continue
        finally:
            rows.measure.baseline.cache_clear()
        problems += suite["problems"]
        runs.update(suite["runs"])
        for stem, launches in suite["launches"].items():
            kinds[stem]["launches"] += launches
        clean += [] if suite["problems"] else [(op, dtype)]
        say(what + "".join(f"\n  {problem}" for problem in suite["problems"]))
    look(machine.ARCHITECTURES[0])
    for op, dtype in clean:
        try:
            if backend.NAME == "triton":  # only running the cases tells which forms there are
                rows.in_time()
            kernels = rows.kernels(backend, op, dtype)
        except rows.NotRun:
            missing.append(f"{backend.NAME}, {op}, {dtype}: mutants of all its kernels")
            continue
        late = []
        for kernel in kernels:
            try:
                row = rows.kernel_row(backend, kernel)
            except rows.NotRun:
                late.append(backend.short(kernel))
                continue
            problems += row["uncovered"]
            kinds[backend.stem(kernel)]["rows"].append(row)
            say(f"{row['kernel']}: {row['tried']} mutants, {len(row['open'])} open")
        missing += [f"{backend.NAME}, {op}: mutants of {', '.join(late)}"] if late else []
        rows.measure.baseline.cache_clear()
    for arch in machine.ARCHITECTURES[1:]:
        look(arch)
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
    equal = sum(m["equal"] for r in mine for m in r["explained"])
    tried = sum(r["tried"] for r in mine) - equal
    open_ = sum(len(r["open"]) + len(r["explained"]) for r in mine) - equal
    covered, total = sum(r["covered"] for r in mine), sum(r["total"] for r in mine)
    registers = ", ".join(str(found["registers"].get(arch, "–")) for arch in machine.ARCHITECTURES)
    cells = [
        f"`{stem}`", backend, len(mine), runs or "not run",
        f"{100 * covered / total:.0f} %" if mine else "–", worst("load", True),
        worst("store", True),
        worst("waves"), worst("again"), worst("instructions"),
        f"{most_bytes:.2f} / {ceiling:.2f}" if halves and not most.mma else "–", f"{registers} / {most.registers}",
        f"{tried - open_} / {tried}, {equal} equal" if mine else "not run",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def render(parts: dict[str, dict[str, Any]]) -> str:
    """The page."""
    out = [HEAD.format(schedules=len({mode["schedule"] for mode in rows.measure.MODES}))]
    missing = [entry for part in parts.values() for entry in part["missing"]]
    seen = {(backend, stem) for backend, part in parts.items() for stem in part["kinds"]}
    missing += [
        f"{b}: anything of `{kernel}` ({where})" for b, kernel, where in limits.shipped_kernels() if (b, kernel) not in seen
    ]
    if missing:
        out += ["**Partial: time ran out** (`make gates` measures the rest). Not run:\n", *(f"- {m}" for m in missing), ""]
    titles = "kernel|backend|mutated forms|runs|code|loads|stores|waves|again|instr|bytes|regs|mutants"
    out += ["| " + titles.replace("|", " | ") + " |", "|---" * 2 + "|---:" * 11 + "|"]
    for backend, part in parts.items():
        out += [line(backend, stem, found, part["runs"].get(stem, 0)) for stem, found in part["kinds"].items()]
    every = [row for part in parts.values() for found in part["kinds"].values() for row in found["rows"]]
    explained = [(r["kernel"], m) for r in every for m in r["explained"]]
    tried, equal = sum(r["tried"] for r in every), sum(m["equal"] for _, m in explained)
    missed = [(k, m) for k, m in explained if not m["equal"]]
    open_ = [(r["kernel"], m) for r in every for m in r["open"]]
    killed = tried - len(explained) - len(open_)
    share = killed / max(1, tried - equal)
    out += [
        f"\n{tried} mutants of {len(every)} compiled kernels by {len(rows.mutate.OPERATORS) + 1} operators: {killed} found, "
        f"{equal} shown to change nothing, {len(missed) + len(open_)} not found. Killed, of those that change anything: "
        f"**{100 * share:.1f} %** (of all: {100 * killed / max(tried, 1):.1f} %).\n"
    ]
    if share < checks.LEAST_KILLED:
        out += [f"**Not met:** fewer than {100 * checks.LEAST_KILLED:.0f} % killed\n"]
    problems = [p for part in parts.values() for p in part["problems"]]
    met = f"{'No gate that was run is exceeded' if missing else 'All gates are met'}.\n"
    out += [f"**Not met:** {problem}\n" for problem in problems] or [met]
    out += ["| operator | tried | found | equal | not found |", "|---|---:|---:|---:|---:|"]
    by = {
        "tried": sum((Counter(r["operators"]) for r in every), Counter()),
        "equal": Counter(m["mutant"]["operator"] for _, m in explained if m["equal"]),
        "open": Counter([m["operator"] for _, m in open_] + [m["mutant"]["operator"] for _, m in missed]),
    }
    for name, count in sorted(by["tried"].items()):
        out.append(
            f"| {name} | {count} | {count - by['equal'][name] - by['open'][name]} | {by['equal'][name]} | {by['open'][name]} |"
        )
    notes = [(b, s, limits.limits_of(b, s).note) for b, part in parts.items() for s in part["kinds"]]
    out += ["\n## Notes\n"] + [f"- `{stem}` ({backend}): {note}" for backend, stem, note in notes if note]
    out += ["\n## Survivors that change nothing, by argument\n", *_reasons([m for _, m in explained if m["equal"]])]
    if missed:
        out += ["\n## Survivors that change something, by reason\n", *_reasons([m for _, m in missed])]
    if open_:
        out += ["\n## Survivors that no case tells apart, and no argument explains\n"]
        # Source lines as code: `v[k]` in plain text is a link of the docs, and one without a target.
        out += [
            f"- `{k}`: {m['operator']} at `{m['place']}`: `{m['before']}` -> `{m['after'] or '(removed)'}`" for k, m in open_
        ]
    return "\n".join(out) + "\n"


def _reasons(explained: list[dict[str, Any]]) -> list[str]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for (why, operator), count in Counter((m["why"], m["mutant"]["operator"]) for m in explained).most_common():
        grouped[why].append(f"{operator} {count}")
    return [f"- {why}: {', '.join(found)}" for why, found in grouped.items()]


def collect(name: str, until: float) -> dict[str, Any]:
    """Measurements of a backend, in a process where Triton compiles or (for the rest) is interpreted; until: rows.until."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if name == "triton" else "1"}
    command = [sys.executable, "-m", "tests.ptxsim", "gates", "--measure", name, "--until", str(until)]
    done = subprocess.run(command, cwd=build.REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {name} failed")
    found = done.stdout.splitlines()[-1]
    (build.cache_folder() / "gates" / f"measured_{name}.json").write_text(found)  # for a person
    return json.loads(found)
