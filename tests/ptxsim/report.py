"""What a simulated launch found and counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One defect at one instruction; `times` counts its occurrences, the rest describes the first."""

    kind: str
    message: str
    file: str
    line: int
    instruction: str
    kernel: str
    block: tuple[int, int, int]
    thread: int
    times: int

    def __str__(self) -> str:
        where = f"{self.file or 'line'}:{self.line}" if self.line else "?"
        again = f" ({self.times} times)" if self.times > 1 else ""
        return f"{self.kind} at {where} [{self.instruction}] block {self.block} thread {self.thread}: {self.message}{again}"


@dataclass
class Report:
    """Result of one launch.

    errors: every finding as text, outputs with unwritten bytes, and the reason why the kernel stopped, if it did.
    counters: totals (see README.md for the names). tensors: name -> bytes touched, in whole 32-byte sectors.
    lines: the same counters per PTX instruction, with its source line.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    findings: list[Finding]
    counters: dict[str, int]
    tensors: dict[str, dict[str, int]]
    lines: list[dict[str, Any]]
    stopped: str = ""
    unwritten: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_result(cls, result: dict[str, Any]) -> Report:
        """Builds a report from one JSON object of ptxsim_results()."""
        findings = [Finding(**{**f, "block": tuple(f["block"])}) for f in result["findings"]]
        tensors = result.get("tensors", {})
        unwritten = {name: t["unwritten"] for name, t in tensors.items() if t["unwritten"]}
        return cls(
            kernel=result["kernel"],
            grid=tuple(result["grid"]),
            block=tuple(result["block"]),
            shared=result["shared"],
            findings=findings,
            counters=result["counters"],
            tensors=tensors,
            lines=result.get("lines", []),
            stopped=result["stopped"],
            unwritten=unwritten,
        )

    @property
    def errors(self) -> list[str]:
        """Everything that is wrong, one line each; empty for a clean launch."""
        texts = [str(f) for f in self.findings]
        if self.stopped:
            return [*texts, f"STOPPED: {self.stopped}"]
        return texts + [f"UNWRITTEN: {n} bytes of output {name} were never written" for name, n in self.unwritten.items()]

    @property
    def kinds(self) -> set[str]:
        """The kinds of all findings, with UNWRITTEN and STOPPED."""
        return {error.split(" ")[0].rstrip(":") for error in self.errors}

    def check(self) -> Report:
        """Raises AssertionError unless the launch was clean; returns itself."""
        assert not self.errors, f"{self.kernel}:\n  " + "\n  ".join(self.errors)
        return self

    def efficiency(self, kind: str = "load") -> float:
        """Share of the moved 32-byte sectors that the requests needed at least; kind: "load" or "store"."""
        sectors = self.counters[f"{kind}_sectors"]
        return self.counters[f"{kind}_ideal_sectors"] / sectors if sectors else 1.0

    def bank_waves(self) -> float:
        """Shared-memory waves per ideal wave: 1.0 means no bank conflict."""
        ideal = self.counters["shared_ideal_waves"]
        return self.counters["shared_waves"] / ideal if ideal else 1.0

    def profile(self, source: str | Path | None = None) -> str:
        """Table of instructions and traffic per source line; with `source`, the text of the lines beside it."""
        return profile([self], source)


_COLUMNS = ("warps", "requests", "sectors", "ideal_sectors", "waves", "ideal_waves")


def profile(reports: Iterable[Report], source: str | Path | None = None) -> str:
    """Per-line table over several launches: warp instructions, memory requests, sectors and shared-memory waves."""
    texts = Path(source).read_text().splitlines() if source else []
    rows: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0] * len(_COLUMNS))
    for report in reports:
        for line in report.lines:
            row = rows[line["file"], line["line"]]
            for i, column in enumerate(_COLUMNS):
                row[i] += line[column]
    out = [f"{'line':>24} {'warp instr':>11} {'requests':>9} {'sectors':>9} {'ideal':>9} {'waves':>9} {'ideal':>9}"]
    for (file, number), row in sorted(rows.items()):
        text = texts[number - 1].strip()[:80] if 0 < number <= len(texts) and Path(source).name == file else ""
        out.append(f"{f'{file}:{number}':>24} {row[0]:>11} " + " ".join(f"{n:>9}" for n in row[1:]) + f"  {text}")
    return "\n".join(out)
