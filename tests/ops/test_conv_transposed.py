"""``conv_transpose_bn_act_packed`` (2x2, stride 2): against fp64 and stock torch, and the module helper that calls it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as TF
from _isa import every_isa, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv_engine import ACTS
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import _extension, _packing
from dl4ds_kernels.modules._packed import Epilogue
from dl4ds_kernels.modules._transposed import is_convolution, one_pixel, run_conv_transpose_act, run_conv_transpose_bn_act

pytestmark = pytest.mark.skipif(not _extension.status()["_C"].loaded, reason="the engine is in the C++ part")

OPS = torch.ops.dl4ds_kernels
CL = torch.channels_last
# (N, C, C_out, H, W): around panels, chunks and the rows of an A panel; few units for the threads; an empty batch.
CASES = [
    (1, 64, 32, 16, 16), (2, 3, 5, 7, 9), (1, 16, 1, 1, 1), (1, 1, 16, 5, 14), (3, 33, 17, 4, 15), (1, 48, 40, 3, 29),
    (1, 512, 256, 2, 2), (2, 20, 8, 40, 13), (1, 100, 64, 31, 33), (0, 8, 8, 4, 4),
]  # fmt: skip
on_vectors = pytest.mark.skipif(
    _extension.status()["_C"].loaded and _extension.host().cpu_features()["isa"] not in ("avx512", "avx2"),
    reason="chosen with AVX2 and AVX-512 only",
)


def make(n: int, c: int, k: int, h: int, w: int, bn: bool = True, bias: bool = True) -> dict:
    return {
        "x": torch.randn(n, c, h, w).to(memory_format=CL),
        "weight": torch.randn(c, k, 2, 2) / c**0.5,
        "bias": torch.randn(k) if bias else None,
        "bn": (torch.randn(k), torch.rand(k) + 0.5, torch.randn(k), torch.randn(k)) if bn else (None,) * 4,
    }


def stock(t: dict, act: int, dtype: torch.dtype) -> Tensor:
    cast = lambda v: None if v is None else v.to(dtype)  # noqa: E731
    y = TF.conv_transpose2d(cast(t["x"]), cast(t["weight"]), cast(t["bias"]), 2)
    if t["bn"][0] is not None:
        y = TF.batch_norm(y, *map(cast, t["bn"]), False, 0.1, 1e-5)
    return ACTS[act](y)


def ours(t: dict, act: int) -> Tensor:
    packed = OPS.conv_transpose_bn_act_pack(t["weight"])
    return OPS.conv_transpose_bn_act_packed(t["x"], t["weight"], packed, t["bias"], *t["bn"], 1e-5, False, act, 0.1)


def check(case: tuple[int, ...], act: int, **options: bool) -> None:
    t = make(*case, **options)
    truth, eager, out = stock(t, act, torch.float64), stock(t, act, torch.float32), ours(t, act)
    assert out.shape == truth.shape and out.is_contiguous(memory_format=CL)
    if truth.numel():
        scale = float(truth.abs().max())
        error, stock_error = float((out - truth).abs().max()), float((eager - truth).abs().max())
        assert error <= max(2 * stock_error, 2e-6 * scale), f"{error:.2e} against {stock_error:.2e} of stock"


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: tuple[int, ...], act: int) -> None:
    check(case, act, bn=act % 2 == 0, bias=act < 4)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_size(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    check((draw(1, 3), draw(1, 40), draw(1, 70), draw(1, 20), draw(1, 40)), draw(0, 5), bn=data.draw(st.booleans()))


@pytest.mark.parametrize("case", [(1, 64, 64, 2, 2), (1, 24, 20, 30, 31), (5, 64, 32, 9, 9)], ids=str)
def test_same_bits_for_any_number_of_threads(case: tuple[int, ...]) -> None:
    t = make(*case)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(ours(t, 1))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_spread_as_in_stock(value: float) -> None:
    for name, at in (("x", (0, 3, 5, 6)), ("weight", (2, 7, 0, 1)), ("bias", (4,))):
        t = make(1, 20, 36, 11, 11)
        t[name][at] = value
        for act in (0, 1):
            torch.testing.assert_close(ours(t, act), stock(t, act, torch.float32), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_any_layout() -> None:
    t = make(2, 24, 40, 10, 11)
    expected = ours(t, 1)
    sliced = torch.full((2, 48, 12, 13), float("nan")).to(memory_format=CL)[:, 8:32, 1:11, 2:13]
    for x in (t["x"].contiguous(), sliced.copy_(t["x"]), t["x"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert torch.equal(ours(t | {"x": x}, 1), expected)
    assert torch.equal(ours(t | {"weight": t["weight"].to(memory_format=CL)}, 1), expected)


def test_bad_arguments_are_named() -> None:
    t = make(1, 8, 8, 4, 4)
    for change, message in (
        ({"x": torch.randn(1, 7, 4, 4)}, "x: expected shape"),
        ({"x": t["x"].double()}, "x: expected dtype float32"),
        ({"bias": torch.randn(7)}, "bias: expected a contiguous float32 vector"),
        ({"bn": (torch.randn(8), torch.rand(9), None, None)}, "running_var: expected a contiguous"),
    ):
        with pytest.raises(RuntimeError, match=f"conv_transpose_bn_act: {message}"):
            ours(t | change, 0)
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        OPS.conv_transpose_bn_act_pack(torch.randn(8, 8, 3, 3))
    packed = OPS.conv_transpose_bn_act_pack(torch.randn(16, 8, 2, 2))
    with pytest.raises(RuntimeError, match="packed: expected"):
        OPS.conv_transpose_bn_act_packed(t["x"], t["weight"], packed, None, *t["bn"], 1e-5, False, 0, 0.0)


def test_opcheck() -> None:
    t = make(1, 8, 8, 6, 6)
    packed = OPS.conv_transpose_bn_act_pack(t["weight"])
    arguments = (t["x"], t["weight"], packed, t["bias"], *t["bn"], 1e-5, False, 1, 0.1)
    torch.library.opcheck(
        OPS.conv_transpose_bn_act_packed.default, arguments, test_utils=("test_schema", "test_faketensor")
    )  # fmt: skip


@on_vectors
def test_module_helper() -> None:
    """Where it applies it is equal to the stock modules; where not it says so and the module itself is called."""
    conv, bn = nn.ConvTranspose2d(32, 24, 2, 2).eval(), nn.BatchNorm2d(24).eval()
    with torch.no_grad():
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2), bn.weight.normal_()
    epilogue = Epilogue(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, False, 1, 0.0)
    x = torch.randn(2, 32, 30, 31)
    assert run_conv_transpose_act(x, conv, epilogue) is None  # grad is on
    with torch.no_grad():
        torch.testing.assert_close(run_conv_transpose_act(x, conv, epilogue), torch.relu(bn(conv(x))), rtol=1e-5, atol=1e-5)
        assert _packing.algorithms(conv) == ("transposed 2x2",)
        first = run_conv_transpose_act(x, conv, epilogue)
        conv.weight.mul_(2)  # seen by the pack
        torch.testing.assert_close(run_conv_transpose_act(x, conv, epilogue), torch.relu(bn(conv(x))), rtol=1e-5, atol=1e-5)
        assert not torch.equal(first, run_conv_transpose_act(x, conv, epilogue))
        assert run_conv_transpose_act(x[:1, :, :2, :2], conv, epilogue) is None  # too small to gain
        assert run_conv_transpose_act(x.double(), conv, epilogue) is None
        for other in (
            nn.ConvTranspose2d(32, 24, 3, 2), nn.ConvTranspose2d(32, 24, 2, 2, 1), nn.ConvTranspose2d(32, 24, 2, 2, groups=2),
            nn.ConvTranspose2d(32, 24, 2, 2, output_padding=1), nn.ConvTranspose2d(32, 24, 2, 2, dilation=2),
        ):  # fmt: skip
            assert run_conv_transpose_act(x, other.eval(), epilogue) is None
        conv.register_forward_hook(lambda module, args, out: out + 1)
        assert run_conv_transpose_act(x, conv, epilogue) is None
        assert torch.equal(run_conv_transpose_bn_act(x, conv, None), conv(x))


@on_vectors
def test_optimize_takes_lone_ones() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(64, 32, 2, 2)

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return torch.cat((self.up(x), skip), 1)

    stock_model = Up().eval()
    x, skip = torch.randn(1, 64, 72, 73), torch.randn(1, 4, 144, 146)
    model = dk.optimize(stock_model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, skip), stock_model(x, skip), rtol=1e-5, atol=1e-5)
        assert dk.algorithms(model) == {"up": ("transposed 2x2",)}
        with pytest.warns(UserWarning, match="changed nothing"):
            kept = dk.optimize(stock_model, exclude="up")
        assert torch.equal(kept(x, skip), stock_model(x, skip)) and "forward" not in vars(kept)
    model.train()
    out = model(x, skip)
    out.sum().backward()
    assert torch.equal(out, stock_model(x, skip)) and model.up.weight.grad is not None
    assert dk.restore(model) is model and "forward" not in vars(model) and not dk.algorithms(model)


def layer(c: int, k: int, *geometry: int, bias: bool = True) -> tuple[nn.ConvTranspose2d, nn.BatchNorm2d]:
    conv, bn = nn.ConvTranspose2d(c, k, *geometry, bias=bias).eval(), nn.BatchNorm2d(k).eval()
    with torch.no_grad():
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2), bn.weight.normal_()
    return conv, bn


def compared(x: Tensor, conv: nn.Module, bn: nn.Module | None, exact: bool) -> None:
    """Ours against fp64: at most twice stock's error with ``exact``, within 2e-5 of the largest output without."""
    stock = nn.Sequential(conv, nn.Identity() if bn is None else bn)
    act = dk.modules._run.ActSpec("relu", 0.0, None)
    truth, own = copy.deepcopy(stock).double()(x.double()).relu(), stock(x).relu()
    out = run_conv_transpose_bn_act(x, conv, bn, act, exact=exact)
    assert out.shape == truth.shape and _packing.algorithms(conv)
    largest, scale = float((out - truth).abs().max()), float(truth.abs().max())
    assert largest <= (max(2 * float((own - truth).abs().max()), 1e-6 * scale) if exact else 2e-5 * scale)


