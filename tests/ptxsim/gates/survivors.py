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
    Argument("loose_comparison", r"pos \+ k >= 0", "single accesses: a window begins in its plane", never=True, kernel="Li1E"),
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
    # --- NMS
    Argument(
        "nan_losing_max", r"^nms_(iou|block)\.cuh: (if \(\(?(o\.inter|threshold|r <)|return r > 0|for \(int half)",
        "where one of them is NaN no way ends in a suppression: the quotient is NaN, and so is the remainder",
    ),
    Argument(
        "missing_mask", r"^nms_iou\.cuh: if \(\(r < 0",
        "the quotient decides as the remainder does; the remainder is only cheaper",
    ),
    Argument(
        "missing_barrier", r"^nms_block\.cuh: __syncthreads\(\);$",
        "one of two barriers in a row: solve_in_block ends with one, and what is written next is not what was read last",
    ),
    Argument(
        "missing_barrier", "previous (call|bin) have been read|bin_kept and kept have been read",
        "a block takes a second turn of this loop only in calls of more than 4096 boxes", equal=False,
    ),
    Argument(
        "missing_barrier", "__nvvm_bar_warp_sync",
        "a write after another lane's read is not checked inside a warp (README), and lanes run in step", equal=False,
    ),
    Argument(
        "missing_mask", r"^nms_sort\.cuh: if \(peers != 0",
        "lanes of one digit write the same count; lanes without an item come last and spoil a counter that nobody needs then",
    ),
    Argument("loose_comparison", r"^nms_sort\.cuh: return bits & 0x8000u", "a zero has left before", never=True),
    Argument(
        "wrong_predicate|missing_mask|loose_comparison|wrong_thread", r"^nms_kernel\.cuh: if \(threadIdx\.x == 0\)",
        "every thread has counted the same", kernel="nms_large",
    ),
    Argument(
        "missing_mask|loose_comparison|wrong_predicate", r"^nms_(large_kernel|block)\.cuh: (if \(lane == 0\)|const int lane)",
        "every lane of the warp holds the same word",
    ),
    Argument(
        "missing_mask", r"^nms_block\.cuh: for \(int w = threadIdx\.x; w < kBlockLimit / 32",
        "further threads write zeros over bits that are zeroed next and keys that are no longer needed", kernel="nms_image",
    ),
    Argument(
        "uninitialised_tail", r"^nms_kernel\.cuh: w\.bin_start\[i\] =",
        "counters of a bin are read only where it has more than 1024 boxes, which here no bin of this part of the loop has",
        equal=False,
    ),
    Argument(
        "wrong_predicate|missing_mask|loose_comparison", r"^nms_kernel\.cuh: w\.bin_at\[i\] = takes_part",
        "the compiler's two ways to take a 64-bit remainder", never=True,
    ),
    Argument(
        "loose_comparison", r"^nms_block\.cuh: for \(int (half|w) =",
        "the choice of who stores a word that every lane, or every warp, would compute alike",
        before=r"^setp\.ne\.s32 %p\d+, %r\d+, 0;",
    ),
    Argument(
        "wrong_thread", r"^nms_kernel\.cuh: for \(int base = 0; base < w\.bins", "every thread has counted the same: it does "
        "not matter which of them stores the count", kernel="nms_large",
    ),
    Argument("loose_comparison", r"^nms_sort\.cuh: return bits & 0x8000u", "computed for zeros too, whose key is another one"),
    Argument(
        "loose_comparison", r"^nms_sort\.cuh: for \(int64_t base = 0; base < per_image", "a round behind the last counter: it "
        "stores nothing",
    ),
    Argument(
        "loose_comparison", r"^nms_kernel\.cuh: for \(int64_t base = 0; base < w\.count && found < w\.max_output",
        "where nothing is to be kept, no kept box finds a place", before=r"^setp\.gt\.s64 %p\d+, %rd\d+, 0;",
    ),
    Argument("missing_mask", r"^nms_large_kernel\.cuh: if \(n == 0\)", "an empty chunk has no word and keeps nothing"),
    Argument(
        "missing_mask", r"^nms_large_kernel\.cuh: if \(i < n && w\.alive", "the row of a suppressed box is not used, and a row "
        "behind the chunk is not stored",
    ),
    Argument(
        "uninitialised_tail|swapped_operands", r"^nms_large_kernel\.cuh: (w\.kept_at\[place\] =|before \+= v < warp)",
        "the places of kept boxes are read by nms_push alone, in bins of more than 2048 boxes (kept_at: with classes): such a "
        "call is too long to simulate for every mutant", equal=False, kernel="nms_decide",
    ),
    Argument(
        "missing_mask", r"^nms_iou\.cuh: if \(threshold >= 1e-4f", "one of the four conditions of the quick way is left out: "
        "its remainder then decided as the quotient does in every simulated pair of this kernel", equal=False,
    ),
    Argument(
        "wrong_rounding|wrong_sign", r"^(cuda_fp16\.hpp|nms_iou\.cuh: const float area_b)",
        "every pair that this copy of the code compares in a simulated call is far from the threshold", equal=False,
        kernel="nms_(bins|image|push|mask)_kernelI(6__half|NS0_11Float16Rule)",
    ),
    Argument(
        "wrong_thread", r"^nms_block\.cuh: for \(uint32_t i = threadIdx\.x", "word 15 of the kept bits keeps an old value: "
        "read only where a bin has more than 960 boxes and reaches max_output before", equal=False,
    ),
    Argument(
        "loose_comparison", r"^nms_kernel\.cuh: for \(int64_t pad = p\.count", "one zero more, behind the flags: the next "
        "image's first, a zero anyway, or a byte of the workspace that changed no result", equal=False,
    ),
    Argument(
        "loose_comparison", r"^bn_act_fwd_kernel\.cuh: if \(step >= u && r < a\.rows\.count\)",
        "no thread of a simulated call is just one row behind the last here: its load would have been reported", equal=False,
    ),
    # --- Triton
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


def arguments_for(kernel: str, mutant: mutate.Mutant) -> list[Argument]:
    """Those that fit, those that need no run first."""
    fitting = [a for a in ARGUMENTS if a.fits(kernel, mutant.operator, place_of(mutant), mutant.before)]
    return sorted(fitting, key=lambda a: a.never)
