"""Calls of bn_act in both layouts: batch and running statistics, residual, mask, every activation, odd sizes, sliced inputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..report import Report
from .limits import Limits, small_work
from .truth_bn_act import CHANNELS_LAST, EPS, MOMENTUM, backward_truth, forward_truth, rstd_of
from .workload import MASKED, Case, Results, at_kinks, random, random_bits, shifted

_FORWARD, _SUMS = ("x", "residual", "out", "mask"), ("dout", "x", "residual", "mask")
_GRADIENT = (*_SUMS, "dx", "dresidual")
_CACHED = "per-channel vectors are read again for every vector of x, from the L1 cache"
LIMITS = [
    Limits(
        "bn_act_stats_kernel_nhwc", "cuda", ("x",), waves=2.0, instructions=155, wide_stores=False,
        note="126 in fp16, 151 in bf16: unpacking a bf16 pair takes two PTX instructions more, moves and shifts among "
        "them that ptxas folds into one PRMT or IMAD.U32 (sm_80 has no cvt.f32.bf16)",
    ),
    Limits(
        "bn_act_stats_kernel_nchw", "cuda", ("x",), again=1.3, load=0.9, instructions=165, wide_stores=False,
        note="140 in fp16, 158 in bf16 (see above) at planes of 56 x 56; the merge over the block (log2 of its threads) costs "
        "as much as the data where a thread has two windows only (8 images of 16 x 32: 215 to 235)",
    ),
    small_work("bn_act_finalize_kernel", "cuda"),
    Limits("bn_act_fwd_kernel_nhwc", "cuda", _FORWARD, instructions=95),
    Limits(
        "bn_act_fwd_kernel_nchw", "cuda", _FORWARD, store=0.95, instructions=110,
        note="a warp's 32 bytes of mask begin in the middle of a sector where a plane has no multiple of 32 vectors",
    ),
    Limits(
        "bn_act_bwd_reduce_kernel_nhwc", "cuda", _SUMS, waves=1.75, instructions=130, wide_stores=False,
        note="two rows share one read of the table, so the merge at the end has a larger share of fewer waves",
    ),
    Limits(
        "bn_act_bwd_reduce_kernel_nchw", "cuda", _SUMS, again=1.15, instructions=155, wide_stores=False,
        note="98 to 125; 151 in bf16 with a mask, whose eighth of a byte an element is all that replaces z's arithmetic",
    ),
    small_work("bn_act_bwd_finalize_kernel", "cuda"),
    Limits("bn_act_bwd_kernel_nhwc", "cuda", _GRADIENT, again=1.5, instructions=85, note=_CACHED),
    Limits("bn_act_bwd_kernel_nchw", "cuda", _GRADIENT, instructions=105),
    Limits(
        "bn_stats_partial_kernel", "triton", ("x",), small=0.02, again=1.05, instructions=165, registers=128, wide_stores=False,
    ),
    small_work("bn_stats_merge_kernel", "triton", registers=255),
    small_work("bn_fold_kernel", "triton", registers=255),
    Limits(
        "bn_apply_kernel", "triton", _FORWARD, small=0.02, store=0.95, again=1.05, instructions=55,
        note="in NCHW a warp's 32 bytes of mask begin in the middle of a sector where a plane has no multiple of 256 elements",
    ),
    Limits(
        "bn_bwd_partial_kernel", "triton", _SUMS, small=0.02, again=1.05, instructions=95, registers=128, wide_stores=False,
    ),
    small_work("bn_bwd_merge_kernel", "triton", registers=255),
    Limits("bn_bwd_apply_kernel", "triton", _GRADIENT, small=0.02, again=1.05, instructions=45, registers=72),
]  # fmt: skip
WRITTEN = {
    "bn_stats_partial_kernel": {"partial"},
    "bn_stats_merge_kernel": {"mean", "rstd", "scale", "shift", "new_running_mean", "new_running_var"},
    "bn_fold_kernel": {"center", "scale", "shift"},
    "bn_apply_kernel": {"out", "mask"},
    "bn_bwd_partial_kernel": {"partial"},
    "bn_bwd_merge_kernel": {"dweight", "dbias", "scale", "shift", "slope_x", "offset"},
    "bn_bwd_apply_kernel": {"dx", "dresidual"},
}


def cuda(case: Case, options: dict[str, int]) -> tuple[Results, list[Report]]:
    """The call through the launcher that ships."""
    import _cuda_launch as launchers

    return getattr(launchers, f"bn_act_{case.way}")(**case.arguments, options=options)


def triton(case: Case) -> Results:
    """The call through the host functions of the Triton backend."""
    from dl4ds_kernels._triton import bn_act

    t = case.arguments
    last = (t["eps"], t["eps_std"], t["activation"], t["negative_slope"])
    if case.way == "fwd":
        names = ("x", "weight", "bias", "running_mean", "running_var", "residual", "training", "momentum")
        results = bn_act.bn_act(*(t[n] for n in names), *last, t["save_mask"])
        found = dict(zip(("out", "mean", "rstd", "mask", "new_running_mean", "new_running_var"), results, strict=True))
        return found if t["training"] else {n: found[n] for n in ("out", "mask")}
    names = ("dout", "x", "weight", "bias", "mean", "rstd", "residual", "mask", "training")
    results = bn_act.bn_act_bwd(*(t[n] for n in names), *last, True, True, "dresidual" in t["needs"])
    return dict(zip(("dx", "dweight", "dbias", "dresidual"), results, strict=True))


def changed(kernel: str, name: str, given: dict[str, Any]) -> bool:
    """Room that a Triton kernel need not fill: only the gradient of batch statistics uses these."""
    return name in ("slope_x", "offset") and not given["TRAINING"]


def triton_runs(case: Case) -> bool:
    """Compiling takes longer than running: every layout, tiling and activation, on some of the shapes."""
    if case.name.endswith("-other") or "-single" in case.name and "wide-nhwc" not in case.name:
        return False
    return any(f"-{part}" in case.name for part in ("wide-", "slice-", "tail-", "matrix-n", "far", "chunks", "even", "sweep"))


def cuda_runs(case: Case) -> bool:
    """Not the sweeps over what Triton compiles to one form."""
    return "-sweep" not in case.name


def laid_out(values: Tensor, layout: str, single: bool) -> Tensor:
    """nhwc or nchw; `+slice`: part of a larger tensor in every dimension but the batch. single: not in 16-byte steps."""
    order, _, sliced = layout.partition("+")
    channels_last = order == "nhwc" and values.dim() in CHANNELS_LAST
    memory_format = CHANNELS_LAST[values.dim()] if channels_last else torch.contiguous_format
    if not sliced:
        dense = values.contiguous(memory_format=memory_format)
        return shifted(dense) if single else dense
    n, c, h, w = values.shape
    gap = 1 if single else 8  # a whole vector of any type
    c_gap, w_gap = (gap, 2) if channels_last else (2, gap)
    whole = torch.full((n, c + 2 * c_gap, h + 3, w + 2 * w_gap), float("nan"), dtype=values.dtype)
    whole = whole.contiguous(memory_format=memory_format)
    return whole[:, c_gap : c_gap + c, 2 : 2 + h, w_gap : w_gap + w].copy_(values)


# name: shape, layouts, single accesses too, a small grid
SHAPES = {
    "wide": ((3, 24, 5, 7), ("nhwc", "nchw"), (False, True), True),
    "odd": ((2, 63, 5, 3), ("nhwc", "nchw"), (False,), True),
    "long": ((2, 24, 20, 21), ("nhwc", "nchw"), (False, True), True),
    "tiny": ((70, 9, 1, 3), ("nhwc", "nchw"), (False,), True),
    "batch": ((120, 3, 5, 7), ("nchw",), (False, True), True),
    "matrix": ((230, 16), ("nhwc",), (False, True), True),
    "plane": ((5, 1, 9, 9), ("nchw",), (False, True), False),
    "tiles": ((2, 264, 3, 4), ("nhwc", "nchw"), (False,), False),
    "slice": ((3, 16, 24, 24), ("nhwc+slice", "nchw+slice"), (False, True), True),
    "volume": ((2, 8, 3, 4, 5), ("nhwc", "nchw"), (False,), False),
    "whole": ((11, 2, 28, 56), ("nchw",), (False,), True),  # planes of whole vectors, eight for each thread: by channel
    "pitch": ((11, 2, 28, 56), ("nchw+slice",), (False,), True),
    "tail": ((1, 7, 1, 17), ("nchw",), (False,), True),
    "few": ((2, 3, 1, 4), ("nhwc", "nchw"), (False,), False),
    "nine": ((3, 24, 15, 17), ("nhwc",), (False,), False),  # rows a thread: two rounds of the statistics' unrolled loop
    "nines": ((2, 24, 5, 9), ("nhwc",), (True,), False),
}
# Triton compiles a form for what divides by 16 and what is 1: these are of one form a layout, with several chunks or groups of
# channels, a vector that no block of channels fits, and in the last tile all, some or one of its lines.
CHUNKS = {
    "nhwc": ((3, 72, 7, 9), (2, 72, 5, 17), (1, 72, 3, 43)),
    "nchw": ((7, 3, 20, 55), (5, 3, 25, 43), (3, 3, 33, 63)),
}
# What is tried on the shapes, four on each in turn: activation, training, residual, 1 / (sqrt(var) + eps), dtype
# of the vectors, affine. In every group of three are two with batch statistics.
VARIANTS = (
    (1, True, True, False, "acc", "wb"), (4, True, True, False, "acc", "b"), (5, False, False, True, "own", ""),
    (2, True, True, True, "own", "wb"), (0, True, False, False, "half", "wb"), (3, False, True, False, "acc", "w"),
    (3, True, False, True, "acc", "wb"), (5, True, True, False, "bfloat", "wb"), (4, False, True, False, "half", "wb"),
    (2, True, False, False, "bfloat", "wb"), (3, True, True, False, "acc", "wb"), (1, False, True, False, "acc", ""),
    (0, True, True, False, "own", "w"), (1, True, False, True, "acc", "wb"), (2, False, False, False, "bfloat", "wb"),
)  # fmt: skip
VECTOR_DTYPES = {"half": torch.float16, "bfloat": torch.bfloat16}


def calls(
    label: str, x: Tensor, residual: Tensor | None, dout: Tensor, variant: tuple[Any, ...], acc: torch.dtype, **flags: bool
) -> list[Case]:
    """Forward, backward, and backward from a mask where the activation has one and the kernel saves it."""
    code, training, _, eps_std, kind, affine = variant
    own = x.dtype if x.dtype != torch.float64 else torch.float64
    dtype = {"acc": acc, "own": own}.get(kind) or VECTOR_DTYPES[kind]
    channels = x.shape[1]
    weight, bias, mean = (random(channels, dtype=dtype, seed=s) for s in (4, 5, 6))
    variance = random(channels, dtype=dtype, seed=7).abs() + 0.5
    if "w" in affine and "b" in affine and dtype == acc and residual is not None and channels == 24:
        six, *smallest = at_kinks(x.dtype)
        for c in range(channels):  # z = bias + residual; x has NaN in every third channel from 1 on
            if c % 3 != 1:
                value, addend = six if c % 3 == 2 else smallest[c // 3 % 2]
                weight[c], bias[c] = 0.0, addend
                residual[:, c] = value
    if code in (2, 4):  # not at a multiple of 16 bytes
        weight, bias, mean, variance = map(shifted, (weight, bias, mean, variance))
    masks = code in MASKED and residual is not None
    shared = {
        "x": x, "weight": weight if "w" in affine else None, "bias": bias if "b" in affine else None, "residual": residual,
        "activation": code, "training": training, "eps": EPS, "eps_std": eps_std, "negative_slope": 0.1,
    }  # fmt: skip
    forward = shared | {"running_mean": mean, "running_var": variance, "momentum": MOMENTUM, "save_mask": masks}
    statistics = {"mean": mean.to(acc), "rstd": rstd_of(variance.double(), eps_std).to(acc)}
    needs = ("dx", "dweight", "dbias") + (("dresidual",) if residual is not None else ())
    other = forward | {"save_mask": not masks}  # (of zeros where the activation has none)
    backward = shared | statistics | {"dout": dout, "mask": None, "needs": needs}
    backward |= {} if code else {"residual": None}  # as the host code does: only what is needed
    truth = functools.partial
    found = [
        Case("bn_act", "fwd", f"fwd-{label}", forward, truth(forward_truth, forward), **flags),
        Case("bn_act", "fwd", f"fwd-{label}-other", other, truth(forward_truth, other), **flags),
        Case("bn_act", "bwd", f"bwd-{label}", backward, truth(backward_truth, backward), **flags),
    ]
    if masks:
        masked = backward | {"mask": random_bits(x.numel()), "residual": None}
        found.append(Case("bn_act", "bwd", f"bwd-{label}-mask", masked, truth(backward_truth, masked), **flags))
    return found


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    found: list[Case] = []
    turn = 0
    for name, (shape, layouts, singles, few) in SHAPES.items():
        for layout in layouts:
            for single in singles:
                for variant in (*VARIANTS, *VARIANTS)[turn:][: len(VARIANTS) if name in ("wide", "whole") else 4]:
                    x, residual, dout = (random(*shape, dtype=dtype, seed=s, nan=s == 1) for s in (1, 2, 3))
                    dense = layout.partition("+")[0]
                    x, residual = (laid_out(t, layout, single) for t in (x, residual))
                    dout = laid_out(dout, dense if variant[0] % 2 else layout, single)
                    mode = "train" if variant[1] else "eval"
                    label = f"{name}-{layout}-{'single' if single else 'vector'}-act{variant[0]}-{mode}"
                    found += calls(label, x, residual if variant[2] else None, dout, variant, acc, few_blocks=few)
                turn = (turn + 3) % len(VARIANTS)
    relu = VARIANTS[0]
    if dtype in (torch.float32, torch.float64):  # more than 256 partial results, for the kernels that merge them
        x, residual, dout = (laid_out(random(1, 9, 190, 200, dtype=dtype, seed=s), "nhwc", False) for s in (1, 2, 3))
        found += calls("parts", x, None, dout, relu, acc)
    for layout, shapes in CHUNKS.items():
        for shape in shapes:
            x, residual, dout = (laid_out(random(*shape, dtype=dtype, seed=s), layout, False) for s in (1, 2, 3))
            found += calls(f"chunks{shape[0]}-{layout}", x, residual, dout, relu, acc)
    for tail in range(1, 16 // dtype.itemsize if dtype != torch.float64 else 1):  # the last vector of a plane, every length
        x, residual, dout = (random(1, 1, 1, 32 + tail, dtype=dtype, seed=s) for s in (1, 2, 3))
        for variant in (VARIANTS[0], VARIANTS[5 + tail % 2]):
            found += calls(f"tail{tail}", x, residual, dout, variant, acc)
    for layout in ("nhwc", "nchw"):  # one NaN a channel, in turn at every place of a vector; nothing else is NaN there
        for code, single in ((3, False), (5, False), (3, True), (5, True)):
            x, residual, dout = (random(2, 24, 5, 8, dtype=dtype, seed=s) for s in (1, 2, 3))
            for c in range(24):
                x[1, c, c % 5, c % 8] = float("nan")
            x, residual, dout = (laid_out(t, layout, single) for t in (x, residual, dout))
            spots = (code, False, True, False, "acc", "wb")
            found += calls(f"spots-{layout}{'-single' * single}-act{code}", x, residual, dout, spots, acc)
    for layout in ("nhwc", "nchw"):  # where exp overflows and underflows
        for single in (False, True):
            x, residual, dout = (laid_out(random(2, 16, 3, 8, dtype=dtype, seed=s), layout, single) for s in (1, 2, 3))
            far = (4, False, True, False, "acc", "wb")
            found += calls(f"far-{layout}{'-single' * single}", x.mul_(400), residual, dout, far, acc)
    # Of one compiled form each: planes and a tensor that end at every place of a thread; one and two steps of the merges over
    # chunks, by two programs; folds by three programs.
    sweep = [(((35, 52, 60, 70)[width % 4], 3, 3, width), "nchw", relu) for width in range(22, 30)]
    sweep += [((1, 17, lines, 61), "nhwc", relu) for lines in (9, 13, 17, 25, 35, 52, 71, 345)]
    # Programs that walk over several tiles of 8 pixels by 64 channels (of which the last are 48), with a last pixel at every
    # place of a tile. Vectors of two types: the merges see the sweep above more often than one form of these.
    relu6 = (3, True, True, False, "acc", "wb"), (3, True, True, False, "half", "wb")
    sweep += [((1, 176, lines, 5), "nhwc", relu6[lines > 8]) for lines in (5, 6, 7, 8, 9, 10, 12, 19)]
    sweep += [((2, 300, 1, 2), "nhwc", variant) for variant in VARIANTS if not variant[1]]
    if dtype.itemsize == 2:  # merges that read and write vectors of the own dtype
        sweep += [((1, 17, lines, 61), "nhwc", VARIANTS[3]) for lines in (9, 13, 35, 71, 277)]
    for shape, layout, variant in sweep:
        x, residual, dout = (random(*shape, dtype=dtype, seed=s, nan=s == 1 and shape[3] % 2) for s in (1, 2, 3))
        x, residual, dout = (laid_out(t, layout, False) for t in (x, residual, dout))
        label = f"sweep{'x'.join(map(str, shape))}-{layout}-act{variant[0]}-{variant[4]}{variant[5]}"
        made = calls(label, x, residual if variant[2] else None, dout, variant, acc, few_blocks=shape[1] == 176)
        found += made[: 3 if shape[1] == 17 else 4]  # (the merges are no others after a mask)
    for layout, shape in (("nhwc", (8, 64, 16, 32)), ("nchw", (16, 8, 56, 56))):
        x, residual, dout = (laid_out(random(*shape, dtype=dtype, seed=s), layout, False) for s in (1, 2, 3))
        found += calls(f"even-{layout}", x, residual, dout, relu, acc, few_blocks=True, even=True)
    return found
