"""Sizes, strides and geometry: F11 to F13 and F20 to F23. Every result has the values, shape and strides of stock torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _cases import LAYOUTS, lay_out
from _stock import bn_vectors, same, significant
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import functional as F

EACH = pytest.mark.parametrize("backend", [None, "cpu"], ids=lambda b: b or "auto")
ROOT = Path(__file__).parent.parent.parent


def image(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "nchw", seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return lay_out(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), layout)


def conv_bn(channels: int) -> dict[str, Tensor]:
    return dict(zip(("running_mean", "running_var", "bn_weight", "bn_bias"), bn_vectors(channels), strict=True))


def all_ops(x: Tensor, backend: str | None, training: bool = False, residual: Tensor | None = None, **options: Any) -> None:
    """Every elementwise op and a small convolution on ``x`` (N, C, H, W) against stock."""
    bn = bn_vectors(x.shape[1], x.dtype)
    other = image(*x.shape, dtype=x.dtype, seed=4) if residual is None else residual
    same("add_act", x, other, backend=backend, **options)
    same("bn_act", x, *bn, training=training, backend=backend, **options)
    same("bn_act", x, *bn, residual=other, training=training, backend=backend, **options)


@EACH
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 3, 7, 31, 33, 1025])
def test_F11_channels_that_no_vector_width_divides(channels: int, layout: str, backend: str | None, kernels: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = image(2, channels, 5, 7, dtype=dtype, layout=layout)
        all_ops(x, backend, training=True)
    x = image(2, channels, 6, 8, layout=layout)
    same("max_pool_indices", x, backend=backend, strides=channels > 1)
    same("upsample_add", x, image(2, channels, 12, 16, layout=layout), backend=backend)
    if channels < 100:
        weight = image(channels, channels, 3, 3)
        same("conv_bn_act", x, weight, **conv_bn(channels), padding=1, backend=backend)


@EACH
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (13, 1), (17, 19), (1, 65536)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_F12_heights_and_widths(size: tuple[int, int], layout: str, backend: str | None, kernels: None) -> None:
    """One pixel, one row, one column, primes, and a row of 65,536."""
    x = image(2, 5, *size, layout=layout)
    all_ops(x, backend, training=True)
    same("conv_bn_act", x, image(4, 5, 3, 3), **conv_bn(4), padding=1, backend=backend)
    same("conv_bn_act", x, image(4, 5, 1, 1), **conv_bn(4), backend=backend)
    low = image(2, 5, *size, layout=layout)
    same("upsample_add", low, image(2, 5, 2 * size[0], 2 * size[1], layout=layout), backend=backend)


GEOMETRY: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "stride": ((6, 8, 3, 3), {"stride": 2, "padding": 1}),
    "stride-pair": ((6, 8, 3, 3), {"stride": (2, 3), "padding": (0, 2)}),
    "padding-larger-than-kernel": ((6, 8, 3, 3), {"padding": 5}),
    "dilation": ((6, 8, 3, 3), {"dilation": 2, "padding": 2}),
    "dilation-pair": ((6, 8, 3, 2), {"dilation": (1, 3)}),
    "groups": ((6, 4, 3, 3), {"groups": 2}),
    "depthwise": ((8, 1, 3, 3), {"groups": 8, "padding": 1}),
    "depthwise-multiplier": ((16, 1, 5, 5), {"groups": 8, "padding": 2, "stride": 2}),
    "same": ((6, 8, 3, 3), {"padding": "same"}),
    "same-even-kernel": ((6, 8, 2, 4), {"padding": "same"}),
    "valid": ((6, 8, 3, 3), {"padding": "valid"}),
    "1x1-stride": ((6, 8, 1, 1), {"stride": 2}),
    "7x7": ((6, 8, 7, 7), {"stride": 2, "padding": 3}),
    "1x7": ((6, 8, 1, 7), {"padding": (0, 3)}),
}


@EACH
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_F13_geometry(name: str, layout: str, backend: str | None, kernels: None) -> None:
    """Right, whatever the geometry; factor 4: two summation orders of one convolution differ by about each one's error."""
    shape, options = GEOMETRY[name]
    x = image(2, 8, 13, 11, layout=layout)
    same("conv_bn_act", x, image(*shape), **conv_bn(shape[0]), **options, backend=backend, factor=4.0)
    same("conv_bn_act", x, image(*shape), **conv_bn(shape[0]), **options, training=True, backend=backend, factor=4.0)
    if name.startswith("same"):
        same("conv_bn_act", x, image(*shape), **conv_bn(shape[0]), **{**options, "stride": 2}, backend=backend)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_F13_padding_modes_are_kept_with_the_reason(mode: str) -> None:
    stock = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model = dk.optimize(stock)
    assert "PADDING_MODE" in str(model.dl4ds_report)
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(model(x), stock(x))


