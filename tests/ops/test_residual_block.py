"""basic_block, bottleneck and the pre-activation twins: numbers, gradients, what is kept, compile, export, errors."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as TF
from _assert import Results, compare, compile_counter, no_worse_than_torch
from _cases import lay_out
from conftest import device_of
from torch import Tensor

from dl4ds_kernels import functional as F
from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import op, triton_interpreted
from dl4ds_kernels.ops._block_code import IDENTITY, PROJECTION, Block, Conv, Norm, decode, encode

SLOPE = 0.1
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Case(NamedTuple):
    """One block on (3, 8, 7, 6); ``stride`` 2 comes with a projection to 12 channels."""

    kind: str = "bottleneck"
    stride: int = 1
    dtype: torch.dtype = FP32
    layout: str = "nchw"
    activation: str = "relu"
    training: bool = True
    memory_efficient: bool = False
    affine: bool = True
    leading: bool = True  # a BatchNorm in front of a pre-activation block
    groups: int = 1
    conv_bias: bool = False
    eps_mode: str = "var"
    wide: bool = False  # fp32 BatchNorm vectors beside half-precision convolutions
    shape: tuple[int, ...] = (3, 8, 7, 6)

    @property
    def id(self) -> str:
        base = Case()
        named = (
            f"{name}={value}".replace("torch.", "") for name, value in self._asdict().items() if value != getattr(base, name)
        )
        return "-".join(named).replace(" ", "") or "base"

    @property
    def preact(self) -> bool:
        return self.kind.startswith("preact")

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(F, self.kind)


KINDS = ("basic_block", "bottleneck", "preact_basic_block", "preact_bottleneck")
CASES = [Case(kind, stride, training=training) for kind in KINDS for stride in (1, 2) for training in (True, False)]
CASES += [Case(kind, stride, memory_efficient=True) for kind in KINDS for stride in (1, 2)]
CASES += [Case(kind, stride, layout=layout) for kind in KINDS for stride in (1, 2) for layout in ("nhwc", "transposed")]
CASES += [Case(stride=2, dtype=dtype, layout="nhwc", wide=wide) for dtype in (FP64, BF16, FP16) for wide in (False, True)]
CASES += [Case(activation=a, stride=s, memory_efficient=a == "silu") for a in ("none", "leaky_relu", "silu") for s in (1, 2)]
CASES += [Case(stride=2, affine=False), Case(groups=2), Case(stride=2, conv_bias=True), Case(eps_mode="std", stride=2)]
CASES += [Case("preact_bottleneck", stride, leading=False) for stride in (1, 2)]
CASES += [Case("basic_block", 2, shape=(2, 32, 28, 28), layout="nhwc"), Case("basic_block", 1, layout="nhwc_cslice")]
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def tensors_of(case: Case) -> dict[str, Tensor]:
    """Every tensor of the call by name: x, conv<i>.weight, conv<i>.bias, bn<i>.weight, bn<i>.bias, bn<i>.mean, bn<i>.var."""
    g = torch.Generator().manual_seed(len(case.id) + 7 * case.stride)
    dtype, vectors = case.dtype, FP32 if case.wide and case.dtype in (BF16, FP16) else case.dtype

    def randn(*shape: int, of: torch.dtype = dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=FP64) * scale + shift).to(of)

    cin = case.shape[1]
    out = cin if case.stride == 1 else cin + 4
    width = 4 if "bottleneck" in case.kind else out
    channels = [(cin, width, 1), (width, width, 3), (width, out, 1)]
    if "basic" in case.kind:
        channels = [(cin, width, 3), (width, out, 3)]
    if case.stride == 2:
        channels.append((cin, out, 1))
    tensors = {"x": lay_out(randn(*case.shape), case.layout)}
    for i, (c, o, k) in enumerate(channels):
        groups = case.groups if k == 3 else 1
        tensors[f"conv{i}.weight"] = randn(o, c // groups, k, k, scale=(c * k * k / groups) ** -0.5)
        if case.conv_bias:
            tensors[f"conv{i}.bias"] = randn(o)
        projection = case.stride == 2 and i == len(channels) - 1
        if case.preact and (projection or (i == 0 and not case.leading)):
            continue
        n = c if case.preact else o
        if case.affine:
            tensors[f"bn{i}.weight"] = randn(n, of=vectors, scale=0.3, shift=1.0)
            tensors[f"bn{i}.bias"] = randn(n, of=vectors)
        tensors[f"bn{i}.mean"] = randn(n, of=vectors, scale=0.1)
        tensors[f"bn{i}.var"] = randn(n, of=vectors).abs() + 0.5
    return tensors


def params_of(case: Case, t: dict[str, Tensor]) -> tuple[list[F.ConvParams], F.ConvParams | None]:
    """The same as the public functions take it."""
    count = sum(name.startswith("conv") and name.endswith("weight") for name in t)
    strided = 1 if case.kind == "bottleneck" else 0
    params = []
    for i in range(count):
        projection = case.stride == 2 and i == count - 1
        norm = None
        if f"bn{i}.mean" in t:
            vectors = (t[f"bn{i}.mean"], t[f"bn{i}.var"], t.get(f"bn{i}.weight"), t.get(f"bn{i}.bias"))
            norm = F.BNParams(*vectors, momentum=0.2 + 0.1 * i, eps=1e-3 * (i + 1), eps_mode=case.eps_mode)
        kernel = t[f"conv{i}.weight"].shape[2]
        params.append(
            F.ConvParams(
                t[f"conv{i}.weight"], norm, t.get(f"conv{i}.bias"), case.stride if projection or i == strided else 1,
                kernel // 2, groups=case.groups if kernel == 3 else 1,
            )
        )  # fmt: skip
    return (params[:-1], params[-1]) if case.stride == 2 else (params, None)


def ours(case: Case, backend: str | None) -> Callable[[dict[str, Tensor]], Tensor]:
    extra = {"alpha": 0.5**0.5} if case.preact else {}

    def call(t: dict[str, Tensor]) -> Tensor:
        return case.function(
            t["x"], *params_of(case, t), training=case.training, activation=case.activation, negative_slope=SLOPE,
            memory_efficient=case.memory_efficient, backend=backend, **extra,
        )  # fmt: skip

    return call


def stock(case: Case) -> Callable[[dict[str, Tensor]], Tensor]:
    """What a user writes today."""

    def call(t: dict[str, Tensor]) -> Tensor:
        params, projection = params_of(case, t)

        def conv(z: Tensor, p: F.ConvParams) -> Tensor:
            return TF.conv2d(z, p.weight, p.bias, p.stride, p.padding, 1, p.groups)

        def bn(z: Tensor, p: F.ConvParams) -> Tensor:
            m = p.norm
            if case.eps_mode == "std":  # torch has sqrt(var + eps) only: the second form by its own eps
                wide = z.to(FP64)
                mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
                unbiased = wide.var((0, 2, 3))
                with torch.no_grad():
                    m.running_mean.lerp_(mean.to(z.dtype), m.momentum)
                    m.running_var.lerp_(unbiased.to(z.dtype), m.momentum)
                shape = (1, -1, 1, 1)
                normal = (wide - mean.view(shape)) / (var.sqrt() + m.eps).view(shape)
                return (normal * m.weight.view(shape) + m.bias.view(shape)).to(z.dtype)
            return TF.batch_norm(z, m.running_mean, m.running_var, m.weight, m.bias, case.training, m.momentum, m.eps)

        def act(z: Tensor) -> Tensor:
            return apply_activation(z, ACTIVATION_CODES[case.activation], SLOPE)

        z = source = t["x"]
        if case.preact:
            for i, p in enumerate(params):
                if p.norm is not None:
                    z = act(bn(z, p))
                source = z if i == 0 else source
                z = conv(z, p)
            return 0.5**0.5 * (z + (t["x"] if projection is None else conv(source, projection)))
        for i, p in enumerate(params):
            z = bn(conv(z, p), p)
            z = act(z) if i + 1 < len(params) else z
        return act(z + (t["x"] if projection is None else bn(conv(t["x"], projection), projection)))

    return call


def results(
    case: Case, function: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype | None = None
) -> Results:
    """Output, every gradient and the running statistics after one call."""
    leaves = {n: t.detach().clone() if t.dim() == 1 else t.detach() for n, t in tensors.items()}
    if dtype is not None:
        leaves = {n: t.to(dtype).cpu() for n, t in leaves.items()}
    names = [n for n in leaves if not n.endswith((".mean", ".var"))]
    for name in names:
        leaves[name].requires_grad_()
    out = function(leaves)
    g = torch.Generator().manual_seed(3)
    dout = torch.randn(out.shape, generator=g, dtype=FP64)
    grads = torch.autograd.grad(out, [leaves[n] for n in names], dout.to(out.dtype).to(out.device))
    found: Results = {"out": out.detach(), **{f"d{n}": grad for n, grad in zip(names, grads, strict=True)}}
    return found | {n: t for n, t in leaves.items() if n.endswith((".mean", ".var"))}


def on(device: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(device) if device != "cpu" else t for name, t in tensors.items()}


@each
def test_numbers(case: Case, backend: str) -> None:
    """Output, gradients and statistics are at most twice as far from fp64 as stock torch's.

    A value that rounding puts on another side of a kink moves a gradient by a whole element, in stock torch too: those of the
    tensors in half precision are compared as a whole.
    """
    tensors = on(device_of(backend), tensors_of(case))
    got, eager = results(case, ours(case, backend), tensors), results(case, stock(case), tensors)
    truth = results(case, stock(case), tensors, FP64)
    if case.dtype in (BF16, FP16):
        for name, t in truth.items():
            scale, error, stock_error = t.norm(), (got[name].double() - t).norm(), (eager[name].double() - t).norm()
            assert error <= 2 * stock_error + 4 * torch.finfo(case.dtype).eps * scale, name
        return
    got, eager, truth = _grouped(got), _grouped(eager), _grouped(truth)
    for name in truth:  # the reference is written to be obvious, and its sums may err more
        no_worse_than_torch(got[name], eager[name], truth[name], name, 8.0 if backend == "reference" else 2.0)


def _grouped(found: Results) -> Results:
    """All gradients of one kind as one: some are zero but for rounding (a bias in front of a BatchNorm) and have no scale."""
    groups: dict[str, list[Tensor]] = {}
    for name, t in found.items():
        groups.setdefault(name if name in ("out", "dx") else name[0] + name[name.index(".") :], []).append(t.flatten())
    return {name: torch.cat(ts) for name, ts in groups.items()}


SMALL_CASES = [Case(kind, stride, FP64, "nhwc", shape=(2, 8, 3, 2)) for kind in KINDS for stride in (1, 2)]
SMALL_CASES += [c._replace(memory_efficient=True) for c in SMALL_CASES[:4]] + [
    c._replace(training=False) for c in SMALL_CASES[2:6]
]
SMALL_CASES += [c._replace(activation="silu") for c in SMALL_CASES[2:4]]


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.id)
def test_gradcheck(case: Case, kernels: None) -> None:
    tensors = tensors_of(case)
    names = [n for n in tensors if not n.endswith((".mean", ".var"))]

    def function(*leaves: Tensor) -> Tensor:
        statistics = {n: t.clone() for n, t in tensors.items() if n.endswith((".mean", ".var"))}
        return ours(case, "cpu")({**dict(zip(names, leaves, strict=True)), **statistics})

    torch.autograd.gradcheck(function, [tensors[n].requires_grad_() for n in names], fast_mode=True)


def raw(case: Case, tensors: dict[str, Tensor], save: bool = True) -> tuple[Any, ...]:
    """The op's own arguments, from what the functional hands to the dispatcher."""
    caught: list[tuple[Any, ...]] = []

    class Caught(Exception):
        pass

    def catch(overload: Any, differentiable: bool, *args: Any) -> Any:
        caught.append(args)
        raise Caught

    from dl4ds_kernels.functional import residual_block as module

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "call", catch)
    try:
        ours(case, "cpu")(tensors)
    except Caught:
        pass
    finally:
        patch.undo()
    x, convs, norms, running, code, numbers, training, _, memory_efficient = caught[0]
    return x, convs, norms, running, code, numbers, training, save, memory_efficient


