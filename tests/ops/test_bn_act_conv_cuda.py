"""bn_act_conv on CUDA: BatchNorm and relu on the way into a 1x1 convolution, on the PTX simulator and by the host function.

The truth is fp64. The normalised input is rounded to the operands' type (fp32: to TF32) as where bn_act writes it: against that
way, kernel for kernel, the bits are the same.
"""

from __future__ import annotations

import re
from typing import Any

import _cuda_launch as cuda
import pytest
import torch
from _cuda_conv import ARCHITECTURES, bn_act_conv_fwd, channels_last, conv_bn_act_fwd, machine_code, require_fused_conv
from _cuda_host import host
from ptxsim._gate import ROTATION
from torch import Tensor

from dl4ds_kernels import _cuda_conv
from dl4ds_kernels._activation import ACTIVATION_CODES
from dl4ds_kernels.functional import _prologue, bn_act_conv
from dl4ds_kernels.models import densenet
from dl4ds_kernels.modules import preact
from dl4ds_kernels.ops._traffic import FUSED, moved

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = ("k128x128", "k128x64", "k64x64")
# N, C, H, W, C_out, stride; BatchNorm and relu behind it; residual
GEOMETRIES = [
    ((1, 8, 1, 1), 8, 1, False, False), ((2, 24, 9, 8), 136, 1, False, False), ((3, 72, 8, 7), 40, 1, True, False),
    ((1, 136, 13, 5), 72, 2, False, False), ((2, 40, 12, 11), 64, 1, True, True), ((1, 64, 16, 9), 200, 2, True, True),
]  # fmt: skip
ODD = ((2, 32, 9, 8), 21, 1, True, True)  # output channels that fill no vectors: only the smallest tile
MODES = ({"lazy_copies": 0}, {"schedule": 1}, {"lazy_copies": 0, "schedule": 7})
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-11}  # of an operand's rounding


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()


