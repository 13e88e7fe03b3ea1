"""The Triton kernels for real GPUs, on a machine without one. test_triton.py runs this file in a process of its own.

Not collected by itself: it needs Triton's compiler, which TRITON_INTERPRET=1 (set by conftest for every other test) replaces.
The shipped host functions run on CPU tensors with ``_common.launch`` replaced: every launch is compiled as Triton's launcher
would compile it, and either inspected (registers, spills, width of memory accesses, tensor-core instructions) or run on the PTX
simulator, where it must be free of findings and right to the project's error rule.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from _assert import no_worse_than_torch
from _cases import DTYPE_NAMES, KINKS
from ptxsim import Arr, Module, Report, toolchain
from ptxsim.gates import workload_add_act, workload_bn_act, workload_conv_bn_act
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._triton import _common, add_act, bn_act, conv_bn_act

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
HALVES = (FP16, BF16)
EPS, SLOPE, MOMENTUM = 1e-3, 0.1, 0.2
POINTERS = {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"} | {
    dtype: f"*{name}" for dtype, name in DTYPE_NAMES.items()
}
# What each kernel writes, all of it; every other tensor is read-only to it.
WRITTEN = {**workload_add_act.WRITTEN, **workload_bn_act.WRITTEN, **workload_conv_bn_act.WRITTEN}
ELEMENTWISE = ("bn_apply_kernel", "bn_bwd_apply_kernel", "add_act_kernel", "add_act_bwd_kernel")
VECTORS = ("center", "mean", "scale", "shift", "slope_x", "offset")
REDUCTIONS = ("bn_stats_partial_kernel", "bn_bwd_partial_kernel")


@dataclass(frozen=True)
class Compiled:
    """One launch as the compiler sees it: the kernel, its compiled form and its run-time arguments in order."""

    name: str
    code: Any
    arguments: list[tuple[str, Any]]
    programs: int

    @property
    def ptx(self) -> str:
        return self.code.asm["ptx"]

    def global_accesses(self) -> list[str]:
        """PTX types of all global loads and stores, ``v4.b32`` being the 16-byte one."""
        return re.findall(r"(?:ld|st)\.global[.\w:]*?\.((?:v\d\.)?[bu]\d+)\b", self.ptx)

    def resources(self, folder: Path) -> dict[str, int]:
        """REG, STACK, SHARED, LOCAL of the machine code."""
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(self.code.asm["cubin"])
        tool = [toolchain.cuda_tool("cuobjdump"), "-res-usage", str(cubin)]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def compile_launch(kernel: Any, programs: int, arguments: dict[str, Any], capability: int) -> Compiled:
    """Compile one launch specialised as by Triton's launcher: ones are constants, multiples of 16 are known as such."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in arguments}
    signature, constants, attributes, passed = {}, {}, {}, []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name], divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = parameter.annotation_type or "fp32"
        else:
            signature[name], divisible = "i32" if value < 2**31 else "i64", value % 16 == 0
        passed.append((name, value))
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    key = repr((kernel.__name__, capability, signature, constants, attributes, options))
    if key not in _compiled:
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        _compiled[key] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(kernel.__name__, _compiled[key], passed, programs)


_compiled: dict[str, Any] = {}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int, dict[str, Any]]]:
    """Launches that the host functions ask for, recorded and not run."""
    recorded: list[tuple[Any, int, dict[str, Any]]] = []
    monkeypatch.setattr(_common, "launch", lambda kernel, programs, **given: recorded.append((kernel, programs, given)))
    return recorded