OPCHECK = [Case(kind, stride, layout=layout) for kind, stride, layout in (
    ("bottleneck", 2, "nchw"), ("bottleneck", 1, "nhwc"), ("basic_block", 2, "transposed"), ("preact_bottleneck", 2, "nhwc"),
)]  # fmt: skip
OPCHECK += [Case("basic_block", 1, memory_efficient=True), Case(stride=2, training=False), Case(activation="silu", stride=2)]


@pytest.mark.parametrize("case", OPCHECK, ids=lambda case: case.id)
def test_opcheck(case: Case, kernels: None) -> None:
    """Schema, fake kernel (strides included), autograd and AOT dispatch of both ops, on three layouts."""
    tensors = tensors_of(case)
    for name, t in tensors.items():
        t.requires_grad_(not name.endswith((".mean", ".var")))
    arguments = raw(case, tensors)
    torch.library.opcheck(op("residual_block"), arguments)
    with torch.no_grad():
        x, convs, norms, running, code, numbers, training, _, memory_efficient = arguments
        detach = lambda ts: [t.detach() for t in ts]  # noqa: E731
        x, convs, norms = x.detach(), detach(convs), detach(norms)
        out, mask, kept, statistics, _ = op("residual_block")(x, convs, norms, running, *arguments[4:])
        count = 1 + len(convs) + len(norms)
        for needs in ([True] * count, [False, *[True] * (count - 1)])[: 1 + (case is OPCHECK[0])]:
            backward = (torch.randn_like(out), mask, x, convs, norms, running, kept, statistics, code, numbers, training)
            torch.library.opcheck(op("residual_block_bwd"), (*backward, memory_efficient, needs))


