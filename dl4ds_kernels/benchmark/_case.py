"""What a benchmark case is, and what every op's cases have in common: inputs, layouts, fp64 truth, providers."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from .._define import triton_interpreted

OURS = ("auto", "cpu", "cuda", "triton", "reference")
STOCK = ("eager", "eager_cl", "eager_inplace", "compile")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# The part of a tensor's scale within which a pre-activation counts as "at a kink": rounding decides its derivative there.
_KINK = 64


class Unavailable(RuntimeError):
    """A provider that cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Case:
    """One measurement: ``op`` on the tensors of ``layer`` for a batch of ``batch``, forward or forward and backward.

    ``backward=False`` is inference (running statistics, no gradients); True is a training step of the op.
    """

    op: str
    layer: Any  # Layer, or the op's own description with ``name`` and ``describe(batch)``
    batch: int = 1
    dtype: str = "fp32"
    layout: str = "nhwc"
    backward: bool = False
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def direction(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def id(self) -> str:
        return f"{self.layer.name}-{self.layer.describe(self.batch)}-{self.dtype}-{self.layout}-{self.direction}"


@dataclass
class Run:
    """One provider on one case.

    ``fn`` is the call to time. ``outputs`` makes the call once and names its results for the parity gate; it comes before any
    timing, because training calls move running statistics. ``bytes`` and ``flops`` are the least that the case needs.
    """

    fn: Callable[[], Any]
    outputs: Callable[[], dict[str, Tensor]]
    bytes: int
    flops: int = 0


@dataclass
class Problem:
    """Inputs in the case's dtype, the gradient of the output, and the fp64 results."""

    inputs: dict[str, Tensor]
    truth: dict[str, Tensor]
    dout: Tensor | None = None


def remembered(make: Callable[[Case], Problem]) -> Callable[[Case], Problem]:
    """Keep the last problem: all providers of a case share one."""
    return lru_cache(maxsize=1)(make)


def generator(case: Case) -> torch.Generator:
    """A CPU generator whose seed depends on the case alone."""
    return torch.Generator().manual_seed(zlib.crc32(case.id.encode()))


def randn(case: Case, g: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Standard normal values rounded to the case's dtype, on the CPU, contiguous."""
    return torch.randn(tuple(shape), generator=g).to(case.torch_dtype)


def place(case: Case, x: Tensor, provider: str = "") -> Tensor:
    """A fresh copy of ``x`` on the case's device in the layout that ``provider`` is given."""
    layout = "nhwc" if provider == "eager_cl" else case.layout
    copy = x.to(case.device, copy=True)
    return copy.contiguous(memory_format=LAYOUTS[layout]) if copy.dim() == 4 else copy


def safe_gradient(case: Case, g: torch.Generator, z: Tensor, activation: str) -> Tensor:
    """A random gradient that is zero where the fp64 pre-activation ``z`` lies at a kink of the activation.

    There the derivative of any rounded computation is a coin toss, for stock torch and for us; elsewhere results must agree.
    """
    kinks = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0)}.get(activation, ())
    width = (
        _KINK * torch.finfo(case.torch_dtype).eps if case.dtype in ("fp32", "fp64") else 8 * torch.finfo(case.torch_dtype).eps
    )
    keep = torch.ones_like(z, dtype=torch.bool)
    for kink in kinks:
        keep &= (z - kink).abs() > width * max(1.0, float(z.abs().max()) if z.numel() else 1.0)
    return randn(case, g, z.shape) * keep


def gradients(fn: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs ``fn`` and differentiates it: (out, *gradients of ``leaves``)."""

    def step() -> tuple[Tensor, ...]:
        out = fn()
        return (out, *torch.autograd.grad(out, leaves, dout))

    return step


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(fn)``; earlier compilations are dropped, or the recompile limit would fall back to eager unseen."""
    torch._dynamo.reset()
    return torch.compile(fn, dynamic=False)


def why_not(provider: str, device: str) -> str | None:
    """Why ``provider`` cannot run on ``device`` here, or None."""
    kind = torch.device(device).type
    if provider in ("cpu", "cuda"):
        if kind != provider:
            return f"backend {provider!r} needs {provider} tensors, this run is on {device}"
        part = _extension.status()["_C" if provider == "cpu" else "_cuda"]
        if kind == "cuda" and part.loaded and torch.cuda.is_available():
            return _extension.no_code_for(torch.cuda.get_device_capability(device)) or None
        return None if part.loaded else part.message()
    if provider == "triton":
        if kind == "cpu" and not triton_interpreted():
            return "Triton needs a CUDA device (TRITON_INTERPRET=1 runs its interpreter on the CPU, for parity only)"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
    return None


def parity_only(provider: str, device: str) -> bool:
    """Triton's interpreter checks numbers; its speed means nothing."""
    return provider == "triton" and torch.device(device).type == "cpu"


def default_backends(device: str) -> tuple[str, ...]:
    """Our kernels that can run on ``device`` here; ``("auto",)`` where there are none."""
    found = tuple(name for name in ("cpu", "cuda", "triton") if why_not(name, device) is None and not parity_only(name, device))
    return found or ("auto",)


def choose(
    provider: str, eager: Callable[..., Any], inplace: Callable[..., Any] | None, ours: Callable[..., Any]
) -> Callable[..., Any]:
    """The callable of a provider: stock eager, its in-place form, torch.compile of it, or ours with ``backend=``."""
    if provider in ("eager", "eager_cl"):
        return eager
    if provider == "eager_inplace":
        if inplace is None:
            raise Unavailable("no in-place form of this case exists in stock torch")
        return inplace
    if provider == "compile":
        return compiled(eager)
    if provider in OURS:
        return partial(ours, backend=provider)
    raise ValueError(f"provider: expected one of {', '.join(STOCK + OURS)}, got {provider!r}")
