"""The CPU convolution engine behind ``conv_bn_act_packed`` and ``bn_act_conv_packed``: every algorithm against fp64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dl4ds_kernels import _extension, _packing

pytestmark = pytest.mark.skipif(not _extension.status()["_C"].loaded, reason="the engine is in the C++ part")

DIRECT, F2, F4, F6, DOTS = 1, 2, 4, 6, 8
OPS = torch.ops.dl4ds_kernels
ACTS = {0: lambda z: z, 1: torch.relu, 2: lambda z: TF.leaky_relu(z, 0.1), 3: TF.relu6, 4: TF.silu, 5: TF.hardswish}
# The documented bound of F(4x4) and F(6x6) is 1e-4 of the output's scale; what they do on these inputs is well below.
BOUNDS = {F4: 2e-5, F6: 4e-5}


class Conv(NamedTuple):
    n: int
    c: int
    k: int
    h: int
    w: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1

    def __str__(self) -> str:
        sizes = f"N{self.n}-C{self.c}-K{self.k}-H{self.h}-W{self.w}"
        return f"{sizes}-k{self.kernel}s{self.stride}p{self.padding}d{self.dilation}g{self.groups}"


WINOGRAD = [
    Conv(1, 16, 32, 14, 14), Conv(2, 3, 5, 7, 9), Conv(2, 48, 40, 13, 18), Conv(1, 33, 63, 6, 5, padding=0),
    Conv(3, 128, 96, 7, 7, padding=2), Conv(1, 1, 1, 3, 3), Conv(1, 64, 64, 56, 56), Conv(1, 7, 70, 1, 40),
]  # fmt: skip
DIRECT_ONLY = [
    # Few channels: kernel rows that begin anywhere in a chunk, also where the map is not much wider than a row.
    Conv(2, 3, 40, 9, 33, 7, 2, 3), Conv(1, 1, 8, 12, 40, 5), Conv(1, 4, 8, 9, 4, 3), Conv(2, 5, 33, 30, 31, 3, 1, 0),
    Conv(1, 3, 20, 24, 23, 11, 4, 2), Conv(1, 2, 9, 17, 8, (3), 1, 2),
    Conv(1, 3, 64, 50, 47, 7, 2, 3), Conv(2, 64, 128, 14, 13, 1, 1, 0), Conv(2, 64, 100, 15, 14, 1, 2, 0),
    Conv(2, 32, 40, 15, 14, 3, 2, 1), Conv(1, 24, 36, 15, 14, 3, 1, 2, 2, 3), Conv(1, 32, 32, 9, 9, 3, 1, 1, 1, 32),
    Conv(1, 20, 30, 9, 9, 5, 3, 2, 1, 2), Conv(1, 5, 6, 9, 9, 4, 1, 3), Conv(1, 2, 3, 4, 300, 3, 1, (1)),
]  # fmt: skip


NARROW = [
    Conv(2, 32, 2, 9, 7, 1, 1, 0), Conv(1, 20, 1, 5, 6, 1, 1, 0), Conv(2, 100, 4, 8, 9, 1, 2, 0), Conv(1, 3, 3, 4, 5, 1, 1, 0),
    Conv(0, 8, 2, 4, 4, 1, 1, 0), Conv(1, 1, 1, 1, 3, 1, 1, 0),
]  # fmt: skip


def make(conv: Conv, *, bn: bool = True, bias: bool = True, residual: bool = False) -> dict[str, Any]:
    k = conv.k
    x = torch.randn(conv.n, conv.c, conv.h, conv.w).to(memory_format=torch.channels_last)
    weight = torch.randn(k, conv.c // conv.groups, conv.kernel, conv.kernel)
    shape = TF.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups).shape
    return {
        "x": x,
        "weight": weight / (weight[0].numel() ** 0.5),
        "bias": torch.randn(k) if bias else None,
        "bn": (torch.randn(k), torch.rand(k) + 0.5, torch.randn(k), torch.randn(k)) if bn else (None,) * 4,
        "residual": torch.randn(shape).to(memory_format=torch.channels_last) if residual else None,
    }


def stock(conv: Conv, t: dict[str, Any], act: int, dtype: torch.dtype) -> Tensor:
    def cast(v: Tensor | None) -> Tensor | None:
        return None if v is None else v.to(dtype)

    y = TF.conv2d(
        cast(t["x"]), cast(t["weight"]), cast(t["bias"]), conv.stride, conv.padding, conv.dilation, conv.groups
    )  # fmt: skip
    if t["bn"][0] is not None:
        y = TF.batch_norm(y, *map(cast, t["bn"]), False, 0.1, 1e-5)
    return ACTS[act](y if t["residual"] is None else y + cast(t["residual"]))


def ours(conv: Conv, t: dict[str, Any], act: int, algorithm: int, packed: Tensor | None = None) -> Tensor:
    if packed is None:
        packed = OPS.conv_bn_act_pack(t["weight"], conv.groups, algorithm)
    pairs = [[v, v] for v in (conv.stride, conv.padding, conv.dilation)]
    return OPS.conv_bn_act_packed(
        t["x"], t["weight"], packed, algorithm, t["bias"], *t["bn"], t["residual"], *pairs, conv.groups, 1e-5, False, act, 0.1
    )


def check(conv: Conv, algorithm: int, act: int, **options: bool) -> None:
    t = make(conv, **options)
    truth, eager, out = stock(conv, t, act, torch.float64), stock(conv, t, act, torch.float32), ours(conv, t, act, algorithm)
    assert out.shape == truth.shape and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    if not truth.numel():
        return
    scale = float(truth.abs().max())
    error, stock_error = float((out - truth).abs().max()), float((eager - truth).abs().max())
    bound = BOUNDS[algorithm] * scale if algorithm in BOUNDS else max(2 * stock_error, 2e-6 * scale)
    assert error <= bound, f"{error:.2e} against {stock_error:.2e} of stock, scale {scale:.2e}"


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("algorithm", [DIRECT, F2, F4, F6])
@pytest.mark.parametrize("conv", WINOGRAD, ids=str)
def test_three_by_three(conv: Conv, algorithm: int, act: int) -> None:
    check(conv, algorithm, act, residual=act % 2 == 1)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("conv", DIRECT_ONLY, ids=str)
def test_direct(conv: Conv, act: int) -> None:
    check(conv, DIRECT, act, residual=act % 2 == 0, bias=act < 3)


# Sums of 25,088 products, as in the middle of DeconvNet, and of 4,608, 2,500 and 700: pieces of several lengths.
LONG = [
    Conv(2, 512, 40, 7, 7, 7, 1, 0), Conv(1, 512, 33, 7, 9, 3), Conv(1, 100, 70, 5, 9, 5, 1, 0), Conv(2, 700, 8, 5, 3, 1, 1, 0),
]  # fmt: skip


def long_sums_hold(conv: Conv) -> None:
    """A sum of many positive numbers, behind a ReLU, errs no more than stock torch's, which is made in pieces too."""
    t = make(conv, bn=False, bias=False)
    t["x"], t["weight"] = t["x"].abs(), t["weight"].abs()  # one long chain would drift
    truth = stock(conv, t, 0, torch.float64)
    error, own = (out.double() - truth for out in (ours(conv, t, 0, DIRECT), stock(conv, t, 0, torch.float32)))
    assert float(error.abs().max()) <= 2 * float(own.abs().max())
    assert float(error.square().mean()) <= 4 * float(own.square().mean())
    assert float((error / truth).abs().max()) <= 2e-6


