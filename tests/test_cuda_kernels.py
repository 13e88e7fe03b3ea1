"""The CUDA kernels of bn_act and add_act, executed on the PTX simulator through the launchers that ship.

Every launch is checked for stray accesses, races and unwritten outputs (tests/_cuda_launch.py); the numbers obey the
project's error rule against fp64; traffic, grids and ptxas reports are gates.
"""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import _cuda_launch as cuda
import numpy as np
import pytest
import torch
from _assert import no_worse_than_torch
from _cases import ACTIVATIONS, BASE, DTYPES, KINKS, LAYOUTS, Case, bn_vectors, each, gradient, images
from ptxsim import compile_cuda, sites
from ptxsim._gate import rotating
from ptxsim.fixture import require_nvcc, require_simulator
from torch import Tensor

from dl4ds_kernels import reference
from dl4ds_kernels._activation import ACTIVATION_CODES, MASK_CODES, activation_grad, apply_activation

SLOPE, MOMENTUM, EPS = 0.1, 0.2, 1e-3
READABLE = [layout for layout in LAYOUTS if layout != "transposed"]  # which the host code copies
VECTORS = replace(BASE, shape=(2, 16, 6, 5), layout="nhwc")
IN_ONE_ORDER = ("nchw", "nhwc_cslice", "nhwc_hwslice", "nchw_hwslice")
CASES = [
    # Single elements (63 channels, planes of 35): every dtype and layout, with a residual in every other case.
    *(
        replace(BASE, dtype=d, layout=n, residual=n * ((i + j) % 2))
        for i, d in enumerate(DTYPES)
        for j, n in enumerate(READABLE)
    ),
    # Vectors: activations with a mask (fp32) and without, then the layouts.
    *(replace(VECTORS, activation=a, residual="nhwc") for a in ACTIVATIONS),
    *(replace(VECTORS, activation=a, dtype=torch.bfloat16) for a in ACTIVATIONS),
    *(replace(VECTORS, dtype=d, layout=n, residual=n) for d in DTYPES for n in IN_ONE_ORDER),
    # Other ranks, one pixel, one channel; several channel tiles; planes that begin inside a vector.
    *(
        replace(BASE, shape=s, dtype=torch.float16)
        for s in ((17, 64), (300, 8), (3, 8, 19), (2, 3, 4, 5, 6), (4, 7, 1, 1), (3, 1, 5, 7))
    ),
    *(replace(BASE, shape=s, dtype=torch.bfloat16, layout="nhwc", residual="nhwc") for s in ((2, 264, 3, 3), (3, 40, 14, 14))),
    *(replace(BASE, shape=s, dtype=torch.float16, residual="nchw") for s in ((3, 12, 14, 14), (5, 40, 7, 7), (2, 3, 40, 41))),
    # Planes of whole vectors: channel by channel.
    *(replace(BASE, shape=(5, 3, 8, 24), activation=a, residual="nchw") for a in ACTIVATIONS),
    *(replace(BASE, shape=(5, 3, 8, 24), activation=a, dtype=torch.bfloat16, training=a != "silu") for a in ACTIVATIONS),
    *(replace(VECTORS, training=t, affine=a, eps_mode="std") for t in (True, False) for a in ("", "weight", "bias")),
    *(replace(VECTORS, training=False, dtype=d, residual=r, wide_parameters=True) for d in DTYPES[2:] for r in ("", "nhwc")),
]
GRADIENTS = {0: "dx", 1: "dweight", 2: "dbias", 5: "dresidual"}


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_simulator()
    require_nvcc()


