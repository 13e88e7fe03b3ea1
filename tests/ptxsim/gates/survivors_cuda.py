"""Why mutants of the CUDA kernels of BatchNorm and addition may survive (survivors.py)."""

from __future__ import annotations

from .survivor import Argument

DIVISION = r"[/%] (a\.plan\.(tiles|parts|windows)|((a|in)\.)?row_vecs|stride|planes\.(length|channels))"
COPIES = "|".join(
    (
        r"^bn_act_bwd_kernel\.cuh: (if \(a\.dresidual != nullptr|if \(step < u \|\| left <= 0)",
        r"^bn_act_fwd_kernel\.cuh: (if \(residual\)|if \(step >= u|for \(; step >= 0)",
        r"^bn_act_stats_kernel\.cuh: (const int part =|for \(; left > 0|for \(const T\* p = tail|if \(row \+)",
        r"^bn_act_reduce_kernel\.cuh: if \(inside\[u\] == 0",
        r"^bn_act_kernel\.cuh: (if \(window >=|.*steps\(\) const)",
        r"^raw\.cuh: (asm|if \(left >= kVec)",
        r"^reduce\.cuh: if \(group < groups",
    )
)
TWO_DIVISIONS = (
    "the compiler's two ways to divide 64-bit numbers: the quick one for operands below 2^32 gives the same quotient"
)
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
    Argument(
        "missing_mask|wrong_predicate|loose_comparison", r"^reduce\.cuh: while \(groups > 1\)",
        "a tree over one group does nothing",
    ),
    Argument("missing_mask|wrong_predicate|loose_comparison", DIVISION, TWO_DIVISIONS),
    Argument(
        "loose_comparison", r"^reduce\.cuh: ", "the compiler's count of merges left: a block has eight warps", never=True,
        kernel="nchw",
    ),
    Argument(
        ".*", r"^bn_act_(fwd|bwd)_kernel\.cuh: .*\bhere\b",
        "single accesses: a value lies in its own plane, and `next` holds the same vectors", kernel="Li1E",
    ),
    Argument(
        "missing_mask|wrong_predicate", r"^bn_act_(bwd|reduce)_kernel\.cuh: .*(reads_x|recomputes)(<kFrom>)?\(",
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
    Argument(
        "wrong_grid", "", "a grid-stride loop: any number of blocks does all the work", kernel="^_Z.*add_act_(fwd|bwd)_kernel",
    ),
    Argument(
        "missing_mask", r"^add_act_kernel\.cuh: if \(f < vecs\)",
        "behind the end nothing is left, so load_upto reads nothing, and `valid` guards what follows",
    ),
    Argument(
        "missing_mask", r"in\.activation != Activation::kNone\)", "the gradient of no activation is 1: dz stays as it is",
    ),
    Argument("nan_losing_max", r"sigma > 0 \?", "where sigma is NaN, rstd and with it scale and factor are NaN either way"),
    Argument(
        "wrong_sign|nan_losing_max", r"^activation\.h: .*::exp\(x\)",
        "exp's branch for overflow: inf minus a negative number or NaN; on either side of its comparisons NaN stays NaN",
        before=r"^(sub\.f64( %fd\d+,){2} %fd\d+|setp\.\w+\.f32)",
    ),
    Argument(
        "forgotten_addend", r"^activation\.cuh: .*expf\(-z\)",
        "expf splits its exponent elsewhere: ex2 of a larger share times a smaller power of two, less exact by less than the "
        "rounding of a 16-bit type", kernel="half|bfloat16",
    ),
    Argument(
        "missing_mask", r"^vec\.cuh: if \(reinterpret_cast<uintptr_t>\(p\) % 16 == 0\)",
        "the way of single loads reads the same values as the way of 16-byte loads",
    ),
    Argument(
        "missing_mask", r"^reduce\.cuh: if \(count > 0\)",
        "an empty state's NaN mean has a count of 0, which the merge leaves out",
    ),
    Argument("nan_losing_max", r"value\[0\] > 0 \?", "counts are never NaN", never=True),
    Argument(
        "wrong_rounding", r"^cuda_bf16\.hpp", "every value that this copy rounds in a simulated call is rounded alike",
        equal=False, kernel="bn_act_fwd_kernel",
    ),
    Argument(
        "loose_comparison", r"^bn_act_(stats|reduce)_kernel\.cuh: for \(; row \+ \(kUnroll",
        "no thread of a simulated call is just one row behind the last here: its load would have been reported", equal=False,
    ),
    Argument(
        "wrong_sign|stale_shared_memory", r"^bn_act_(bwd_)?kernel\.cuh: (sum\[0\] \+=|shared\[k\]\[group\]\[lane\])",
        "a group of partial results that is empty in every simulated call of this type", kernel="finalize_kernelId",
        equal=False,
    ),
    Argument(
        "loose_comparison", r"^add_act_kernel\.cuh: if \(\(base \+",
        "the way with bounds reads what the way of whole vectors reads",
    ),
    Argument(
        "loose_comparison", r"^add_act_kernel\.cuh: (if \(f (<|>=) vecs\)|const bool valid|for \(int64_t base)",
        "behind the end nothing is left: no value is loaded and none is stored",
    ),
    Argument(
        "missing_mask", r"^add_act_kernel\.cuh: \} else if \(recompute\)",
        "the gradient of no activation is 1: dz stays as it is",
    ),
    Argument(
        "loose_comparison", r"^vec\.cuh: pack\.v\[k\] = k < count", "a vector that is loaded has a value left",
        kernel="add_act_(fwd|bwd)_kernel",
    ),
    Argument(
        "missing_mask|wrong_predicate", r"^activation\.h: .*::exp\(x\)", "exp's way for arguments near overflow: of this copy's"
        " values none is so large in a simulated call", kernel="add_act_(fwd|bwd)_kernelIdLi1E", equal=False,
    ),
    # Unrolled loops hold many copies of a line. Of the lines below other copies are found; these meet nothing that tells.
    Argument(
        "nan_losing_max",
        r"^(raw|activation)\.cuh: return (z <= -3|z >|!\(z <=)|^activation\.h: (.*::exp\(x\)|const T clamped)",
        "no NaN comes to this copy in a simulated call", kernel="bn_act_(fwd|bwd|bwd_reduce)_kernel", equal=False,
    ),
    Argument(
        "missing_mask|wrong_predicate|loose_comparison|swapped_operands", COPIES,
        "no thread of a simulated call comes to this copy, or none with just the number of values, steps or parts at which the "
        "change tells", kernel="bn_act_", equal=False,
    ),
    Argument(
        "missing_mask", r"^add_act_kernel\.cuh: if \(!kRecompute && a\.mask",
        "every simulated call that comes to this copy has a mask", equal=False,
    ),
    Argument(
        "forgotten_addend", r"^bn_act_reduce_kernel\.cuh: own\[g \+ k\]", "a thread's first row, where the addend is zero",
        equal=False,
    ),
    Argument(
        "swapped_operands", r"^activation\.cuh: .*expf\(-z\)",
        "a step of expf's range reduction: the few values of this copy round to the same number", kernel="half|bfloat16",
        equal=False,
    ),
    Argument(
        "loose_comparison|missing_mask", r"^bn_act_bwd_kernel\.cuh: (return c % vec|const int64_t c = int64_t\(blockIdx)",
        TWO_DIVISIONS, kernel="bwd_finalize",
    ),
    Argument("wrong_grid", "", "threads behind the last channel return", kernel="bn_act_pair_(fwd|bwd)_table_kernel"),
    Argument(
        "loose_comparison", r"^bn_act_pair_fwd\.cu: (for \(.*step >= 0;|valid\[u\] = step >= u|if \(step >= u && left)",
        "the loop's end: one step more, of which no vector is valid",
    ),
    Argument(
        "missing_mask", r"^bn_act_pair_reduce_kernel\.cuh: if \(inside\[u\] == 0",
        "none of its bits is set: nothing of it is added", kernel="nchw.*Lb0E",
    ),
    Argument(
        "missing_mask", r"^bn_act_pair_reduce_kernel\.cuh: for \(; left > 0",
        "a round in which no vector is inside adds nothing",
    ),
    Argument(
        "stale_shared_memory", r"^bn_act_kernel\.cuh: shared\[k\]\[group\]\[lane\]",
        "a store of the tree's last level, whose sum its own thread takes on", kernel="bn_act_pair_finalize",
    ),
    Argument("loose_comparison", r"^bn_act_kernel\.cuh: bits = pos < 0", "bits & (bits << 0) are the bits"),
    Argument(
        "loose_comparison", r"^bn_act_kernel\.cuh: return length - pos >= kVec", "no values left: no bits either way",
    ),
    Argument(
        "loose_comparison", r"^bn_act_(stats|reduce)_kernel\.cuh: if \(.*start \+ pos \+ kVec >",
        "a whole vector at the tensor's end: the way for cut ones reads the same values",
    ),
    Argument(
        "unsigned_wrap", r"^bn_act_stats_kernel\.cuh: for \(int u = 0", "a count that the compiler keeps below zero",
        before=r"^max\.s32 .*, -4",
    ),
)  # fmt: skip