@pytest.mark.parametrize("name", GEOMETRY)
def test_F13_geometry_through_a_model(name: str) -> None:
    (c_out, c_in, *kernel), options = GEOMETRY[name]
    conv = nn.Conv2d(c_in * options.get("groups", 1), c_out, tuple(kernel), **options, bias=False)
    stock = nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU()).eval()
    model, x = dk.optimize(stock), image(2, 8, 13, 11)
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)


def test_F20_grids_are_one_dimensional() -> None:
    """blockIdx.y and z end at 65,535: no launch uses them, so no shape can exceed them (launch.cuh checks the one that is)."""
    launches = 0
    for path in [*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "csrc").rglob("*.cuh")]:
        text = path.read_text()
        assert not any(word in text for word in ("blockIdx.y", "blockIdx.z", "gridDim.y", "gridDim.z", "dim3")), path
        launches += text.count("launch(") + text.count("<<<")
    assert launches > 10
    assert "blocks > INT32_MAX" in (ROOT / "csrc/common/cuda/launch.cuh").read_text()


@EACH
@pytest.mark.parametrize("shape", [(70_000, 3, 1, 1), (1, 70_000, 1, 2), (70_000, 3), (1, 2, 70_000, 1)], ids=str)
def test_F20_more_than_65535_of_a_dimension(shape: tuple[int, ...], backend: str | None, kernels: None) -> None:
    """The same sizes on the CPU; tests/test_cuda_kernels.py runs many-block grids of the CUDA kernels on the simulator."""
    x = image(*shape)
    same("add_act", x, x, backend=backend)
    if shape[0] > 1:
        same("bn_act", x, *bn_vectors(shape[1]), training=True, backend=backend)
    same("bn_act", x, *bn_vectors(shape[1]), backend=backend)


@EACH
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (2, 1, 5, 6), (2, 8, 1, 1), (1, 8, 5, 6), (1, 1, 1, 1), (2, 8, 1, 6)], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_F21_strides_of_the_result(layout: str, shape: tuple[int, ...], backend: str | None, kernels: None) -> None:
    """channels_last in, channels_last out; where C = 1 or H = W = 1 leaves it open, stock's strides to the last one."""
    x = image(*shape, layout=layout)
    bn = bn_vectors(shape[1])
    for residual in (None, image(*shape, layout="nhwc"), image(*shape, layout="nchw")):
        ours = F.bn_act(x, *bn, residual=residual, backend=backend)
        z = torch.nn.functional.batch_norm(x, *bn)
        expected = z if residual is None else z + residual
        kept = Tensor.stride if residual is None else significant  # torch.add's ties are its own
        assert kept(ours) == kept(expected) or x.numel() == 1
        if residual is not None:
            total = F.add_act(x, residual, backend=backend)
            assert significant(total) == significant(torch.relu(x + residual))
    for c_out in (4, 1):
        same("conv_bn_act", x, image(c_out, shape[1], 3, 3), **conv_bn(c_out), padding=1, backend=backend)


