"""Calls of bn_act_into: slices of a larger buffer, in and out, tails of pixels and of channels, every activation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .limits import Limits
from .truth_bn_act import EPS, normalised, rstd_of
from .workload import SLOPE, Case, Results, Truth, activation, random
from .workload_bn_act import laid_out

BESIDE = 7.0  # what the buffer holds where nothing may be written
LIMITS = [Limits("bn_apply_into_kernel", "triton", ("x", "out"), small=0.02, again=1.05, instructions=50)]
WRITTEN = {"bn_apply_into_kernel": {"out"}}
# x (N, C, H, W), layout, channels of the buffer before and behind. A tile has 8 elements a thread, at most 256 channels.
CALLS = [
    ((2, 24, 3, 5), "nhwc", 3, 2), ((2, 17, 9, 9), "nhwc+slice", 8, 0), ((1, 5, 4, 3), "nchw", 1, 2),
    ((1, 300, 3, 7), "nhwc+slice", 5, 0), ((3, 1, 5, 7), "nhwc", 0, 3), ((1, 64, 7, 5), "nhwc", 64, 0),
    ((2, 16, 3, 4, 5), "nhwc", 16, 16), ((2, 64, 16, 2), "nhwc", 64, 64), ((70, 9), "nhwc", 2, 2),
]  # fmt: skip
EVEN = [((8, 64, 16, 32), "nhwc", 64, 64)]


def changed(kernel: str, name: str, given: dict[str, Any]) -> bool:
    """The output is a slice: the memory between its ends is not all written (the results hold what lies beside it)."""
    return name == "out"


def triton(case: Case) -> Results:
    """The call through the host function of the Triton backend, into a buffer of its own."""
    from dl4ds_kernels._triton import bn_act

    t = case.arguments
    before, behind = t["beside"]
    x = t["x"]
    shape = (x.shape[0], *x.shape[2:], before + x.shape[1] + behind)
    buffer = torch.full(shape, BESIDE, dtype=x.dtype).movedim(-1, 1)
    out = buffer[:, before : before + x.shape[1]]
    vectors = [t[name] for name in ("weight", "bias", "running_mean", "running_var")]
    bn_act.bn_act_into(x, *vectors, out, t["eps"], t["eps_std"], t["activation"], SLOPE)
    return {"out": out, "beside": torch.cat((buffer[:, :before], buffer[:, before + x.shape[1] :]), 1)}


def truth(t: dict[str, Any]) -> Truth:
    """out, and what lies beside it: as it was."""
    z, size = normalised(t, t["running_mean"].double(), rstd_of(t["running_var"].double(), t["eps_std"]))
    x = t["x"]
    beside = torch.full((x.shape[0], sum(t["beside"]), *x.shape[2:]), BESIDE, dtype=torch.float64)
    return {"out": (activation(z, t["activation"]), size), "beside": (beside, 0.0)}


def call(
    shape: tuple[int, ...], layout: str, beside: tuple[int, int], code: int, dtype: torch.dtype, few: bool, even: bool = False
) -> Case:
    """One case; with vectors of the op's own dtype and without an affine part in turn."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    kind, channels = dtype if code in (2, 5) else acc, shape[1]

    def vector(seed: int) -> Tensor:
        return random(channels, dtype=kind, seed=seed)

    x = laid_out(random(*shape, dtype=dtype, seed=1, nan=not even), layout, False)
    arguments = {
        "x": x, "weight": None if code == 3 else vector(2), "bias": None if code in (0, 3) else vector(3), "residual": None,
        "running_mean": vector(4), "running_var": vector(5).abs() + 0.5, "eps": EPS, "eps_std": code == 4,
        "activation": code, "beside": beside,
    }  # fmt: skip
    label = f"{'even-' * even}{'x'.join(map(str, shape))}-{layout}-beside{beside[0]}-{beside[1]}-act{code}"
    return Case("bn_act_into", "fwd", label, arguments, functools.partial(truth, arguments), few_blocks=few, even=even)


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype."""
    found = [call(s, lay, (b, a), i % 6, dtype, False) for i, (s, lay, b, a) in enumerate(CALLS)]
    # One compiled form, programs that walk over several tiles: a last pixel at every place of one; folds by three programs.
    found += [call((1, 24, 1, 48 + 17 * rest), "nhwc", (3, 2), 1, dtype, True) for rest in range(1, 16)]
    found += [call((2, 300, 1, 3), "nhwc", (5, 2), code, dtype, False) for code in range(6)]
    return found + [call(s, lay, (b, a), 1, dtype, True, True) for s, lay, b, a in EVEN]
