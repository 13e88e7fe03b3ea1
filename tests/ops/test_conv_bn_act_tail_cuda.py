"""The end of a bottleneck block in one CUDA kernel (conv_bn_act_tail): on the PTX simulator, and through the host function.

The truth is fp64 with the map between the convolutions rounded to the tensors' type, as the kernel and the two layers round it.
Against those two layers, kernel for kernel, the bits are the same.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from _cuda_conv import ARCHITECTURES, INSTRUCTIONS, channels_last, conv_bn_act_fwd, machine_code, require_fused_conv
from _cuda_host import host
from _cuda_tail import VECTORS, conv_bn_act_tail, random_layer
from ptxsim._gate import ROTATION
from torch import Tensor

from dl4ds_kernels import _cuda_conv
from dl4ds_kernels._activation import ACTIVATION_CODES
from dl4ds_kernels.functional import BNParams, ConvParams, _tail, bottleneck, residual_block
from dl4ds_kernels.modules import Bottleneck, _run
from dl4ds_kernels.ops._traffic import FUSED, moved

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# N, C, H, W; output channels; kernel, stride, padding, dilation; residual; activations; parts
GEOMETRIES = [
    ((1, 64, 7, 5), 256, 3, 1, 1, 1, True, (1, 1), 1), ((2, 24, 9, 8), 136, 3, 1, 1, 1, True, (1, 1), 2),
    ((1, 64, 3, 56), 64, 3, 1, 1, 1, False, (1, 0), 1), ((1, 16, 11, 10), 200, 1, 1, 0, 1, True, (2, 1), 3),
    ((1, 40, 17, 13), 72, 3, 2, 1, 1, False, (3, 2), 2), ((2, 8, 10, 7), 8, 5, 1, 2, 1, True, (0, 3), 1),
    ((1, 72, 9, 9), 392, 3, 1, 2, 2, True, (1, 1), 2), ((1, 8, 1, 1), 64, 3, 1, 1, 1, False, (0, 0), 1),
]  # fmt: skip
MODES = ({"lazy_copies": 0}, {"schedule": 1}, {"lazy_copies": 0, "schedule": 7})
SLOPE = 0.2


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()


def act(code: int, z: Tensor) -> Tensor:
    kinds = (lambda v: v, torch.relu, lambda v: torch.nn.functional.leaky_relu(v, SLOPE), lambda v: v.clamp(0, 6))
    return kinds[code](z)


class Problem:
    """Tensors of a block's end."""

    def __init__(self, dtype: torch.dtype, geometry: tuple, seed: int = 0, **more: Any) -> None:
        shape, k, kernel, stride, padding, dilation, residual, activations, self.parts = geometry
        torch.manual_seed(seed)
        self.x = channels_last(torch.randn(shape).bfloat16().to(dtype))
        self.first = random_layer(shape[1], 64, kernel, dtype, activations[0], **more)
        self.second = random_layer(64, k, 1, dtype, activations[1], **more)
        self.geometry = [stride] * 2, [padding] * 2, [dilation] * 2
        size = torch.conv2d(self.x.float(), self.first["weight"].float(), None, *self.geometry).shape
        self.residual = channels_last(torch.randn(size[0], k, *size[2:]).to(dtype)) if residual else None

    def run(self, parts: int | None = None, **options: int) -> Tensor:
        out, self.reports = conv_bn_act_tail(
            self.x, self.first, self.second, self.residual, *self.geometry, parts=parts or self.parts, negative_slope=SLOPE,
            options=options,
        )  # fmt: skip
        return out

    def by_two_kernels(self, tile: str = "k64x64") -> Tensor:
        z, every = self.x, ([1, 1], [0, 0], [1, 1])
        for layer, geometry, residual in ((self.first, self.geometry, None), (self.second, every, self.residual)):
            z, _ = conv_bn_act_fwd(
                z, layer["weight"], *(layer[name] for name in VECTORS), residual, *geometry, activation=layer["activation"],
                eps=layer["eps"], eps_std=layer.get("eps_std", False), negative_slope=SLOPE, tile=tile,
            )  # fmt: skip
        return z

    def layer(self, given: dict[str, Any], x: Tensor, residual: Tensor | None, geometry: tuple) -> tuple[Tensor, Tensor]:
        """The layer in fp64 and how far from it fp32 sums may be."""
        bias, mean, var, weight, shift = (given[name].double().view(1, -1, 1, 1) for name in VECTORS)
        root = var.sqrt() + given["eps"] if given.get("eps_std") else (var + given["eps"]).sqrt()
        filters = given["weight"].double()
        z = (torch.conv2d(x, filters, None, *geometry) + bias - mean) / root * weight + shift
        size = torch.conv2d(x.abs(), filters.abs(), None, *geometry) / root * weight.abs() + 4
        return act(given["activation"], z if residual is None else z + residual.double()), 2e-6 * size

    def check(self, out: Tensor) -> None:
        """Against fp64. The map in between may be rounded the other way where it lies close to the middle of two values."""
        dtype = self.x.dtype
        exact, limit = self.layer(self.first, self.x.double(), None, self.geometry)
        # TF32 has 10 bits of fraction, as fp16.
        unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-11}[dtype]
        tiny = 2.0**-25 if dtype == torch.float16 else 0.0  # half of a subnormal step
        off = 1.01 * unit * exact.abs() + limit + tiny
        want, more = self.layer(self.second, exact, self.residual, ([1, 1], [0, 0], [1, 1]))
        root = (self.second["running_var"] + self.second["eps"]).sqrt()
        if self.second.get("eps_std"):
            root = self.second["running_var"].sqrt() + self.second["eps"]
        gain = (self.second["bn_weight"].double() / root).abs().view(1, -1, 1, 1)
        limit = torch.conv2d(off, self.second["weight"].double().abs()) * gain + more
        limit += 0.5 * torch.finfo(dtype).eps * (want.abs() + limit) + tiny
        bad = (out.double() - want).abs() > limit
        assert out.shape == want.shape and not bool(bad.any()), f"{int(bad.sum())} values off"
        assert not bool(out.isnan().any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geometries(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Tails of pixels and channels, all activations, parts; against fp64 and, bit for bit, against two kernels."""
    full = request.config.getoption("-m") == ""
    for i, geometry in enumerate(GEOMETRIES):
        if full or (i + ROTATION + DTYPES.index(dtype)) % 4 == 0:
            problem = Problem(dtype, geometry, seed=i, eps_std=i % 2 == 1)
            out = problem.run()
            problem.check(out)
            assert len(problem.reports) == 1 and problem.reports[0].counters["atomics"] == 0
            assert torch.equal(problem.by_two_kernels(), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits(dtype: torch.dtype) -> None:
    """NaN and infinities go the way of two kernels; neither the order of blocks and copies nor the parts change a bit."""
    problem = Problem(dtype, ((1, 24, 10, 8), 328, 3, 1, 1, 1, True, (1, 1), 1), seed=5)
    problem.x[0, 3, 2, 2], problem.x[0, 8, 6, 1] = float("nan"), float("inf")
    problem.x[0, 9, 8, 6] = torch.finfo(dtype).max  # overflows in between
    problem.residual[0, 5, 4, 4], problem.residual[0, 9, 4, 4] = float("inf"), float("nan")
    want = problem.by_two_kernels()
    assert want.isnan().any() and want.isinf().any() and want.isfinite().any()
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(problem.run(), want, **same)
    torch.testing.assert_close(problem.run(parts=3, **MODES[ROTATION % 3]), want, **same)
    torch.testing.assert_close(problem.run(**MODES[(ROTATION + 1) % 3]), want, **same)


def test_traffic() -> None:
    """x, residual and out are moved once, as declared; whole sectors; neither main loop has a bank conflict."""
    for dtype in DTYPES:
        extra = {}
        for channels, k in ((64, 64), (128, 64), (64, 128)):
            problem = Problem(dtype, ((1, channels, 8, 16), k, 3, 1, 1, 1, True, (1, 1), 1))
            out = problem.run()
            report = problem.reports[0]
            given: list[Any] = [None] * 24
            given[0], given[1], given[13] = problem.x, problem.first["weight"], problem.second["weight"]
            given[9], given[21], given[23] = 1, 1, problem.residual
            given[10:13] = problem.geometry
            declared = moved(torch.ops.dl4ds_kernels.conv_bn_act_tail.default, tuple(given), out, FUSED)
            found = {name: (t["read"], t["written"]) for name, t in report.tensors.items()}
            assert declared == {name: found[key] for name, key in (("x", "x"), ("residual", "residual"), ("result", "out"))}
            counts = report.counters
            extra[channels, k] = counts["shared_waves"] - counts["shared_ideal_waves"]
            assert counts["load_sectors"] == counts["load_ideal_sectors"] and counts["mma"] > 0
            assert counts["store_sectors"] == counts["store_ideal_sectors"] and counts["atomics"] == 0
        blocks = counts["blocks"]
        assert blocks == 2 and extra[64, 64] == extra[128, 64], extra  # the first main loop adds none
        # A chunk more: scale and shift, a few entries of the table to a bank of each store.
        assert extra[64, 128] <= 20 * blocks and extra[64, 64] <= 10 * blocks, extra


REFUSALS = {
    "middle": (29, {"first": {"k": 72}}), "not 1x1": (30, {"kernel_h": 3}), "strided": (30, {"stride_w": 2}),
    "padded": (30, {"pad_h": 1}), "another map": (30, {"width": 3}), "another type": (30, {"dtype": "kBFloat16"}),
    "columns": (31, {"k": 36}), "too many columns": (31, {"k": 2056}), "channels": (5, {"channels": 12}),
    "activation": (8, {"activation": ACTIVATION_CODES["silu"]}),
    "first activation": (8, {"first": {"activation": ACTIVATION_CODES["hardswish"]}}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    """The launcher names its reason and launches nothing."""
    code, given = REFUSALS[name]
    edits = {key: v for key, v in given.items() if key not in ("first", "k", "channels")}
    channels, first = given.get("channels", 8), given.get("first", {})
    x = channels_last(torch.zeros(1, channels, 4, 4).half())
    middle = first.get("k", 64)
    layer = random_layer(channels, middle, 3, torch.float16, first.get("activation", 1))
    second = random_layer(middle, given.get("k", 64), 1, torch.float16, 1)
    geometry = [1, 1], [1, 1], [1, 1]
    out, reports = conv_bn_act_tail(x, layer, second, None, *geometry, refusal=code, **edits)
    assert out is None and reports == []


def arguments(problem: Problem) -> list[Any]:
    """Those of the op."""

    def layer(given: dict[str, Any]) -> list[Any]:
        return [given["weight"], *(given[name] for name in VECTORS), given["eps"], False, given["activation"]]

    first, second = layer(problem.first), layer(problem.second)
    first[1], second[1] = first[1].to(problem.x.dtype), second[1].to(problem.x.dtype)
    return [problem.x, *first, *problem.geometry, *second, SLOPE, problem.residual]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_function(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel and two layers of the fused convolution: the same bits, strides and no copies; the library's way is near."""
    problem = Problem(dtype, ((1, 64, 9, 7), 136, 3, 1, 1, 1, True, (1, 1), 1), seed=3)
    results, args = [], arguments(problem)
    for conv, tail in (("library", "1"), ("fused", "0"), ("fused", "1")):
        monkeypatch.setenv("DL4DS_CUDA_CONV", conv)
        monkeypatch.setenv("DL4DS_CUDA_TAIL", tail)
        results.append(host()("conv_bn_act_tail", *args))
        assert host().copies == 0
    assert torch.equal(results[2], results[1]) and results[2].stride() == results[1].stride() == results[0].stride()
    tolerance = {torch.float16: 8e-3, torch.bfloat16: 6e-2, torch.float32: 8e-3}[dtype]
    torch.testing.assert_close(results[2], results[0], rtol=tolerance, atol=tolerance)
    args[-1] = problem.residual.contiguous()
    args[13] = args[13].contiguous()
    assert torch.equal(host()("conv_bn_act_tail", *args), results[2]) and host().copies == 1  # 1x1 filters lie densely anyway
    with pytest.raises(
        RuntimeError, match=r"conv_bn_act_tail: residual: expected shape \(1, 136, 9, 7\), got \(1, 136, 9, 6\)"
    ):
        host()("conv_bn_act_tail", *args[:-1], args[-1][..., :6])
    for place, name in ((3, "running_mean"), (15, "running_mean2"), (16, "running_var2")):
        with pytest.raises(RuntimeError, match=rf"conv_bn_act_tail: {name}: expected shape"):
            host()("conv_bn_act_tail", *args[:place], torch.zeros(5), *args[place + 1 :])
    monkeypatch.setenv("DL4DS_CUDA_TAIL", "yes")
    with pytest.raises(RuntimeError, match="DL4DS_CUDA_TAIL: expected auto, 1 or 0, got yes"):
        host()("conv_bn_act_tail", *args)


def test_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """What dk.explain says (of a device of capability 8.0): few images are one kernel, many two layers."""
    half, last = {"dtype": torch.float16}, {"memory_format": torch.channels_last}

    def explained(batch: int, middle: int = 64, k: int = 256, size: int = 56, activation: int = 1) -> dict[str, Any]:
        ask = lambda *args: host()("conv_bn_act_tail_route", *args)  # noqa: E731
        x = torch.empty(batch, middle, size, size, **half, **last)
        weights = torch.empty(middle, middle, 3, 3, **half), torch.empty(k, middle, 1, 1, **half)
        return _cuda_conv.explain_tail(x, *weights, True, [1, 1], [1, 1], [1, 1], activation, question=ask)

    one = explained(1)
    assert one["kernels"].startswith("one fused kernel") and one["parts"] == 2 and one["fused_us"] < 0.9 * one["apart_us"]
    assert "not measured" in one["reason"] and explained(2)["kernels"].startswith("one fused kernel")
    many = explained(64)
    assert many["kernels"].startswith("two layers") and "no faster" in many["reason"] and many["parts"] == 1
    assert "64 channels" in explained(1, 128, 512, 28)["reason"]
    assert "activation" in explained(1, activation=ACTIVATION_CODES["silu"])["reason"]
    monkeypatch.setenv("DL4DS_CUDA_TAIL", "0")
    assert "DL4DS_CUDA_TAIL=0" in explained(1)["reason"]
    monkeypatch.setenv("DL4DS_CUDA_TAIL", "1")
    assert "DL4DS_CUDA_TAIL=1" in explained(64)["reason"]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "library")
    assert "DL4DS_CUDA_CONV=library" in explained(1)["reason"]


class OnCuda(Tensor):
    """A CPU tensor that says that it lies on a GPU; results of torch's ops on it are plain tensors."""

    is_cuda, is_cpu = True, False
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("downsample", [False, True])
def test_blocks(downsample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """F.bottleneck and the module hand their last two convolutions and the shortcut over in one call where nobody learns."""
    names: list[str] = []

    def simulated(name: str, differentiable: bool, *args: Any) -> Any:
        names.append(name)
        return host()(name, *args)

    monkeypatch.setattr(_tail, "has_tail", lambda namespace, x: True)
    monkeypatch.setattr(_tail, "select", lambda name, x, backend: "dl4ds_kernels")
    monkeypatch.setattr(_tail, "op", lambda name: name)
    monkeypatch.setattr(_tail, "call", simulated)
    for room in (_run, residual_block):

        def layer(x: Tensor, *args: Any, _plain: Any = room.conv_bn_act, **options: Any) -> Tensor:
            out = _plain(x, *args, **options)
            return out.as_subclass(OnCuda) if x.is_cuda else out

        monkeypatch.setattr(room, "conv_bn_act", layer)
    monkeypatch.setenv("DL4DS_CUDA_TAIL", "1")
    torch.manual_seed(4)
    shortcut = torch.nn.Sequential(torch.nn.Conv2d(32, 256, 1, bias=False), torch.nn.BatchNorm2d(256)) if downsample else None
    module = Bottleneck(32 if downsample else 256, 64, downsample=shortcut).eval()
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    x = channels_last(torch.randn(1, 32 if downsample else 256, 6, 5))

    def params(conv: torch.nn.Conv2d, bn: torch.nn.BatchNorm2d) -> ConvParams:
        norm = BNParams(bn.running_mean, bn.running_var, bn.weight, bn.bias, 0.1, bn.eps)
        return ConvParams(conv.weight, norm, None, conv.stride, conv.padding)

    layers = [params(*pair) for pair in module.pairs()]
    projection = params(*shortcut) if downsample else None
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        with torch.no_grad():
            want = torch.nn.Module.__call__(module.double(), x.double()).float()
            module.float()
            assert names == []
            got = module(x.as_subclass(OnCuda))
            assert names == ["conv_bn_act_tail"]
            again = bottleneck(x.as_subclass(OnCuda), layers, projection)
            assert names == ["conv_bn_act_tail"] * 2
            trained = bottleneck(x.as_subclass(OnCuda), layers, projection, training=True)
            assert len(names) == 2 and trained.shape == want.shape
        module(x.as_subclass(OnCuda))  # with gradients
        assert len(names) == 2
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    for out in (got, again):
        torch.testing.assert_close(torch.Tensor(out), want, rtol=2e-2, atol=2e-2)  # TF32


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_machine_code(name: str, arch: str) -> None:
    """No spill, no stack, no advice; fp32 sums on the tensor cores, ldmatrix, 16-byte copies, loads and stores."""
    facts, listings = machine_code("conv_bn_act_tail", name, arch)
    ((kernel, used),) = facts.items()
    listing = listings[kernel]
    assert used["registers"] <= 168 and not (used["stack"] or used["spill_stores"] or used["spill_loads"]), used
    for instruction in (INSTRUCTIONS[name], "LDSM.16.M88.4", "STG.E.128", "LDG.E.128"):
        assert instruction in listing, f"no {instruction}"
    copies = re.findall(r"LDGSTS[\w.]*", listing)
    assert copies and all(c.endswith(".128") for c in copies)
