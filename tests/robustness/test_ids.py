"""The fault checklist is covered: each of F01 to F54 is the id of at least one test, and skips name where they are covered."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ROWS = [f"F{row:02}" for row in range(1, 55)]


def carried() -> dict[str, list[str]]:
    """Row -> names of the tests that carry it."""
    found: dict[str, list[str]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (row := re.match(r"test_(F\d\d)_\w+$", node.name)):
                found.setdefault(row[1], []).append(f"{path.name}::{node.name}")
    return found


def test_every_row_has_a_test() -> None:
    found = carried()
    assert sorted(found) == ROWS, f"missing {set(ROWS) - set(found)}, unknown {set(found) - set(ROWS)}"


def test_no_test_is_shadowed() -> None:
    """Two tests of one name in a file would be one."""
    for names in carried().values():
        assert len(names) == len(set(names)), names


def test_what_needs_a_gpu_is_in_gpu_check() -> None:
    """A skip for lack of a GPU names the row, and bench/gpu_check.py has it."""
    check = (ROOT / "bench/gpu/faults.py").read_text()
    named = set()
    for path in HERE.glob("test_*.py"):
        for reason in re.findall(r"needs (?:a|two) GPUs?; ([^\"']*)", path.read_text()):
            row = re.fullmatch(r"covered by bench/gpu_check\.py (F\d\d)", reason)
            if path.name != Path(__file__).name:
                assert row, f"{path.name}: {reason}"
                named.add(row[1])
    assert named == {"F26", "F48", "F49", "F50"} and all(f"{row}_" in check for row in named)