@on_vectors
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("geometry", [(3, 1, 1), (5, 1, 2), ((3, 1), 1, (1, 0)), (1, 1, 0), (3, 1, 2)], ids=str)
def test_stride_one_is_a_convolution(geometry: tuple, exact: bool) -> None:
    """Turned filters, exchanged channels; the pack follows the weight, and an infinite value spreads as in stock."""
    for bias, with_bn in ((True, True), (False, False)):
        conv, bn = layer(64, 48, *geometry, bias=bias)
        assert is_convolution(conv)
        x = torch.randn(2, 64, 20, 23)
        with torch.no_grad():
            compared(x, conv, bn if with_bn else None, exact)
            conv.weight.mul_(-1.5)
            compared(x, conv, bn if with_bn else None, exact)
            x[0, 3, 5, 6] = float("inf")
            expected, out = (
                torch.relu(conv(x)),
                run_conv_transpose_bn_act(x, conv, None, dk.modules._run.ActSpec("relu", 0.0, None)),
            )
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@on_vectors
def test_what_is_no_convolution_goes_to_the_library() -> None:
    x = torch.randn(1, 64, 20, 20)
    for conv in (
        nn.ConvTranspose2d(64, 48, 3), nn.ConvTranspose2d(64, 48, 3, 2, 1), nn.ConvTranspose2d(64, 48, 3, padding=1, groups=2),
        nn.ConvTranspose2d(64, 48, 3, padding=2, dilation=2), nn.ConvTranspose2d(64, 48, 3, 2, 1, output_padding=1),
    ):  # fmt: skip
        assert not is_convolution(conv)
        with torch.no_grad():
            assert torch.equal(run_conv_transpose_bn_act(x, conv.eval(), None), conv(x))
            assert not _packing.algorithms(conv)
    conv = nn.ConvTranspose2d(64, 48, 3, padding=1).eval()
    assert torch.equal(run_conv_transpose_bn_act(x, conv, None), conv(x))  # with gradients
    assert not is_convolution(nn.Conv2d(4, 4, 3, padding=1)) and not is_convolution(nn.Identity())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_one_pixel_is_a_matrix_product(bias: bool, dtype: torch.dtype) -> None:
    """DeconvNet's first transposed convolution; 1,024 channels are summed up in four pieces, 1,100 in five."""
    for channels, rows in ((1024, 1), (1024, 3), (1100, 2)):
        conv, bn = layer(channels, 40, 7, bias=bias)
        conv, bn = conv.to(dtype), bn.to(dtype)
        x = torch.rand(rows, channels, 1, 1, dtype=dtype)
        assert one_pixel(x, conv) is None  # with gradients
        with torch.no_grad():
            truth, own = copy.deepcopy(conv).double()(x.double()), conv(x)
            out = one_pixel(x, conv)
            assert out.shape == own.shape and out.dtype == dtype
            error = float((out.double() - truth).abs().max())
            assert error <= max(2 * float((own.double() - truth).abs().max()), 1e-6 * float(truth.abs().max()))
            fused = run_conv_transpose_bn_act(x, conv, bn)
            torch.testing.assert_close(fused, bn(own), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for other in (
            nn.ConvTranspose2d(1024, 40, 7, padding=1),
            nn.ConvTranspose2d(1024, 40, 7, groups=2),
            nn.ConvTranspose2d(8, 4, 7),
        ):
            assert one_pixel(torch.rand(1, other.in_channels, 1, 1), other.eval()) is None
        assert one_pixel(torch.rand(1, 1024, 2, 1), nn.ConvTranspose2d(1024, 40, 7)) is None


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import test_conv_transposed as tests
for case in tests.CASES:
    tests.check(case, 1)
    tests.check(case, 4)
"""


@pytest.mark.slow
@every_isa
def test_every_instruction_set(isa: str) -> None:
    run_with(isa, RUN, __file__)