@pytest.mark.parametrize("conv", LONG, ids=str)
def test_long_sums(conv: Conv) -> None:
    long_sums_hold(conv)


@pytest.mark.parametrize("algorithm", [DIRECT, F2, F4, F6])
def test_without_batch_norm(algorithm: int) -> None:
    check(WINOGRAD[2], algorithm, 1, bn=False)
    check(WINOGRAD[2], algorithm, 0, bn=False, bias=False, residual=True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    small = st.integers(1, 20)
    algorithm = data.draw(st.sampled_from([DIRECT, F2, F4, F6]))
    direct = algorithm == DIRECT
    kernel = data.draw(st.integers(1, 5)) if direct else 3
    dilation = data.draw(st.integers(1, 2)) if direct else 1
    groups = data.draw(st.integers(1, 3)) if direct else 1
    # Not more than the kernel reaches: oneDNN, which stock torch runs on, crashes where an output lies in the padding alone
    # (torch 2.14.1: a 1x1 kernel with stride 3 and padding 2 on a 14 x 1 map, in brgemm_convolution_fwd_t::perform_outwork).
    padding = data.draw(st.integers(0, min(3, dilation * (kernel - 1))))
    least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
    conv = Conv(
        data.draw(st.integers(0, 3)), groups * data.draw(small), groups * data.draw(st.integers(1, 40)),
        least + data.draw(small) - 1, least + data.draw(small) - 1, kernel, data.draw(st.integers(1, 3)) if direct else 1,
        padding, dilation, groups,
    )  # fmt: skip
    check(conv, algorithm, data.draw(st.sampled_from(list(ACTS))), residual=data.draw(st.booleans()))


@pytest.mark.parametrize("algorithm", [DIRECT, F2, F4, F6])
def test_any_layout(algorithm: int) -> None:
    conv = Conv(2, 24, 40, 10, 11)
    t = make(conv, residual=True)
    expected = ours(conv, t, 1, algorithm)
    wide = torch.randn(2, 48, 12, 13).to(memory_format=torch.channels_last)
    sliced = wide[:, 8:32, 1:11, 2:13]
    for x in (t["x"].contiguous(), sliced.copy_(t["x"]), t["x"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        for residual in (t["residual"], t["residual"].contiguous()):
            assert torch.equal(ours(conv, t | {"x": x, "residual": residual}, 1, algorithm), expected)
    weight = t["weight"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(ours(conv, t | {"weight": weight}, 1, algorithm), expected)


@pytest.mark.parametrize("algorithm", [DIRECT, F2, F4, F6])
@pytest.mark.parametrize(
    "conv", [Conv(1, 32, 96, 7, 7), Conv(1, 16, 40, 60, 61), Conv(5, 64, 64, 9, 9), Conv(2, 600, 40, 5, 5)], ids=str
)
def test_same_bits_for_any_number_of_threads(conv: Conv, algorithm: int) -> None:
    t = make(conv, residual=True)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(ours(conv, t, 1, algorithm))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("algorithm", [DIRECT, F2, F4, F6])
def test_special_values_spread_as_in_stock(algorithm: int, value: float) -> None:
    """A Winograd transform would spoil a whole tile: the call then goes to the library."""
    conv = Conv(1, 20, 36, 11, 11)
    for name, at in (("x", (0, 3, 5, 6)), ("weight", (7, 2, 1, 1)), ("residual", (0, 3, 2, 2)), ("bias", (4,))):
        t = make(conv, residual=True)
        t[name][at] = value
        for act in (0, 1):
            expected, out = stock(conv, t, act, torch.float32), ours(conv, t, act, algorithm)
            finite = expected.isfinite()
            assert torch.equal(out.isnan(), expected.isnan()), (name, act)
            assert torch.equal(out[~finite], expected[~finite]) or expected[~finite].isnan().any()
            torch.testing.assert_close(out[finite], expected[finite], rtol=1e-4, atol=1e-4)


def hard_inputs(channels: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and weights on which transforms cancel: far from zero, alternating, in spikes, of very different sizes."""
    x, w = torch.randn(1, channels, 38, 37), torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    spikes = torch.zeros_like(x)
    spikes[:, :, ::7, ::5] = 1e3
    board = (torch.arange(38)[:, None] + torch.arange(37)) % 2 * 2.0 - 1.0
    return {
        "relu": (x.relu(), w),
        "shifted": (10 + x, w),
        "shifted, filters of sum zero": (10 + x, w - w.mean((1, 2, 3), keepdim=True)),
        "spikes": (spikes + x, w),
        "board": (board * (1 + 0.1 * x), w),
        "board, smooth filters": (board * (1 + 0.01 * x), torch.ones_like(w) / 9 + 0.1 * w),
        "range": (x * torch.logspace(-3, 3, channels)[:, None, None], w),
        "signs": (x.sign(), w.sign()),
    }


@pytest.mark.parametrize("channels", [16, 128, 256])
@pytest.mark.parametrize("algorithm", [F2, F4, F6])
def test_hard_inputs(algorithm: int, channels: int) -> None:
    conv = Conv(1, channels, channels, 38, 37)
    for name, (x, w) in hard_inputs(channels).items():
        t = make(conv, bn=False, bias=False) | {"x": x.to(memory_format=torch.channels_last), "weight": w}
        truth = stock(conv, t, 0, torch.float64)
        error = float((ours(conv, t, 0, algorithm) - truth).abs().max() / truth.abs().max())
        assert error <= {F2: 5e-6, F4: 3e-5, F6: 1e-4}[algorithm], f"{name}: {error:.2e}"


def dense(xs: list[Tensor], t: dict[str, Any], before: tuple[Tensor, ...], act: int, pool: int = 1) -> Tensor:
    packed = OPS.conv_bn_act_pack(t["weight"], 1, DIRECT)
    return OPS.bn_act_conv_packed(
        xs, t["weight"], packed, *before, 1e-5, False, act, pool, t["bias"], *t["bn"], 1e-5, False, 1, 0.0
    )  # fmt: skip


@pytest.mark.parametrize("act", [0, 1, 3])
@pytest.mark.parametrize("channels", [(64, 32, 32), (16, 7), (24,), (1,), (48, 16, 96, 5)], ids=str)
@pytest.mark.parametrize("pool", [1, 2])
def test_normalise_on_the_way_in(channels: tuple[int, ...], act: int, pool: int) -> None:
    c, conv = sum(channels), Conv(2, sum(channels), 50, 9, 7, 1, 1, 0)
    t = make(conv)
    xs = [torch.randn(2, n, 9, 7).to(memory_format=torch.channels_last) for n in channels]
    xs[0] = xs[0].contiguous()  # another layout is copied
    before = (torch.randn(c), torch.rand(c) + 0.5, torch.randn(c), torch.randn(c))

    def reference(dtype: torch.dtype) -> Tensor:
        x = TF.batch_norm(torch.cat(xs, 1).to(dtype), *(v.to(dtype) for v in before), False, 0.1, 1e-5)
        return stock(conv, t | {"x": TF.avg_pool2d(ACTS[act](x), pool)}, 1, dtype)

    truth = reference(torch.float64)
    stock_error = float((reference(torch.float32) - truth).abs().max())
    error = float((dense(xs, t, before, act, pool) - truth).abs().max())
    assert error <= max(2 * stock_error, 2e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("conv", NARROW, ids=str)
def test_dot_products(conv: Conv, act: int) -> None:
    check(conv, DOTS, act)
    check(conv, DOTS, act, bn=False, residual=True)
    if conv.n:
        t = make(conv)
        expected = ours(conv, t, act, DOTS)
        assert torch.equal(ours(conv, t | {"x": t["x"].contiguous()}, act, DOTS), expected)
        t["x"][0, 0, 0, 0] = float("nan")
        assert torch.equal(ours(conv, t, act, DOTS).isnan(), stock(conv, t, act, torch.float32).isnan())


def test_choice() -> None:
    """exact excludes F(4x4) and F(6x6); narrow groups and 16-byte vectors go to the library."""
    if _extension.host().cpu_features()["isa"] not in ("avx512", "avx2"):
        pytest.skip("the engine is chosen with AVX2 and AVX-512 only")

    def choose(conv: Conv, exact: bool) -> int:
        x, weight = torch.empty(conv.n, conv.c, conv.h, conv.w), torch.empty(conv.k, conv.c // conv.groups, 3, 3)
        pair = (conv.stride,) * 2
        return _packing.choose(x, weight, pair, (conv.padding,) * 2, (conv.dilation,) * 2, conv.groups, exact)

    assert choose(Conv(1, 64, 64, 112, 112), False) == F6
    assert choose(Conv(1, 256, 256, 14, 14), False) in (F2, F4)  # tiles of 6 x 6 fit badly
    assert choose(Conv(1, 512, 512, 112, 112), False) == F4  # F(6x6) errs more on long sums
    assert choose(Conv(1, 64, 64, 56, 56), True) == F2
    assert choose(Conv(1, 64, 64, 56, 56, stride=2), False) == DIRECT
    assert choose(Conv(1, 64, 64, 56, 56, dilation=2), False) == DIRECT
    assert choose(Conv(1, 64, 64, 56, 56, groups=16), False) == _packing.LIBRARY
    # So few tiles that reading four times the weight costs more than the multiplications it saves.
    assert choose(Conv(1, 512, 512, 7, 7), False) == F2
    x, head = torch.empty(1, 32, 64, 64), torch.empty(3, 32, 1, 1)
    assert _packing.choose(x, head, (1, 1), (0, 0), (1, 1), 1, True) == DOTS


RUN = """
import json, torch
from tests.ops.test_conv_engine import Conv, WINOGRAD, DIRECT_ONLY, NARROW, LONG, check, choices, long_sums_hold
torch.manual_seed(0)
for conv in WINOGRAD:
    for algorithm in (1, 2, 4, 6):
        check(conv, algorithm, 1, residual=True)
for conv in DIRECT_ONLY:
    check(conv, 1, 4)
for conv in NARROW:
    check(conv, 8, 1, residual=True)
for conv in LONG:
    long_sums_hold(conv)
print(json.dumps(choices()))
"""


def choices() -> list[int]:
    geometry = ((1, 1), (1, 1), (1, 1))
    return [_packing.choose(torch.empty(1, 64, s, s), torch.empty(64, 64, 3, 3), *geometry, 1, False) for s in (7, 28, 112)]


def in_subprocess(code: str, **environment: str) -> list[int]:
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd=root
    )
    if "this machine does not have" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    chosen = in_subprocess(RUN, DL4DS_CPU_ISA=isa)
    assert (chosen == [_packing.LIBRARY] * 3) == (isa == "baseline")


@pytest.mark.slow
def test_winograd_can_be_switched_off() -> None:
    assert set(in_subprocess(RUN, DL4DS_WINOGRAD="0")) <= {DIRECT, _packing.LIBRARY}


def test_bad_arguments_are_named() -> None:
    conv = Conv(1, 8, 8, 6, 6)
    t = make(conv)
    packed = OPS.conv_bn_act_pack(t["weight"], 1, F2)
    with pytest.raises(RuntimeError, match="algorithm: expected 1, 2, 3, 4, 6, 7 or 8, got 5"):
        OPS.conv_bn_act_pack(t["weight"], 1, 5)
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        OPS.conv_bn_act_pack(torch.randn(8, 8, 3), 1, DIRECT)
    with pytest.raises(RuntimeError, match="algorithm: expected one for weight"):
        OPS.conv_bn_act_pack(torch.randn(8, 8, 5, 5), 1, F2)
    with pytest.raises(RuntimeError, match="packed: expected"):
        ours(conv, t, 1, F4, packed)
    with pytest.raises(RuntimeError, match="x: expected shape"):
        ours(conv, t | {"x": torch.randn(1, 7, 6, 6)}, 1, F2, packed)
    with pytest.raises(RuntimeError, match="residual: expected shape"):
        ours(conv, t | {"residual": torch.randn(1, 8, 6, 5)}, 1, F2, packed)
    with pytest.raises(RuntimeError, match="does not fit this convolution"):
        ours(conv._replace(stride=2), t, 1, F2, packed)
    with pytest.raises(RuntimeError, match="padded input at least as large as the kernel"):
        ours(conv._replace(padding=0), t | {"x": torch.randn(1, 8, 2, 2)}, 1, F2, packed)


def test_opcheck() -> None:
    conv = Conv(1, 8, 8, 6, 6)
    t = make(conv, residual=True)
    packed = OPS.conv_bn_act_pack(t["weight"], 1, F2)
    pairs = [[1, 1]] * 3
    arguments = (t["x"], t["weight"], packed, F2, t["bias"], *t["bn"], t["residual"], *pairs, 1, 1e-5, False, 1, 0.1)
    torch.library.opcheck(OPS.conv_bn_act_packed.default, arguments, test_utils=("test_schema", "test_faketensor"))
    t = make(Conv(1, 32, 8, 6, 6, 1, 1, 0))
    direct = OPS.conv_bn_act_pack(t["weight"], 1, DIRECT)
    xs = [t["x"][:, :16], t["x"][:, 16:]]
    before = (torch.zeros(32), torch.ones(32), None, None)
    arguments = (xs, t["weight"], direct, *before, 1e-5, False, 1, 1, None, *t["bn"], 1e-5, False, 1, 0.0)
    torch.library.opcheck(OPS.bn_act_conv_packed.default, arguments, test_utils=("test_schema", "test_faketensor"))