def bits_of(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as booleans in the shape of ``like`` (a dense tensor in the mask's memory order)."""
    flat = torch.stack([(mask >> k) & 1 for k in range(8)], 1).flatten()[: like.numel()].bool()
    out = torch.empty_like(like, dtype=torch.bool)
    cuda.memory_order(out).copy_(flat)
    return out


class Problem:
    """Tensors of one case, with what plain torch makes of them in their own dtype and in fp64."""

    def __init__(self, case: Case) -> None:
        self.case, self.code = case, ACTIVATION_CODES[case.activation]
        generator = case.generator()
        x = images(case, generator, case.layout)
        vectors = bn_vectors(case, x)
        self.inputs = (x, *(vectors[name] for name in ("weight", "bias", "running_mean", "running_var")))
        self.inputs += (images(case, generator, case.residual) if case.residual else None,)
        self.truth_z = self.reference(True, 0)[0]
        dout_layout = "nhwc" if cuda.suggested(x) != torch.contiguous_format else "nchw"
        self.dout = gradient(case, self.truth_z, case.layout if len(case.activation) % 2 else dout_layout)
        self.stock, self.truth = self.results(False), self.results(True)

    def reference(self, wide: bool, code: int) -> tuple[Tensor, ...]:
        tensors = [t.double() if wide and t is not None else t for t in self.inputs]
        self.leaves = [t if t is None or i in (3, 4) else t.detach().requires_grad_() for i, t in enumerate(tensors)]
        c = self.case
        return reference.bn_act(*self.leaves, c.training, MOMENTUM, EPS, c.eps_mode == "std", code, SLOPE)

    def results(self, wide: bool) -> dict[str, Tensor]:
        out, new_mean, new_var = self.reference(wide, self.code)
        names = {i: name for i, name in GRADIENTS.items() if self.leaves[i] is not None}
        grads = torch.autograd.grad(out, [self.leaves[i] for i in names], self.dout.double() if wide else self.dout)
        results = {"out": out.detach(), "new_running_mean": new_mean, "new_running_var": new_var}
        return {k: v for k, v in (results | dict(zip(names.values(), grads, strict=True))).items() if v is not None}

    def forward(self, **options: int) -> dict[str, Tensor]:
        case, x = self.case, self.inputs[0]
        mask = case.residual != "" and self.code in MASK_CODES
        return cuda.bn_act_fwd(
            *self.inputs, self.code, training=case.training, momentum=MOMENTUM, eps=EPS, eps_std=case.eps_mode == "std",
            negative_slope=SLOPE, save_mask=mask and x.numel() > 0, options=options,
        )[0]  # fmt: skip

    def backward(self, forward: dict[str, Tensor], masked: bool, **options: int) -> dict[str, Tensor]:
        x, weight, bias, mean, var, residual = self.inputs
        acc, std = cuda.accumulator(x), self.case.eps_mode == "std"
        if self.case.training:
            mean, rstd = forward["mean"], forward["rstd"]
        else:
            mean, var = mean.to(acc), var.to(acc)
            rstd = 1 / (var.sqrt() + EPS) if std else 1 / (var + EPS).sqrt()
        needs = ("dx", "dweight", "dbias", "dresidual") if residual is not None else ("dx", "dweight", "dbias")
        return cuda.bn_act_bwd(
            self.dout, x, weight, bias, mean, rstd, residual, forward["mask"] if masked else None, self.code,
            training=self.case.training, eps=EPS, eps_std=std, negative_slope=SLOPE, needs=needs, options=options,
        )[0]  # fmt: skip

    def check(self, results: dict[str, Tensor]) -> None:
        for name in self.stock.keys() & results.keys():
            no_worse_than_torch(results[name].to(self.stock[name].dtype), self.stock[name], self.truth[name], name)


@each(CASES)
def test_bn_act(case: Case) -> None:
    """Forward, mask, and the gradients with the mask and with z recomputed."""
    problem = Problem(case)
    forward = problem.forward()
    problem.check(forward)
    assert problem.stock.keys() <= forward.keys() | {"dx", "dweight", "dbias", "dresidual"}
    if "mask" in forward:
        z = problem.truth_z
        side = (z > 0) & (z < 6) if case.activation == "relu6" else z > 0
        far = torch.stack([(z - kink).abs() > 0.06 for kink in KINKS[case.activation]]).all(0)
        assert torch.equal(bits_of(forward["mask"], forward["out"])[far], side[far])
        problem.check(problem.backward(forward, masked=True))
    problem.check(problem.backward(forward, masked=False))


@pytest.mark.parametrize(
    "shape, layout", [((5, 3, 29, 31), "nchw"), ((5, 3, 29, 31), "nchw_hwslice"), ((9, 3, 16, 24), "nchw")]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bn_act_in_several_steps(training: bool, shape: tuple[int, ...], layout: str) -> None:
    """Threads that walk back over planes and samples: a grid far smaller than the tensor, 3 channels, steps that carry."""
    problem = Problem(replace(BASE, shape=shape, training=training, layout=layout, residual=layout))
    with cuda.small_grids():
        forward = problem.forward()
        problem.check(forward)
        problem.check(problem.backward(forward, masked=True))
        problem.check(problem.backward(forward, masked=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 7, 1000, 2048])
def test_add_act(dtype: torch.dtype, numel: int) -> None:
    """Every activation at an aligned and a misaligned address; NaN and kinks as torch has them; mask and recomputed z agree."""
    for i, name in enumerate(ACTIVATIONS):
        code, offset, alpha = ACTIVATION_CODES[name], i % 2, 1.0 if i % 3 else 0.5
        x, residual, dout = (torch.randn(numel + offset).mul_(4).to(dtype)[offset:] for _ in range(3))
        edges = torch.tensor([0.0, -0.0, 6.0, -3.0, 3.0, float("nan"), float("inf")], dtype=dtype)
        x[: min(numel, 7)] = edges[:numel] / alpha
        residual[: min(numel, 7)] = 0
        masked = code in MASK_CODES
        out, mask, _ = cuda.add_act_fwd(x, residual, alpha, code, SLOPE, masked)
        z64 = (x.double() + residual.double()) * alpha
        z = z64.to(dtype)
        no_worse_than_torch(out, apply_activation(z, code, SLOPE), apply_activation(z64, code, SLOPE))
        expected = activation_grad(dout, z, code, SLOPE) * alpha
        truth = activation_grad(dout.double(), z.double(), code, SLOPE) * alpha
        dx, _ = cuda.add_act_bwd(dout, None, x, residual, alpha, code, SLOPE)
        # torch's vector code gives relu6 and hardswish another derivative at NaN than its scalar code.
        keep = ~(x.isnan() & (name in ("relu6", "hardswish")))
        no_worse_than_torch(dx[keep], expected[keep], truth[keep], f"dx {name}")
        if masked:
            assert numel % 8 == 0 or int(mask[-1]) >> numel % 8 == 0, "bits beyond the last element"
            again, _ = cuda.add_act_bwd(dout, mask, None, None, alpha, code, SLOPE)
            assert torch.equal(again.nan_to_num(7), dx.nan_to_num(7))


def test_add_act_of_a_sum() -> None:
    """Without a residual the kernels take x as the sum, in place too (mixed layouts go through aten::add)."""
    x, dout = torch.randn(100, dtype=torch.float16), torch.randn(100, dtype=torch.float16)
    out, _, _ = cuda.add_act_fwd(x, None, 0.5, 1, SLOPE, False)
    assert torch.equal(out, torch.relu(x * 0.5))
    assert torch.equal(cuda.add_act_bwd(dout, None, x, None, 0.5, 1, SLOPE)[0], dout * 0.5 * (x > 0))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_eval_in_place(layout: str) -> None:
    """conv_bn_act normalises the convolution's output where it lies."""
    problem = Problem(replace(VECTORS, layout=layout, dtype=torch.float16, residual=layout, training=False))
    expected = problem.forward()["out"]
    cuda.bn_act_fwd(*problem.inputs, problem.code, training=False, eps=EPS, negative_slope=SLOPE, inplace=True)
    assert torch.equal(problem.inputs[0], expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_same_bits(layout: str) -> None:
    """No dependence on the order of blocks and warps, nor on the device's size."""
    problem = Problem(replace(BASE, shape=(4, 24, 17, 9), dtype=torch.float16, layout=layout, residual=layout))
    first = None
    for processors, schedule in ((108, 0), (1, 1), (148, 2)):
        cuda.library().device(processors=processors)
        forward = problem.forward(schedule=schedule)
        results = forward | problem.backward(forward, masked=True, schedule=schedule)
        first = first or results
        assert all(torch.equal(results[name], first[name]) for name in first)
    cuda.library().device()


def test_large_mean() -> None:
    """Statistics of data whose mean is 10,000 times its spread; a plain sum of squares has no correct digit left."""
    x = (torch.randn(8, 16, 12, 12, dtype=torch.float64) + 1e4).float()
    for fmt in (torch.contiguous_format, torch.channels_last):
        results, _ = cuda.bn_act_fwd(x.contiguous(memory_format=fmt), None, None, None, None, None, 0)
        var, mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
        assert ((results["mean"] - mean).abs() <= 2**-11).all()  # half an ulp of 1e4
        assert ((results["rstd"] * (var + 1e-5).sqrt() - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    """No empty grid, no division by zero; the sums over nothing are zero."""
    x, vector = torch.empty(shape), torch.ones(shape[1])
    for training in (True, False):
        results, _ = cuda.bn_act_fwd(x, vector, vector, vector, vector, None, 1, training=training)
        assert all(t.isfinite().all() for t in results.values())
        results, _ = cuda.bn_act_bwd(x, x, vector, None, vector, vector, None, None, 1, training=training)
        assert (results["dweight"] == 0).all() and (results["dbias"] == 0).all()
    assert cuda.add_act_fwd(x, x, 1.0, 1, SLOPE, True)[2] == []


def test_far_apart() -> None:
    """Element offsets beyond 2**31 (memory that is never touched costs nothing)."""
    stride = 2**31 + 8
    storage = torch.from_numpy(np.empty(stride + 8 * 16 * 4, dtype=np.float16))
    for strides in ((stride, 1, 64, 16), (stride, 16, 4, 1)):
        x = storage.as_strided((2, 16, 4, 4), strides).copy_(torch.randn(2, 16, 4, 4))
        out = cuda.bn_act_fwd(x, None, None, None, None, None, 1, options={"races": 0})[0]["out"]
        torch.testing.assert_close(out, torch.relu(torch.nn.functional.batch_norm(x.float(), None, None, training=True)).half())


def test_unreadable_strides() -> None:
    """What the kernels can't read they refuse, so that the host code makes a dense copy."""
    for x in (torch.randn(2, 3, 4, 5).transpose(2, 3), torch.randn(2, 3, 4, 1).expand(2, 3, 4, 5)):
        with cuda.library().session() as session:
            launch = cuda.Launch("bn_act", session, "fwd")
            members = {"size": cuda.dims(x.shape), "x_strides": cuda.dims(x.stride()), "x": launch.read(x, "x")}
            params = launch.make(**members)
            assert not session.call("bn_act_fwd_reads", params, restype=ctypes.c_bool)
            assert session.call("launch_bn_act_fwd", params, None) != 0


LARGE = {"x", "residual", "dout", "out", "mask", "dx", "dresidual"}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_traffic(dtype: torch.dtype, layout: str) -> None:
    """Passes over memory as designed: x twice forward, x and dout twice backward; whole sectors; no atomics."""
    problem = Problem(replace(BASE, shape=(4, 64, 16, 16), dtype=dtype, layout=layout, residual=layout))
    x, *_, residual = problem.inputs
    size, sizes = x.numel() * x.element_size(), {"mask": x.numel() // 8}
    results, forward = cuda.bn_act_fwd(*problem.inputs, problem.code, save_mask=True)
    arguments = (problem.inputs[1], problem.inputs[2], results["mean"], results["rstd"], None, results["mask"], problem.code)
    _, backward = cuda.bn_act_bwd(problem.dout.contiguous(memory_format=cuda.suggested(x)), x, *arguments)
    _, _, added = cuda.add_act_fwd(x, residual, 1.0, 1, SLOPE, True)
    stats, _, apply = forward
    reduce, _, gradients = backward
    expected = {
        "stats": (stats, {"x"}, set()),
        "apply": (apply, {"x", "residual"}, {"out", "mask"}),
        "reduce": (reduce, {"x", "dout", "mask"}, set()),
        "gradients": (gradients, {"x", "dout", "mask"}, {"dx", "dresidual"}),
        "add": (added[0], {"x", "residual"}, {"out", "mask"}),
    }
    for name, (report, reads, writes) in expected.items():

        def touched(what: str, counts: dict[str, dict[str, int]] = report.tensors) -> dict[str, int]:
            return {tensor: counts[tensor][what] for tensor in LARGE & counts.keys() if counts[tensor][what]}

        assert touched("read") == {tensor: sizes.get(tensor, size) for tensor in reads}, name
        assert touched("written") == {tensor: sizes.get(tensor, size) for tensor in writes}, name
        assert report.counters["atomics"] == 0
        assert report.efficiency("store") == 1.0, name
        # 512 bytes a request but for the mask's bytes and the per-channel vectors (gradients: a record of 16 bytes a channel).
        vectors = len(reads - {"mask"}) * size / 512
        assert report.counters["load_requests"] < 2.2 * vectors + 56 * report.counters["blocks"], f"{name}: narrow loads"


def test_blocks_of_reductions() -> None:
    """In 16-bit NHWC: whole waves of an H100; the statistics fill a second one only where a thread keeps ten rows."""
    address, shapes = 1 << 20, ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7), (2048, 7, 7), (64, 7, 7))
    given = {"x": address, "mean": address, "rstd": address, "training": True}
    more = {"fwd": {"out": address}, "bwd": dict.fromkeys(("dout", "dx", "dweight", "dbias"), address)}

    def blocks(kernel: str, way: str) -> list[int]:
        found = [sites.grids("bn_act", way, torch.float16, "nhwc", (256, *s), **given, **more[way]) for s in shapes]
        return [f["blocks"][kernel] for f in found]

    assert blocks("bn_act_stats_kernel_nhwc", "fwd") == [1584, 1056, 528, 528, 1056, 78]
    assert blocks("bn_act_bwd_reduce_kernel_nhwc", "bwd") == [1584, 1584, 1056, 528, 1584, 78]


RESOURCES = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


@pytest.mark.slow
@pytest.mark.parametrize("arch", rotating(["80", "90"], 1))
def test_registers(arch: str) -> None:
    """ptxas: no spill, no stack, at most 64 registers (1,024 threads a multiprocessor).

    The sums of bn_act_pair in NHWC have 80 (768 threads): two rows of three maps under way weigh more (docs/gpu-conv.md).
    """
    with ThreadPoolExecutor(2) as pool:
        # The limits of the others: ops/test_nms_cuda_cost.py, ops/test_conv_bn_act_cuda.py.
        sources = [s for s in cuda.SOURCES if s.parent.name not in ("nms", "conv_bn_act")]
        logs = list(pool.map(lambda s: compile_cuda(s, "cubin", arch, [cuda.CSRC], cuda.FLAGS)[1], sources))
    kernels = [(name, *map(int, counts)) for log in logs for name, *counts in RESOURCES.findall(log)]
    assert len(kernels) == 36 + 36 + 7 + 7 + 7 + 7 + 10
    most = {name: 80 if "bn_act_pair_reduce_kernel_nhwc" in name else 64 for name, *_ in kernels}
    wrong = [kernel for kernel in kernels if any(kernel[1:4]) or kernel[4] > most[kernel[0]]]
    assert not wrong, f"(kernel, stack, spill stores, spill loads, registers): {wrong}"
