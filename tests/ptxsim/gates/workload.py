"""What the gates run: small calls of an op that together reach every kernel, branch, tail and layout.

A case is one call with its tensors; `cuda.py` and `triton.py` know how a backend makes it. The truth is the formula in fp64.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor]
# name -> (value in fp64, size of the terms it was added up from: what rounding errors are relative to)
Truth = dict[str, tuple[Tensor, float]]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS = range(6)  # none, relu, leaky_relu, relu6, silu, hardswish
MASKED = (1, 2, 3)  # activations whose backward needs only a bit per element
KINKS = {1: (0.0,), 2: (0.0,), 3: (0.0, 6.0)}
SLOPE = 0.1


@dataclass(frozen=True)
class Case:
    """One call of an op: `way` is "fwd" or "bwd", `arguments` its keywords.

    few_blocks: with a grid so small that every loop takes several steps. even: sizes divide evenly, as in real networks: here
    the limits on traffic hold. Such cases are larger, and no mutant is run on them.
    """

    op: str
    way: str
    name: str
    arguments: dict[str, Any]
    truth: Callable[[], Truth]
    few_blocks: bool = False
    even: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of its tensors."""
        found = (self.arguments.get(name) for name in ("x", "dout", "boxes"))
        tensors = (t for t in self.arguments.values() if isinstance(t, Tensor) and t.is_floating_point())
        return next((t.dtype for t in found if t is not None), None) or next(tensors).dtype


def random(*shape: int, dtype: torch.dtype, seed: int, nan: bool = False) -> Tensor:
    """Normal numbers; with `nan`, some zeros of both signs, and NaN in a third of the channels or in one of nine places."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    if nan:
        values.view(-1)[1::5] = 0.0
        values.view(-1)[3::10] = -0.0
        if len(shape) > 1:
            values[:, 1::3] = float("nan")
        else:
            values.view(-1)[4::9] = float("nan")
    return values.to(dtype)


def at_kinks(dtype: torch.dtype) -> list[tuple[float, float]]:
    """(value, addend) whose sum rounds to the value, a kink, in `dtype`, and is still beside it where it is cut off instead.

    6 less a bit is 6 after rounding and below without; the smallest number less a bit is that or 0.
    """
    smallest = 2.0 ** (math.log2(torch.finfo(dtype).tiny) + math.log2(torch.finfo(dtype).eps))
    return [(6.0, -torch.finfo(dtype).eps), (smallest, -smallest / 4), (-smallest, smallest / 4)]


def random_bits(elements: int, seed: int = 5) -> Tensor:
    """A mask: one bit an element, lowest bit first, none behind the end."""
    bits = torch.randint(0, 256, ((elements + 7) // 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if elements % 8:
        bits[-1] &= (1 << elements % 8) - 1
    return bits


def shifted(t: Tensor) -> Tensor:
    """The same values one element away from a 16-byte boundary: kernels then use single accesses."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)
    return memory[1:].as_strided(t.shape, t.stride(), 1).copy_(t)


def size_of(*terms: Tensor | float) -> float:
    """The sum of the terms' largest finite magnitudes."""
    total = 0.0
    for term in terms:
        values = torch.as_tensor(term, dtype=torch.float64).abs()
        total += float(values[values.isfinite()].amax()) if values.isfinite().any() else 0.0
    return total


def activation(z: Tensor, code: int) -> Tensor:
    """act(z); NaN stays NaN."""
    if code == 1:
        return torch.where(z < 0, 0.0, z)
    if code == 2:
        return torch.where(z > 0, z, z * SLOPE)
    if code == 3:
        return torch.where(z < 0, 0.0, torch.where(z > 6, 6.0, z))
    if code == 4:
        return z / (1 + torch.exp(-z))
    if code == 5:
        return z * (z + 3).clamp(0, 6) / 6
    return z


def positive(z: Tensor, code: int) -> Tensor:
    """What a mask bit says."""
    return z > 0 if code == 2 else ~((z <= 0) | (z >= 6)) if code == 3 else ~(z <= 0)