def memory(tensor: Tensor) -> Any:
    """The bytes from a tensor's first to its last element, as a numpy array that shares them."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((extent,), (1,)).view(torch.uint8).numpy()


def as_argument(kernel: str, name: str, value: Any) -> Any:
    """A launch argument for the simulator: tensors are registered read-only or as results that must be written completely."""
    if not isinstance(value, Tensor):
        return value
    written = name in WRITTEN[kernel]
    return Arr(memory(value), name, read_only=not written, output=written) if value.numel() else 0


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Report]]:
    """Launches run on the simulator; at the end of the test all of them must have been clean."""
    collected: list[Report] = []

    def launch(kernel: Any, programs: int, **given: Any) -> None:
        compiled = compile_launch(kernel, programs, given, 80)
        arguments = [as_argument(compiled.name, name, value) for name, value in compiled.arguments]
        metadata = compiled.code.metadata
        module, threads = Module(compiled.ptx), 32 * metadata.num_warps
        collected.append(module.launch(metadata.name, programs, threads, arguments, smem=metadata.shared, stop=False))

    monkeypatch.setattr(_common, "launch", launch)
    yield collected
    errors = [f"{report.kernel}: {error}" for report in collected for error in report.errors]
    assert not errors, "\n".join(errors)


@pytest.fixture
def fp32_precision() -> Iterator[Callable[[str], None]]:
    """Sets torch's "ieee" or "tf32" for fp32 convolutions; the old setting returns with the end of the test."""
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    yield lambda value: setattr(settings, "fp32_precision", value)
    settings.fp32_precision = before


def lay_out(values: Tensor, layout: str) -> Tensor:
    """nchw, nhwc, or a slice of a larger NaN-filled tensor: of its channels (NHWC) or its rows and columns (NCHW)."""
    if layout in ("nchw", "nhwc"):
        return values.contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)
    n, c, h, w = values.shape
    if layout == "cslice":
        whole = torch.full((n, c + 8, h, w), float("nan"), dtype=values.dtype).to(memory_format=torch.channels_last)
        return whole[:, 3 : 3 + c].copy_(values)
    whole = torch.full((n, c, h + 3, w + 2), float("nan"), dtype=values.dtype)
    return whole[:, :, 2 : 2 + h, 1 : 1 + w].copy_(values)


def vectors(channels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "running_mean": torch.randn(channels, dtype=dtype),
        "running_var": torch.rand(channels, dtype=dtype) + 0.5,
        "weight": torch.randn(channels, dtype=dtype),
        "bias": torch.randn(channels, dtype=dtype),
    }


def bn_forward_backward(
    x: Tensor, residual: Tensor | None, activation: str, dout: Tensor, v: dict[str, Tensor]
) -> dict[str, Tensor]:
    """bn_act in training and its gradient through the host functions."""
    code = ACTIVATION_CODES[activation]
    out, mean, rstd, mask, new_mean, new_var = bn_act.bn_act(
        x, v["weight"], v["bias"], v["running_mean"], v["running_var"], residual, True, MOMENTUM, EPS, False, code, SLOPE, True
    )
    masked = mask.numel() > 0
    dx, dweight, dbias, dresidual = bn_act.bn_act_bwd(
        dout, x, v["weight"], v["bias"], mean, rstd, None if masked else residual, mask if masked else None, True, EPS, False,
        code, SLOPE, True, True, residual is not None,
    )  # fmt: skip
    results = {"out": out, "running_mean": new_mean, "running_var": new_var, "dx": dx, "dweight": dweight, "dbias": dbias}
    return results | ({} if residual is None else {"dresidual": dresidual})


def conv(x: Tensor, weight: Tensor, v: dict[str, Tensor], residual: Tensor | None, *geometry: int, code: int = 1) -> Tensor:
    """conv_bn_act through the host function; geometry: stride, padding, dilation."""
    stride, padding, dilation = ([size] * 2 for size in geometry)
    return conv_bn_act.conv_bn_act(
        x, weight, None, v["running_mean"], v["running_var"], v["weight"], v["bias"], residual, stride, padding, dilation, 1,
        EPS, False, code, SLOPE,
    )  # fmt: skip


def name(value: Any) -> str:
    """Test id of a parameter."""
    return DTYPE_NAMES.get(value) or re.sub("[(),]+ *", "-", str(value)).strip("-")


# ---- compiled for every architecture: resources and instructions


