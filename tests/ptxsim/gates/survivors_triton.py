"""Why mutants of the Triton kernels may survive (survivors.py)."""

from __future__ import annotations

from .survivor import Argument

ARGUMENTS = (
    Argument("nan_losing_max", r"^_device\.py: .*z > 0, z, z \* SLOPE", "leaky_relu gives z or z * slope: NaN either way"),
    Argument("nan_losing_max", r"^_bn_reduce\.py: filled = count > 0", "counts are never NaN", never=True),
    Argument(
        "missing_mask|wrong_predicate|loose_comparison", r"^_bn_reduce\.py: tl\.store\(at \+ group, value\)",
        "every thread of the program holds the channel's one value: it does not matter which stores it, or whether all do",
    ),
    Argument(
        "loose_comparison", r"^_bn_(reduce|merge)\.py: for \w+ in (tl\.)?range\(",
        "a step more than there are lines or chunks: all its loads are masked off, and zeros are added",
        before=r"^setp\.(ge|lt)\.s32 %p\d+, %r\d+, %r",
    ),
    Argument(
        "loose_comparison", r"^_bn_(reduce|merge)\.py: for \w+ in (tl\.)?range\(",
        "there is always a line and a chunk: the loop is never left out", never=True,
        before=r"^setp\.(gt|lt)\.s32 %p\d+, %r\d+, [01];",
    ),
    Argument(
        "missing_mask", r"^nms\.py: return tl\.load\(at, valid", kernel="nms_push",
        why="the boxes of a chunk all exist; a load behind the last of the later ones would have been reported",
    ),
    Argument(
        "loose_comparison", r"^nms\.py: .*j > i", "a box's bit about itself is never read: it has been decided by then",
    ),
    Argument(
        "missing_mask|loose_comparison", r"^nms\.py: .*\bi < N",
        "the boxes of a chunk lie before those that are compared with them", kernel="nms_push",
    ),
    Argument("wrong_grid", "", "every load and store of a program behind the end is masked off", kernel="^[a-z0-9_]+kernel#"),
    Argument("wrong_grid", "", "blocks beyond the last channel leave at once", kernel="finalize_kernel"),
)  # fmt: skip
