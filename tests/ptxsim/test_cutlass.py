"""CUTLASS' sm_80 implicit-GEMM convolutions through their own host launchers: odd shapes, schedules, copies, a short tensor."""

from __future__ import annotations

import functools
import importlib.util
import os
from ctypes import c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from . import Arr, HostLibrary, aligned
from .fixture import require_nvcc

SOURCE = Path(__file__).parent / "samples" / "cutlass_conv.cu"
# -DKIND, type, half a unit in its last place
KINDS = {"fp16": (0, torch.float16, 2.0**-11), "bf16": (1, torch.bfloat16, 2.0**-8), "tf32": (2, torch.float32, 2.0**-24)}
# N, H, W, C, K, kernel, padding, stride, dilation
SHAPES = [
    (1, 14, 14, 64, 128, 3, 1, 1, 1), (1, 9, 7, 8, 8, 3, 1, 1, 1), (2, 15, 13, 32, 72, 3, 1, 2, 1),
    (2, 10, 11, 72, 40, 1, 0, 1, 1), (1, 13, 13, 64, 136, 1, 0, 2, 1), (2, 12, 9, 16, 24, 5, 2, 1, 1),
    (1, 12, 17, 24, 16, 3, 2, 1, 2),
]  # fmt: skip
MODES = [{}, {"lazy_copies": 0}, {"schedule": 1}, {"lazy_copies": 0, "schedule": 7}]

pytestmark = pytest.mark.slow


def headers() -> str | None:
    """The folder that holds cutlass/cutlass.h: CUTLASS_PATH, or the PyPI package nvidia-cutlass."""
    if "CUTLASS_PATH" in os.environ:
        return os.environ["CUTLASS_PATH"]
    spec = importlib.util.find_spec("cutlass_library")
    return str(Path(spec.origin).parent / "source" / "include") if spec and spec.origin else None


@functools.cache
def library(kind: str) -> HostLibrary:
    flags = ["-DNDEBUG", "--expt-relaxed-constexpr", f"-DKIND={KINDS[kind][0]}"]
    return HostLibrary.from_sources([SOURCE], includes=[headers()], flags=flags)


def multiplied(t: Tensor) -> Tensor:
    """What the tensor core gets: of floats 10 bits of mantissa, rounded to nearest, ties away from zero."""
    if t.dtype != torch.float32:
        return t.double()
    return ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32).double()


def convolve(kind: str, x: Tensor, weight: Tensor, out: Tensor, *sizes: int, **mode: int) -> list[str]:
    """Errors of the launch (tensors NHWC and KRSC)."""
    with library(kind).session(**mode) as session:
        pointers = [session.pointer(a) for a in (Arr(x, "x", read_only=True), Arr(weight, "weight", read_only=True))]
        arguments = [c_void_p(p) for p in (*pointers, session.pointer(Arr(out, "out", output=True)))]
        status = session.call("cutlass_conv", *arguments, *sizes)
        assert status == 0 and session.reports[0].counters["mma"] > 0
        return session.errors


@pytest.fixture(autouse=True)
def _toolchain() -> None:
    require_nvcc()
    if headers() is None:
        pytest.skip("no CUTLASS headers (pip install --no-deps nvidia-cutlass, or CUTLASS_PATH)")


@pytest.mark.parametrize("kind", ["fp16", *(pytest.param(k, marks=pytest.mark.full) for k in ("bf16", "tf32"))])
def test_convolution(kind: str) -> None:
    _, dtype, half_ulp = KINDS[kind]
    torch.manual_seed(0)
    for n, h, w, c, k, r, pad, stride, dilation in SHAPES:
        x, weight = aligned(torch.randn(n, h, w, c).to(dtype)), torch.randn(k, r, r, c) / (c * r * r) ** 0.5
        weight = aligned(weight.to(dtype))
        images, filters = (multiplied(t).permute(0, 3, 1, 2) for t in (x, weight))
        want = torch.conv2d(images, filters, None, stride, pad, dilation).relu().permute(0, 2, 3, 1)
        for mode in MODES:
            out = aligned(torch.zeros(want.shape, dtype=dtype))
            sizes = (n, h, w, c, k, r, *want.shape[1:3], pad, stride, dilation)
            assert convolve(kind, x, weight, out, *sizes, **mode) == []
            # half an ulp of the type, and fp32 sums
            assert bool(((out.double() - want).abs() <= half_ulp * want.abs() + 1e-5).all()), (sizes, mode)


def test_a_tensor_one_row_short() -> None:
    """The filter lies right behind x: only the pointer's tag can tell."""
    c = 64
    both = aligned(torch.randn(81 * c + 9 * c * c).half())
    with library("fp16").session() as session:
        out = aligned(torch.zeros(90 * c).half())
        whole = both.numpy()
        inputs = Arr(whole[: 81 * c], "x", read_only=True), Arr(whole[81 * c :], "weight", read_only=True)
        pointers = [session.pointer(a) for a in (*inputs, Arr(out, "out"))]
        assert session.call("cutlass_conv", *map(c_void_p, pointers), 1, 10, 9, c, c, 3, 10, 9, 1, 1, 1) == 0
        assert any("OUT-OF-BOUNDS" in e and "weight" in e for e in session.errors), session.errors