@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (2, 1, 5, 6), (2, 8, 1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "transposed", "nhwc_cslice"])
def test_F21_fake_agrees(layout: str, shape: tuple[int, ...], kernels: None) -> None:
    """opcheck sees a wrong fake kernel only if its samples have the layout: so the strides are compared here for each.

    A stride of a dimension with one element addresses nothing, and torch's own fake kernels differ from its real ones there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, bn = image(*shape, layout=layout), bn_vectors(shape[1])
    ops = torch.ops.dl4ds_kernels
    for call in (
        lambda t: ops.bn_act(t, bn[2], bn[3], bn[0], bn[1], None, False, 0.1, 1e-5, False, 1, 0.1, False)[0],
        lambda t: ops.add_act(t, t, 1.0, 1, 0.1, False)[0],
    ):
        real = call(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = call(mode.from_tensor(x))
        assert significant(fake) == significant(real)


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_F22_strides_of_the_input(layout: str, dtype: torch.dtype, backend: str | None, kernels: None) -> None:
    """Slices, transposes, 0-strides: memory around the tensor is NaN, so what is read beside it shows."""
    x = image(2, 8, 6, 10, dtype=dtype, layout=layout)
    other = image(2, 8, 6, 10, dtype=dtype, layout=LAYOUTS[LAYOUTS.index(layout) - 1], seed=5)
    for options in ({}, {"training": True}):
        same("bn_act", x, *bn_vectors(8, dtype), backend=backend, strides=False, **options)
        same("bn_act", x, *bn_vectors(8, dtype), residual=other, backend=backend, strides=False, **options)
    same("add_act", x, other, backend=backend)
    same("max_pool_indices", x, backend=backend, strides=False)
    same("upsample_add", x[:, :, :3, :5], other, backend=backend, strides=False)
    if dtype == torch.float32:
        same("conv_bn_act", x, image(4, 8, 3, 3, layout=layout if layout != "nslice" else "nchw"), **conv_bn(4), residual=None,
             padding=1, backend=backend, strides=False, factor=4.0)  # fmt: skip
    where = F.max_pool_indices(x)[1]
    same("max_unpool", x[:, :, ::2, ::2], where, backend=backend, strides=False)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_F23_odd_addresses(dtype: torch.dtype, backend: str | None, kernels: None) -> None:
    """One element off every vector boundary: scalar or unaligned loads, no fault, the same numbers."""
    for offset in (1, 3):
        memory = torch.full((2 * 9 * 7 * 11 + offset,), float("nan"), dtype=dtype)
        x = memory[offset:].view(2, 9, 7, 11).copy_(image(2, 9, 7, 11, dtype=dtype))
        assert x.data_ptr() % 16 == offset * x.element_size() % 16
        all_ops(x, backend, training=True, residual=x)
        even = memory[offset : offset + 2 * 9 * 6 * 10].view(2, 9, 6, 10).nan_to_num()
        same("max_pool_indices", even, backend=backend)
        vectors = [torch.cat([v.new_zeros(offset), v])[offset:] for v in bn_vectors(9, dtype)]
        same("bn_act", x, *vectors, backend=backend)


@EACH
def test_F23_two_bytes_off_and_backward(backend: str | None, kernels: None) -> None:
    """A 16-bit tensor at an address that only 2 divides, forward and backward, dense and channels_last."""
    for layout in ("nchw", "nhwc"):
        values = image(2, 16, 9, 9, dtype=torch.bfloat16, layout=layout)
        memory = torch.zeros(values.numel() + 1, dtype=torch.bfloat16)
        x = memory[1:].as_strided(values.shape, values.stride(), 1).copy_(values)
        assert x.data_ptr() % 4 == 2
        results = []
        for tensor in (x, values):
            leaf = tensor.detach().requires_grad_()
            vectors = [v.clone() for v in bn_vectors(16)]
            out = F.bn_act(leaf, *vectors, training=True, residual=leaf, backend=backend)
            results.append((out.detach(), torch.autograd.grad(out.float().square().sum(), leaf)[0]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
