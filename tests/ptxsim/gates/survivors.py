"""Why a mutant may survive: for every kind of survivor the argument that no result can differ.

A mutant that survives and finds no argument here is listed as open in docs/kernel-gates.md, and `make gates` fails. Where
an argument says "never", the unchanged kernel is run once more with a trap where the two instructions would differ.
"""

from __future__ import annotations

from .. import mutate
from . import survivors_conv, survivors_cuda, survivors_nms, survivors_triton
from .survivor import Argument, place, place_of

__all__ = ["ARGUMENTS", "arguments_for", "place", "place_of"]

ARGUMENTS: tuple[Argument, ...] = (
    *survivors_cuda.ARGUMENTS, *survivors_conv.ARGUMENTS, *survivors_nms.ARGUMENTS, *survivors_triton.ARGUMENTS
)  # fmt: skip


def arguments_for(kernel: str, mutant: mutate.Mutant) -> list[Argument]:
    """Those that fit, those that need no run first."""
    fitting = [a for a in ARGUMENTS if a.fits(kernel, mutant.operator, place_of(mutant), mutant.before)]
    return sorted(fitting, key=lambda a: a.never)
