"""An argument why a mutant may survive, and the place in the source that it speaks of (arguments: survivors.py)."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from .. import mutate

KERNELS = Path(__file__).resolve().parents[3] / "dl4ds_kernels" / "_triton"


@functools.cache
def source_lines(file: str) -> list[str]:
    """The lines of a source file; none if it is not there.

    Triton keeps compiled kernels for all checkouts of a user: the file that one names may lie in another that is gone.
    """
    for path in (Path(file), KERNELS / Path(file).name):
        if path.is_file():
            return path.read_text(errors="replace").splitlines()
    return []


def place(file: str, line: int) -> str:
    """`file: text of the line`."""
    lines = source_lines(file)
    text = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    return f"{file.rpartition('/')[2]}: {text}"


def place_of(mutant: mutate.Mutant) -> str:
    """Where a change is."""
    return place(mutant.file, mutant.line)


@dataclass(frozen=True)
class Argument:
    """What it applies to: regular expressions for the operator, the place (`file: text of the line`) and the kernel's name."""

    operator: str
    place: str
    why: str
    never: bool = False  # the two instructions never differ: checked by running the kernel with a trap
    kernel: str = ""
    before: str = ""  # a regular expression for the unchanged instruction
    equal: bool = True  # nothing can change; False: something could, but not in any case that is small enough to simulate

    def fits(self, kernel: str, operator: str, place: str, before: str) -> bool:
        """Whether the argument is about such a mutant."""
        patterns = ((self.place, place), (self.kernel, kernel), (self.before, before))
        return bool(re.fullmatch(self.operator, operator)) and all(re.search(p, text) for p, text in patterns)