def call_every_kernel(dtype: torch.dtype, layout: str) -> None:
    """Every kernel once, on ResNet-like sizes that divide evenly."""
    x, residual = (lay_out(torch.zeros(4, 64, 16, 16, dtype=dtype), layout) for _ in range(2))
    v = vectors(64)
    bn_forward_backward(x, residual, "relu", x, v)
    bn_forward_backward(x, None, "relu", x, v)
    _, mask = add_act.add_act(x, residual, 1.0, 1, SLOPE, True)
    add_act.add_act_bwd(x, mask, None, None, 1.0, 1, SLOPE)
    for kernel_size in (1, 3):
        weight = torch.zeros(128, 64, kernel_size, kernel_size, dtype=dtype)
        conv(x, weight, vectors(128), lay_out(torch.zeros(4, 128, 16, 16, dtype=dtype), layout), 1, kernel_size // 2, 1)


COMPILE_CASES = [
    (capability, *case) for capability in (80, 90, 100, 120) for case in ((FP16, "nhwc"), (BF16, "nchw"), (FP32, "nhwc"))
]


@pytest.mark.parametrize(("capability", "dtype", "layout"), COMPILE_CASES, ids=name)
def test_compile(capability: int, dtype: torch.dtype, layout: str, launches: list[Any], tmp_path: Path) -> None:
    call_every_kernel(dtype, layout)
    seen = set()
    for kernel, programs, given in launches:
        compiled = compile_launch(kernel, programs, given, capability)
        name, accesses, used = compiled.name, compiled.global_accesses(), compiled.resources(tmp_path)
        seen.add(name)
        assert used["STACK"] == used["LOCAL"] == 0, f"{name}: spills, {used}"
        if name in ELEMENTWISE + REDUCTIONS:
            # 7 and 4 blocks of 128 threads a multiprocessor; the reductions keep 2 tiles a tensor in flight on top.
            assert used["REG"] <= (72 if name in ELEMENTWISE else 128), f"{name}: {used}"
            assert "f64" not in compiled.ptx, f"{name}: fp64 arithmetic outside the merges"
            # Tensors move 16 bytes at a time. Narrower are mask bytes (one or two a thread), and fp32 values a channel: here as
            # many as a program has threads, so that each loads one of a vector, and outside the loop over its tiles.
            assert "v4.b32" in accesses or "cp.async" in compiled.ptx, f"{name}: {accesses}"
            single = name in ELEMENTWISE and layout == "nhwc"
            narrow = {"b16", "v2.b16", "v4.b16"} | ({"b32", "v2.b32"} if single else set())
            most = 2 * (given.get("mask") is not None) + single * sum(given.get(vector) is not None for vector in VECTORS)
            assert sum(access in narrow for access in accesses) <= most, f"{name}: {accesses}"
        if name == "conv_bn_act_kernel" and dtype in HALVES:
            assert re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.ptx), (
                f"{name}: no tensor-core instruction"
            )
            assert "cp.async" in compiled.ptx, f"{name}: no asynchronous copy"
    assert seen == set(WRITTEN)


# ---- run on the simulator: numbers and memory safety on odd sizes


