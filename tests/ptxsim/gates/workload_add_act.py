"""Calls of add_act: every activation, with and without mask and residual, aligned or not, every tail, several steps."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..report import Report
from .limits import Limits
from .workload import (
    ACTIVATIONS,
    MASKED,
    SLOPE,
    Case,
    Results,
    Truth,
    activation,
    from_mask,
    gradient,
    positive,
    random,
    random_bits,
    size_of,
    unpacked,
)
from .workload import shifted as misaligned

ALPHA = 0.75
_FORWARD, _BACKWARD = ("x", "residual", "out", "mask"), ("dout", "mask", "x", "residual", "dx")
LIMITS = [
    Limits("add_act_fwd_kernel", "cuda", _FORWARD, small=0.01, instructions=90),
    Limits("add_act_bwd_kernel", "cuda", _BACKWARD, small=0.01, instructions=76),
    Limits("add_act_kernel", "triton", _FORWARD, small=0.01, load=0.99, again=1.01, instructions=50, registers=48),
    Limits("add_act_bwd_kernel", "triton", _BACKWARD, small=0.01, load=0.99, again=1.01, instructions=45, registers=48),
]  # fmt: skip
WRITTEN = {"add_act_kernel": {"out", "mask"}, "add_act_bwd_kernel": {"dx"}}


def cuda(case: Case, options: dict[str, int]) -> tuple[Results, list[Report]]:
    """The call through the launcher that ships."""
    import _cuda_launch as launchers

    t = case.arguments
    operands = (t["x"], t["residual"], t["alpha"], t["activation"], SLOPE)
    if case.way == "fwd":
        out, mask, reports = launchers.add_act_fwd(*operands, t["save_mask"], **options)
        return {"out": out} | ({} if mask is None else {"mask": mask}), reports
    dx, reports = launchers.add_act_bwd(t["dout"], t["mask"], *operands, **options)
    return {"dx": dx}, reports


def triton(case: Case) -> Results:
    """The call through the host functions of the Triton backend."""
    from dl4ds_kernels._triton import add_act

    t, residual = case.arguments, case.arguments["residual"]
    if residual is None and t["x"] is not None:  # of another layout, so that torch adds: x + -0.0 is x
        residual = torch.full((1,), -0.0, dtype=t["x"].dtype).expand(t["x"].shape)
    if case.way == "fwd":
        out, mask = add_act.add_act(t["x"], residual, t["alpha"], t["activation"], SLOPE, t["save_mask"])
        return {"out": out, "mask": mask}
    return {"dx": add_act.add_act_bwd(t["dout"], t["mask"], t["x"], residual, t["alpha"], t["activation"], SLOPE)}


def triton_runs(case: Case) -> bool:
    """One of the two ways to ask for a mask."""
    return not case.name.endswith("-other")


def cuda_runs(case: Case) -> bool:
    """Not the sweep over the tails of a Triton program."""
    return "-sweep" not in case.name


def operands(n: int, dtype: torch.dtype) -> list[Tensor]:
    """x, residual, dout; among them, if there is room, sums that round to a kink."""
    x, residual, dout = (random(n, dtype=dtype, seed=s, nan=s == 1) for s in (1, 2, 3))
    if n > 600 and dtype.itemsize == 2:
        below = 4 - 2 * torch.finfo(dtype).eps  # 0.75 * (4 + below) is 6 after rounding only
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        for i, pair in enumerate([(4.0, below), (smallest, 0.0), (-smallest, 0.0)]):
            x[500 + 17 * i :: 200], residual[500 + 17 * i :: 200] = pair
    return [x, residual, dout]


def argument(t: dict[str, Any]) -> Tensor:
    """z in fp64."""
    x, residual = t["x"].double(), t["residual"]
    return (x if residual is None else x + residual.double()) * t["alpha"]


def forward_truth(t: dict[str, Any]) -> Truth:
    """out and mask of add_act."""
    z, dtype, code = argument(t), t["x"].dtype, t["activation"]
    size = size_of(t["x"], 0.0 if t["residual"] is None else t["residual"])
    truth = {"z": (z, size), "out": (activation(z, code), size)}
    bits = positive(z.to(dtype).double(), code) if code in MASKED else torch.zeros_like(z, dtype=torch.bool)
    return truth | ({"mask": (bits, 0.0)} if t["save_mask"] else {})


def backward_truth(t: dict[str, Any]) -> Truth:
    """dx of add_act."""
    dout, code = t["dout"].double(), t["activation"]
    if t["mask"] is not None:
        dz, size = from_mask(dout, unpacked(t["mask"], dout), code), size_of(dout)
    else:
        z = argument(t) if code else dout
        dz, size = gradient(dout, z.to(t["dout"].dtype).double(), code), size_of(dout) * (1 + size_of(z))
        if code == 5:
            return {"dx": (dz * t["alpha"], size), "open": (z.isnan(), 0.0)}
    return {"dx": (dz * t["alpha"], size)}


def calls(label: str, x: Tensor, residual: Tensor | None, dout: Tensor, code: int, **flags: bool) -> list[Case]:
    """Forward with and without a mask, backward, and backward from a mask where the activation has one."""
    masks = code in MASKED
    forward = {"x": x, "residual": residual, "alpha": ALPHA, "activation": code, "save_mask": masks}
    other = forward | {"save_mask": not masks}  # (of zeros where the activation has none)
    backward = {"dout": dout, "mask": None, "x": x, "residual": residual, "alpha": ALPHA, "activation": code}
    backward |= {} if code else {"x": None, "residual": None}  # as the host code does: only what is needed
    found = [
        Case("add_act", "fwd", f"fwd-{label}", forward, lambda: forward_truth(forward), **flags),
        Case("add_act", "fwd", f"fwd-{label}-other", other, lambda: forward_truth(other), **flags),
        Case("add_act", "bwd", f"bwd-{label}", backward, lambda: backward_truth(backward), **flags),
    ]
    if masks:
        masked = backward | {"mask": random_bits(dout.numel()), "x": None, "residual": None}
        found.append(Case("add_act", "bwd", f"bwd-{label}-mask", masked, lambda: backward_truth(masked), **flags))
    return found


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype."""
    vector = 16 // dtype.itemsize
    found: list[Case] = []
    for code, single in itertools.product(ACTIVATIONS, (False, True)):
        per_thread = 1 if single or dtype == torch.float64 else vector
        # Two blocks of 256 threads, two values a step: more than a step, and a tail of its own length for each activation, in
        # the first and in the second value.
        for part in (4 * 256 + 301, 6 * 256 + 37, *((1, 300, 812) if single else ())):
            x, residual, dout = operands(part * per_thread + (1 + code if part > 1 else 0), dtype)
            if single:
                x, residual, dout = map(misaligned, (x, residual, dout))
            label = f"act{code}-{'single' if single else 'vector'}-{part}"
            found += calls(label, x, residual, dout, code, few_blocks=True)
            # The sum may come ready-made (mixed layouts go through aten::add).
            found += calls(f"{label}-sum", x, None, dout, code, few_blocks=True)
    # One value to a whole number of blocks; tails of every length, in the first and in the second vector of a thread.
    tails = [whole * vector + tail for tail in range(1, vector) for whole in (3, 519)]
    # (Of a Triton program: in each of its rows of vectors.)
    tails += [base + tail for tail in range(1, vector) for base in (704, 1344, 1696)]
    for i, n in enumerate((1, 256 * vector, 4 * 256 * vector, 336, 1120, 1904, *tails)):
        x, residual, dout = operands(n, dtype)
        for code in (i % 6, (i + 3) % 6):
            found += calls(f"n{n}-act{code}", x, residual, dout, code, few_blocks=n > 1024)
            found += calls(f"n{n}-act{code}-sum", x, None, dout, code, few_blocks=n > 1024)
    for code in (4, 5):  # where exp overflows and underflows; in each of a thread's values
        for single in (False, True):
            x, residual, dout = (random(2001, dtype=dtype, seed=s) for s in (1, 2, 3))
            x *= 400
            if single:
                x, residual, dout = map(misaligned, (x, residual, dout))
            found += calls(f"far{'-single' * single}-act{code}", x, residual, dout, code)
    # One form that Triton compiles, two programs: the first element behind the end at every place of a thread.
    for n in (half + tail for half in (1024 + 104, 1024 + 712) for tail in range(8)):
        found += calls(f"sweep{n}", *operands(n, dtype), 1)
    x, residual, dout = (random(1 << 17, dtype=dtype, seed=s) for s in (1, 2, 3))
    found += calls("even", x, residual, dout, 1, few_blocks=True, even=True)
    return found
