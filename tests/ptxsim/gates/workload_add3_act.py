"""Calls of the three-way addition: every activation, with and without a mask, tails, memory off 16-byte boundaries, layouts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .limits import Limits
from .workload import ACTIVATIONS, MASKED, SLOPE, Case, Results, Truth, activation, positive, random, shifted, size_of

ALPHA = 0.75
_TENSORS = ("x", "residual", "residual2", "out", "mask")
LIMITS = [Limits("add3_act_kernel", "triton", _TENSORS, small=0.01, load=0.99, again=1.01, instructions=50, registers=48)]
WRITTEN = {"add3_act_kernel": {"out", "mask"}}


def triton(case: Case) -> Results:
    """The call through the host function of the Triton backend."""
    from dl4ds_kernels._triton import add_act

    t = case.arguments
    operands = (t["x"], t["residual"], t["residual2"])
    out, mask = add_act.add3_act(*operands, t["alpha"], t["activation"], SLOPE, t["save_mask"])
    return {"out": out, "mask": mask}


def truth(t: dict[str, Any]) -> Truth:
    """out and mask."""
    terms, code = [t[name].double() for name in ("x", "residual", "residual2")], t["activation"]
    z, size = sum(terms) * t["alpha"], size_of(*terms)
    found = {"z": (z, size), "out": (activation(z, code), size)}
    return found | ({"mask": (positive(z.to(t["x"].dtype).double(), code), 0.0)} if t["save_mask"] else {})


def call(label: str, operands: list[Tensor], code: int, save_mask: bool, even: bool = False) -> Case:
    """One case."""
    arguments = dict(zip(("x", "residual", "residual2"), operands, strict=True))
    arguments |= {"alpha": ALPHA, "activation": code, "save_mask": save_mask}
    return Case("add3_act", "fwd", label, arguments, functools.partial(truth, arguments), even=even)


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype. A program makes 1024 elements; a byte of the mask holds 8."""
    found: list[Case] = []
    for code in ACTIVATIONS:
        # A few, one block and a tail, two large blocks and a tail of another length for each activation; a whole vector.
        for part, n in enumerate((5 + code, 1024 + 301 + code, 4096 + 37 + code, 2064)):
            operands = [random(n, dtype=dtype, seed=s, nan=s == 1) for s in (1, 2, 3)]
            single = (part + code) % 4 == 1
            operands = list(map(shifted, operands)) if single else operands
            masks = code in MASKED and (part + code) % 3 != 0
            found.append(call(f"n{n}-act{code}{'-single' * single}{'-mask' * masks}", operands, code, masks))
    for code in (4, 5):  # where exp overflows and underflows
        found.append(call(f"far-act{code}", [random(130, dtype=dtype, seed=s) * 400 for s in (1, 2, 3)], code, False))
    # One compiled form, two programs: the first element behind the end at every place of a thread.
    for n in (half + tail for half in (1024 + 104, 1024 + 712) for tail in range(8)):
        found.append(call(f"sweep{n}", [random(n, dtype=dtype, seed=s, nan=s == 1) for s in (1, 2, 3)], 1, True))
    x, y, z = (random(2, 5, 3, 7, dtype=dtype, seed=s, nan=s == 1) for s in (1, 2, 3))
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, y, z)]
    found.append(call("nhwc-act1-mask", last, 1, True))
    operands = [random(1 << 17, dtype=dtype, seed=s) for s in (1, 2, 3)]
    return [*found, call("even", operands, 1, True, even=True)]