def bn_stock(x: Tensor, residual: Tensor | None, activation: str, dout: Tensor, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same results from plain torch, in the dtype of its inputs."""
    leaves = {"x": x.detach().requires_grad_(), "weight": v["weight"].clone().requires_grad_()}
    leaves |= {"bias": v["bias"].clone().requires_grad_()}
    if residual is not None:
        leaves["residual"] = residual.detach().requires_grad_()
    mean, var = v["running_mean"].clone(), v["running_var"].clone()
    z = torch.nn.functional.batch_norm(leaves["x"], mean, var, leaves["weight"], leaves["bias"], True, MOMENTUM, EPS)
    z = z if residual is None else z + leaves["residual"]
    out = apply_activation(z, ACTIVATION_CODES[activation], SLOPE)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "z": z.detach(), "running_mean": mean, "running_var": var} | named


def widened(*values: Any) -> list[Any]:
    return [None if v is None else {k: t.double() for k, t in v.items()} if isinstance(v, dict) else v.double() for v in values]


def away_from_kinks(dout: Tensor, z: Tensor, activation: str) -> Tensor:
    """``dout`` with zeros where rounding decides the side of a kink."""
    for kink in KINKS.get(activation, ()):
        dout = torch.where((z - kink).abs() < 0.06, 0, dout)
    return dout


BN_CASES = [
    ((2, 63, 7, 5), "nhwc", "relu", True, FP16),
    ((2, 63, 7, 5), "nchw", "relu", True, BF16),
    ((3, 64, 5, 3), "nhwc", "relu6", True, BF16),
    ((2, 31, 4, 12), "nchw", "leaky_relu", True, FP16),
    ((2, 24, 5, 5), "cslice", "silu", True, FP32),
    ((2, 17, 5, 7), "hwslice", "hardswish", False, FP16),
    ((33, 3, 1, 1), "nchw", "none", False, FP32),
    ((1, 1, 33, 65), "nchw", "relu", False, FP16),
    ((2, 5, 3, 7), "nhwc", "relu", True, FP64),
]


@pytest.mark.parametrize(("shape", "layout", "activation", "with_residual", "dtype"), BN_CASES, ids=name)
def test_bn_act(
    shape: tuple[int, ...], layout: str, activation: str, with_residual: bool, dtype: torch.dtype, reports: list[Report]
) -> None:
    x = lay_out((torch.randn(shape) * 2 + 1).to(dtype), layout)
    residual = torch.randn(shape).to(dtype) if with_residual else None
    v = vectors(shape[1], FP64 if dtype == FP64 else FP32)
    dout = torch.randn(shape).to(dtype)
    dout = away_from_kinks(dout, bn_stock(*widened(x, residual), activation, *widened(dout, v))["z"], activation)
    ours = bn_forward_backward(x, residual, activation, dout, v)
    stock = bn_stock(x, residual, activation, dout, v)
    truth = bn_stock(*widened(x, residual), activation, *widened(dout, v))
    for name, result in ours.items():
        no_worse_than_torch(result, stock[name], truth[name], name)
    assert len(reports) == 6


ADD_CASES = [("relu", FP16), ("relu", BF16), ("leaky_relu", BF16), ("relu6", FP32), ("silu", FP16)]


@pytest.mark.parametrize(("activation", "dtype"), ADD_CASES, ids=name)
def test_add_act(activation: str, dtype: torch.dtype, reports: list[Report]) -> None:
    code = ACTIVATION_CODES[activation]
    x, residual, dout = (torch.randn(2, 5, 7, 31).mul(3).to(dtype) for _ in range(3))

    def plain(x: Tensor, residual: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        out = apply_activation(0.5 * (x + residual), code, SLOPE)
        return out.detach(), torch.autograd.grad(out, x, dout)[0]

    dout = away_from_kinks(dout, 0.5 * (x.double() + residual.double()), activation)
    stock, truth = plain(x.detach(), residual, dout), plain(*widened(x, residual, dout))
    out, mask = add_act.add_act(x.detach(), residual, 0.5, code, SLOPE, True)
    no_worse_than_torch(out, stock[0], truth[0], "out")
    # Halving is exact, so both round once and to nearest even.
    assert torch.equal(out, stock[0]) or activation not in ("relu", "relu6")
    recomputed = add_act.add_act_bwd(dout, None, x.detach(), residual, 0.5, code, SLOPE)
    no_worse_than_torch(recomputed, stock[1], truth[1], "dx recomputed")
    if mask.numel():
        masked = add_act.add_act_bwd(dout, mask, None, None, 0.5, code, SLOPE)
        no_worse_than_torch(masked, stock[1], truth[1], "dx from the mask")
    assert len(reports) == (3 if mask.numel() else 2)


# x (N, C, H, W), output channels, kernel size, stride, padding, dilation
CONV_GEOMETRIES = [
    ((2, 16, 7, 6), 24, 1, 1, 0, 1),
    ((1, 17, 8, 9), 33, 1, 2, 0, 1),
    ((2, 5, 9, 7), 5, 3, 1, 1, 1),
    ((1, 40, 9, 8), 72, 3, 2, 1, 1),
    ((1, 16, 11, 9), 6, 3, 1, 2, 2),
]
CONV_CASES = [(geometry, layout, dtype) for geometry in CONV_GEOMETRIES for layout, dtype in (("nhwc", FP16), ("nchw", BF16))]
CONV_CASES += [(CONV_GEOMETRIES[1], "nhwc", FP32), (CONV_GEOMETRIES[2], "nchw", FP32)]


@pytest.mark.parametrize(("case", "layout", "dtype"), CONV_CASES, ids=name)
def test_conv_bn_act(
    case: tuple[Any, ...], layout: str, dtype: torch.dtype, reports: list[Report], fp32_precision: Callable[[str], None]
) -> None:
    shape, channels_out, size, *geometry = case
    fp32_precision("ieee")
    x = lay_out(torch.randn(shape).to(dtype), layout)
    weight = (torch.randn(channels_out, shape[1], size, size) / (shape[1] * size * size) ** 0.5).to(dtype)
    v = vectors(channels_out)
    residual = torch.randn_like(torch.conv2d(x, weight, None, *geometry))

    def plain(x: Tensor, weight: Tensor, residual: Tensor, v: dict[str, Tensor]) -> Tensor:
        y = torch.conv2d(x, weight, None, *geometry)
        y = torch.nn.functional.batch_norm(y, v["running_mean"], v["running_var"], v["weight"], v["bias"], False, 0.0, EPS)
        return torch.relu(y + residual)

    out = conv(x, weight, v, residual, *geometry)
    no_worse_than_torch(out, plain(x, weight, residual, v), plain(*widened(x, weight, residual, v)))
    assert out.stride() == torch.conv2d(x, weight, None, *geometry).stride()
    if dtype in HALVES:
        assert reports[-1].counters["mma"] > 0


def test_tf32_convolution_follows_the_flag(reports: list[Report], fp32_precision: Callable[[str], None]) -> None:
    x, weight, v = torch.randn(1, 32, 9, 9), torch.randn(32, 32, 3, 3) / 17, vectors(32)
    for precision, multiplies in (("tf32", True), ("ieee", False)):
        fp32_precision(precision)
        conv(x, weight, v, None, 1, 1, 1)
        assert (reports[-1].counters["mma"] > 0) == multiplies


def test_memory_traffic_of_divisible_sizes(reports: list[Report]) -> None:
    """Whole sectors for every tensor and vector."""
    x, residual = (lay_out(torch.randn(2, 64, 8, 8).half(), "nhwc") for _ in range(2))
    bn_forward_backward(x, residual, "relu", x, vectors(64))
    for report in reports:
        assert report.efficiency("store") == 1.0, f"{report.kernel}\n{report.profile()}"
        assert report.efficiency("load") >= 0.98, f"{report.kernel}\n{report.profile()}"


def test_wide_indices_give_the_same_bits(reports: list[Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors beyond 2**31 elements use 64-bit indices; here every tensor does."""
    x, residual = lay_out(torch.randn(2, 17, 5, 7), "hwslice"), torch.randn(2, 17, 5, 7)
    weight, v = torch.randn(17, 17, 3, 3) / 12, vectors(17)

    def results() -> list[Tensor]:
        return [
            *bn_forward_backward(x, residual, "relu", residual, v).values(),
            *add_act.add_act(x.contiguous(), residual, 1.0, 1, SLOPE, True),
            conv(x, weight, v, residual, 1, 1, 1),
        ]

    narrow = results()
    monkeypatch.setattr(_common, "INT32_LIMIT", 0)
    for wide, expected in zip(results(), narrow, strict=True):
        assert torch.equal(wide, expected)
