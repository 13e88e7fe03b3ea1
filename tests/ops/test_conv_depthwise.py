"""The depthwise algorithm of the CPU engine: against fp64 and stock torch, any geometry, every instruction set."""

from __future__ import annotations

import json

import pytest
import torch
from _isa import run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv_engine import ACTS, Conv, check, make, ours, stock
from torch import nn

import dl4ds_kernels as dk
from dl4ds_kernels import _extension, _packing

pytestmark = pytest.mark.skipif(not _extension.status()["_C"].loaded, reason="the engine is in the C++ part")

DEPTHWISE = 3
OPS = torch.ops.dl4ds_kernels


def depthwise(n: int, c: int, h: int, w: int, kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1) -> Conv:
    return Conv(n, c, c, h, w, kernel, stride, padding, dilation, c)


# Channels and widths around every vector and block of pixels; borders wider than the map; taps that never touch it.
CASES = (
    [depthwise(2, c, 9, 11, kernel, stride, kernel // 2)
     for c in (2, 3, 8, 16, 17, 40, 96) for kernel in (3, 5) for stride in (1, 2)]
    + [depthwise(1, 20, 3, w) for w in range(1, 14)] + [depthwise(1, 20, 3, w, 5, 2, 2) for w in (1, 2, 7, 8, 15, 16, 17)]
    + [depthwise(3, 24, 15, 14, 7, 1, 3), depthwise(1, 24, 15, 14, 7, 3, 0), depthwise(1, 33, 15, 14, 3, 1, 2, 2),
       depthwise(1, 33, 13, 12, 3, 2, 4, 4), depthwise(1, 9, 5, 4, 1, 1, 0), depthwise(1, 9, 5, 4, 4, 1, 3),
       depthwise(1, 9, 2, 2, 5, 1, 2),
       depthwise(1, 9, 8, 8, 2, 2, 0), depthwise(0, 9, 5, 4), depthwise(1, 130, 4, 4)]
)  # fmt: skip


@pytest.mark.parametrize("conv", CASES, ids=str)
def test_against_fp64(conv: Conv) -> None:
    check(conv, DEPTHWISE, 1, residual=True)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("options", [{"bn": False, "bias": False}, {"bn": False}, {"residual": True}, {}], ids=str)
def test_epilogues(act: int, options: dict[str, bool]) -> None:
    for conv in (depthwise(2, 21, 7, 12), depthwise(1, 48, 9, 9, 5, 2, 2), depthwise(1, 24, 8, 8, 3, 1, 2, 2)):
        check(conv, DEPTHWISE, act, **options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    kernel, dilation = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    reach = dilation * (kernel - 1)
    # Padding up to the kernel's reach: oneDNN crashes beyond (see test_conv_engine.py).
    padding = data.draw(st.integers(0, reach))
    least = max(1, reach + 1 - 2 * padding)
    size = st.integers(least, least + 20)
    conv = depthwise(
        data.draw(st.integers(1, 3)), data.draw(st.integers(2, 70)), data.draw(size), data.draw(size), kernel,
        data.draw(st.integers(1, 4)), padding, dilation,
    )  # fmt: skip
    check(conv, DEPTHWISE, data.draw(st.sampled_from(list(ACTS))), residual=data.draw(st.booleans()))


@pytest.mark.parametrize("conv", [depthwise(1, 40, 30, 31), depthwise(5, 96, 14, 14, 5, 2, 2)], ids=str)
def test_same_bits_for_any_number_of_threads(conv: Conv) -> None:
    t = make(conv, residual=True)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(ours(conv, t, 1, DEPTHWISE))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_spread_as_in_stock(value: float) -> None:
    for conv in (depthwise(1, 20, 11, 11), depthwise(2, 20, 11, 10, 5, 2, 2)):
        for name, at in (("x", (0, 3, 5, 6)), ("x", (0, 19, 0, 0)), ("weight", (7, 0, 1, 1)), ("residual", (0, 3, 2, 2))):
            t = make(conv, residual=True)
            t[name][at] = value
            for act in (0, 1):
                expected, out = stock(conv, t, act, torch.float32), ours(conv, t, act, DEPTHWISE)
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_any_layout() -> None:
    conv = depthwise(2, 24, 10, 11)
    t = make(conv, residual=True)
    expected = ours(conv, t, 1, DEPTHWISE)
    sliced = torch.full((2, 48, 12, 13), float("nan")).to(memory_format=torch.channels_last)[:, 8:32, 1:11, 2:13]
    for x in (t["x"].contiguous(), sliced.copy_(t["x"]), t["x"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert torch.equal(ours(conv, t | {"x": x}, 1, DEPTHWISE), expected)


def test_only_depthwise_weights() -> None:
    with pytest.raises(RuntimeError, match="algorithm: expected one for weight"):
        OPS.conv_bn_act_pack(torch.randn(8, 2, 3, 3), 4, DEPTHWISE)
    with pytest.raises(RuntimeError, match="algorithm: expected one for weight"):
        OPS.conv_bn_act_pack(torch.randn(8, 1, 3, 3), 4, DEPTHWISE)  # two filters a channel


@pytest.mark.skipif(
    _extension.status()["_C"].loaded and _extension.host().cpu_features()["isa"] not in ("avx512", "avx2"),
    reason="the engine is chosen with AVX2 and AVX-512 only",
)
def test_optimize_takes_it() -> None:
    """The depthwise layer of a stock model, by choice of its own, equal to stock."""
    block = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6()).eval()
    model, x = dk.optimize(block), torch.randn(1, 32, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(x), block(x), rtol=1e-5, atol=1e-5)
    assert dk.algorithms(model) == {"0": (_packing.ALGORITHMS[DEPTHWISE],)}


RUN = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import test_conv_depthwise as tests
sums = []
for i, conv in enumerate(tests.CASES):
    tests.check(conv, 3, 4 if i % 7 == 0 else 1, residual=True)
    torch.manual_seed(i)
    t = tests.make(conv, residual=True)
    sums.append(tests.ours(conv, t, 1, 3).double().sum().item())
print(json.dumps(sums))
"""


def on(isa: str) -> list[float]:
    return json.loads(run_with(isa, RUN, __file__).splitlines()[-1])


@pytest.mark.slow
def test_avx2_and_avx512_give_the_same_bits() -> None:
    assert on("avx2") == on("avx512")


@pytest.mark.slow
def test_sixteen_byte_vectors() -> None:
    on("baseline")
