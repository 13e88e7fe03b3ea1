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
        "loose_comparison", r"^_bn_apply\.py: for tile in tl\.range\(", "every program has a tile: the loop is never left out",
        never=True, before=r"^setp\.ge\.\w+ %p\d+, %r\d+, %r\d+;",
    ),
    Argument(
        "unsigned_wrap", r"^_bn_merge\.py: unbiased =", "there is at least one value: the number less one is not negative",
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
    Argument(
        "swapped_operands", r"^_bn_merge\.py: delta = chunk_mean - merged_mean", "only the square of the difference is used",
    ),
    Argument(
        "wrong_lane", r"^standard\.py: return core\.reduce", "with the exchanges by 4, 2 and 1 that follow, one with lane ^ 11 "
        "instead of lane ^ 8 still adds every lane's value once", before=r"^shfl\.sync\.bfly\.b32 .*, 8, 31, -1;",
    ),
    Argument(
        "missing_barrier", r"^_windows\.py: tl\.store\(large", "no warp stores where another one has read before (the race "
        "check would tell): the rows of a tile belong to one warp",
    ),
    Argument(
        "wrong_rounding", r"^(max_pool_indices\.py: tl\.store\(dy|_bn_apply\.py: tl\.store\(dresidual)",
        "a gradient is handed on: it is exact in the narrow type", never=True,
    ),
    Argument(
        "wrong_rounding", r"^nms\.py: return value\.to\(tl\.float16\)", "every pair that this copy of the code compares in a "
        "simulated call is far from the threshold", kernel="nms_push", equal=False,
    ),
    Argument(
        "loose_comparison",
        r"^(_bn_reduce\.py: valid =|_bn_merge\.py: valid =|_bn_apply\.py: valid =|_device\.py: return index, row|"
        r"add_act\.py: return index|conv_bn_act\.py: (in_(k|pixels) =|for step)|"
        r"conv_transpose_bn_act\.py: (weight_tile|in_pixels)|"
        r"_windows\.py: return row, col|local_response_norm\.py: (inside =|for shift)|nms\.py: live =)",
        "the mask of one of several copies of an access, loose by one element: no lane of a simulated call has just that "
        "element in this copy, or it is masked off by its other coordinate", equal=False,
    ),
    Argument(
        "missing_mask", r"^(_windows\.py: (upper|lower) = tl\.load|max_pool_indices\.py: value = tl\.load\(y|"
        r"_bn_apply\.py: return tl\.load\(x|_bn_reduce\.py: first = tl\.load\(x)",
        "a load without its mask: in every simulated call it stays inside the tensor (it would have been reported), and what "
        "it reads without need is not stored", equal=False,
    ),
    Argument(
        "swapped_operands", r"^conv_transpose_bn_act\.py: for first in", "x is dense in every call of this form: a pixel's "
        "address is the same whichever image it is counted into", before=r"^div\.s32", equal=False,
    ),
    Argument(
        "stale_shared_memory|off_by_one", r"^(standard\.py: return core\.reduce|_bn_reduce\.py: count = tl\.where)",
        "neighbouring lines and columns have counted the same number of values in every simulated call",
        kernel="bn_stats_partial", equal=False,
    ),
    Argument(
        "missing_barrier", r"^(standard\.py: return core\.reduce|_bn_reduce\.py: (dz = tl\.load\(dout|for _ in tl\.range))",
        "between these accesses no other warp touches the places (the race check would tell, and the places do not depend on "
        "data)",
        kernel="bn_(stats_partial|stats_merge|bwd_partial)",
    ),
)  # fmt: skip
