"""The shapes, layouts and dtypes that every op is tested on, and tensors made to them.

An id reads like ``N2-C63-H7-W5-bf16-nhwc-relu-res``. Values depend on the id alone. Memory around a sliced tensor is NaN, so
that a kernel that reads beside its input shows it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
DTYPES = tuple(DTYPE_NAMES)
ACTIVATIONS = ("none", "relu", "leaky_relu", "relu6", "silu", "hardswish")
# Where the derivative of an activation jumps: rounding may put a value on either side.
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
LAYOUTS = (
    "nchw", "nhwc", "nhwc_cslice", "nhwc_hwslice", "nchw_hwslice", "nchw_cslice", "nslice", "offset", "transposed", "expanded",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of an op: sizes, dtype, layout and options. Options that an op does not have are ignored by it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    activation: str = "relu"
    residual: str = ""  # "" none, else the layout of the residual
    training: bool = True
    affine: str = "weight+bias"
    wide_parameters: bool = False  # fp32 vectors beside half-precision x
    eps_mode: str = "var"
    alpha: float = 1.0
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def id(self) -> str:
        """Readable test id; only what differs from the defaults is spelled out."""
        names = ("N", "C", *("D", "H", "W")[5 - len(self.shape) :])[: len(self.shape)]
        parts = [f"{name}{size}" for name, size in zip(names, self.shape, strict=True)]
        parts += [DTYPE_NAMES[self.dtype] + ("+fp32" if self.wide_parameters else ""), self.layout, self.activation]
        parts += [f"res_{self.residual}"] if self.residual else []
        parts += [] if self.training else ["eval"]
        parts += [] if self.affine == "weight+bias" else [self.affine or "no_affine"]
        parts += [f"eps_{self.eps_mode}"] if self.eps_mode != "var" else []
        parts += [f"alpha{self.alpha:.2g}"] if self.alpha != 1.0 else []
        options = (("k", self.kernel, 3), ("s", self.stride, 1), ("g", self.groups, 1))
        return "-".join(parts + [f"{key}{value}" for key, value, default in options if value != default])

    @property
    def channels(self) -> int:
        return self.shape[1]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.id.encode()))


BASE = Case((2, 63, 7, 5))
# Odd sizes, single channels and pixels, empty batches, sizes around every vector width, and one that the output pool serves.
SHAPES = (
    (2, 63, 7, 5), (3, 1, 5, 7), (4, 7, 1, 1), (2, 31, 1, 257), (1, 1025, 3, 3), (5, 8, 16, 16), (2, 33, 13, 17),
    (0, 3, 4, 5), (2, 3, 0, 5), (2, 64, 28, 28),
)  # fmt: skip
OTHER_RANKS = ((17, 63), (3, 5, 19), (2, 3, 4, 5, 6))


def grid(**axes: Iterable[object]) -> list[Case]:
    """BASE with one axis varied at a time, for each axis given."""
    return [replace(BASE, **{name: value}) for name, values in axes.items() for value in values]


def unique(cases: Iterable[Case]) -> list[Case]:
    return list({case.id: case for case in cases}.values())


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """``@each(cases)``: one test per case, named by its id."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in unique(cases)])


