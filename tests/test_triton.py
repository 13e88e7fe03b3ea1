"""The Triton backend: its maths in Triton's interpreter, and the kernels for GPUs without a GPU (_triton_offline.py).

The interpreter runs one program at a time in numpy, so the shapes are small: odd sizes, tails of every kind, all layouts. It
truncates where a GPU rounds to bf16, so bf16 is close here and exact only in the simulated kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from _assert import Results, compare, copies_made, run, widen
from _cases import BASE, LAYOUTS, Case, bn_vectors, each, gradient, images, randn
from ptxsim import toolchain
from torch import Tensor

from dl4ds_kernels import functional
from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import TRITON, op, triton_interpreted
from dl4ds_kernels.ops._layout import suggested_format

pytest.importorskip("triton", reason="the Triton backend needs triton")
interpreted = pytest.mark.skipif(
    not triton_interpreted(), reason="Triton compiles for the GPU of this machine: tests/ops runs its kernels there"
)

# The interpreter is numpy: it warns where a GPU quietly makes the Inf and NaN that these tests want.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

EPS, SLOPE, MOMENTUM = 1e-3, 0.1, 0.2
FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SMALL = replace(BASE, shape=(2, 5, 4, 3))
TILED = replace(BASE, shape=(3, 32, 3, 5), layout="nhwc", residual="nhwc")  # rows of whole 16-byte vectors
PLANES = replace(BASE, shape=(2, 3, 4, 12), residual="nchw")  # the same for NCHW


def both(*cases: Case) -> list[Case]:
    """Each case in training and in eval."""
    return [replace(case, training=training) for case in cases for training in (True, False)]


# ---- bn_act

BN_CASES = both(BASE, replace(BASE, layout="nhwc", residual="nhwc", dtype=BF16), replace(TILED, dtype=FP16), PLANES)
BN_CASES += [
    replace(SMALL, layout=layout, residual="nchw", dtype=dtype)
    for layout in ("nhwc_cslice", "nhwc_hwslice", "nchw_hwslice", "nchw_cslice", "nslice", "offset", "transposed", "expanded")
    for dtype in (FP32, FP16)
]

SHAPES = ((9, 5), (700, 3), (3, 5, 19), (2, 3, 2, 3, 4), (3, 1, 5, 7), (4, 7, 1, 1), (1, 2, 40, 33))
BN_CASES += [replace(SMALL, shape=shape, residual="nchw") for shape in SHAPES]
BN_CASES += [replace(SMALL, shape=(2, 3, 2, 3, 4), layout="nhwc")]
BN_CASES += both(replace(SMALL, shape=(1, 5, 2, 1)), replace(SMALL, affine=""), replace(SMALL, dtype=FP64, residual="nhwc"))
BN_CASES += [replace(case, activation=a) for case in (SMALL, PLANES, TILED) for a in ACTIVATION_CODES]
BN_CASES += [replace(SMALL, dtype=BF16, wide_parameters=True, affine=affine) for affine in ("weight", "bias", "weight+bias")]
BN_CASES += both(replace(SMALL, eps_mode="std"), replace(TILED, eps_mode="std", dtype=FP64))


def bn_problem(case: Case) -> dict[str, Any]:
    generator = case.generator()
    x = images(case, generator, case.layout)
    residual = images(case, generator, case.residual) if case.residual else None
    return {"x": x, **bn_vectors(case, x), "residual": residual}


def bn_ours(case: Case) -> Any:
    return lambda t: functional.bn_act(
        t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], residual=t["residual"], training=case.training,
        momentum=MOMENTUM, eps=EPS, eps_mode=case.eps_mode, activation=case.activation, negative_slope=SLOPE, backend="triton",
    )  # fmt: skip


def bn_stock(case: Case, activation: str | None = None) -> Any:
    """Stock torch; for ``sqrt(var) + eps``, which it does not have, the package's plain-torch reference."""
    code = ACTIVATION_CODES[case.activation if activation is None else activation]

    def call(t: dict[str, Any]) -> Tensor:
        if case.eps_mode == "std":
            return functional.bn_act(
                t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], residual=t["residual"],
                training=case.training, momentum=MOMENTUM, eps=EPS, eps_mode="std", activation=list(ACTIVATION_CODES)[code],
                negative_slope=SLOPE, backend="reference",
            )  # fmt: skip
        z = TF.batch_norm(t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], case.training, MOMENTUM, EPS)
        return apply_activation(z if t["residual"] is None else z + t["residual"], code, SLOPE)

    return call


