"""What ``optimize`` replaced and kept, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

REPLACED, KEPT = "replaced", "kept"

REASONS = {
    "EXCLUDED": "left out by include= or exclude=",
    "HOOKS": "a module of the chain has forward or backward hooks",
    "OVERRIDDEN": "a module of the chain has a forward patched onto the instance",
    "SHARED_MODULE": "the convolution or BatchNorm is used in more than one place",
    "SUBCLASS": "a subclass or look-alike that may compute something else than the stock layer",
    "PARAMETRIZED": "a parameter is computed by torch.nn.utils.parametrize",
    "NO_RUNNING_STATS": "the BatchNorm keeps no running statistics",
    "DTYPE": "no kernel for the dtype of the parameters",
    "PADDING_MODE": "the convolution pads with something else than zeros",
    "MULTIPLE_USERS": "an intermediate result is used elsewhere too",
    "INPLACE": "an in-place addition writes to a tensor that is visible elsewhere",
    "REORDERED": "an operation in between may change an input of the chain",
    "UNTRACEABLE": "the forward that contains the chain cannot be followed faithfully",
}


@dataclass(frozen=True)
class Row:
    """One candidate chain.

    ``fqn``: of its first module (of the container for functions); ``members``: the modules and functions of the chain in order;
    ``reason``: a key of :data:`REASONS`, empty when replaced; ``backend``: where a replaced chain runs.
    """

    fqn: str
    pattern: str
    members: tuple[str, ...]
    status: str
    reason: str = ""
    detail: str = ""
    backend: str = ""


@dataclass
class Report:
    """Rows in the model's module order; prints as a table, exports with ``to_dict``, ``to_json`` and ``to_markdown``.

    ``own``: names of the outermost modules of this package, which run fused without being replaced ("": the model itself).
    """

    rows: list[Row] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.status == REPLACED]

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if row.status == KEPT]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def summary(self) -> str:
        """One line: ``17 of 20 conv-bn-act replaced; 3 kept: 2 HOOKS, 1 SUBCLASS``."""
        own = f"{len(self.own)} module{'s' * (len(self.own) > 1)} of this package fused as built" if self.own else ""
        if not self.rows:
            return own or "nothing to replace: no conv-bn-act, bn-act or add-act chain found"
        patterns = {row.pattern for row in self.rows}
        if all(name.startswith("conv_bn") for name in patterns):
            what = "conv-bn-act"
        elif all(name.startswith("bn") for name in patterns):
            what = "bn-act"
        else:
            what = "conv-bn-act, bn-act and add-act"
        line = f"{len(self.replaced)} of {len(self.rows)} {what} replaced"
        if self.kept:
            reasons = Counter(row.reason for row in self.kept).most_common()
            line += f"; {len(self.kept)} kept: " + ", ".join(f"{count} {reason}" for reason, count in reasons)
        return f"{line}; {own}" if own else line

    def to_dict(self) -> dict[str, Any]:
        return {"summary": self.summary(), "rows": [asdict(row) for row in self.rows]}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        lines = ["| module | pattern | status | reason | backend |", "|---|---|---|---|---|"]
        for row in self.rows:
            cells = (row.fqn or "(model)", row.pattern, row.status, _why(row), row.backend)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join([*lines, "", self.summary()])

    def __str__(self) -> str:
        table = [("module", "pattern", "status", "backend", "reason")]
        table += [(row.fqn or "(model)", row.pattern, row.status, row.backend, _why(row)) for row in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        body = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
            for line in table
        ]
        return "\n".join([*(body if self.rows else []), self.summary()])


def _why(row: Row) -> str:
    return f"{row.reason}: {row.detail}" if row.reason and row.detail else row.reason
