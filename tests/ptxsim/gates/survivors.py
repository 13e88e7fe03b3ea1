"""Why a mutant may survive: for every kind of survivor the argument that no result can differ.

A mutant that survives and finds no argument here is listed as open in docs/kernel-gates.md, and `make gates` fails. Where
an argument says "never", the unchanged kernel is run once more with a trap where the two instructions would differ.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from .. import mutate


@functools.cache
def source_lines(file: str) -> list[str]:
    """The lines of a source file; none if it is not there."""
    path = Path(file)
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def place_of(mutant: mutate.Mutant) -> str:
    """`file: text of the line` of a change."""
    lines = source_lines(mutant.file)
    text = lines[mutant.line - 1].strip() if 0 < mutant.line <= len(lines) else ""
    return f"{mutant.file.rpartition('/')[2]}: {text}"


@dataclass(frozen=True)
class Argument:
    """What it applies to: regular expressions for the operator, the place (`file: text of the line`) and the kernel's name."""

    operator: str
    place: str
    why: str
    never: bool = False  # the two instructions never differ: checked by running the kernel with a trap
    kernel: str = ""

    def fits(self, kernel: str, operator: str, place: str) -> bool:
        """Whether the argument is about such a mutant."""
        return bool(re.fullmatch(self.operator, operator) and re.search(self.place, place) and re.search(self.kernel, kernel))


DIVISION = r"[/%] (a\.plan\.(tiles|parts|windows)|(a|in)\.row_vecs|stride|planes\.(length|channels))"
ARGUMENTS = (
    Argument("unsigned_wrap", "", "sizes, indices and activation codes are never negative there", never=True),
    Argument("wrong_rounding", r"^cuda_(fp16|bf16)\.hpp", "the value is exact in the narrow type, a constant zero", never=True),
    Argument("nan_losing_max", r"^reduce\.cuh: if \((other\.v\[0\]|count) > 0\)", "counts are never NaN", never=True),
    Argument(
        "nan_losing_max", r"^reduce\.cuh: m\.v\[2\] =",
        "where the sum of squares is NaN, so is the mean, and every merge makes both NaN",
    ),
    Argument(
        "nan_losing_max", r"^activation\.cuh: const float clamped = ",
        "hardswish multiplies the clamped value by z, which is NaN itself",
    ),
    Argument("nan_losing_max", r"^activation\.h: return z > T\(0\) \? z", "leaky_relu gives z or z * slope: NaN either way"),
    Argument(
        "missing_mask", r"^reduce\.cuh: if \(other\.v\[0\] > 0\)",
        "merging an empty state into another changes nothing; two empty ones make NaN means with a count of 0, which the next "
        "level leaves out",
    ),
    Argument("missing_mask", r"^reduce\.cuh: if \(threadIdx\.x == 0\)", "only thread 0's result is used"),
    Argument("missing_mask|wrong_predicate", r"^reduce\.cuh: while \(groups > 1\)", "a tree over one group does nothing"),
    Argument(
        "missing_mask|wrong_predicate|loose_comparison", DIVISION,
        "the compiler's two ways to divide 64-bit numbers: the quick one for operands below 2^32 gives the same quotient",
    ),
    Argument(
        ".*", r"^bn_act_fwd_kernel\.cuh: (const bool whole =|if \(whole\))",
        "single accesses: every window is whole, and its one value is added alike on both paths", kernel="Li1E",
    ),
    Argument(
        "loose_comparison", r"^bn_act_fwd_kernel\.cuh: const bool whole =",
        "a window that ends with its plane is added alike value by value",
    ),
    Argument(
        "loose_comparison", r"if \(pos < length\)", "single accesses: there are as many windows as values", never=True,
        kernel="Li1E",
    ),
    Argument(
        "loose_comparison", r"^reduce\.cuh: ", "the compiler's count of merges left: a block has eight warps", never=True,
        kernel="nchw",
    ),
    Argument(
        ".*", r"^bn_act_(fwd|bwd)_kernel\.cuh: .*\bhere\b",
        "single accesses: a value lies in its own plane, and `next` holds the same vectors", kernel="Li1E",
    ),
    Argument(
        "missing_mask|wrong_predicate", r"^bn_act_bwd_kernel\.cuh: .*(a\.reads_x|in\.recomputes)\(\)",
        "x and the vectors are there in any case; what is read without need is not used",
    ),
    Argument(
        "loose_comparison", r"^vec\.cuh: return left >= kVec", "single accesses: a value is left", never=True, kernel="Li1E",
    ),
    Argument("nan_losing_max", r"unbiased", "counts are never NaN", never=True),
    Argument(
        "swapped_operands|loose_comparison|wrong_predicate|missing_mask", r"bits = left < kVec \?",
        "single accesses: a valid lane has a value left, so its bit stays", kernel="Li1E",
    ),
    Argument(
        "wrong_predicate|missing_mask", r"if \(a\.mask != nullptr\)",
        "the bits of an activation without a mask are zero either way, and without room for a mask they are not stored",
    ),
    Argument("wrong_grid", "", "a grid-stride loop: any number of blocks does all the work", kernel="add_act_(fwd|bwd)_kernel"),
    Argument("wrong_grid", "", "blocks beyond the last channel leave at once", kernel="finalize_kernel"),
)  # fmt: skip


def arguments_for(kernel: str, mutant: mutate.Mutant) -> list[Argument]:
    """Those that fit, those that need no run first."""
    fitting = [a for a in ARGUMENTS if a.fits(kernel, mutant.operator, place_of(mutant))]
    return sorted(fitting, key=lambda a: a.never)