@pytest.mark.parametrize("case", [Case(), Case("basic_block", 2), Case("preact_bottleneck", 2)], ids=lambda case: case.id)
def test_gradient_subsets(case: Case, kernels: None) -> None:
    """Each single gradient equals that of the full backward pass: what is skipped changes nothing else."""
    tensors = tensors_of(case)
    full = results(case, ours(case, "cpu"), tensors)
    for name in [n for n in tensors if not n.endswith((".mean", ".var"))]:
        leaves = {n: t.detach().clone() for n, t in tensors.items()}
        leaves[name].requires_grad_()
        out = ours(case, "cpu")(leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=FP64).to(out.dtype)
        torch.testing.assert_close(torch.autograd.grad(out, leaves[name], dout)[0], full[f"d{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [Case(stride=2), Case("basic_block", 2), Case("preact_bottleneck")], ids=lambda case: case.id)
def test_recomputing_changes_no_bit(case: Case, kernels: None) -> None:
    """The layers' own ops, the block, and the block with the last convolution computed twice: the same bits."""
    tensors = {n: lay_out(t, "nhwc") if t.dim() == 4 else t for n, t in tensors_of(case._replace(shape=(4, 8, 28, 30))).items()}
    block = results(case, ours(case, "cpu"), tensors)
    for other in (case, case._replace(memory_efficient=True)):
        again = results(case, ours(other, "cpu"), tensors)
        assert [name for name in block if not torch.equal(block[name], again[name])] == []
    stepwise = results(case, lambda t: _layers(case, t), tensors)
    for name in ("out", *(n for n in block if n.startswith("bn"))):
        assert torch.equal(block[name], stepwise[name]), name
    for name in block:
        no_worse_than_torch(block[name], stepwise[name], block[name].double(), name)


def _layers(case: Case, t: dict[str, Tensor]) -> Tensor:
    """The block through the functionals of its layers."""
    from dl4ds_kernels.functional import residual_block as module

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "select", lambda *_: "stock")
    try:
        return ours(case, "cpu")(t)
    finally:
        patch.undo()


def saved_bytes(function: Callable[[], Tensor], owned: list[Tensor]) -> int:
    """Bytes of storages that autograd keeps for the call, without the caller's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in owned}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_what_is_kept(kernels: None) -> None:
    """Per element of a bottleneck: the convolutions' outputs and one bit of the output; nothing else of that size."""
    case = Case(layout="nhwc", shape=(2, 16, 32, 32))
    tensors = tensors_of(case)
    leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors.items()}
    pixels = 2 * 32 * 32
    statistics = 4 * 2 * (4 + 4 + 16)
    outputs, mask = 4 * pixels * (4 + 4 + 16), pixels * 16 // 8
    assert saved_bytes(lambda: ours(case, "cpu")(leaves), [*leaves.values()]) == outputs + mask + statistics
    efficient = case._replace(memory_efficient=True)
    outputs = 4 * pixels * (4 + 4)
    assert saved_bytes(lambda: ours(efficient, "cpu")(leaves), [*leaves.values()]) == outputs + mask + statistics