def three_ways(case: Case, tensors: dict[str, Any], ours: Any, stock: Any, z: Tensor, wrt: tuple[str, ...]) -> None:
    """Ours against stock in the same dtype and in fp64, forward and backward; no gradient where z is near a kink."""
    dout = gradient(case, z, "nchw")
    results: list[Results] = [run(ours, tensors, dout, wrt), run(stock, tensors, dout, wrt)]
    compare(*results, run(stock, widen(tensors), dout.double(), wrt), "triton")


@interpreted
@each(BN_CASES)
def test_bn_act(case: Case) -> None:
    tensors = bn_problem(case)
    z = bn_stock(case, "none")({name: None if t is None else t.clone() for name, t in widen(tensors).items()})
    three_ways(case, tensors, bn_ours(case), bn_stock(case), z, ("x", "weight", "bias", "residual"))


@interpreted
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(3, 2, 9, 31), (4, 2, 41, 53)], ids=str)
def test_statistics_far_from_zero(shape: tuple[int, ...], layout: str) -> None:
    """A mean of 10,000 standard deviations, and an outlier as the first value; planes of one piece and of three."""
    case = replace(SMALL, shape=shape, layout=layout)
    values = torch.randn(case.shape, dtype=FP64, generator=case.generator())
    values[:, 0] += 1e4
    values[0, 1, 0, 0] = 1e4
    x = values.float().contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)
    _, mean, rstd, *_ = op("bn_act", TRITON)(x, None, None, None, None, None, True, 0.1, EPS, False, 0, 0.0, False)
    wide = x.double()
    true_mean, true_var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
    assert ((mean - true_mean).abs() <= 1.2e-7 * (true_mean.abs() + true_var.sqrt())).all()
    torch.testing.assert_close(rstd.double(), (true_var + EPS).rsqrt(), rtol=1e-6, atol=0)


