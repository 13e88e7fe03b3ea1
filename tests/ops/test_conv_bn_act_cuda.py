"""The fused CUDA convolution of conv_bn_act on the PTX simulator: through its launcher, and through the host function.

Every launch is free of findings; results obey one rounding to the type and fp32 sums against fp64 (of fp32 operands: rounded to
TF32 as the tensor cores do).
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import _cuda_launch as cuda
import pytest
import torch
from _cuda_conv import ARCHITECTURES, INSTRUCTIONS, channels_last, conv_bn_act_fwd, machine_code, require_fused_conv
from _cuda_host import host
from ptxsim import HostLibrary, build
from ptxsim._gate import ROTATION
from torch import Tensor

from dl4ds_kernels import _cuda_conv
from dl4ds_kernels._activation import ACTIVATION_CODES

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILES = ("k128x128", "k128x64", "k64x64")
# N, C, H, W, C_out, kernel, stride, padding, dilation
GEOMETRIES = [
    ((1, 8, 1, 1), 8, (1, 1), 1, (0, 0), 1), ((2, 16, 5, 3), 13, (1, 1), 1, (0, 0), 1),
    ((1, 24, 7, 7), 40, (3, 3), 1, (1, 1), 1), ((2, 8, 9, 11), 16, (3, 3), 2, (1, 1), 1),
    ((1, 8, 9, 7), 72, (7, 7), 2, (3, 3), 1), ((1, 16, 8, 8), 24, (3, 3), 1, (2, 2), 2),
    ((2, 8, 6, 5), 9, (1, 3), 1, (0, 1), 1), ((1, 40, 13, 4), 16, (5, 2), (2, 1), (0, 0), 1),
    ((3, 64, 9, 9), 136, (1, 1), 2, (0, 0), 1), ((1, 8, 2, 2), 8, (3, 3), 1, (3, 3), 1),
]  # fmt: skip
MODES = ({"lazy_copies": 0}, {"schedule": 1}, {"lazy_copies": 0, "schedule": 7})


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()


def multiplied(t: Tensor) -> Tensor:
    """What the tensor core gets: of floats 10 bits of mantissa, rounded to nearest, ties away from zero."""
    return (((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) if t.dtype == torch.float32 else t).double()


class Problem:
    """Tensors of one layer, the truth, and how far from it a result may be."""

    def __init__(
        self, dtype: torch.dtype, geometry: tuple, activation: str, residual: bool, seed: int = 0, **more: Any
    ) -> None:
        shape, k, kernel, stride, padding, dilation = geometry
        torch.manual_seed(seed)
        self.x = channels_last(torch.randn(shape).to(dtype))
        scale = (shape[1] * kernel[0] * kernel[1]) ** -0.5
        self.weight = channels_last((torch.randn(k, shape[1], *kernel) * scale).to(dtype))
        vector = more.get("vector", torch.float32)
        self.bias, self.mean, self.bn_weight, self.bn_bias = (torch.randn(k).to(vector) for _ in range(4))
        self.var = (torch.rand(k) + 0.5).to(vector)
        self.stride = [stride] * 2 if isinstance(stride, int) else list(stride)
        self.padding, self.dilation, self.eps_std = list(padding), [dilation] * 2, more.get("eps_std", False)
        self.activation = activation
        y = self.convolve(multiplied(self.x), multiplied(self.weight))
        self.residual = channels_last(torch.randn(y.shape).to(dtype)) if residual else None
        wide = lambda v: v.double().view(1, -1, 1, 1)  # noqa: E731
        root = wide(self.var).sqrt() + 1e-3 if self.eps_std else (wide(self.var) + 1e-3).sqrt()
        z = (y + wide(self.bias) - wide(self.mean)) / root * wide(self.bn_weight) + wide(self.bn_bias)
        z = z if self.residual is None else z + self.residual.double()
        act = {"none": lambda v: v, "relu": torch.relu, "relu6": lambda v: v.clamp(0, 6)}
        act["leaky_relu"] = lambda v: torch.nn.functional.leaky_relu(v, 0.2)
        self.truth = act[activation](z)
        size = self.convolve(self.x.double().abs(), self.weight.double().abs()) / root * wide(self.bn_weight).abs() + 4
        self.limit = 0.5 * torch.finfo(dtype).eps * self.truth.abs() + 2e-6 * size

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.conv2d(x, weight, None, self.stride, self.padding, self.dilation)

    def run(self, tile: str = "k64x64", slices: int = 1, **options: int) -> Tensor:
        out, reports = conv_bn_act_fwd(
            self.x, self.weight, self.bias, self.mean, self.var, self.bn_weight, self.bn_bias, self.residual, self.stride,
            self.padding, self.dilation, activation=ACTIVATION_CODES[self.activation], eps=1e-3, eps_std=self.eps_std,
            negative_slope=0.2, tile=tile, slices=slices, options=options,
        )  # fmt: skip
        self.reports = reports
        return out

    def check(self, out: Tensor) -> None:
        bad = (out.isnan() != self.truth.isnan()) | ((out.double() - self.truth).abs() > self.limit)
        assert not bool(bad.any()), f"{int(bad.sum())} values, by {float((out.double() - self.truth).abs().max())} at most"


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geometries(dtype: torch.dtype, tile: str, request: pytest.FixtureRequest) -> None:
    """Every tile and type over odd sizes; all geometries in the full run, a share of them by the day in the default one."""
    full = request.config.getoption("-m") == ""
    for i, geometry in enumerate(GEOMETRIES):
        if geometry[1] % 8 and tile != "k64x64":
            continue  # refused: see test_refusals
        if full or (i + ROTATION + DTYPES.index(dtype) + TILES.index(tile)) % 3 == 0:
            activation = list(ACTIVATION_CODES)[i % 4]
            problem = Problem(dtype, geometry, activation, residual=i % 2 == 0, seed=i, eps_std=i % 3 == 0)
            problem.check(problem.run(tile))


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "relu6"])
def test_activations(activation: str) -> None:
    """NaN and infinities go through as in stock; vectors in half precision; with and without a residual."""
    for residual in (False, True):
        problem = Problem(torch.float16, ((1, 8, 4, 4), 8, (1, 1), 1, (0, 0), 1), activation, residual, vector=torch.float16)
        problem.x[0, 0, 0, 0] = float("nan")
        problem.x[0, 1, 1, 1], problem.weight[:, 1], problem.weight[::2, 1] = float("inf"), 1.0, -1.0
        y = problem.convolve(problem.x.double(), problem.weight.double())
        stock = torch.nn.functional.batch_norm(
            (y + problem.bias.double().view(1, -1, 1, 1)), *(v.double() for v in (problem.mean, problem.var)),
            *(v.double() for v in (problem.bn_weight, problem.bn_bias)), False, 0.0, 1e-3,
        )  # fmt: skip
        stock = stock if problem.residual is None else stock + problem.residual.double()
        act = {"none": lambda v: v, "relu": torch.relu, "relu6": torch.nn.functional.relu6}
        want = act.get(activation, lambda v: torch.nn.functional.leaky_relu(v, 0.2))(stock)
        torch.testing.assert_close(problem.run().double(), want, rtol=1e-3, atol=1e-2, equal_nan=True)
        assert want.isnan().any() and (want.isinf().any() or activation == "relu6")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slices", [2, 3, pytest.param(9, marks=pytest.mark.full)])
def test_slices(slices: int, dtype: torch.dtype) -> None:
    """Cut over the channels, also where they do not divide: right, and the same bits in any order of blocks."""
    problem = Problem(dtype, ((1, 72, 7, 7), 68, (3, 3), 1, (1, 1), 1), "relu", True)
    first = problem.run(slices=slices)
    problem.check(first)
    assert len(problem.reports) == 2
    for mode in MODES[:: 1 if slices == 3 else 3]:
        assert torch.equal(problem.run(slices=slices, **mode), first), mode


@pytest.mark.parametrize("tile", TILES)
def test_same_bits(tile: str) -> None:
    """No dependence on the order of blocks and warps, nor on when asynchronous copies arrive; nor on the tile."""
    problem = Problem(torch.float16, ((1, 72, 9, 8), 136, (3, 3), 1, (1, 1), 1), "relu", True)
    first = problem.run("k64x64")
    for mode in MODES[ROTATION % 3 :: 3]:
        assert torch.equal(problem.run(tile, **mode), first)


def test_slice_of_channels() -> None:
    """x as a slice of a wider tensor, in its place."""
    problem = Problem(torch.float16, ((2, 16, 5, 6), 24, (3, 3), 1, (1, 1), 1), "none", False)
    whole = channels_last(torch.full((2, 40, 7, 8), float("nan"), dtype=torch.float16))
    part = whole[:, 8:24, 1:6, 1:7]
    problem.x = part.copy_(problem.x)
    problem.check(problem.run())


def test_main_loop_has_no_bank_conflicts() -> None:
    """Twice the steps of the main loop: as many shared-memory waves more as there must be. Whole sectors everywhere."""
    for dtype in DTYPES:
        for tile in TILES:
            extra = []
            for channels in (64, 128):
                problem = Problem(dtype, ((1, channels, 8, 8), 128, (3, 3), 1, (1, 1), 1), "relu", True)
                problem.run(tile)
                counts = problem.reports[0].counters
                extra.append(counts["shared_waves"] - counts["shared_ideal_waves"])
                assert counts["load_sectors"] == counts["load_ideal_sectors"] and counts["atomics"] == 0
                assert counts["store_sectors"] == counts["store_ideal_sectors"] and counts["mma"] > 0
            assert extra[0] == extra[1], f"{tile}, {dtype}: {extra} waves lost to bank conflicts"
            assert extra[0] <= 64 * counts["blocks"], "epilogue"


REFUSALS = {
    "kDType": (2, {"dtype": torch.float64}), "kEmpty": (3, {"geometry": ((0, 8, 4, 4), 8, (1, 1), 1, (0, 0), 1)}),
    "kChannels": (5, {"geometry": ((1, 3, 8, 8), 8, (7, 7), 2, (3, 3), 1)}),
    "kFilter": (7, {"geometry": ((1, 8, 40, 2), 8, (33, 1), 1, (0, 0), 1)}),
    "kActivation": (8, {"code": ACTIVATION_CODES["silu"]}),
    "kTile": (9, {"geometry": ((1, 8, 4, 4), 9, (1, 1), 1, (0, 0), 1), "tile": "k128x64"}),
    "kTile by slices": (9, {"tile": "k128x64", "slices": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    """The launcher names its reason and launches nothing."""
    code, given = REFUSALS[name]
    shape, k, kernel, stride, padding, dilation = given.get("geometry", ((1, 8, 4, 4), 8, (1, 1), 1, (0, 0), 1))
    dtype, vector = given.get("dtype", torch.float16), torch.ones(k)
    x, weight = torch.zeros(shape, dtype=dtype), torch.zeros(k, shape[1], *kernel, dtype=dtype)
    _, reports = conv_bn_act_fwd(
        channels_last(x), channels_last(weight), None, vector, vector, None, None, None, [stride] * 2, list(padding),
        [dilation] * 2, activation=given.get("code", 1), tile=given.get("tile", "k64x64"), slices=given.get("slices", 1),
        refusal=code,
    )  # fmt: skip
    assert reports == []


def ask(*args: Any) -> list[int]:
    return host()("conv_bn_act_route", *args)


def explained(x: Tensor, weight: Tensor, groups: int = 1, activation: int = 1, padding: int = 1) -> dict[str, Any]:
    return _cuda_conv.explain(x, weight, False, [1, 1], [padding] * 2, [1, 1], groups, activation, question=ask)


def test_route_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host function takes, and what dk.explain says of it (of a device of capability 8.0)."""
    half = {"dtype": torch.float16}
    last = {"memory_format": torch.channels_last}
    x, weight = torch.empty(64, 64, 56, 56, **half, **last), torch.empty(64, 64, 3, 3, **half, **last)
    fused = explained(x, weight)
    assert fused["kernels"].startswith("one fused") and fused["tile"] == "128x64" and fused["slices"] == 1
    assert fused["fused_us"] < fused["library_us"] and "not measured" in fused["reason"]
    pointwise = explained(torch.empty(64, 256, 14, 14, **half, **last), torch.empty(1024, 256, 1, 1, **half), padding=0)
    assert pointwise["kernels"].startswith("one fused") and pointwise["tile"] == "128x128"
    one = explained(torch.empty(1, 512, 7, 7, **half, **last), torch.empty(512, 512, 3, 3, **half))
    assert one["tile"] == "64x64" and one["slices"] > 4 and "no faster fused" in one["reason"]  # modelled, so conservative
    deep = torch.empty(64, 512, 14, 14, **half, **last), torch.empty(512, 512, 3, 3, **half)
    assert "no faster fused" in explained(*deep)["reason"]
    stem = torch.empty(2, 3, 8, 8, **half, **last), torch.empty(64, 3, 7, 7, **half)
    assert "16 bytes" in explained(*stem)["reason"]
    assert explained(x, torch.empty(64, 1, 3, 3, **half), groups=64)["reason"] == "groups"
    assert "channels_last" in explained(x.contiguous(), weight)["reason"]
    assert "activation" in explained(x, weight, activation=ACTIVATION_CODES["silu"])["reason"]
    assert "fit" in explained(x, weight[:, :8])["reason"]
    assert "dtype" in explained(x, weight.float())["reason"]
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert "TF32" in explained(x.float(), weight.float())["reason"]
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert "TF32" not in explained(x.float(), weight.float())["reason"]
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    monkeypatch.setenv("DL4DS_CUDA_CONV", "library")
    assert "asked for" in explained(x, weight)["reason"]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
    assert explained(*deep)["kernels"].startswith("one fused")
    assert "channels_last" in explained(x.contiguous(), weight)["reason"]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "maybe")
    with pytest.raises(RuntimeError, match="DL4DS_CUDA_CONV: expected auto, fused or library, got maybe"):
        explained(x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_function(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the dispatcher give the same tensor: values, strides; only what lies otherwise is copied."""
    torch.manual_seed(1)
    x = torch.randn(1, 64, 6, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(40, 64, 3, 3) / 24).to(dtype)
    mean, var, bn_weight, bn_bias = torch.randn(40), torch.rand(40) + 0.5, torch.randn(40), torch.randn(40)
    shape = torch.conv2d(x.float(), weight.float(), None, 2, 1).shape
    added = torch.randn(shape).to(dtype)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 4e-3}[dtype]
    for residual in (None, added, added.contiguous(memory_format=torch.channels_last)):
        results = []
        for wish in ("library", "fused"):
            monkeypatch.setenv("DL4DS_CUDA_CONV", wish)
            given = weight.contiguous(memory_format=torch.channels_last) if residual is not added else weight
            args = (x, given, bn_bias.to(dtype), mean, var, bn_weight, bn_bias, residual, [2, 2], [1, 1], [1, 1], 1, 1e-5)
            results.append(host()("conv_bn_act", *args, False, 1, 0.1))
            if wish == "fused":
                assert host().copies == (2 if residual is added else 0)  # weight and residual
        assert results[0].stride() == results[1].stride() and results[1].dtype == dtype
        torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    with pytest.raises(RuntimeError, match=r"conv_bn_act: residual: expected shape \(1, 40, 3, 4\), got \(1, 40, 3, 3\)"):
        host()("conv_bn_act", *args[:7], added[..., :3], *args[8:], False, 1, 0.1)
    with pytest.raises(RuntimeError, match=r"conv_bn_act: running_var: expected shape \(C,\) = \(40,\), got \(39,\)"):
        host()("conv_bn_act", *args[:4], var[:39], *args[5:], False, 1, 0.1)


def test_without_headers() -> None:
    """A build without CUTLASS: the launcher is there, refuses every call and says why; the library serves them."""
    flags = cuda.FLAGS[: cuda.FLAGS.index("-isystem")]
    sources = sorted((cuda.CSRC / "ops" / "conv_bn_act").glob("*.cu"))
    whole = build.cache_folder() / "conv_bn_act_without_cutlass.cu"  # one file: nvcc starts once instead of twenty times
    whole.write_text("".join(f'#include "{s.relative_to(cuda.CSRC)}"\n' for s in sources) + f"// {build.digest(*sources)}\n")
    library = HostLibrary.from_sources([whole], includes=[cuda.CSRC], flags=flags)
    with library.session() as session:
        assert session.call("conv_bn_act_fused", restype=ctypes.c_bool) is False
        params = cuda.headers("conv_bn_act").make("ConvBnActFwdParams", int, batch=1, channels=8, channels_out=8)
        assert session.call("conv_bn_act_fwd_refusal", params) == 1 and "CUTLASS" in _cuda_conv.REASONS[1]
        assert session.call("launch_conv_bn_act_fwd", params, None) in (0, 1) and session.reports == []


def test_reason_codes_are_those_of_the_headers() -> None:
    """dl4ds_kernels/_cuda_conv.py spells out every code of ConvRefusal and ConvReason, and no other."""
    codes: set[int] = set()
    enums = {
        "conv_bn_act.h": "ConvRefusal", "conv_bn_act_cuda.h": "ConvReason", "conv_bn_act_tail.h": "ConvTailReason",
        "conv_bn_act_dgrad.h": "DgradRefusal",
    }  # fmt: skip
    for header, enum in enums.items():
        text = (cuda.CSRC / "ops" / "conv_bn_act" / header).read_text()
        body = re.search(rf"enum class {enum} : int \{{(.*?)\}};", text, re.DOTALL).group(1)
        codes |= {int(code) for code in re.findall(r"=\s*(\d+)", re.sub(r"//[^\n]*", "", body))}
    assert codes - {0} == _cuda_conv.REASONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_machine_code(name: str, arch: str) -> None:
    """Tensor cores with fp32 sums, asynchronous 16-byte copies, ldmatrix; no spill; no ptxas advice (C7510 and its like)."""
    facts, listings = machine_code("conv_bn_act_fwd", name, arch)
    assert len(facts) == 4  # three tiles and the sum of slices
    for kernel, used in facts.items():
        assert used["registers"] <= 255 and not (used["stack"] or used["spill_stores"] or used["spill_loads"]), used
        assert "STG.E.128" in listings[kernel]
        if "finish" not in kernel:
            for instruction in (INSTRUCTIONS[name], "LDSM.16.M88.4"):
                assert instruction in listings[kernel], f"{kernel}: no {instruction}"
            copies = re.findall(r"LDGSTS[\w.]*", listings[kernel])
            assert copies and all(c.endswith(".128") for c in copies) and any("BYPASS" in c for c in copies)
