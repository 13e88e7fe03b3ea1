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
# (N, C, C_out, H, W, padding): odd sizes, channels that fill no vector, every padding the op takes
SHAPES = [
    (2, 16, 32, 8, 8, 1), (2, 33, 17, 9, 14, 1), (3, 64, 64, 14, 14, 1), (2, 48, 40, 13, 11, 0), (4, 20, 65, 6, 7, 2),
    (16, 128, 32, 3, 3, 1), (2, 40, 24, 70, 70, 1), (8, 96, 128, 7, 7, 1), (2, 17, 64, 9, 40, (0, 2)), (40, 1, 1, 4, 5, 1),
]  # fmt: skip


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _make(n: int, c: int, k: int, h: int, w: int, padding: Any, weight_format: torch.memory_format) -> dict[str, Tensor]:
    p = _pair(padding)
    return {
        "x": torch.randn(n, c, h, w).to(memory_format=LAST),
        "weight": (torch.randn(k, c, 3, 3) / (3 * c**0.5)).to(memory_format=weight_format),
        "bias": torch.randn(k),
        "dout": torch.randn(n, k, h + 2 * p[0] - 2, w + 2 * p[1] - 2).to(memory_format=LAST),
    }


def _stock(t: dict[str, Tensor], padding: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    x, weight, bias, dout = (v.to(dtype) for v in t.values())
    p = list(_pair(padding))
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dout, x, weight, [len(bias)], [1, 1], p, [1, 1], False, [0, 0], 1, [True, True, True]
    )
    return {"out": torch.conv2d(x, weight, bias, 1, p), "dx": dx, "dweight": dweight, "dbias": dbias}