@interpreted
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, vector = torch.ones(shape, requires_grad=True), torch.ones(3)
    out = functional.bn_act(x, vector, vector, residual=torch.ones(shape), backend="triton")
    out = functional.add_act(out, torch.ones(shape), backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.shape == grad.shape == shape


@interpreted
@torch.no_grad()
def test_empty_convolution() -> None:
    four = torch.ones(4)
    out = functional.conv_bn_act(
        torch.ones(0, 3, 4, 5), torch.ones(4, 3, 3, 3), running_mean=four, running_var=four, backend="triton"
    )
    assert out.shape == (0, 4, 2, 3)


# ---- masks, NaN, wide indices


def positive_side(z: Tensor, activation: str) -> Tensor:
    if activation == "leaky_relu":
        return z > 0
    return ~(z <= 0) if activation == "relu" else ~((z <= 0) | (z >= 6))


@interpreted
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (3, 32, 2, 5), (2, 3, 4, 12)], ids=str)
def test_mask_bits(shape: tuple[int, ...], layout: str, activation: str) -> None:
    """One bit an element in memory order, lowest first; zeros of both signs, six, and NaN on their sides."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 4
    x.view(-1)[:5] = torch.tensor([0.0, -0.0, 6.0, float("nan"), float("inf")])
    x = x.contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)
    zero, one = torch.zeros(shape[1]), torch.ones(shape[1])
    code = ACTIVATION_CODES[activation]
    expected = positive_side(x, activation).permute(0, 2, 3, 1) if layout == "nhwc" else positive_side(x, activation)
    bits = np.packbits(expected.contiguous().numpy().reshape(-1), bitorder="little")
    residual = torch.zeros_like(x)
    by_bn = op("bn_act", TRITON)(x, None, None, zero, one, residual, False, 0.1, 0.0, False, code, SLOPE, True)
    by_add = op("add_act", TRITON)(x, residual, 1.0, code, SLOPE, True)
    for out, mask in ((by_bn[0], by_bn[3]), by_add):
        np.testing.assert_array_equal(mask.numpy(), bits)
        torch.testing.assert_close(out, apply_activation(x, code, SLOPE), equal_nan=True)


@interpreted
@pytest.mark.parametrize("activation", ACTIVATION_CODES)
def test_nan_and_infinity_pass(activation: str) -> None:
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0, -1.0, 7.0]).view(1, 1, 1, 8).repeat(1, 1, 1, 3)
    expected = apply_activation(z, ACTIVATION_CODES[activation], SLOPE)
    zero, one = torch.zeros(1), torch.ones(1)
    identity = {"running_mean": zero, "running_var": one, "activation": activation, "negative_slope": SLOPE, "eps": 0.0}
    with torch.no_grad():
        outs = (
            functional.add_act(z, torch.zeros_like(z) * -1, activation=activation, negative_slope=SLOPE, backend="triton"),
            functional.bn_act(z, **identity, backend="triton"),
            functional.conv_bn_act(z, torch.ones(1, 1, 1, 1), **identity, backend="triton"),
        )
    for out in outs:
        torch.testing.assert_close(out, expected, equal_nan=True)
    if activation == "relu":
        assert torch.signbit(outs[0][..., 3]).all(), "relu(-0.0) is -0.0, as in torch"


@interpreted
@each([replace(BASE, residual="nhwc"), TILED, replace(PLANES, layout="nchw_hwslice")])
def test_wide_indices(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors beyond 2**31 elements use 64-bit indices; here every tensor does, and one program walks over all its tiles."""
    from dl4ds_kernels._triton import _common

    def results() -> Results:
        return run(bn_ours(case), tensors, dout, ("x", "residual"))

    tensors = bn_problem(case)
    dout = torch.randn(case.shape)
    narrow = results()
    monkeypatch.setattr(_common, "INT32_LIMIT", 0)
    monkeypatch.setattr(_common, "WARPS", 1)
    for name, result in results().items():
        assert torch.equal(result, narrow[name]), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_bytes_beside_the_tensors(layout: torch.memory_format) -> None:
    """ResNet's sites at batch 32, 16 bits: partial results weigh at most 2 % of what is read; large tensors, vectors 7 %."""
    from dl4ds_kernels._triton import _bn_reduce, _common

    sites = [(64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28), (256, 14), (512, 14), (1024, 14)]
    for channels, size in [*sites, (512, 7), (2048, 7)]:
        x = torch.empty(32, channels, size, size, device="meta", memory_format=layout)
        matrix, site = _common.Matrix.of(x, x), (channels, size)
        # Bytes of a chunk and channel, and bytes read of an element: x; dout, x and residual; dout, x and mask.
        for tile, left, read in ((_bn_reduce.STATS, 12, 2), (_bn_reduce.SUMS, 8, 6), (_bn_reduce.MASKED_SUMS, 8, 4.125)):
            chunks = _bn_reduce.reduce_launch_config(matrix, tile)["chunks"]
            assert left * channels * chunks <= 0.02 * read * x.numel(), (site, tile)
        programs, config = _common.elementwise_launch_config(matrix)
        if layout == torch.channels_last and x.numel() > 6e6:  # three vectors for two tensors
            assert 3 * 4 * config["BLOCK_COLS"] * programs <= 0.07 * 4 * x.numel(), site


# ---- add_act