def test_launches(kernels: None) -> None:
    """Convolutions, normalisations and copies of a block with a projection, forward and backward."""
    case = Case(stride=2, layout="nhwc", shape=(2, 32, 28, 28))
    leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors_of(case).items()}
    counts: list[collections.Counter[str]] = []
    out = None
    for forwards in (True, False):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = ours(case, "cpu")(leaves) if forwards else out.sum().backward()
        counts.append(collections.Counter(event.name for event in profile.events()))
    forward, backward = counts
    assert forward["aten::convolution"] == 4 and forward["dl4ds_kernels::bn_act"] == 4 and forward["aten::_foreach_copy_"] == 1
    # Two plain activations are made again, no convolution is.
    assert backward["aten::convolution_backward"] == 4 and backward["dl4ds_kernels::bn_act_bwd"] == 4
    assert backward["dl4ds_kernels::bn_act"] == 2 and backward["aten::convolution"] == 0 and backward["aten::add_"] >= 1


def test_a_cheap_projection_is_computed_again(kernels: None) -> None:
    """64 to 128 channels beside two 3x3 convolutions: 1/27 of the work, and its output is not kept."""
    x = torch.randn(1, 64, 32, 32)
    rand = lambda *shape: torch.randn(shape).requires_grad_()  # noqa: E731
    norm = lambda: F.BNParams(torch.zeros(128), torch.ones(128), rand(128), rand(128))  # noqa: E731
    params = [
        F.ConvParams(rand(128, 64, 3, 3), norm(), stride=2, padding=1),
        F.ConvParams(rand(128, 128, 3, 3), norm(), padding=1),
    ]
    projection = F.ConvParams(rand(128, 64, 1, 1), norm(), stride=2)
    owned = [x, *(c.weight for c in params), projection.weight]
    kept = saved_bytes(lambda: F.basic_block(x, params, projection, training=True, backend="cpu"), owned)
    assert 2 * 4 * 128 * 256 <= kept < 2.2 * 4 * 128 * 256


