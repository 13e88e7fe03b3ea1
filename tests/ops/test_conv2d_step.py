"""A training step's convolutions: Winograd's F(2x2, 3x3) for the output and both gradients, and who chooses it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import dl4ds_kernels as dk
from dl4ds_kernels import _cpu_conv, _extension
from dl4ds_kernels import functional as F
from dl4ds_kernels.functional._conv2d import conv2d
from tests._assert import no_worse_than_torch

_FAST = _extension.status()["_C"].loaded and _extension.host().cpu_features()["isa"] in ("avx512", "avx2")
pytestmark = pytest.mark.skipif(not _FAST, reason="the kernels need the C++ part and AVX2; elsewhere the library serves")

OPS = torch.ops.dl4ds_kernels
LAST = torch.channels_last
DIRECT, WINOGRAD = 1, 2
# (N, C, C_out, H, W, padding) of 3x3: odd sizes, channels that fill no vector, every padding Winograd takes
TILES = [
    (2, 16, 32, 8, 8, 1), (2, 33, 17, 9, 14, 1), (3, 64, 64, 14, 14, 1), (2, 48, 40, 13, 11, 0), (4, 20, 65, 6, 7, 2),
    (16, 128, 32, 3, 3, 1), (2, 40, 24, 70, 70, 1), (8, 96, 128, 7, 7, 1), (2, 17, 64, 9, 40, (0, 2)), (40, 1, 1, 4, 5, 1),
]  # fmt: skip
# (N, C, C_out, H, W, kernel, stride, padding, dilation): 1x1, strided, stems, odd channels, one pixel, long sums
PIXELS = [
    (2, 64, 64, 14, 14, 1, 1, 0, 1), (1, 33, 17, 9, 14, 1, 1, 0, 1), (4, 256, 48, 4, 4, 1, 1, 0, 1),
    (3, 24, 100, 5, 1, 1, 1, 0, 1), (2, 1, 1, 4, 5, 1, 1, 0, 1), (2, 16, 16, 70, 70, 1, 1, 0, 1),
    (1, 2, 3, 1, 1, 1, 1, 0, 1), (2, 64, 96, 9, 8, 1, 2, 0, 1),
    (2, 19, 21, 13, 11, 1, 3, 0, 1), (2, 32, 48, 12, 9, 3, 2, 1, 1), (3, 20, 17, 11, 13, 3, 2, 1, 1),
    (2, 16, 40, 10, 10, 3, 2, 0, 1), (2, 3, 64, 31, 32, 7, 2, 3, 1), (2, 48, 16, 9, 9, 3, 1, 1, 1),
    (2, 16, 33, 12, 12, 3, 1, 2, 2), (1, 8, 24, 17, 16, 5, 3, 2, 1),
    (2, 16, 8, 12, 10, (1, 3), (1, 2), (0, 1), 1), (2, 12, 20, 9, 9, 2, 2, 0, 1),
    (3, 37, 50, 61, 53, 1, 1, 0, 1), (2, 6, 20, 133, 131, 3, 2, 1, 1),  # the weight's gradient in parts
]  # fmt: skip
CASES = [(WINOGRAD, (*shape[:5], 3, 1, shape[5], 1)) for shape in TILES] + [(DIRECT, shape) for shape in PIXELS]


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _name(value: Any) -> str:
    return {DIRECT: "direct", WINOGRAD: "winograd"}[value] if isinstance(value, int) else "-".join(map(str, value))


class Case:
    """Tensors of one convolution, and the results of stock torch and ours."""

    def __init__(self, algorithm: int, shape: tuple[Any, ...], weight_format: torch.memory_format = LAST) -> None:
        n, c, k, h, w, kernel, *geometry = shape
        self.algorithm, self.geometry, kernel = algorithm, [_pair(v) for v in geometry], _pair(kernel)
        self.t = {
            "x": torch.randn(n, c, h, w).to(memory_format=LAST),
            "weight": (torch.randn(k, c, *kernel) / (kernel[0] * kernel[1] * c) ** 0.5).to(memory_format=weight_format),
            "bias": torch.randn(k),
        }
        out = torch.conv2d(self.t["x"], self.t["weight"], None, *self.geometry)
        self.t["dout"] = torch.randn_like(out).to(memory_format=LAST)

    def stock(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, weight, bias, dout = (v.to(dtype) for v in self.t.values())
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            dout, x, weight, [len(bias)], *self.geometry, False, [0, 0], 1, [True, True, True]
        )
        return {"out": torch.conv2d(x, weight, bias, *self.geometry), "dx": dx, "dweight": dweight, "dbias": dbias}

    def ours(self, **changed: Tensor) -> dict[str, Tensor]:
        x, weight, bias, dout = {**self.t, **changed}.values()
        dx, dweight = OPS.conv2d_exact_bwd(dout, x, weight, *self.geometry, self.algorithm, self.algorithm)
        return {"out": OPS.conv2d_exact(x, weight, bias, *self.geometry, self.algorithm), "dx": dx, "dweight": dweight}


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, LAST], ids=["w-nchw", "w-nhwc"])
@pytest.mark.parametrize(("algorithm", "shape"), CASES, ids=_name)
def test_error_is_at_most_twice_stocks(algorithm: int, shape: tuple[Any, ...], weight_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    case = Case(algorithm, shape, weight_format)
    truth, stock, ours = case.stock(torch.float64), case.stock(torch.float32), case.ours()
    for name, value in ours.items():
        no_worse_than_torch(value, stock[name], truth[name], name)
    assert ours["out"].is_contiguous(memory_format=LAST) and ours["dx"].is_contiguous(memory_format=LAST)
    assert ours["dweight"].stride() == case.t["weight"].stride()  # the optimizer's passes run over both alike


@pytest.mark.parametrize(
    ("algorithm", "shape"),
    [
        (WINOGRAD, (3, 50, 70, 21, 19, 3, 1, 1, 1)),
        (DIRECT, (3, 50, 70, 21, 19, 1, 1, 0, 1)),
        (DIRECT, (2, 50, 40, 31, 19, 3, 2, 1, 1)),
        (DIRECT, (2, 70, 20, 97, 91, 1, 1, 0, 1)),
    ],
    ids=_name,
)
def test_the_bits_do_not_depend_on_threads_or_runs(algorithm: int, shape: tuple[Any, ...]) -> None:
    case = Case(algorithm, shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8, 9, 1):
            torch.set_num_threads(threads)
            results.append(case.ours())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r[name], results[0][name]) for r in results for name in r)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("place", ["x", "weight", "dout"])
@pytest.mark.parametrize(
    ("algorithm", "shape"),
    [(WINOGRAD, (2, 32, 32, 10, 10, 3, 1, 1, 1)), (DIRECT, (2, 32, 32, 10, 10, 3, 2, 1, 1)),
     (DIRECT, (2, 24, 40, 6, 6, 1, 1, 0, 1)), (DIRECT, (2, 24, 40, 6, 6, 1, 2, 0, 1))],
    ids=_name,
)  # fmt: skip
def test_values_that_are_not_finite_stay_where_stock_has_them(
    place: str, value: float, algorithm: int, shape: tuple[Any, ...]
) -> None:
    """A transform would spread them over a tile, zeros of the padding make NaN of them: the library answers instead."""
    torch.manual_seed(1)
    case = Case(algorithm, shape)
    case.t[place][0, 0, 0, 0] = value
    stock = case.stock(torch.float32)
    for name, ours in case.ours().items():
        assert torch.equal(ours.isfinite(), stock[name].isfinite()), name
        assert torch.equal(ours.isnan(), stock[name].isnan()), name


@pytest.mark.parametrize("algorithm", [DIRECT, WINOGRAD], ids=_name)
def test_layouts_that_need_a_copy_give_the_same_bits(algorithm: int) -> None:
    case = Case(algorithm, (2, 24, 40, 12, 10, 3, 1, 1, 1), torch.contiguous_format)
    wanted = case.ours()
    wide = torch.randn(2, 48, 12, 10)[:, ::2]
    wide.copy_(case.t["x"])
    for name, value in case.ours(x=wide, dout=case.t["dout"].contiguous()).items():
        assert torch.equal(value, wanted[name]), name


def test_an_empty_batch() -> None:
    case = Case(DIRECT, (0, 8, 16, 5, 5, 1, 1, 0, 1))
    ours = case.ours()
    assert ours["out"].shape == (0, 16, 5, 5) and ours["dx"].shape == (0, 8, 5, 5)
    assert torch.equal(ours["dweight"], torch.zeros(16, 8, 1, 1))


def test_what_is_chosen() -> None:
    """F(2x2) for large fp32 3x3 maps in channels_last, direct for 1x1 and strided ones; the library for everything else."""
    x, weight = torch.randn(16, 64, 28, 28).to(memory_format=LAST), torch.randn(64, 64, 3, 3)
    plain = ((1, 1), (1, 1), (1, 1), 1)
    assert _cpu_conv.choose(x, weight, plain) == (2, 2, 2)
    pointwise = torch.randn(128, 64, 1, 1), ((1, 1), (0, 0), (1, 1), 1)
    assert _cpu_conv.choose(x, *pointwise) == (1, 1, 1)
    assert _cpu_conv.choose(x, pointwise[0], ((2, 2), (0, 0), (1, 1), 1)) == (1, 1, 1)
    assert _cpu_conv.choose(x, torch.randn(128, 64, 3, 3), ((2, 2), (1, 1), (1, 1), 1)) == (0, 0, 1)
    others = {
        "NCHW": (x.contiguous(), weight, plain),
        "bf16": (x.bfloat16(), weight.bfloat16(), plain),
        "fp64": (x.double(), weight.double(), plain),
        "groups": (x, weight[:, :32], ((1, 1), (1, 1), (1, 1), 2)),
        "1x1, NCHW": (x.contiguous(), *pointwise),
        "few pixels": (x[:1, :, :9, :9].contiguous(memory_format=LAST), *pointwise),
        "few channels": (x, weight[:, :, :1, :1], pointwise[1]),
        "dilation": (x, weight, ((1, 1), (2, 2), (2, 2), 1)),
        "padding": (x, weight, ((1, 1), (3, 3), (1, 1), 1)),
        "stem": (x[:, :3].contiguous(memory_format=LAST), torch.randn(64, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1)),
        "1-D": (x[0, 0], weight, plain),
    }
    for name, call in others.items():
        assert _cpu_conv.choose(*call) == (0, 0, 0), name


STEP = (4, 32, 48, 14, 13, 3, 1, 1, 1), (4, 64, 128, 14, 13, 1, 1, 0, 1)  # one for Winograd, one for the direct product


@pytest.mark.parametrize("shape", STEP, ids=_name)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_conv2d_is_differentiable_like_torchs(bias: bool, shape: tuple[Any, ...]) -> None:
    torch.manual_seed(2)
    case = Case(DIRECT, shape)
    truth, stock = case.stock(torch.float64), case.stock(torch.float32)
    leaves = [case.t[name].clone().requires_grad_() for name in ("x", "weight", "bias")]
    out = conv2d(leaves[0], leaves[1], leaves[2] if bias else None, *case.geometry, 1)
    assert "conv2d_step" in out.grad_fn.name()
    out.backward(case.t["dout"])
    for name, leaf in zip(("dx", "dweight", "dbias"), leaves, strict=True):
        if name != "dbias" or bias:
            no_worse_than_torch(leaf.grad, stock[name], truth[name], name)
    with pytest.raises(RuntimeError, match="first-order"):
        x = leaves[0]
        (dx,) = torch.autograd.grad(conv2d(x, leaves[1], None, *case.geometry, 1).pow(2).sum(), x, create_graph=True)
        dx.sum().backward()


@pytest.mark.parametrize("shape", STEP, ids=_name)
def test_frozen_tensors_get_no_gradient(shape: tuple[Any, ...]) -> None:
    case = Case(DIRECT, shape)
    for frozen in ("x", "weight"):
        x, weight = (case.t[name].clone().requires_grad_(name != frozen) for name in ("x", "weight"))
        conv2d(x, weight, None, *case.geometry, 1).sum().backward()
        assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_opcheck() -> None:
    t = Case(WINOGRAD, (2, 16, 32, 8, 10, 3, 1, 1, 1)).t
    x, weight = t["x"].requires_grad_(), t["weight"].requires_grad_()
    torch.library.opcheck(OPS.conv2d_step.default, (x, weight, t["bias"], [1, 1], [1, 1], [1, 1], 1))
    for algorithm, shape in ((WINOGRAD, (2, 16, 32, 8, 10, 3, 1, 1, 1)), (DIRECT, (2, 16, 32, 8, 9, 3, 2, 1, 1))):
        case = Case(algorithm, shape)
        x, weight, bias, dout = case.t.values()
        torch.library.opcheck(OPS.conv2d_exact.default, (x, weight, bias, *case.geometry, algorithm))
        torch.library.opcheck(OPS.conv2d_exact_bwd.default, (dout, x, weight, *case.geometry, algorithm, algorithm))


def test_a_training_step_takes_it_and_gradients_hold() -> None:
    """conv_bn_act in training: the chain with BatchNorm, against fp64."""
    torch.manual_seed(3)
    t = Case(WINOGRAD, (4, 32, 32, 12, 12, 3, 1, 1, 1)).t

    def run(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        x, weight = (t[name].detach().to(dtype).requires_grad_() for name in ("x", "weight"))
        with torch.random.fork_rng():
            out = F.conv_bn_act(x, weight, running_mean=None, running_var=None, padding=1, training=True, backend=backend)
        return [out, *torch.autograd.grad(out, (x, weight), t["dout"].to(dtype))]

    truth, stock = run(torch.float64, "reference"), run(torch.float32, "reference")
    for name, ours, theirs, true in zip(("out", "dx", "dweight"), run(torch.float32, None), stock, truth, strict=True):
        no_worse_than_torch(ours, theirs, true, name)


def test_explain_tells_the_three_algorithms() -> None:
    x, weight = torch.randn(16, 64, 28, 28).to(memory_format=LAST), torch.randn(64, 64, 3, 3)
    report = dk.explain("conv_bn_act", x, weight, padding=1)
    passes = ("forward", "gradient of x", "gradient of weight")
    assert report["training"] == dict.fromkeys(passes, "Winograd F(2x2, 3x3)")
    assert dk.explain("conv_bn_act", x, torch.randn(128, 64, 1, 1))["training"] == dict.fromkeys(passes, "direct")
    report = dk.explain("conv_bn_act", x.contiguous(), weight, padding=1)
    assert set(report["training"].values()) == {"oneDNN"} and "channels_last" in report["training_reason"]


def test_the_switches_turn_them_off() -> None:
    code = (
        "import torch; from dl4ds_kernels import _cpu_conv;"
        "x = torch.randn(16, 64, 28, 28).to(memory_format=torch.channels_last);"
        "print(_cpu_conv.choose(x, torch.randn(64, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),"
        "_cpu_conv.choose(x, torch.randn(128, 64, 1, 1), ((1, 1), (0, 0), (1, 1), 1)))"
    )
    env = {**os.environ, "DL4DS_WINOGRAD": "0", "DL4DS_TRAIN_GEMM": "0"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "(0, 0, 0) (0, 0, 0)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 3, 3)}, r"weight: expected shape \(C_out, C, kH, kW\)"),
        ({"x": torch.zeros(2, 5, 8, 8)}, r"x: expected shape \(N, 3, H, W\)"),
        ({"x": torch.zeros(2, 3, 1, 8), "padding": [0, 0]}, "x: expected a padded input at least as large as the kernel"),
        ({"padding": [3, 1]}, "algorithm: Winograd takes a 3x3 kernel"),
        ({"stride": [2, 2]}, "algorithm: Winograd takes a 3x3 kernel"),
        ({"stride": [0, 1]}, "stride: expected two numbers from 1 up"),
        ({"algorithm": 4}, r"algorithm: expected 1 \(direct\) or 2"),
        ({"x": torch.zeros(2, 3, 8, 8, dtype=torch.float64)}, "x: expected"),
    ],
)
def test_clear_errors(change: dict[str, Any], message: str) -> None:
    call = {
        "x": torch.zeros(2, 3, 8, 8), "weight": torch.zeros(4, 3, 3, 3), "bias": None, "stride": [1, 1], "padding": [1, 1],
        "dilation": [1, 1], "algorithm": WINOGRAD, **change,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        OPS.conv2d_exact(*call.values())


def test_clear_errors_of_the_gradients() -> None:
    x, weight, dout = torch.zeros(2, 3, 9, 9), torch.zeros(4, 3, 3, 3), torch.zeros(2, 4, 4, 4)
    with pytest.raises(RuntimeError, match="dout: expected the output's shape"):
        OPS.conv2d_exact_bwd(dout, x, weight, [2, 2], [1, 1], [1, 1], DIRECT, DIRECT)
    with pytest.raises(RuntimeError, match="dgrad: no stride together with dilation"):
        OPS.conv2d_exact_bwd(dout[:, :, :3, :3], x, weight, [2, 2], [0, 0], [2, 2], DIRECT, 0)
