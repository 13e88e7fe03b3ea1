"""Training through the fused CUDA convolution: its statistics epilogue on the PTX simulator, the host function, the schedule.

The statistics are those of the values as stored: they are compared with fp64 moments of the very tensor that the kernel wrote.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cuda_conv import channels_last, conv_stats, require_fused_conv
from _cuda_host import host
from ptxsim._gate import ROTATION
from torch import Tensor
from torch.nn import functional as stock

from dl4ds_kernels import _cuda_conv
from dl4ds_kernels._activation import ACTIVATION_CODES
from dl4ds_kernels._define import op
from dl4ds_kernels.ops import _bn_act_pair, _conv_bn_act_train
from dl4ds_kernels.ops._block_code import IDENTITY, PROJECTION, Block, Conv, Norm, encode
from dl4ds_kernels.ops.residual_block import _forward

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = ("k128x128", "k128x64", "k64x64")
# N, C, H, W, C_out, kernel, stride, padding, dilation
GEOMETRIES = [
    ((2, 16, 13, 12), 24, 1, 1, 0, 1), ((1, 24, 9, 7), 136, 3, 1, 1, 1), ((1, 8, 17, 11), 16, 5, 1, 3, 2),
    ((3, 40, 16, 9), 72, 1, 2, 0, 1), ((1, 8, 1, 1), 8, 1, 1, 0, 1), ((2, 64, 8, 9), 200, 1, 1, 0, 1),
]  # fmt: skip
ODD = ((2, 16, 9, 8), 21, 3, 1, 1, 1)  # output channels that fill no vectors: only the smallest tile


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()


def layer(dtype: torch.dtype, geometry: tuple, offset: float = 0.0, seed: int = 0) -> tuple[Any, ...]:
    """x, weight, bias, stride, padding, dilation; values that TF32 holds exactly."""
    shape, k, size, stride, padding, dilation = geometry
    torch.manual_seed(seed)
    x = channels_last(torch.randn(shape).bfloat16().to(dtype))
    weight = (torch.randn(k, shape[1], size, size) * (shape[1] * size * size) ** -0.5).bfloat16().to(dtype)
    bias = torch.randn(k) + offset
    return x, channels_last(weight), bias, [stride] * 2, [padding] * 2, [dilation] * 2


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all but channels, in fp64."""
    return y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), correction=0)