def test_statistics_move_once(kernels: None) -> None:
    """One update for a call, none while backward computes again; none at all in eval."""
    for training in (True, False):
        case = Case("basic_block", 2, memory_efficient=True, training=training)
        leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors_of(case).items()}
        before = {n: t.clone() for n, t in leaves.items() if n.startswith("bn")}
        out = ours(case, "cpu")(leaves)
        versions = {n: leaves[n]._version for n in before}
        after = {n: leaves[n].detach().clone() for n in before}
        out.sum().backward()
        for name in before:
            if name.endswith((".mean", ".var")):
                assert torch.equal(before[name], after[name]) == (not training), name
                assert leaves[name]._version == versions[name] and torch.equal(leaves[name], after[name]), name


@pytest.mark.parametrize("case", [Case(stride=2, layout="nhwc"), Case("preact_bottleneck")], ids=lambda case: case.id)
def test_compile(case: Case, kernels: None, fresh_dynamo: Any) -> None:
    """One graph, no recompile for the same shapes, and the results of the uncompiled call."""
    counter = compile_counter("aot_eager")
    compiled = torch.compile(ours(case, "cpu"), fullgraph=True, backend=counter)
    tensors = tensors_of(case)
    expected = results(case, ours(case, "cpu"), tensors)
    for _ in range(2):
        actual = results(case, compiled, tensors)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert counter.graphs == 1


@pytest.mark.slow
def test_compile_inductor(kernels: None, fresh_dynamo: Any) -> None:
    case = Case(stride=2, layout="nhwc", shape=(2, 32, 28, 28))
    tensors = tensors_of(case)
    expected = results(case, ours(case, "cpu"), tensors)
    actual = results(case, torch.compile(ours(case, "cpu"), fullgraph=True), tensors)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


