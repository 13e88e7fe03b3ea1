"""Why mutants of the fused convolution's CUDA kernels may survive (survivors.py).

Their epilogues are unrolled: a statement of the source is hundreds of instructions, each for one of a thread's values. A tile
of 128 x 128 sums takes seconds to simulate, so that not every copy gets a value of every kind.
"""

from __future__ import annotations

from .survivor import Argument

_KERNEL = "conv_bn_act_(fwd|stats|finish|prologue|tail|dgrad)_kernel"
_DGRAD = "conv_bn_act_dgrad_kernel"
ARGUMENTS = (
    Argument(
        "nan_losing_max|swapped_operands",
        r"^conv_bn_act_tile\.cuh: (z = z < 0\.0f|return z > output\.limit)|^conv_bn_act_prologue_kernel\.cuh: asm\(.max\.NaN",
        "no NaN, or no negative value, comes to this copy in a simulated call", kernel=_KERNEL, equal=False,
    ),
    Argument(
        "nan_losing_max|swapped_operands", r"^(cmath: \{ return __builtin_isfinite|tfloat32\.h: if \(::isfinite)",
        "the calls with moments hold whole numbers, which both ways of rounding to TF32 leave as they are; "
        "conv_bn_act_fwd_kernel runs the same lines on NaN and infinity", kernel="conv_bn_act_(stats|dgrad)_kernel",
        equal=False,
    ),
    Argument(
        "loose_comparison|unsigned_wrap|missing_mask|off_by_one", r"^vec\.cuh: (pack\.v\[k\] = k < count|if \(k < count\))",
        "a copy for a number of channels left over that no simulated call has in this place", kernel=_KERNEL, equal=False,
    ),
    Argument(
        "wrong_grid", "", "a block behind the last has neither rows nor columns: it stores nothing",
        kernel="conv_bn_act_(prologue|tail)_kernel",
    ),
    Argument(
        "loose_comparison|swapped_operands", r"^conv2d_fprop_activation_tile_access_iterator_optimized\.h: (masks_\[s\]|"
        r"\(masks_\[iteration|if \(filter_r_ <)", "CUTLASS' masks of taps: a 1x1 filter has one tap", equal=False,
        kernel="conv_bn_act_prologue_kernel",
    ),
    Argument(
        "loose_comparison|unsigned_wrap",
        r"^conv_bn_act_fwd_kernel\.cuh: (const int left =|added\[i\] = left)|^conv2d_fprop_(activation|filter)_tile",
        "no tile of a simulated call ends at just this copy's row or column", kernel=_KERNEL, equal=False,
    ),
    Argument(
        "forgotten_addend|wrong_sign",
        r"^conv_bn_act_fwd_kernel\.cuh: (z\[k\] = |sums\[4 \* i)|^conv_bn_act_stats_kernel\.cuh: (squares|sum)\[c\]\[k\]",
        "the copy's rows or columns lie outside the output in every simulated call, or it is a thread's first row, where the "
        "addend is zero", kernel=_KERNEL, equal=False,
    ),
    Argument(
        "wrong_thread", r"^conv_bn_act_stats_kernel\.cuh: const int thread", "of the last columns of the tile, which lie "
        "outside the output in every simulated call", kernel=_KERNEL, equal=False,
    ),
    Argument(
        "stale_shared_memory", r"^conv_bn_act_tile\.cuh: scale = ", "one of two stores of the scale: columns beyond the "
        "output, which nothing stores", kernel=_KERNEL, equal=False,
    ),
    Argument(
        "unsigned_wrap|missing_mask", r"^reduce\.cuh: if \((other\.v\[0\] > 0|group >= half)",
        "a bound of the compiler's for merges that are left, and groups beyond the tree whose results nobody reads",
        kernel="conv_bn_act_stats_kernel", equal=False,
    ),
    Argument(
        "nan_losing_max|swapped_operands", r"^(cmath: \{ return __builtin_isfinite|tfloat32\.h: if \(::isfinite)",
        "a NaN of the first filters or in between comes to an output by several ways, so that one that loses it is not seen; "
        "conv_bn_act_fwd_kernel runs the same lines", kernel="conv_bn_act_tail_kernel", equal=False,
    ),
    Argument(
        "unsigned_wrap", r"^conv_bn_act_tail_kernel\.cuh: const int ahead = min", "a number of chunks: never negative",
        kernel="conv_bn_act_tail_kernel",
    ),
    Argument(
        "nan_losing_max", r"^conv_bn_act_dgrad_kernel\.cuh: (const bool below|return !\(below)",
        "no NaN comes to this copy of the activation's side in a simulated call", kernel=_DGRAD, equal=False,
    ),
    Argument(
        "unsigned_wrap|missing_mask|wrong_predicate|loose_comparison",
        r"^conv_bn_act_dgrad_kernel\.cuh: (return left > 0|const int64_t from|if \(k < left|if \(whole\)|const int left)",
        "no tile of a simulated call ends at just this copy's row or column, or both ways of reading give the same there",
        kernel=_DGRAD, equal=False,
    ),
    Argument(
        "unsigned_wrap|missing_mask", r"^conv_bn_act_dgrad_kernel\.cuh: if \(args\.partial == nullptr",
        "rows and columns outside the output add zeros, and without sums nobody reads them", kernel=_DGRAD,
    ),
    Argument(
        "loose_comparison", r"^conv_bn_act_dgrad_kernel\.cuh: \} else if \(left > 0",
        "whole vectors: one channel is never left", kernel=_DGRAD,
    ),
    Argument(
        "forgotten_addend|wrong_sign", r"^conv_bn_act_dgrad_kernel\.cuh: (own|theirs)\[c\]\[g \+ k\]",
        "a thread's first row, where the addend is zero, or a copy whose rows or columns lie outside the output in every "
        "simulated call", kernel=_DGRAD, equal=False,
    ),
    Argument(
        "wrong_thread", r"^conv_bn_act_dgrad_kernel\.cuh: const int thread",
        "128 threads for 64 channels: with numbers lower by one every channel is still worked out, the first one twice",
        kernel=f"{_DGRAD}.*Li64E",
    ),
    Argument(
        "wrong_thread", r"^conv_bn_act_dgrad_kernel\.cuh: const int thread",
        "128 threads for 128 channels: this copy is only asked for its group of rows (thread / 128), none but the first",
        kernel=f"{_DGRAD}.*Li128ELi128E",
    ),
    Argument(
        "loose_comparison", r"^cuda_fp16\.hpp: ",
        "the bit of a row or column that lies outside the output in every simulated call", kernel=_DGRAD,
        before=r"^setp\.(eq|ne)\.s16", equal=False,
    ),
    Argument(
        "unsigned_wrap", r"^reduce\.cuh: for \(int row = group",
        "a bound of the compiler's for merges that are left, more than none in every tile", kernel=_DGRAD, equal=False,
    ),
    Argument(
        "loose_comparison", r"^conv_bn_act_turn_kernel\.cuh: for \(int i = y",
        "the loop's end: the place is 8 rows behind it or more", kernel="conv_bn_act_turn_kernel",
        before=r"setp\.gt\.u32 .*, 31",
    ),
)  # fmt: skip
