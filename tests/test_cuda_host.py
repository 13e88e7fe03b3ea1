"""The CUDA host functions against the reference backend's kernels on CPU: values, strides, copies and error messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cases import LAYOUTS, lay_out
from _cuda_host import host
from _cuda_launch import accumulator, suggested
from conftest import skip_unless_loaded
from ptxsim.fixture import require_nvcc, require_simulator
from torch import Tensor

SHAPES = ((2, 16, 6, 5), (2, 7, 3, 5), (3, 1, 4, 4), (4, 8, 1, 1), (0, 3, 4, 5), (2, 3, 4, 5, 6), (17, 8), (3, 5, 9))
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_simulator()
    require_nvcc()
    skip_unless_loaded("cpu")  # the CPU kernels are what the results are compared with


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    return lay_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout)


def vectors(channels: int, dtype: torch.dtype, strided: bool) -> list[Tensor]:
    """weight, bias, running_mean, running_var."""
    values = [torch.rand(channels).add(0.5).to(dtype) for _ in range(4)]
    return [torch.stack([v, v], 1)[:, 0] for v in values] if strided else values


def compare(name: str, *args: Any) -> tuple[Tensor, ...]:
    """Runs both, checks every output and returns the CPU's."""
    ours, expected = host()(name, *args), getattr(torch.ops.dl4ds_kernels, name)(*args)
    if isinstance(ours, Tensor):
        ours, expected = (ours,), (expected,)
    for a, b in zip(ours, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.stride() == b.stride() or a.numel() < 2
        if a.dtype == torch.uint8:
            assert (a != b).sum() <= 1  # a value at the kink
        else:
            size = b.double().abs().max().item() if b.numel() else 0
            torch.testing.assert_close(a, b, rtol=TOLERANCE[b.dtype], atol=TOLERANCE[b.dtype] * max(1.0, size), equal_nan=True)
    return expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_cpu(shape: tuple[int, ...], layout: str) -> None:
    """bn_act and add_act, both ways, for one layout of x, others of residual and gradient; dtypes and options vary."""
    i = LAYOUTS.index(layout) + SHAPES.index(shape)
    dtype, activation, training = list(TOLERANCE)[i % 4], i % 6, i % 3 > 0 and 0 not in shape
    x, other, mixed = (tensor(shape, dtype, LAYOUTS[(LAYOUTS.index(layout) + k) % len(LAYOUTS)]) for k in (0, 1, 2))
    weight, bias, mean, var = vectors(shape[1], dtype if i % 2 else accumulator(x), strided=i % 5 == 0)
    residual = other if i % 2 else None
    out = compare("bn_act", x, weight, bias, mean, var, residual, training, 0.1, 1e-5, i % 4 == 0, activation, 0.1, True)
    saved_mean, rstd = out[1:3] if training else (mean.to(accumulator(x)), var.to(accumulator(x)))
    mask = out[3] if out[3].numel() else None
    saved = (weight, bias, saved_mean, rstd, residual, mask)
    compare("bn_act_bwd", mixed, x, *saved, training, 1e-5, i % 4 == 0, activation, 0.1, True, i % 3 != 1, residual is not None)

    out, mask = compare("add_act", x, other, 0.5, activation, 0.1, i % 2 == 0)
    if mask.numel():
        dout = torch.empty_strided(out.shape, out.stride(), dtype=dtype).copy_(mixed)
        compare("add_act_bwd", dout, mask, None, None, 0.5, activation, 0.1)
    dx = host()("add_act_bwd", mixed, None, x, other, 0.5, activation, 0.1)
    expected = torch.ops.dl4ds_kernels.add_act_bwd(mixed, None, x, other, 0.5, activation, 0.1)
    torch.testing.assert_close(dx, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert dx.stride() == torch.add(x, other).stride() or dx.numel() < 2  # what the op's contract says of dx


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_hidden_copies(layout: str) -> None:
    """Dense, sliced and repeated inputs are read where they lie; only a transposed one is copied."""
    x, weight = tensor((2, 16, 6, 5), torch.float32, layout), torch.ones(16)
    for training in (True, False):
        host()("bn_act", x, weight, weight, weight, weight, x, training, 0.1, 1e-5, False, 1, 0.1, False)
        assert host().copies == 2 * (layout == "transposed")
        host()("bn_act_bwd", x, x, weight, weight, weight, weight, None, None, training, 1e-5, False, 1, 0.1, True, True, False)
        assert host().copies == 2 * (layout == "transposed")


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("residual", ["", "nchw", "nhwc_cslice"])
def test_conv_bn_act(layout: str, residual: str) -> None:
    """The convolution through the dispatcher, the epilogue in place."""
    x, weight = tensor((2, 8, 7, 6), torch.float32, layout), tensor((12, 4, 3, 3), torch.float32, layout)
    bias, mean, _, _ = vectors(12, torch.float32, False)
    added = tensor((2, 12, 4, 3), torch.float32, residual) if residual else None
    bn = (mean, torch.rand(12) + 0.5, torch.rand(12) + 0.5, None)
    out = compare("conv_bn_act", x, weight, bias, *bn, added, [2, 2], [1, 1], [1, 1], 2, 1e-5, False, 1, 0.1)[0]
    assert suggested(out) == suggested(x)


X, V = torch.zeros(2, 4, 3, 3), torch.ones(4)
FLAGS = (True, 0.1, 1e-5, False, 1, 0.1, False)
BWD_FLAGS = (True, 1e-5, False, 1, 0.1, True, True, False)
BYTES = torch.zeros(3, dtype=torch.uint8)
WRONG = {
    "bn_act: weight: expected shape (C,) = (4,), got (3,)": ("bn_act", X, V[:3], V, V, V, None, *FLAGS),
    "bn_act: weight: expected dtype float32": ("bn_act", X, V.int(), V, V, V, None, *FLAGS),
    "bn_act: residual: expected shape (2, 4, 3, 3), got (1, 4, 3, 3)": ("bn_act", X, V, V, V, V, X[:1], *FLAGS),
    "bn_act: residual: expected dtype float32, got float16": ("bn_act", X, V, V, V, V, X.half(), *FLAGS),
    "bn_act: expected running_mean and running_var both": ("bn_act", X, V, V, V, None, None, *FLAGS),
    "bn_act: expected running statistics in eval mode": ("bn_act", X, V, V, None, None, None, False, *FLAGS[1:]),
    "bn_act: activation: expected a code in [0, 6), got 9": ("bn_act", X, V, V, V, V, None, *FLAGS[:4], 9, 0.1, False),
    "bn_act: x: expected dtype float32": ("bn_act", X.int(), V, V, V, V, None, *FLAGS),
    "bn_act: x: expected 2 to 5 dims": ("bn_act", V, V, V, V, V, None, *FLAGS),
    "bn_act_bwd: mask: expected shape (ceil(numel / 8),) = (9,)": ("bn_act_bwd", X, X, V, V, V, V, X, BYTES, *BWD_FLAGS),
    "bn_act_bwd: dout: expected shape (2, 4, 3, 3)": ("bn_act_bwd", X[:1], X, V, V, V, V, None, None, *BWD_FLAGS),
    "bn_act_bwd: mean: expected dtype float32": ("bn_act_bwd", X, X, V, V, V.double(), V, None, None, *BWD_FLAGS),
    "add_act: residual: expected shape (2, 4, 3, 3)": ("add_act", X, X[:1], 1.0, 1, 0.1, False),
    "add_act_bwd: expected a mask, or x and residual": ("add_act_bwd", X, None, None, None, 1.0, 1, 0.1),
    "add_act_bwd: mask: expected shape": ("add_act_bwd", X, BYTES, None, None, 1.0, 1, 0.1),
}


@pytest.mark.parametrize("message", WRONG)
def test_messages(message: str) -> None:
    """What protects memory is checked again below Python, with op, argument, expected and got."""
    name, *args = WRONG[message]
    with pytest.raises(RuntimeError) as error:
        host()(name, *args)
    assert message in str(error.value)