class _Module(torch.nn.Module):
    def __init__(self, case: Case, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.case, self.names = case, [n for n in tensors if n != "x"]
        for name in self.names:
            self.register_buffer(name.replace(".", "_"), tensors[name].detach())

    def forward(self, x: Tensor) -> Tensor:
        t = {name: getattr(self, name.replace(".", "_")) for name in self.names}
        return ours(self.case, None)({"x": x, **t})


@pytest.mark.parametrize("kind", KINDS)
def test_export(kind: str) -> None:
    """torch.export writes standard ops."""
    case = Case(kind, 2, training=False)
    tensors = tensors_of(case)
    program = torch.export.export(_Module(case, tensors), (tensors["x"],))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not any("dl4ds" in target for target in targets)
    torch.testing.assert_close(program.module()(tensors["x"]), stock(case)(tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast(dtype: torch.dtype, kernels: None) -> None:
    """Convolutions in the autocast dtype, BatchNorm vectors and every gradient in fp32; as close to fp64 as stock autocast.

    A smooth activation: half precision puts some values on the other side of a kink, in stock torch too.
    """
    case = Case(stride=2, activation="silu", layout="nhwc", shape=(2, 32, 28, 28))
    tensors = tensors_of(case)

    def under(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(t: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype):
                return function(t)

        return call

    got, eager = results(case, under(ours(case, "cpu")), tensors), results(case, under(stock(case)), tensors)
    truth = results(case, stock(case), tensors, FP64)
    assert got["out"].dtype == dtype
    for name, t in truth.items():
        assert name == "out" or got[name].dtype == FP32, name
        error, stock_error = (got[name].double() - t).norm(), (eager[name].double() - t).norm()
        assert error <= 2 * stock_error + 4 * torch.finfo(dtype).eps * t.norm(), name


@pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine: `backend` covers it")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
@pytest.mark.parametrize("kind", ["basic_block", "preact_basic_block"])
def test_triton(kind: str) -> None:
    """The same schedule over the Triton kernels, in Triton's interpreter."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    case = Case(kind, 2, layout="nhwc", shape=(2, 4, 4, 3))
    tensors = tensors_of(case)
    got, eager = results(case, ours(case, "triton"), tensors), results(case, stock(case), tensors)
    truth = results(case, stock(case), tensors, FP64)
    compare(_grouped(got), _grouped(eager), _grouped(truth), "triton")


def test_second_backward_is_refused(kernels: None) -> None:
    leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors_of(Case()).items()}
    (dx,) = torch.autograd.grad(ours(Case(), "cpu")(leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="residual_block: expected a first-order gradient"):
        dx.sum().backward()


def test_a_changed_tensor_is_noticed(kernels: None) -> None:
    leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors_of(Case()).items()}
    x = leaves["x"].detach().clone()
    out = ours(Case(), "cpu")({**leaves, "x": x})
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_code_round_trip() -> None:
    norm = Norm(1, 2, -1, 4, True, 0.25, 1e-3)
    conv = Conv(0, -1, (1, 2), (3, 4), (5, 6), 7, norm)
    for projection, shortcut in ((conv._replace(norm=None), PROJECTION), (None, IDENTITY)):
        block = Block(True, shortcut, 3, False, 0.5, 2.0, (conv._replace(norm=norm._replace(index=0)), conv), projection)
        assert decode(*encode(block)) == block


def _first(p: list[F.ConvParams], **changed: Any) -> list[F.ConvParams]:
    return [p[0]._replace(**changed), *p[1:]]


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "count": (lambda p, d: (p[:2], d), ValueError, "bottleneck: params: expected 3 convolutions, got 2"),
    "norm": (lambda p, d: (_first(p, norm=None), d), ValueError, r"params\[0\].norm: expected BNParams, got None"),
    "channels": (
        lambda p, d: ([p[1], *p[1:]], d), RuntimeError, r"params\[0\].weight: expected 8 channels in with groups=1, got 4",
    ),
    "dtype": (lambda p, d: (_first(p, weight=p[0].weight.double()), d), RuntimeError, "expected dtype torch.float32 like x"),
    "vector": (
        lambda p, d: (_first(p, norm=p[0].norm._replace(bias=torch.ones(3))), d), RuntimeError,
        r"params\[0\].norm.bias: expected shape \(C,\) = \(4,\), got \(3,\)",
    ),
    "projection": (lambda p, d: (p, None), RuntimeError, "downsample: expected a projection from 8 to 12 channels, got None"),
    "width": (lambda p, d: (p, p[0]), RuntimeError, "downsample.weight: expected 12 channels out like the branch, got 4"),
    "tensor": (lambda p, d: (_first(p, weight=1), d), TypeError, r"params\[0\].weight: expected a Tensor, got int"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, backend: str) -> None:
    change, kind, message = ERRORS[name]
    case = Case(stride=2)
    tensors = tensors_of(case)
    with pytest.raises(kind, match=message):
        F.bottleneck(tensors["x"], *change(*params_of(case, tensors)), training=True, backend=backend)


def test_one_value_per_channel_is_refused(kernels: None) -> None:
    case = Case(stride=2, shape=(1, 8, 2, 2))
    tensors = tensors_of(case)
    before = tensors["bn0.mean"].clone()
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        ours(case, "cpu")(tensors)
    assert torch.equal(tensors["bn0.mean"], before)
    with pytest.raises(ValueError, match="activation: expected one of none, relu"):
        F.bottleneck(tensors["x"], *params_of(case, tensors), activation="gelu")