def gradient(dout: Tensor, z: Tensor, code: int) -> Tensor:
    """dout * act'(z)."""
    if code in MASKED:
        return from_mask(dout, positive(z, code), code)
    if code == 4:
        s = 1 / (1 + torch.exp(-z))
        return dout * s * (1 + z * (1 - s))
    if code == 5:
        return torch.where(z <= -3, 0.0, torch.where(z >= 3, dout, dout * (z / 3 + 0.5)))
    return dout


def from_mask(dout: Tensor, bits: Tensor, code: int) -> Tensor:
    """The same from the bits."""
    return torch.where(bits, dout, dout * SLOPE if code == 2 else 0.0)


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """A mask's bits as booleans in the shape of `like`, a tensor without gaps in the mask's memory order."""
    flat = torch.stack([(mask >> k) & 1 for k in range(8)], 1).flatten()[: like.numel()].bool()
    out = torch.empty_strided(like.shape, like.stride(), dtype=torch.bool)
    out.as_strided((out.numel(),), (1,)).copy_(flat)
    return out


def wrong(results: Results, truth: Truth, dtype: torch.dtype, acc: torch.dtype) -> str:
    """Why results are further from the truth than one rounding to their type and fp32 arithmetic explain ("" if not).

    A truth "z" is the activation's argument: mask bits are compared but where rounding decides on which side of a kink it is.
    "open" says where a result is not: hardswish' gradient at NaN, which torch's own kernels define in two ways.
    """
    free = truth.get("open", (None, 0.0))[0]
    for name, (want, size) in truth.items():
        if name not in results:
            continue
        got = results[name]
        if name == "mask" and "z" in truth:
            z, limit = truth["z"][0], 64 * torch.finfo(dtype).eps * (1 + truth["z"][1])
            near = torch.stack([(z - kink).abs() <= limit for kink in (0.0, 6.0)]).any(0) & (z != 0)
            if bool(((unpacked(got, z) != want.bool()) & ~near).any()):
                return "mask differs"
            continue
        if not want.is_floating_point():
            if not torch.equal(got, want):
                return f"{name}: {int((got != want).sum())} values differ"
            continue
        limit = torch.finfo(got.dtype).eps * want.abs() + 64 * torch.finfo(acc).eps * size
        bad = (got.isnan() != want.isnan()) | ((got.double() - want).abs() > limit)
        if free is not None:
            per_channel = free.dim() > 1 and bad.dim() == 1
            bad &= ~(free.transpose(0, 1).flatten(1).any(1) if per_channel else free)
        if bool(bad.any()):
            at = bad.flatten().nonzero()[0].item()
            return f"{name}: {int(bad.sum())} values; {got.flatten()[at].item()} instead of {want.flatten()[at].item()}"
    return ""


def same_as(results: Results, expected: Results) -> str:
    """Why a mutant's results are not those of the unchanged kernel within the rounding of their type ("" if they are)."""
    for name, want in expected.items():
        got = results[name]
        if not want.is_floating_point():
            if not torch.equal(got, want):
                return f"{name} differs"
            continue
        limit = 0.75 * torch.finfo(want.dtype).eps * want.double().abs() + (1e-30 if want.dtype == torch.float64 else 1e-12)
        if want.dtype in (torch.float32, torch.float64):  # another order of operations may round differently
            limit = 8 * limit
        bad = (got.isnan() != want.isnan()) | ((got.double() - want.double()).abs() > limit)
        bad |= (torch.signbit(got) != torch.signbit(want)) & ~want.isnan()
        if bool(bad.any()):
            return f"{int(bad.sum())} values of {name} differ"
    return ""


@functools.cache
def cases(op: str, dtype: torch.dtype) -> list[Case]:
    """The calls of one op and dtype: `cases(dtype)` of the module workload_<op>.py."""
    return importlib.import_module(f"{__package__}.workload_{op}").cases(dtype)