ADD_CASES = [replace(SMALL, activation=a, residual="nchw", alpha=0.5) for a in ACTIVATION_CODES]
LAYOUT_PAIRS = (("nchw", "nchw"), ("nhwc", "nhwc"), ("nhwc", "nchw"), ("nchw_cslice", "expanded"), ("transposed", "transposed"))
ADD_CASES += [replace(BASE, layout=x, residual=r, dtype=dtype) for x, r in LAYOUT_PAIRS for dtype in (FP32, FP16, BF16)]
ADD_CASES += [replace(SMALL, shape=shape, residual="nchw") for shape in ((1,) * 4, (3, 5, 19), (2, 3, 2, 3, 4), (41, 63))]
# Sizes that leave the memory format open.
ADD_CASES += [
    replace(SMALL, shape=shape, layout="nhwc", residual="nhwc") for shape in ((4, 7, 1, 1), (3, 1, 5, 7), (0, 3, 4, 5))
]


@interpreted
@each(ADD_CASES)
def test_add_act(case: Case) -> None:
    generator = case.generator()
    tensors = {"x": images(case, generator, case.layout), "residual": images(case, generator, case.residual)}
    code = ACTIVATION_CODES[case.activation]

    def ours(t: dict[str, Any]) -> Tensor:
        return functional.add_act(
            t["x"], t["residual"], alpha=case.alpha, activation=case.activation, negative_slope=SLOPE, backend="triton"
        )

    def stock(t: dict[str, Any]) -> Tensor:
        return apply_activation(case.alpha * (t["x"] + t["residual"]), code, SLOPE)

    z = case.alpha * (tensors["x"].double() + tensors["residual"].double())
    three_ways(case, tensors, ours, stock, z, ("x", "residual"))
    assert ours(tensors).stride() == torch.add(tensors["x"], tensors["residual"]).stride()


# ---- conv_bn_act

CONV = replace(BASE, shape=(2, 5, 9, 8), residual="nchw", training=False)
CONV_CASES = [
    replace(CONV, layout=layout, dtype=dtype, kernel=kernel, stride=stride)
    for layout in ("nchw", "nhwc", "nhwc_cslice", "nchw_hwslice")
    for dtype, kernel, stride in ((FP32, 3, 1), (FP16, 3, 2), (BF16, 1, 1), (FP32, 1, 2))
]
CONV_CASES += [replace(CONV, activation=a, layout="nhwc", residual="") for a in ACTIVATION_CODES]
CONV_CASES += [replace(CONV, shape=(1, 1, 3, 3)), replace(CONV, shape=(1, 70, 5, 4)), replace(CONV, affine="", eps_mode="std")]
# Left to the library convolution, with our epilogue in place.
CONV_CASES += [replace(CONV, dtype=FP64), replace(CONV, kernel=5, layout="nhwc"), replace(CONV, shape=(2, 6, 5, 5), groups=2)]