def merged(partial: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The same from what the kernel left, merged in fp64."""
    n, mean, m2 = counts.double()[:, None], partial[:, 0].double(), partial[:, 1].double()
    total = (n * mean).sum(0) / n.sum()
    return total, (m2 + n * (mean - total) ** 2).sum(0) / n.sum()


def check_moments(y: Tensor, mean: Tensor, var: Tensor) -> None:
    true_mean, true_var = moments(y)
    eps = torch.finfo(torch.float32).eps
    size = y.double().abs().amax((0, 2, 3))
    assert bool(((mean - true_mean).abs() <= 8 * eps * size).all())
    assert bool(((var - true_var).abs() <= 64 * eps * true_var + (8 * eps * size) ** 2).all())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(dtype: torch.dtype, tile: str, request: pytest.FixtureRequest) -> None:
    """The convolution within one rounding, its moments to fp32's last bits, the same bits in any order; no stray sector."""
    full = request.config.getoption("-m") == ""
    for i, geometry in enumerate([*GEOMETRIES, *([ODD] if tile == "k64x64" else [])]):
        if not full and (i + ROTATION + DTYPES.index(dtype) + TILES.index(tile)) % 3:
            continue
        given = layer(dtype, geometry, offset=0.0 if i % 2 else 100.0, seed=i)
        y, partial, counts, reports = conv_stats(*given, tile=tile)
        x, weight, bias, *rest = given
        want = torch.conv2d(x.double(), weight.double(), bias.double(), *rest)
        size = torch.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), *rest)
        assert bool(((y.double() - want).abs() <= 0.5 * torch.finfo(dtype).eps * want.abs() + 2e-6 * size).all())
        check_moments(y, *merged(partial, counts))
        assert int(counts.sum()) == y.numel() // y.shape[1] and len(reports) == 1 and reports[0].counters["atomics"] == 0
        if i % 3 == 0 or full:
            again = conv_stats(*given, tile=tile, options={"lazy_copies": 0, "schedule": 7})
            assert all(map(torch.equal, again[:3], (y, partial, counts)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_traffic(dtype: torch.dtype) -> None:
    """y is written once and not read; what is left of the statistics is two floats for a channel of a tile of pixels."""
    given = layer(dtype, ((1, 64, 16, 16), 128, 1, 1, 0, 1))
    y, partial, counts, (report,) = conv_stats(*given, tile="k128x128")
    assert report.tensors["out"] == report.tensors["out"] | {"read": 0, "written": y.numel() * y.element_size()}
    assert report.tensors["x"]["read"] == given[0].numel() * y.element_size()
    sectors = -(-4 * (partial.numel() + counts.numel()) // 32)  # what the simulator counts in
    assert report.tensors["moments"]["written"] == 32 * sectors
    assert partial.shape[0] == 2 and report.counters["store_sectors"] <= 1.02 * report.counters["store_ideal_sectors"]


def test_large_mean() -> None:
    """A mean of ten thousand deviations: the variance keeps its digits, which raw sums of squares would lose."""
    x, weight, bias, *rest = layer(torch.float32, GEOMETRIES[0])
    y, partial, counts, _ = conv_stats(x, weight, torch.full_like(bias, 1e4), *rest)
    mean, var = merged(partial, counts)
    true_mean, true_var = moments(y)
    torch.testing.assert_close(mean, true_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var, true_var, rtol=2e-3, atol=0)
    raw = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    assert bool(((raw - true_var).abs() > 0.1 * true_var).any())  # the trap


def arguments(dtype: torch.dtype, residual: bool, activation: str = "relu") -> tuple[Any, ...]:
    x, weight, bias, *rest = layer(dtype, ((2, 64, 10, 9), 40, 3, 1, 1, 1), seed=3)
    vectors = [torch.randn(40), torch.rand(40) + 0.5, torch.randn(40), torch.randn(40)]
    added = torch.randn(2, 40, 10, 9).to(dtype).contiguous(memory_format=torch.channels_last) if residual else None
    code = ACTIVATION_CODES[activation]
    return (x, weight, bias, *vectors, added, *rest, 1, 0.2, 1e-3, False, code, 0.1, residual and code == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_function(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: out, statistics, running statistics and mask follow in fp64 from the y that each stored."""
    for residual, activation in ((False, "silu"), (True, "relu")):
        args = arguments(dtype, residual, activation)
        for wish in ("fused", "library"):
            monkeypatch.setenv("DL4DS_CUDA_CONV", wish)
            given = (*args[:2], args[2].to(dtype), *args[3:])  # the library wants a bias of x's type
            out, y, mean, rstd, mask, new_mean, new_var = host()("conv_bn_act_train", *given)
            true_mean, true_var = moments(y)
            count = y.numel() // y.shape[1]
            torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rstd.double(), (true_var + 1e-3).rsqrt(), rtol=1e-5, atol=0)
            torch.testing.assert_close(new_mean.double(), 0.8 * args[3].double() + 0.2 * true_mean, rtol=1e-5, atol=1e-6)
            unbiased = true_var * count / (count - 1)
            torch.testing.assert_close(new_var.double(), 0.8 * args[4].double() + 0.2 * unbiased, rtol=1e-5, atol=1e-6)
            z = stock.batch_norm(y.double(), None, None, args[5].double(), args[6].double(), True, 0.0, 1e-3)
            z = z if args[7] is None else z + args[7].double()
            want = torch.relu(z) if residual else stock.silu(z)
            torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-4)
            assert out.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
            assert mask.numel() == (y.numel() // 8 if residual else 0)


def test_same_statistics_as_a_second_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The epilogue's statistics of a tensor are those that bn_act's own kernels find in it, to the last bit or two."""
    monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
    args = arguments(torch.float16, False)
    fused = host()("conv_bn_act_train", *args)
    read = host()("bn_act", fused[1], args[5], args[6], args[3], args[4], None, True, 0.2, 1e-3, False, 1, 0.1, False)
    torch.testing.assert_close(fused[2], read[1], rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(fused[3], read[2], rtol=3e-7, atol=0)
    assert torch.equal(host()("conv_bn_act_train", *args)[2], fused[2])


def test_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """1x1 layers, whose time is memory's, take the epilogue; the switch and the reasons are those of inference."""
    half = {"dtype": torch.float16}
    x = torch.empty(64, 64, 56, 56, **half, memory_format=torch.channels_last)

    def explained(x: Tensor, weight: Tensor, activation: int = 1, padding: int = 0) -> dict[str, Any]:
        ask = lambda *args: host()("conv_bn_act_route", *args)  # noqa: E731
        return _cuda_conv.explain(x, weight, False, [1, 1], [padding] * 2, [1, 1], 1, activation, True, ask)

    wide = explained(x, torch.empty(256, 64, 1, 1, **half))
    assert wide["kernels"].startswith("a convolution that leaves its batch statistics") and wide["tile"] == "128x128"
    assert wide["fused_us"] < 0.9 * wide["library_us"] and wide["slices"] == 1
    assert explained(x, torch.empty(256, 64, 1, 1, **half), ACTIVATION_CODES["silu"])["kernels"] == wide["kernels"]
    stem = explained(torch.empty(2, 3, 8, 8, **half, memory_format=torch.channels_last), torch.empty(64, 3, 7, 7, **half))
    assert "16 bytes" in stem["reason"] and stem["kernels"] == "cuDNN, then batch statistics, BatchNorm and activation"
    deep = torch.empty(64, 512, 14, 14, **half, memory_format=torch.channels_last), torch.empty(512, 512, 3, 3, **half)
    assert "no faster fused" in explained(*deep, padding=1)["reason"]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "library")
    assert "asked for" in explained(x, torch.empty(256, 64, 1, 1, **half))["reason"]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
    small = explained(torch.empty(1, 512, 7, 7, **half, memory_format=torch.channels_last), torch.empty(512, 512, 3, 3, **half))
    assert small["kernels"] == wide["kernels"] and small["slices"] == 1


class Context(SimpleNamespace):
    """What autograd hands to setup_context and backward."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None:
        pass

    def set_materialize_grads(self, _: bool) -> None:
        pass


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_backward(residual: bool, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's gradients from what its CUDA forward saves (gradient ops on the CPU), against torch's in fp64."""
    monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
    args = arguments(torch.float32, residual, activation)
    outputs = host()("conv_bn_act_train", *args)
    ctx = Context(needs_input_grad=[t is not None and i not in (3, 4) for i, t in enumerate(args[:8])])
    _conv_bn_act_train._setup_context(ctx, args, outputs)
    dout = torch.randn_like(outputs[0])
    grads = _conv_bn_act_train._backward("dl4ds_kernels", ctx, dout, *[None] * 6)
    wide = [t if t is None else t.double().requires_grad_(i not in (3, 4)) for i, t in enumerate(args[:8])]
    y = torch.conv2d(wide[0], wide[1], wide[2], 1, 1)
    z = stock.batch_norm(y, None, None, wide[5], wide[6], True, 0.0, 1e-3)
    z = z + wide[7] if residual else z
    truth = {"none": lambda v: v, "relu": torch.relu, "silu": stock.silu}[activation](z)
    places = [i for i in (0, 1, 2, 5, 6, 7) if wide[i] is not None]
    for place, want in zip(places, torch.autograd.grad(truth, [wide[i] for i in places], dout.double()), strict=True):
        # A bias in front of a BatchNorm has no gradient: what is left is the rounding of sums over 180 terms.
        far = (grads[place].double() - want).abs() / (want.abs().max() + (1.0 if place == 2 else 1e-2))
        assert float((far > 1e-3).double().mean()) < 2e-3, place  # a relu within a rounding of its kink takes the other side


@pytest.mark.parametrize("shortcut", [IDENTITY, PROJECTION])
def test_block(shortcut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bottleneck in training through the op: as the CPU's schedule gives it, kept tensors in the same order."""
    torch.manual_seed(4)
    channels, wide = (32, 32) if shortcut == IDENTITY else (16, 32)
    x = channels_last(torch.randn(2, channels, 7, 6))
    shapes = [(8, channels, 1, 1), (8, 8, 3, 3), (wide, 8, 1, 1), *([(wide, channels, 1, 1)] if shortcut == PROJECTION else [])]
    convs = [channels_last(torch.randn(s) * (s[1] * s[2] * s[3]) ** -0.5) for s in shapes]
    norms = [t for s in shapes for t in (torch.rand(s[0]) + 0.5, torch.randn(s[0]))]
    running = [t for s in shapes for t in (torch.randn(s[0]), torch.rand(s[0]) + 0.5)]
    coded = [
        Conv(i, -1, (1, 1), (s[2] // 2,) * 2, (1, 1), 1, Norm(i, 2 * i, 2 * i + 1, 2 * i, False, 0.1, 1e-5))
        for i, s in enumerate(shapes)
    ]
    block = Block(False, shortcut, 1, True, 0.1, 1.0, tuple(coded[:3]), coded[3] if shortcut == PROJECTION else None)
    given = (x, convs, norms, running, *encode(block), True, True, False)
    want = op("residual_block")(*given)
    monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
    monkeypatch.setattr(_conv_bn_act_train, "has_train", lambda namespace, t: True)
    for module in (_conv_bn_act_train, _bn_act_pair):
        monkeypatch.setattr(module, "op", lambda name, namespace: lambda *args: host()(name, *args))
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        got = _forward("dl4ds_kernels", *given)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    flat = lambda results: [t for group in results for t in ([group] if isinstance(group, Tensor) else group)]  # noqa: E731
    for a, b in zip(flat(got), flat(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.dtype != torch.uint8:  # of the sums' bits a TF32 rounding may turn some
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
