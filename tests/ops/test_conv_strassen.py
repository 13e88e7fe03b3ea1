"""One step of Strassen's algorithm for 1x1 convolutions (algorithm 7 of ``conv_bn_act_packed``)."""

from __future__ import annotations

import pytest
import torch

from dl4ds_kernels import _extension, _packing
from tests.ops.test_conv_engine import ACTS, DIRECT, OPS, Conv, in_subprocess, make, ours, stock

pytestmark = pytest.mark.skipif(not _extension.status()["_C"].loaded, reason="the engine is in the C++ part")

STRASSEN = 7
# An error relative to the scale of the whole output, like F(4x4)'s; the documented bound is 1e-4.
BOUND = 2e-5

# Odd numbers of pixels, several images, strides, few and many tiles; channels are multiples of 64 as the algorithm asks.
CONVS = [
    Conv(1, 64, 64, 14, 14, 1, 1, 0), Conv(3, 128, 64, 7, 7, 1, 1, 0), Conv(2, 64, 128, 15, 13, 1, 2, 0),
    Conv(1, 32, 192, 1, 1, 1, 1, 0), Conv(5, 96, 64, 1, 3, 1, 1, 0), Conv(1, 256, 128, 40, 41, 1, 1, 0),
    Conv(0, 64, 64, 5, 5, 1, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_against_fp64(conv: Conv, act: int) -> None:
    t = make(conv, residual=act % 2 == 1)
    truth, out = stock(conv, t, act, torch.float64), ours(conv, t, act, STRASSEN)
    assert out.shape == truth.shape and out.is_contiguous(memory_format=torch.channels_last)
    if truth.numel():
        assert float((out - truth).abs().max()) <= BOUND * float(truth.abs().max())


@pytest.mark.parametrize("scales", [(1e4, 1.0), (1.0, 1e4), (1e-3, 1.0)], ids=str)
def test_neighbours_of_another_size(scales: tuple[float, float]) -> None:
    """Two pixels share sums: the error of the smaller is bounded by the larger."""
    conv = Conv(2, 128, 128, 8, 8, 1, 1, 0)
    t = make(conv, bn=False, bias=False)
    t["x"][..., 0::2] *= scales[0]
    t["x"][..., 1::2] *= scales[1]
    truth, out = stock(conv, t, 0, torch.float64), ours(conv, t, 0, STRASSEN)
    assert float((out - truth).abs().max()) <= BOUND * float(truth.abs().max())


def test_images_do_not_touch_one_another() -> None:
    """A tile never spans two images: a result does not depend on what else is in the batch."""
    conv = Conv(3, 128, 64, 7, 7, 1, 1, 0)
    t = make(conv)
    whole = ours(conv, t, 1, STRASSEN)
    for i in range(3):
        assert torch.equal(whole[i : i + 1], ours(conv, t | {"x": t["x"][i : i + 1]}, 1, STRASSEN))


@pytest.mark.parametrize("conv", [CONVS[1], CONVS[5]], ids=str)
def test_same_bits_for_any_number_of_threads(conv: Conv) -> None:
    t = make(conv, residual=True)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(ours(conv, t, 1, STRASSEN))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_special_values_spread_as_in_stock(value: float) -> None:
    conv = Conv(2, 64, 64, 5, 5, 1, 1, 0)
    for name, at in (("x", (0, 3, 2, 2)), ("x", (1, 3, 4, 4)), ("weight", (40, 35, 0, 0)), ("residual", (0, 3, 2, 2))):
        t = make(conv, residual=True)
        t[name][at] = value
        expected, out = stock(conv, t, 0, torch.float32), ours(conv, t, 0, STRASSEN)
        finite = expected.isfinite()
        assert torch.equal(out.isnan(), expected.isnan()), name
        scale = float(expected[finite].abs().max())  # 3e38 overflows nowhere, and bounds its neighbour's error
        assert float((out[finite].double() - expected[finite]).abs().max()) <= BOUND * scale, name


def test_only_where_it_fits() -> None:
    for shape, groups in (((64, 48, 1, 1), 1), ((72, 64, 1, 1), 1), ((64, 64, 3, 3), 1), ((128, 64, 1, 1), 2)):
        with pytest.raises(RuntimeError, match="algorithm: expected one for weight"):
            OPS.conv_bn_act_pack(torch.randn(shape), groups, STRASSEN)


def choose(conv: Conv, exact: bool) -> int:
    x, weight = torch.empty(conv.n, conv.c, conv.h, conv.w), torch.empty(conv.k, conv.c, 1, 1)
    return _packing.choose(x, weight, (conv.stride,) * 2, (0, 0), (1, 1), 1, exact)


def test_choice() -> None:
    """Taken where the sums cost less than the product they save, and never with exact=True."""
    if _extension.host().cpu_features()["isa"] != "avx512":
        pytest.skip("sizes at which the choice changes are those of AVX-512")
    wide, narrow = Conv(1, 1024, 256, 14, 14, 1, 1, 0), Conv(1, 64, 256, 56, 56, 1, 1, 0)
    assert choose(wide, False) == STRASSEN and choose(wide, True) == DIRECT
    assert choose(narrow, False) == DIRECT


RUN = """
import json, torch
from tests.ops.test_conv_strassen import CONVS, Conv, choose, test_against_fp64
for conv in CONVS:
    test_against_fp64(conv, 1)
print(json.dumps([choose(Conv(1, 1024, 256, 14, 14, 1, 1, 0), False)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    in_subprocess(RUN, DL4DS_CPU_ISA=isa)


@pytest.mark.slow
def test_can_be_switched_off() -> None:
    assert STRASSEN not in in_subprocess(RUN, DL4DS_STRASSEN="0")