@interpreted
@each(CONV_CASES)
@pytest.mark.parametrize("dilation", [1, 2])
def test_conv_bn_act(case: Case, dilation: int) -> None:
    generator, channels_out = case.generator(), 8
    geometry = {"stride": case.stride, "padding": case.kernel // 2, "dilation": dilation, "groups": case.groups}
    x = images(case, generator, case.layout)
    weight = randn(case, generator, (channels_out, case.channels // case.groups, case.kernel, case.kernel), scale=0.2)
    if case.layout == "nhwc":
        weight = weight.contiguous(memory_format=torch.channels_last)
    y = torch.conv2d(x.double(), weight.double(), None, **geometry)
    vectors = bn_vectors(case, y)
    bias = randn(case, generator, (channels_out,))
    residual = randn(case, generator, tuple(y.shape), case.residual) if case.residual else None
    tensors = {"x": x, "weight": weight, "conv_bias": bias, "residual": residual}
    tensors |= {f"bn_{name}" if name in ("weight", "bias") else name: vector for name, vector in vectors.items()}

    def call(backend: str) -> Any:
        return lambda t: functional.conv_bn_act(
            t["x"], t["weight"], t["conv_bias"], running_mean=t["running_mean"], running_var=t["running_var"],
            bn_weight=t["bn_weight"], bn_bias=t["bn_bias"], residual=t["residual"], eps=EPS, eps_mode=case.eps_mode,
            activation=case.activation, negative_slope=SLOPE, backend=backend, **geometry,
        )  # fmt: skip

    results = [run(call(backend), tensors, None, ()) for backend in ("triton", "reference")]
    compare(*results, run(call("reference"), widen(tensors), None, ()), "triton")
    assert results[0]["out"].stride() == torch.conv2d(x, weight, None, **geometry).stride()


# ---- torch integration and messages


@interpreted
@each([replace(BASE, layout=layout) for layout in LAYOUTS])
def test_no_layout_copy(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read any x in place. Launches are left out here: the interpreter makes copies of its own."""
    from dl4ds_kernels._triton import _common, add_act, bn_act, conv_bn_act

    monkeypatch.setattr(_common, "launch", lambda *_, **__: None)
    x, vector = images(case, case.generator(), case.layout), torch.ones(case.channels)
    dense = torch.empty_like(x, memory_format=suggested_format(x))
    one_by_one, geometry = torch.ones(8, case.channels, 1, 1), ([1, 1], [0, 0], [1, 1], 1)

    def calls() -> None:
        _, mean, rstd, *_ = bn_act.bn_act(x, vector, vector, None, None, dense, True, 0.1, EPS, False, 1, 0.0, False)
        bn_act.bn_act_bwd(dense, x, vector, vector, mean, rstd, dense, None, True, EPS, False, 1, 0.0, True, True, True)
        add_act.add_act(dense, dense, 1.0, 1, 0.0, True)
        conv_bn_act.conv_bn_act(x, one_by_one, None, vector[:8], vector[:8], None, None, None, *geometry, EPS, False, 1, 0.0)

    assert copies_made(calls) == []


@interpreted
@pytest.mark.parametrize("name", ["bn_act", "add_act", "conv_bn_act"])
def test_opcheck(name: str) -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    vector = torch.rand(3) + 0.5
    arguments = {
        "bn_act": (x, vector, vector, vector, vector, x, True, 0.1, EPS, False, 1, 0.0, True),
        "add_act": (x, x, 1.0, 1, 0.0, True),
        "conv_bn_act": (x.detach(), torch.randn(3, 3, 3, 3), None, vector, vector, vector, vector, x.detach(), [1, 1], [1, 1],
                        [1, 1], 1, EPS, False, 1, 0.0),
    }  # fmt: skip
    torch.library.opcheck(op(name, TRITON), arguments[name])


@interpreted
def test_bad_arguments_are_refused() -> None:
    x, three, four = torch.ones(2, 3, 4, 5), torch.ones(3), torch.ones(4)
    tail = (True, 0.1, EPS, False, 1, 0.0, True)
    with pytest.raises(RuntimeError, match=r"bn_act: weight: expected shape \(C,\) = \(3,\), got \(4,\)"):
        op("bn_act", TRITON)(x, four, None, three, three, None, *tail)
    with pytest.raises(RuntimeError, match=r"bn_act: residual: expected dtype torch.float32, got torch.float64"):
        op("bn_act", TRITON)(x, None, None, None, None, x.double(), *tail)
    with pytest.raises(RuntimeError, match=r"add_act_bwd: mask: expected shape \(15,\), got \(14,\)"):
        op("add_act_bwd", TRITON)(x, torch.zeros(14, dtype=torch.uint8), None, None, 1.0, 1, 0.0)
    with pytest.raises(RuntimeError, match="conv_bn_act: weight: expected 3 input channels, got 4"):
        op("conv_bn_act", TRITON)(
            x, torch.ones(3, 4, 1, 1), None, three, three, None, None, None, [1, 1], [0, 0], [1, 1], 1, EPS, False, 1, 0.0
        )


# ---- the compiled kernels, without a GPU


@pytest.mark.parametrize("part", ["compile", "not compile"], ids=["compiled", "simulated"])
def test_offline(part: str) -> None:
    """_triton_offline.py in a process where Triton compiles: see there."""
    if part != "compile" and toolchain.cxx() is None:
        pytest.skip("the PTX simulator needs a C++ compiler")
    tests = Path(__file__).with_name("_triton_offline.py")
    command = [sys.executable, "-m", "pytest", "-q", "-k", part, str(tests)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