class Problem:
    """One layer; filters that TF32 holds exactly."""

    def __init__(self, dtype: torch.dtype, geometry: tuple, seed: int = 0, eps_std: bool = False) -> None:
        shape, k, stride, behind, residual = geometry
        torch.manual_seed(seed)
        self.x = channels_last(torch.randn(shape).to(dtype))
        self.weight = channels_last((torch.randn(k, shape[1], 1, 1) * shape[1] ** -0.5).bfloat16().to(dtype))
        self.bias, self.stride = torch.randn(k), [stride] * 2
        self.inner = {**self.vectors(shape[1]), "eps": 1e-3, "eps_std": eps_std}
        names = {"mean": "running_mean", "var": "running_var", "weight": "bn_weight", "bias": "bn_bias"}
        self.outer = {names[name]: v for name, v in self.vectors(k).items()} if behind else None
        height, width = ((s - 1) // stride + 1 for s in shape[2:])
        self.residual = channels_last(torch.randn(shape[0], k, height, width).to(dtype)) if residual else None

    def vectors(self, channels: int) -> dict[str, Tensor]:
        found = {name: torch.randn(channels) for name in ("mean", "weight", "bias")}
        return {**found, "var": torch.rand(channels) + 0.5}

    def run(self, tile: str = "k64x64", **options: int) -> Tensor:
        more = {"eps": 1e-3, "activation": 1} if self.outer else {}
        out, self.reports = bn_act_conv_fwd(
            self.x, self.inner, self.weight, self.bias, self.stride, [0, 0], outer=self.outer, residual=self.residual,
            tile=tile, options=options, **more,
        )  # fmt: skip
        return out

    def conv(self, z: Tensor, weight: Tensor) -> Tensor:
        return torch.conv2d(z, weight, None, self.stride)

    def truth(self) -> tuple[Tensor, Tensor]:
        """The result in fp64, and how far from it a kernel may be."""
        at = {name: v.double().view(1, -1, 1, 1) for name, v in self.inner.items() if isinstance(v, Tensor)}
        root = at["var"].sqrt() + 1e-3 if self.inner["eps_std"] else (at["var"] + 1e-3).sqrt()
        scale = at["weight"] / root
        z = (self.x.double() * scale + at["bias"] - at["mean"] * scale).clamp_min(0)
        terms = self.x.double().abs() * scale.abs() + at["bias"].abs() + (at["mean"] * scale).abs()
        weight = self.weight.double()
        want = self.conv(z, weight) + self.bias.double().view(1, -1, 1, 1)
        off = 1.01 * UNIT[self.x.dtype] * self.conv(z, weight.abs()) + 2e-6 * (self.conv(terms, weight.abs()) + 1)
        if self.outer:
            mean, var, bn_weight, bn_bias = (
                self.outer[name].double().view(1, -1, 1, 1) for name in ("running_mean", "running_var", "bn_weight", "bn_bias")
            )
            factor = bn_weight / (var + 1e-3).sqrt()
            want, off = (want - mean) * factor + bn_bias, off * factor.abs() + 2e-6 * (mean * factor).abs()
            want = (want if self.residual is None else want + self.residual.double()).clamp_min(0)
        return want, off + 0.5 * torch.finfo(self.x.dtype).eps * (want.abs() + off) + 2e-6

    def check(self, out: Tensor) -> None:
        want, limit = self.truth()
        bad = (out.double() - want).abs() > limit
        assert out.shape == want.shape and not bool(bad.any()), f"{int(bad.sum())} values off"


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geometries(dtype: torch.dtype, tile: str, request: pytest.FixtureRequest) -> None:
    """Tails of pixels and channels, strides, a BatchNorm and a residual behind it; no atomics; the same bits in any order."""
    full = request.config.getoption("-m") == ""
    for i, geometry in enumerate([*GEOMETRIES, *([ODD] if tile == "k64x64" else [])]):
        if full or (i + ROTATION + DTYPES.index(dtype) + TILES.index(tile)) % 3 == 0:
            problem = Problem(dtype, geometry, seed=i, eps_std=i % 2 == 1)
            out = problem.run(tile)
            problem.check(out)
            assert len(problem.reports) == 1 and problem.reports[0].counters["atomics"] == 0
            assert torch.equal(problem.run(tile, **MODES[(i + ROTATION) % 3]), out)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_two_kernels(dtype: torch.dtype, tile: str) -> None:
    """bn_act's kernel, then the fused convolution on what it wrote: not one bit else, infinities and NaN included."""
    problem = Problem(dtype, ((2, 72, 9, 8), 136, 1, False, False), seed=5)
    problem.x[0, 3, 2, 2], problem.x[1, 8, 4, 1] = float("nan"), float("inf")
    problem.x[0, 9, 3, 3] = torch.finfo(dtype).max  # overflows where weight * rstd is above one
    inner = problem.inner
    z, _ = cuda.bn_act_fwd(
        problem.x, inner["weight"], inner["bias"], inner["mean"], inner["var"], None, 1, training=False, eps=1e-3
    )
    zero, one = torch.zeros(136), torch.ones(136)
    want, _ = conv_bn_act_fwd(
        z["out"], problem.weight, problem.bias, zero, one, None, None, None, [1, 1], [0, 0], [1, 1], eps=0.0, tile=tile
    )
    torch.testing.assert_close(problem.run(tile), want, rtol=0, atol=0, equal_nan=True)
    assert want.isnan().any() and want.isfinite().sum() > 0.9 * want.numel()


def test_slice_of_a_buffer() -> None:
    """The first channels of DenseNet's buffer, where they lie: what is behind them is neither read nor missed."""
    problem = Problem(torch.float16, ((2, 40, 7, 6), 64, 1, True, False))
    whole = channels_last(torch.full((2, 104, 7, 6), float("nan"), dtype=torch.float16))
    problem.x = whole[:, :40].copy_(problem.x)
    problem.check(problem.run())


def test_half_vectors() -> None:
    """BatchNorms of half precision, and without weight and bias."""
    problem = Problem(torch.bfloat16, GEOMETRIES[2], seed=7)
    for vectors in (problem.inner, problem.outer):
        vectors.update({name: v.bfloat16() for name, v in vectors.items() if isinstance(v, Tensor)})
    problem.check(problem.run())
    given, ones = problem.inner, torch.ones(72)
    problem.inner = {**given, "weight": ones, "bias": 0 * ones}
    want = problem.run()
    problem.inner = {**given, "weight": None, "bias": None}
    assert torch.equal(problem.run(), want)


def test_traffic() -> None:
    """x is read once and out written once, as declared; whole sectors; the main loop has no bank conflicts."""
    for dtype in DTYPES:
        for tile in TILES:
            extra = []
            for channels in (64, 128):
                problem = Problem(dtype, ((1, channels, 8, 16), 128, 1, True, True))
                out = problem.run(tile)
                report = problem.reports[0]
                schema = [None] * 24
                schema[0], schema[7], schema[9], schema[11], schema[15] = problem.x, 1, problem.weight, 1, problem.residual
                schema[16:20] = [1, 1], [0, 0], [1, 1], 1
                declared = moved(torch.ops.dl4ds_kernels.bn_act_conv.default, tuple(schema), out, FUSED)
                found = {name: (t["read"], t["written"]) for name, t in report.tensors.items()}
                assert declared == {name: found[key] for name, key in (("x", "x"), ("residual", "residual"), ("result", "out"))}
                counts = report.counters
                extra.append(counts["shared_waves"] - counts["shared_ideal_waves"])
                assert counts["load_sectors"] == counts["load_ideal_sectors"] and counts["mma"] > 0
                assert counts["store_sectors"] == counts["store_ideal_sectors"]
            # Twice the channels: the main loop adds none. The table does before it, two entries to a bank of each store.
            assert extra[1] - extra[0] == 4 * counts["blocks"], f"{tile}, {dtype}: {extra}"
            assert extra[1] <= (64 + 8) * counts["blocks"], "epilogue and table"


REFUSALS = {
    "kernel": (10, {"weight": torch.zeros(8, 8, 3, 3)}), "padding": (10, {"padding": [1, 1]}), "slices": (10, {"slices": 2}),
    "activation": (11, {"in_activation": ACTIVATION_CODES["leaky_relu"]}),
    "channels": (12, {"x": torch.zeros(1, 4104, 2, 2), "weight": torch.zeros(8, 4104, 1, 1)}),
    "behind": (8, {"activation": ACTIVATION_CODES["silu"]}), "vectors": (5, {"x": torch.zeros(1, 12, 4, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    """The launcher names its reason and launches nothing: padding above all, whose zeros the shift would not leave zero."""
    code, given = REFUSALS[name]
    x, weight = given.pop("x", torch.zeros(1, 8, 4, 4)), given.pop("weight", torch.zeros(8, 8, 1, 1))
    ones = torch.ones(x.shape[1])
    inner = {"mean": ones, "var": ones, "weight": None, "bias": None, "eps": 1e-3}
    weight = weight if weight.shape[1] == x.shape[1] else torch.zeros(8, x.shape[1], 1, 1)
    _, reports = bn_act_conv_fwd(
        channels_last(x.half()), inner, channels_last(weight.half()), None, [1, 1], given.pop("padding", [0, 0]), refusal=code,
        **given,
    )  # fmt: skip
    assert reports == []


def arguments(dtype: torch.dtype, behind: bool, activation: int = 1, padding: int = 0) -> tuple[Any, ...]:
    p = Problem(dtype, ((2, 64, 9, 8), 40, 1, behind, behind), seed=3)
    inner = [p.inner[name] for name in ("mean", "var", "weight", "bias")]
    names = ("running_mean", "running_var", "bn_weight", "bn_bias")
    outer = [p.outer[name] for name in names] if behind else [None] * 4
    tail = (1e-3, False, 1 if behind else 0, 0.0)
    return (
        p.x, *inner, 1e-3, False, activation, 0.1, p.weight, p.bias.to(dtype), *outer, p.residual, [1, 1], [padding] * 2,
        [1, 1], 1, *tail,
    )  # fmt: skip


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_function(dtype: torch.dtype, behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the dispatcher give the same tensor; what the kernel refuses goes the other way."""
    args, results = arguments(dtype, behind), []
    for wish in ("library", "fused"):
        monkeypatch.setenv("DL4DS_CUDA_CONV", wish)
        results.append(host()("bn_act_conv", *args))
        assert host().copies == 0
    assert results[0].stride() == results[1].stride() and results[1].dtype == dtype
    tolerance = {torch.float16: 8e-3, torch.bfloat16: 6e-2, torch.float32: 8e-3}[dtype]
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    silu = arguments(dtype, behind, ACTIVATION_CODES["silu"], padding=0 if behind else 1)
    monkeypatch.setenv("DL4DS_CUDA_CONV", "library")
    want = host()("bn_act_conv", *silu)
    monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
    torch.testing.assert_close(host()("bn_act_conv", *silu), want, rtol=tolerance, atol=tolerance)


def test_host_errors() -> None:
    """Vectors that do not fit, and an epilogue without its statistics."""
    args = arguments(torch.float16, True)
    with pytest.raises(RuntimeError, match="bn_act_conv: running_mean: expected where bn_weight"):
        host()("bn_act_conv", *args[:11], None, None, *args[13:])
    with pytest.raises(RuntimeError, match="bn_act_conv: running_var: expected with running_mean"):
        host()("bn_act_conv", *args[:12], None, *args[13:])
    for place in (1, 11):
        with pytest.raises(RuntimeError, match=r"(in|running)_mean: expected"):
            host()("bn_act_conv", *args[:place], torch.zeros(5), *args[place + 1 :])


def test_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """What dk.explain says (of a device of capability 8.0)."""
    half, last = {"dtype": torch.float16}, {"memory_format": torch.channels_last}

    def explained(x: Tensor, weight: Tensor, activation: int = 1, padding: int = 0, **more: Any) -> dict[str, Any]:
        ask = lambda *args: host()("bn_act_conv_route", *args)  # noqa: E731
        return _cuda_conv.explain_prologue(x, weight, [1, 1], [padding] * 2, [1, 1], 1, activation, question=ask, **more)

    x, weight = torch.empty(32, 256, 28, 28, **half, **last), torch.empty(128, 256, 1, 1, **half)
    for epilogue in (False, True):
        found = explained(x, weight, epilogue=epilogue)
        assert found["kernels"].startswith("one fused kernel") and found["fused_us"] < 0.9 * found["library_us"]
    assert found["tile"] == "128x128"
    deep = torch.empty(32, 4096, 7, 7, **half, **last), torch.empty(4096, 4096, 1, 1, **half)
    assert "no faster fused" in explained(*deep)["reason"]  # arithmetic: a pass over x is nothing beside it
    wide = torch.empty(1, 4104, 7, 7, **half, **last)
    assert "4096" in explained(wide, torch.empty(8, 4104, 1, 1, **half))["reason"]
    assert "relu" in explained(x, weight, ACTIVATION_CODES["silu"])["reason"]
    assert "1x1" in explained(x, torch.empty(128, 256, 3, 3, **half), padding=1)["reason"]
    assert "1x1" in explained(x, weight, padding=1)["reason"]
    assert "channels_last" in explained(x.contiguous(), weight)["reason"]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "library")
    assert explained(x, weight)["kernels"] == "BatchNorm and activation, then cuDNN"


class OnCuda(Tensor):
    """A CPU tensor that says that it lies on a GPU; results of torch's ops on it are plain tensors."""

    is_cuda, is_cpu = True, False
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functional and the modules find the kernel and call the host function: the ops that they asked for."""
    names: list[str] = []

    def simulated(name: str, differentiable: bool, *args: Any) -> Any:
        names.append(name)
        return host()(name, *args)

    monkeypatch.setattr(_prologue, "has_prologue", lambda namespace, x: True)
    monkeypatch.setattr(_prologue, "select", lambda name, x, backend: "dl4ds_kernels")
    monkeypatch.setattr(_prologue, "op", lambda name: name)
    monkeypatch.setattr(_prologue, "call", simulated)
    monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
    return names


def test_functional(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """F.bn_act_conv asks the op for 1x1 convolutions without gradients, and else not."""
    p = Problem(torch.float16, ((2, 64, 9, 8), 40, 1, False, False), seed=3)
    vectors = [p.inner[name] for name in ("mean", "var", "weight", "bias")]
    bias = p.bias.half()
    out = bn_act_conv(p.x.as_subclass(OnCuda), *vectors, p.weight, bias, eps=1e-3)
    assert calls == ["bn_act_conv"]
    p.bias = bias.float()
    p.check(out)
    x, weight = p.x.float().as_subclass(OnCuda), p.weight.float()
    bn_act_conv(x, *vectors, weight.clone().requires_grad_(), eps=1e-3)
    bn_act_conv(x, *vectors, torch.zeros(8, 64, 3, 3), eps=1e-3)
    bn_act_conv(x, *vectors, weight, padding="same", eps=1e-3)
    bn_act_conv(x, *vectors, weight, eps=1e-3, training=True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device == "cuda")
    assert torch.get_autocast_dtype("cuda") == torch.float16
    bn_act_conv(x, *vectors, weight, eps=1e-3)  # there BatchNorm comes first, in fp32
    assert calls == ["bn_act_conv"]


@pytest.mark.parametrize("name", ["densenet", "preact"])
def test_modules(name: str, calls: list[str]) -> None:
    """A DenseNet layer and a pre-activation bottleneck hand both BatchNorms of their first convolution over in one call."""
    torch.manual_seed(2)
    module = densenet.DenseLayer(64, 16, 4, 0.0, False) if name == "densenet" else preact.PreActBottleneck(64, 16)
    for norm in (m for m in module.eval().modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    x = channels_last(torch.randn(1, 64, 6, 5))
    before = torch.backends.cudnn.conv.fp32_precision
    with torch.no_grad():
        want = module(x)
        assert calls == []
        try:
            torch.backends.cudnn.conv.fp32_precision = "tf32"
            got = module(x.as_subclass(OnCuda))
        finally:
            torch.backends.cudnn.conv.fp32_precision = before
    assert calls == ["bn_act_conv"]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)  # TF32


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_machine_code(name: str, arch: str) -> None:
    """No spill, no stack, no advice; relu costs nothing in 16-bit types: it is part of the packing."""
    facts, listings = machine_code("conv_bn_act_prologue", name, arch)
    assert len(facts) == (2 if name == "float32" else 3)  # fp32 has no 128 x 128: too few registers
    for kernel, used in facts.items():
        assert used["registers"] <= 255 and not (used["stack"] or used["spill_stores"] or used["spill_loads"]), used
        for instruction in ("STG.E.128", "LDSM.16.M88.4", "HMMA", "LDGSTS"):
            assert instruction in listings[kernel], f"{kernel}: no {instruction}"
        if name != "float32" and arch == "80":
            assert re.search(r"F2FP\S*RELU", listings[kernel]) and "FMNMX" not in listings[kernel]
