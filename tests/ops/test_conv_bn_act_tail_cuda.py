"""The end of a bottleneck block in one CUDA kernel (conv_bn_act_tail): on the PTX simulator, and through the host function.

The truth is fp64 with the map between the convolutions rounded to the tensors' type, as the kernel and the two layers round it.
Against those two layers, kernel for kernel, the bits are the same.
"""

from __future__ import annotations

import re
from typing import Any

import _cuda_launch as cuda
import pytest
import torch
from _cuda_conv import channels_last, conv_bn_act_fwd, require_fused_conv
from _cuda_tail import VECTORS, conv_bn_act_tail, random_layer
from ptxsim import compile_cuda
from ptxsim._gate import ROTATION
from ptxsim.gates import machine
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# N, C, H, W; output channels; kernel, stride, padding, dilation; residual; activations; parts
GEOMETRIES = [
    ((1, 64, 7, 5), 256, 3, 1, 1, 1, True, (1, 1), 1), ((2, 24, 9, 8), 136, 3, 1, 1, 1, True, (1, 1), 2),
    ((1, 64, 3, 56), 64, 3, 1, 1, 1, False, (1, 0), 1), ((1, 16, 11, 10), 200, 1, 1, 0, 1, True, (2, 1), 3),
    ((1, 40, 17, 13), 72, 3, 2, 1, 1, False, (3, 2), 2), ((2, 8, 10, 7), 8, 5, 1, 2, 1, True, (0, 3), 1),
    ((1, 72, 9, 9), 392, 3, 1, 2, 2, True, (1, 1), 2), ((1, 8, 1, 1), 64, 3, 1, 1, 1, False, (0, 0), 1),
]  # fmt: skip
MODES = ({"lazy_copies": 0}, {"schedule": 1}, {"lazy_copies": 0, "schedule": 7})
SLOPE = 0.2


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()


def act(code: int, z: Tensor) -> Tensor:
    kinds = (lambda v: v, torch.relu, lambda v: torch.nn.functional.leaky_relu(v, SLOPE), lambda v: v.clamp(0, 6))
    return kinds[code](z)


class Problem:
    """Tensors of a block's end."""

    def __init__(self, dtype: torch.dtype, geometry: tuple, seed: int = 0, **more: Any) -> None:
        shape, k, kernel, stride, padding, dilation, residual, activations, self.parts = geometry
        torch.manual_seed(seed)
        self.x = channels_last(torch.randn(shape).bfloat16().to(dtype))
        self.first = random_layer(shape[1], 64, kernel, dtype, activations[0], **more)
        self.second = random_layer(64, k, 1, dtype, activations[1], **more)
        self.geometry = [stride] * 2, [padding] * 2, [dilation] * 2
        size = torch.conv2d(self.x.float(), self.first["weight"].float(), None, *self.geometry).shape
        self.residual = channels_last(torch.randn(size[0], k, *size[2:]).to(dtype)) if residual else None

    def run(self, parts: int | None = None, **options: int) -> Tensor:
        out, self.reports = conv_bn_act_tail(
            self.x, self.first, self.second, self.residual, *self.geometry, parts=parts or self.parts, negative_slope=SLOPE,
            options=options,
        )  # fmt: skip
        return out

    def by_two_kernels(self, tile: str = "k64x64") -> Tensor:
        z, every = self.x, ([1, 1], [0, 0], [1, 1])
        for layer, geometry, residual in ((self.first, self.geometry, None), (self.second, every, self.residual)):
            z, _ = conv_bn_act_fwd(
                z, layer["weight"], *(layer[name] for name in VECTORS), residual, *geometry, activation=layer["activation"],
                eps=layer["eps"], eps_std=layer.get("eps_std", False), negative_slope=SLOPE, tile=tile,
            )  # fmt: skip
        return z

    def layer(self, given: dict[str, Any], x: Tensor, residual: Tensor | None, geometry: tuple) -> tuple[Tensor, Tensor]:
        """The layer in fp64 and how far from it fp32 sums may be."""
        bias, mean, var, weight, shift = (given[name].double().view(1, -1, 1, 1) for name in VECTORS)
        root = var.sqrt() + given["eps"] if given.get("eps_std") else (var + given["eps"]).sqrt()
        filters = given["weight"].double()
        z = (torch.conv2d(x, filters, None, *geometry) + bias - mean) / root * weight + shift
        size = torch.conv2d(x.abs(), filters.abs(), None, *geometry) / root * weight.abs() + 4
        return act(given["activation"], z if residual is None else z + residual.double()), 2e-6 * size

    def check(self, out: Tensor) -> None:
        """Against fp64. The map in between may be rounded the other way where it lies close to the middle of two values."""
        dtype = self.x.dtype
        exact, limit = self.layer(self.first, self.x.double(), None, self.geometry)
        # TF32 has 10 bits of fraction, as fp16.
        unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-11}[dtype]
        tiny = 2.0**-25 if dtype == torch.float16 else 0.0  # half of a subnormal step
        off = 1.01 * unit * exact.abs() + limit + tiny
        want, more = self.layer(self.second, exact, self.residual, ([1, 1], [0, 0], [1, 1]))
        root = (self.second["running_var"] + self.second["eps"]).sqrt()
        if self.second.get("eps_std"):
            root = self.second["running_var"].sqrt() + self.second["eps"]
        gain = (self.second["bn_weight"].double() / root).abs().view(1, -1, 1, 1)
        limit = torch.conv2d(off, self.second["weight"].double().abs()) * gain + more
        limit += 0.5 * torch.finfo(dtype).eps * (want.abs() + limit) + tiny
        bad = (out.double() - want).abs() > limit
        assert out.shape == want.shape and not bool(bad.any()), f"{int(bad.sum())} values off"
        assert not bool(out.isnan().any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geometries(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Tails of pixels and channels, all activations, parts; against fp64 and, bit for bit, against two kernels."""
    full = request.config.getoption("-m") == ""
    for i, geometry in enumerate(GEOMETRIES):
        if full or (i + ROTATION + DTYPES.index(dtype)) % 4 == 0:
            problem = Problem(dtype, geometry, seed=i, eps_std=i % 2 == 1)
            out = problem.run()
            problem.check(out)
            assert len(problem.reports) == 1 and problem.reports[0].counters["atomics"] == 0
            assert torch.equal(problem.by_two_kernels(), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits(dtype: torch.dtype) -> None:
    """NaN and infinities go the way of two kernels; neither the order of blocks and copies nor the parts change a bit."""
    problem = Problem(dtype, ((1, 24, 10, 8), 328, 3, 1, 1, 1, True, (1, 1), 1), seed=5)
    problem.x[0, 3, 2, 2], problem.x[0, 8, 6, 1] = float("nan"), float("inf")
    problem.x[0, 9, 8, 6] = torch.finfo(dtype).max  # overflows in between
    problem.residual[0, 5, 4, 4], problem.residual[0, 9, 4, 4] = float("inf"), float("nan")
    want = problem.by_two_kernels()
    assert want.isnan().any() and want.isinf().any() and want.isfinite().any()
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(problem.run(), want, **same)
    torch.testing.assert_close(problem.run(parts=3, **MODES[ROTATION % 3]), want, **same)
    torch.testing.assert_close(problem.run(**MODES[(ROTATION + 1) % 3]), want, **same)