def standard_cases() -> list[Case]:
    """What every op has in common: shapes x {NCHW, NHWC}, every layout, dtype and activation, with and without residual."""
    cases = [replace(BASE, shape=shape, layout=layout) for shape in SHAPES for layout in ("nchw", "nhwc")]
    cases += [
        replace(BASE, dtype=dtype, layout=layout, residual=residual)
        for dtype in DTYPES
        for layout in LAYOUTS
        for residual in ("", layout)
    ]
    cases += [
        replace(BASE, dtype=dtype, activation=activation, residual=residual, layout="nhwc")
        for dtype in (torch.float32, torch.bfloat16)
        for activation in ACTIVATIONS
        for residual in ("", "nhwc")
    ]
    # A residual in another layout than x, and a large half-precision pair.
    cases += [
        replace(BASE, layout=a, residual=b) for a in ("nchw", "nhwc", "nhwc_cslice") for b in ("nchw", "nhwc", "expanded")
    ]
    cases += [replace(BASE, shape=(2, 64, 28, 28), dtype=torch.float16, layout=n, residual=n) for n in ("nchw", "nhwc")]
    return unique(cases)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in the given layout; image layouts leave other ranks contiguous. "expanded" repeats the first row."""
    nan = {"fill_value": float("nan"), "dtype": values.dtype, "device": values.device}
    if layout == "offset":  # one element off the allocation's alignment
        return torch.full((values.numel() + 1,), **nan)[1:].view(values.shape).copy_(values)
    if layout == "nslice":  # every second sample of a batch
        return torch.full((2 * values.shape[0], *values.shape[1:]), **nan)[::2].copy_(values)
    if layout == "nhwc" and values.dim() == 5:
        return values.clone(memory_format=torch.channels_last_3d)
    if values.dim() != 4 or layout == "nchw":
        return values.clone(memory_format=torch.contiguous_format)
    n, c, h, w = values.shape
    last = torch.channels_last
    if layout == "nhwc":
        return values.clone(memory_format=last)
    if layout == "expanded":
        return values[:, :, :1].clone().expand(n, c, h, w)
    if layout == "transposed":
        return values.transpose(2, 3).clone(memory_format=torch.contiguous_format).transpose(2, 3)
    if layout == "nhwc_cslice":
        view = torch.full((n, c + 5, h, w), **nan).to(memory_format=last)[:, 3 : 3 + c]
    elif layout == "nhwc_hwslice":
        view = torch.full((n, c, h + 3, w + 2), **nan).to(memory_format=last)[:, :, 1 : 1 + h, 2 : 2 + w]
    elif layout == "nchw_hwslice":
        view = torch.full((n, c, h + 3, w + 2), **nan)[:, :, 2 : 2 + h, 1 : 1 + w]
    elif layout == "nchw_cslice":
        view = torch.full((n, c + 5, h, w), **nan)[:, 2 : 2 + c]
    else:
        raise ValueError(f"unknown layout {layout!r}")
    return view.copy_(values)


def randn(case: Case, generator: torch.Generator, shape: tuple[int, ...], layout: str = "nchw", scale: float = 1.0) -> Tensor:
    """Seeded normal values in the case's dtype and in ``layout``."""
    return lay_out((torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(case.dtype), layout)


def images(case: Case, generator: torch.Generator, layout: str) -> Tensor:
    """(N, C, …) with a mean and a spread of its own per channel."""
    per_channel = (1, -1, *(1,) * (len(case.shape) - 2))
    mean = torch.randn(case.channels, generator=generator, dtype=torch.float64).mul_(2)
    spread = torch.rand(case.channels, generator=generator, dtype=torch.float64).mul_(2.5).add_(0.5)
    values = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    return lay_out(torch.addcmul(mean.view(per_channel), values, spread.view(per_channel)).to(case.dtype), layout)


def bn_vectors(case: Case, x: Tensor, channels: int | None = None) -> dict[str, Tensor | None]:
    """running_mean, running_var near the statistics of ``x`` (N, C, …), weight of both signs, bias."""
    generator = case.generator()
    channels = x.shape[1] if channels is None else channels
    dtype = torch.float32 if case.wide_parameters else case.dtype
    wide = x.detach().double().cpu()
    dims = [d for d in range(x.dim()) if d != 1]
    full = wide.numel() > 0
    mean = wide.mean(dims) if full else torch.zeros(channels, dtype=torch.float64)
    var = wide.var(dims, unbiased=False) if full else torch.ones(channels, dtype=torch.float64)
    jitter = torch.rand(4, channels, generator=generator, dtype=torch.float64)
    weight = (jitter[0] * 1.5 + 0.5) * (jitter[1] - 0.2).sign()
    vectors = {
        "running_mean": mean + 0.1 * jitter[2],
        "running_var": var.clamp(min=0.1) * (0.8 + 0.4 * jitter[3]),
        "weight": weight if "weight" in case.affine else None,
        "bias": torch.randn(channels, generator=generator, dtype=torch.float64) if "bias" in case.affine else None,
    }
    return {name: None if v is None else v.to(dtype) for name, v in vectors.items()}


def gradient(case: Case, z: Tensor, layout: str, margin: float = 0.06) -> Tensor:
    """A random gradient for an output of pre-activation ``z`` (fp64), zero near the activation's kinks.

    There rounding decides which side a value is on, in stock torch too, and no error bound holds.
    """
    dout = torch.randn(z.shape, generator=case.generator(), dtype=torch.float64)
    for kink in KINKS.get(case.activation, ()):
        dout[(z.detach().cpu() - kink).abs() < margin] = 0
    return lay_out(dout.to(case.dtype), layout)
