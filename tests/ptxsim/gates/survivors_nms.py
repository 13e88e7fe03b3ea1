"""Why mutants of the NMS kernels, CUDA and Triton, may survive (survivors.py)."""

from __future__ import annotations

from .survivor import Argument

ARGUMENTS = (
    Argument(
        "nan_losing_max", r"^nms_(iou|block)\.cuh: (if \(\(?(o\.inter|threshold|r <)|return r > 0|for \(int half)",
        "where one of them is NaN no way ends in a suppression: the quotient is NaN, and so is the remainder",
    ),
    Argument(
        "missing_mask|wrong_predicate", r"^nms_iou\.cuh: if \(\(r < 0",
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
    Argument(
        "missing_barrier|missing_mask", r"^nms_large_kernel\.cuh: if \(!__syncthreads_or", "a way out for blocks that have "
        "nothing to compare: without it they compare nothing",
    ),
    Argument(
        "missing_mask", r"^nms_kernel\.cuh: w\.bin_at\[i\] = takes_part", "the compiler's two ways to take a 64-bit "
        "remainder: the long one is right for small operands too",
    ),
    Argument(
        "swapped_operands", r"^nms_iou\.cuh: const float both", "every pair that this copy of the code compares in a "
        "simulated call is far from the threshold", equal=False,
    ),
    Argument(
        "wrong_predicate", r"^nms_block\.cuh: for \(int64_t i = count", "the compiler's first of several rounds: what is "
        "filled up is filled up already in every simulated call", equal=False,
    ),
    Argument(
        "wrong_thread", r"^nms_large_kernel\.cuh: const int lane", "the shifted thread decides about the same word in every "
        "simulated call", equal=False,
    ),
    Argument(
        "wrong_sign", r"^nms_sort\.cuh: const uint64_t bits", "minus zero becomes zero: no simulated call of this type has "
        "both among its scores", equal=False,
    ),
    Argument(
        "loose_comparison", r"^nms_sort\.cuh: return first \+ r \* 32", "no warp of a simulated call ends just there: its "
        "load would have been reported", equal=False,
    ),
)  # fmt: skip