def _ours(t: dict[str, Tensor], padding: Any) -> dict[str, Tensor]:
    p = list(_pair(padding))
    dx, dweight = OPS.conv2d_winograd_bwd(t["dout"], t["x"], t["weight"], p, True, True)
    return {"out": OPS.conv2d_winograd(t["x"], t["weight"], t["bias"], p), "dx": dx, "dweight": dweight}


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, LAST], ids=["w-nchw", "w-nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-C{}-K{}-H{}-W{}-p{}".format(*s))
def test_error_is_at_most_twice_stocks(shape: tuple[Any, ...], weight_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    t = _make(*shape, weight_format)
    truth, stock, ours = _stock(t, shape[-1], torch.float64), _stock(t, shape[-1], torch.float32), _ours(t, shape[-1])
    for name, value in ours.items():
        no_worse_than_torch(value, stock[name], truth[name], name)
    assert ours["out"].is_contiguous(memory_format=LAST) and ours["dx"].is_contiguous(memory_format=LAST)
    assert ours["dweight"].stride() == t["weight"].stride()  # the optimizer's passes run over both alike


def test_the_bits_do_not_depend_on_threads_or_runs() -> None:
    t = _make(3, 50, 70, 21, 19, 1, LAST)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(_ours(t, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r[name], results[0][name]) for r in results for name in r)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("place", ["x", "weight", "dout"])
def test_values_that_are_not_finite_stay_where_stock_has_them(place: str, value: float) -> None:
    """A transform would spread them over a tile (and may overflow): the library answers instead."""
    torch.manual_seed(1)
    t = _make(2, 32, 32, 10, 10, 1, LAST)
    t[place][0, 0, 1, 1] = value
    stock = _stock(t, 1, torch.float32)
    for name, ours in _ours(t, 1).items():
        assert torch.equal(ours.isfinite(), stock[name].isfinite()), name
        assert torch.equal(ours.isnan(), stock[name].isnan()), name


def test_layouts_that_need_a_copy_give_the_same_bits() -> None:
    t = _make(2, 24, 40, 12, 10, 1, torch.contiguous_format)
    wanted = _ours(t, 1)
    wide = torch.randn(2, 48, 12, 10)[:, ::2]
    wide.copy_(t["x"])
    given = {**t, "x": wide, "dout": t["dout"].contiguous()}
    for name, value in _ours(given, 1).items():
        assert torch.equal(value, wanted[name]), name


def test_what_is_chosen() -> None:
    """F(2x2) for large fp32 3x3 maps in channels_last; the library for everything else."""
    x, weight = torch.randn(16, 64, 28, 28).to(memory_format=LAST), torch.randn(64, 64, 3, 3)
    plain = ((1, 1), (1, 1), (1, 1), 1)
    assert _cpu_conv.choose(x, weight, plain) == (2, 2, 2)
    others = {
        "NCHW": (x.contiguous(), weight, plain),
        "bf16": (x.bfloat16(), weight.bfloat16(), plain),
        "fp64": (x.double(), weight.double(), plain),
        "stride 2": (x, weight, ((2, 2), (1, 1), (1, 1), 1)),
        "dilation": (x, weight, ((1, 1), (2, 2), (2, 2), 1)),
        "groups": (x, weight[:, :32], ((1, 1), (1, 1), (1, 1), 2)),
        "1x1": (x, weight[:, :, :1, :1], ((1, 1), (0, 0), (1, 1), 1)),
        "padding": (x, weight, ((1, 1), (3, 3), (1, 1), 1)),
        "few channels": (x[:, :3].to(memory_format=LAST), weight[:, :3], plain),
    }
    for name, call in others.items():
        assert _cpu_conv.choose(*call) == (0, 0, 0), name


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_conv2d_is_differentiable_like_torchs(bias: bool) -> None:
    torch.manual_seed(2)
    t = _make(4, 32, 48, 14, 13, 1, LAST)
    truth, stock = _stock(t, 1, torch.float64), _stock(t, 1, torch.float32)
    leaves = [t[name].clone().requires_grad_() for name in ("x", "weight", "bias")]
    out = conv2d(leaves[0], leaves[1], leaves[2] if bias else None, 1, 1, 1, 1)
    assert "conv2d_step" in out.grad_fn.name()
    out.backward(t["dout"])
    for name, leaf in zip(("dx", "dweight", "dbias"), leaves, strict=True):
        if name != "dbias" or bias:
            no_worse_than_torch(leaf.grad, stock[name], truth[name], name)
    with pytest.raises(RuntimeError, match="first-order"):
        x = leaves[0]
        (dx,) = torch.autograd.grad(conv2d(x, leaves[1], None, 1, 1, 1, 1).pow(2).sum(), x, create_graph=True)
        dx.sum().backward()


def test_frozen_tensors_get_no_gradient() -> None:
    t = _make(4, 32, 48, 14, 13, 1, LAST)
    for frozen in ("x", "weight"):
        x, weight = (t[name].clone().requires_grad_(name != frozen) for name in ("x", "weight"))
        conv2d(x, weight, None, 1, 1, 1, 1).sum().backward()
        assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_opcheck() -> None:
    t = _make(2, 16, 32, 8, 10, 1, LAST)
    x, weight = t["x"].requires_grad_(), t["weight"].requires_grad_()
    torch.library.opcheck(OPS.conv2d_step.default, (x, weight, t["bias"], [1, 1], [1, 1], [1, 1], 1))
    torch.library.opcheck(OPS.conv2d_winograd.default, (x.detach(), weight.detach(), None, [1, 1]))
    torch.library.opcheck(
        OPS.conv2d_winograd_bwd.default, (t["dout"], x.detach(), weight.detach(), [1, 1], True, True)
    )  # fmt: skip


def test_a_training_step_takes_it_and_gradients_hold() -> None:
    """conv_bn_act in training: the chain with BatchNorm, against fp64."""
    torch.manual_seed(3)
    t = _make(4, 32, 32, 12, 12, 1, LAST)

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
    assert report["training"] == dict.fromkeys(("forward", "gradient of x", "gradient of weight"), "Winograd F(2x2, 3x3)")
    report = dk.explain("conv_bn_act", x.contiguous(), weight, padding=1)
    assert set(report["training"].values()) == {"oneDNN"} and "channels_last" in report["training_reason"]


def test_the_switch_turns_it_off() -> None:
    code = (
        "import torch; from dl4ds_kernels import _cpu_conv;"
        "x = torch.randn(16, 64, 28, 28).to(memory_format=torch.channels_last);"
        "print(_cpu_conv.choose(x, torch.randn(64, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1)))"
    )
    env = {**os.environ, "DL4DS_WINOGRAD": "0"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "(0, 0, 0)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 3, 5, 5)}, r"weight: expected shape \(C_out, C, 3, 3\)"),
        ({"x": torch.zeros(2, 5, 8, 8)}, r"x: expected shape \(N, 3, H, W\)"),
        ({"padding": [3, 1]}, "padding: expected two numbers from 0 to 2"),
        ({"x": torch.zeros(2, 3, 8, 8, dtype=torch.float64)}, "x: expected"),
    ],
)
def test_clear_errors(change: dict[str, Any], message: str) -> None:
    call = {"x": torch.zeros(2, 3, 8, 8), "weight": torch.zeros(4, 3, 3, 3), "bias": None, "padding": [1, 1], **change}
    with pytest.raises(RuntimeError, match=message):
        OPS.conv2d_winograd(*call.values())
