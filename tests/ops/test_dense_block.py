"""dense_block: numbers against stock torch and fp64, gradients, opcheck, what is kept, errors; its steps by themselves."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as TF
from _assert import compile_counter, no_worse_than_torch
from conftest import device_of
from test_residual_block_torch import saved_bytes
from torch import Tensor

from dl4ds_kernels import _cpu_conv
from dl4ds_kernels import functional as F
from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import CPP, TRITON, has_kernel, op, triton_interpreted

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
SLOPE, MOMENTUM, EPS = 0.2, 0.3, 1e-3
Results = dict[str, Tensor]


class Case(NamedTuple):
    shape: tuple[int, ...] = (3, 19, 7, 6)  # no multiple of a vector anywhere
    layers: int = 3
    growth: int = 5
    width: int = 12  # of the bottleneck; 0: without
    dtype: torch.dtype = FP32
    layout: str = "nhwc"
    activation: str = "relu"
    affine: bool = True
    bias: bool = False
    running: bool = True
    eps_mode: str = "var"
    wide: bool = False  # BatchNorm vectors in fp32 beside 16-bit features
    memory_efficient: bool = False
    keep_activations: bool = False
    training: bool = True

    @property
    def id(self) -> str:
        base = Case()
        return ",".join(f"{f}={str(v).replace(' ', '')}" for f, v, d in zip(self._fields, self, base, strict=True) if v != d)


def tensors_of(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(shape, generator=g, dtype=FP64)  # noqa: E731
    n, c, h, w = case.shape
    spread = torch.rand(c, generator=g, dtype=FP64).view(1, -1, 1, 1) + 0.5
    format = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
    tensors = {"x": (rand(n, c, h, w) * spread + rand(1, c, 1, 1)).to(case.dtype).contiguous(memory_format=format)}
    vector_dtype = FP32 if case.wide else case.dtype
    for layer in range(case.layers):
        plan = [(c, case.width, 1), (case.width, case.growth, 3)] if case.width else [(c, case.growth, 3)]
        for i, (inputs, outputs, kernel) in enumerate(plan):
            name = f"{layer}.{i}."
            weight = rand(outputs, inputs, kernel, kernel) / (inputs * kernel * kernel) ** 0.5
            tensors[name + "conv"] = weight.to(case.dtype)
            if case.bias:
                tensors[name + "shift"] = rand(outputs).to(case.dtype)
            if case.affine:
                tensors[name + "weight"] = (rand(inputs) * 0.3 + 1).to(vector_dtype)
                tensors[name + "bias"] = (rand(inputs) * 0.3).to(vector_dtype)
            if case.running:
                tensors[name + "mean"] = rand(inputs).to(vector_dtype)
                tensors[name + "var"] = (rand(inputs).abs() + 0.5).to(vector_dtype)
        c += case.growth
    return tensors


def params_of(case: Case, t: dict[str, Tensor]) -> list[list[F.ConvParams]]:
    layers = []
    for layer in range(case.layers):
        own = []
        for i in range(2 if case.width else 1):
            v = lambda what, name=f"{layer}.{i}.": t.get(name + what)  # noqa: E731
            norm = F.BNParams(v("mean"), v("var"), v("weight"), v("bias"), MOMENTUM, EPS, case.eps_mode)
            own.append(F.ConvParams(v("conv"), norm, v("shift"), padding=v("conv").shape[2] // 2))
        layers.append(own)
    return layers


def ours(case: Case, backend: str | None) -> Callable[[dict[str, Tensor]], Tensor]:
    def call(t: dict[str, Tensor]) -> Tensor:
        return F.dense_block(
            t["x"], params_of(case, t), training=case.training, activation=case.activation, negative_slope=SLOPE,
            memory_efficient=case.memory_efficient, keep_activations=case.keep_activations, backend=backend,
        )  # fmt: skip

    return call


def stock(case: Case) -> Callable[[dict[str, Tensor]], Tensor]:
    """What a user writes today."""

    def call(t: dict[str, Tensor]) -> Tensor:
        x = t["x"]
        for layer in params_of(case, t):
            z = x
            for p in layer:
                m = p.norm
                if case.eps_mode == "std":
                    mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), unbiased=False, keepdim=True)
                    with torch.no_grad():
                        m.running_mean.lerp_(mean.flatten(), MOMENTUM)
                        m.running_var.lerp_(z.var((0, 2, 3)), MOMENTUM)
                    z = (z - mean) / (var.sqrt() + EPS) * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)
                else:
                    z = TF.batch_norm(z, m.running_mean, m.running_var, m.weight, m.bias, case.training, MOMENTUM, EPS)
                z = apply_activation(z, ACTIVATION_CODES[case.activation], SLOPE)
                z = TF.conv2d(z, p.weight, p.bias, padding=p.padding)
            x = torch.cat([x, z], 1)
        return x

    return call


def is_running(name: str) -> bool:
    return name.endswith((".mean", ".var"))


def results(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype | None = None, steps: int = 1
) -> Results:
    """Output, every gradient and the running statistics after ``steps`` calls."""
    leaves = {n: t.detach().clone() for n, t in tensors.items()}
    if dtype is not None:
        leaves = {n: t.to(dtype).cpu() for n, t in leaves.items()}
    names = [n for n in leaves if not is_running(n)]
    for name in names:
        leaves[name].requires_grad_()
    for _ in range(steps):
        out = function(leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=FP64)
    dout = dout.to(out.device, out.dtype).contiguous(memory_format=torch.channels_last)
    grads = torch.autograd.grad(out, [leaves[n] for n in names], dout)
    found: Results = {"out": out.detach(), **{f"d{n}": grad for n, grad in zip(names, grads, strict=True)}}
    return found | {n: t for n, t in leaves.items() if is_running(n)}


def grouped(found: Results) -> Results:
    """All gradients of one kind as one: a bias in front of a BatchNorm has no gradient but rounding."""
    groups: dict[str, list[Tensor]] = {}
    for name, t in found.items():
        kind = name if name in ("out", "dx") else "d" * name.startswith("d") + name.rpartition(".")[2]
        groups.setdefault(kind, []).append(t.flatten())
    return {name: torch.cat(ts) for name, ts in groups.items()}


KEEP = [{"memory_efficient": True}, {}, {"keep_activations": True}]
CASES = [Case(width=width, **keep) for width in (12, 0) for keep in KEEP]
CASES += [Case((2, 32, 14, 14), 4, 16, 64, **keep) for keep in KEEP] + [Case(layout="nchw"), Case(training=False)]
CASES += [Case(activation=a, width=w) for a, w in itertools.product(("none", "leaky_relu", "silu"), (12, 0))]
CASES += [Case(affine=False), Case(bias=True), Case(running=False), Case(eps_mode="std"), Case(layers=1), Case(layers=0)]
CASES += [
    Case(dtype=d, wide=w, width=b) for d, w, b in ((FP64, False, 12), (BF16, True, 12), (FP16, False, 0), (BF16, False, 12))
]
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@each
def test_numbers(case: Case, backend: str) -> None:
    """Output, gradients and statistics after three calls: at most twice as far from fp64 as stock torch's."""
    tensors = {n: t.to(device_of(backend)) for n, t in tensors_of(case).items()}
    got, eager = results(ours(case, backend), tensors, steps=3), results(stock(case), tensors, steps=3)
    truth = results(stock(case), tensors, FP64, steps=3)
    if case.dtype in (BF16, FP16):  # rounding puts some values on another side of the kink, in stock torch too
        for name, t in truth.items():
            error, stock_error = (got[name].double().cpu() - t).norm(), (eager[name].double().cpu() - t).norm()
            assert got[name].dtype == eager[name].dtype, name
            assert error <= 2 * stock_error + 4 * torch.finfo(case.dtype).eps * t.norm(), name
        return
    for name, t in got.items():
        assert t.shape == eager[name].shape and t.dtype == eager[name].dtype, name
    got, eager, truth = grouped(got), grouped(eager), grouped(truth)
    for name in truth:
        no_worse_than_torch(got[name], eager[name], truth[name], name, 8.0 if backend == "reference" else 2.0)


def test_layout_and_bits(kernels: None) -> None:
    """channels_last out; what is kept changes no bit, nor does the number of threads (but in the library's 1x1 weights)."""
    case = Case((4, 32, 14, 14), 4, 16, 64)
    tensors = tensors_of(case)
    first = results(ours(case, "cpu"), tensors)
    assert first["out"].is_contiguous(memory_format=torch.channels_last)
    others = [(case._replace(**keep), 2) for keep in KEEP] + [(case, 1)]
    for other, threads in others:
        torch.set_num_threads(threads)
        again = results(ours(other, "cpu"), tensors)
        differ = [n for n in first if not torch.equal(first[n], again[n]) and not (threads == 1 and n.endswith(".0.conv"))]
        assert differ == [], (other.id, threads)


GRADCHECK = [Case((2, 3, 3, 2), 3, 2, width, FP64, **keep) for width in (3, 0) for keep in KEEP]
GRADCHECK += [c._replace(activation="silu", bias=True) for c in GRADCHECK[1::3]]


@pytest.mark.parametrize("case", GRADCHECK, ids=lambda case: case.id)
def test_gradcheck(case: Case, kernels: None) -> None:
    tensors = tensors_of(case)
    names = [n for n in tensors if not is_running(n)]

    def function(*leaves: Tensor) -> Tensor:
        return ours(case, "cpu")({**{n: t.clone() for n, t in tensors.items()}, **dict(zip(names, leaves, strict=True))})

    torch.autograd.gradcheck(function, [tensors[n].requires_grad_() for n in names], fast_mode=True)


def raw(case: Case, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """The op's own arguments, from what the functional hands to the dispatcher."""
    caught: list[tuple[Any, ...]] = []

    class Caught(Exception):
        pass

    def catch(overload: Any, differentiable: bool, *args: Any) -> Any:
        caught.append(args)
        raise Caught

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("dl4ds_kernels.functional.dense_block"), "call", catch)
        with pytest.raises(Caught):
            ours(case, "cpu")(tensors)
    return caught[0]


@pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case.id)
def test_opcheck(case: Case, kernels: None) -> None:
    """Schema, fake kernel (strides included), autograd and AOT dispatch of both ops."""
    tensors = tensors_of(case)
    for name, t in tensors.items():
        t.requires_grad_(not is_running(name))
    arguments = raw(case, tensors)
    torch.library.opcheck(op("dense_block"), arguments)
    with torch.no_grad():
        x, convs, norms, running, code, numbers, per_layer, keep, save = arguments
        x, convs, norms = x.detach(), [t.detach() for t in convs], [t.detach() for t in norms]
        out, kept, statistics, _ = op("dense_block")(x, convs, norms, running, code, numbers, per_layer, keep, save)
        needs = [True] * (1 + len(convs) + len(norms))
        backward = (torch.randn_like(out), out, convs, norms, kept, statistics, code, numbers, per_layer, keep, x.shape[1])
        for change in ([], [0], [3, 5]):
            torch.library.opcheck(op("dense_block_bwd"), (*backward, [n and i not in change for i, n in enumerate(needs)]))


@pytest.mark.parametrize("case", [Case(), Case(width=0), Case(memory_efficient=True)], ids=lambda case: case.id)
def test_gradient_subsets(case: Case, kernels: None) -> None:
    """Each single gradient equals that of the full backward pass: what is skipped changes nothing else."""
    tensors = tensors_of(case)
    full = results(ours(case, "cpu"), tensors)
    for name in [n for n in tensors if not is_running(n)]:
        leaves = {n: t.detach().clone() for n, t in tensors.items()}
        leaves[name].requires_grad_()
        out = ours(case, "cpu")(leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=FP64).to(out.dtype)
        torch.testing.assert_close(torch.autograd.grad(out, leaves[name], dout)[0], full[f"d{name}"], rtol=1e-5, atol=1e-5)


def test_what_is_kept(kernels: None) -> None:
    """The output, the bottlenecks' outputs, statistics; with memory_efficient the output and statistics alone."""
    case = Case((2, 32, 14, 14), 4, 16, 64)
    leaves = {n: t.requires_grad_(not is_running(n)) for n, t in tensors_of(case).items()}
    pixels = 2 * 14 * 14
    features, inner, statistics = 4 * pixels * 96, 4 * pixels * 64 * 4, 4 * (2 * 96 + 2 * 64 * 4)
    for keep, expected in zip(KEEP, (0, inner, 2 * inner), strict=True):
        found = saved_bytes(lambda keep=keep: ours(case._replace(**keep), "cpu")(leaves), list(leaves.values()))
        assert found == features + statistics + expected, keep


def test_without_gradients(kernels: None) -> None:
    """In training under no_grad the same output and statistics, and the running statistics move."""
    case = Case()
    tensors = tensors_of(case)
    with_grad = results(ours(case, "cpu"), tensors)
    with torch.no_grad():
        out = ours(case, "cpu")(tensors)
    assert torch.equal(out, with_grad["out"])
    assert all(torch.equal(t, with_grad[n]) for n, t in tensors.items() if is_running(n))


def test_compile(kernels: None, fresh_dynamo: Any) -> None:
    """One graph, no recompile for the same shapes, and the results of the uncompiled call."""
    case = Case()
    counter = compile_counter("aot_eager")
    compiled = torch.compile(ours(case, "cpu"), fullgraph=True, backend=counter)
    tensors = tensors_of(case)
    expected = results(ours(case, "cpu"), tensors)
    for _ in range(2):
        actual = results(compiled, tensors)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert counter.graphs == 1


@pytest.mark.parametrize("width", [12, 0])
def test_autocast(width: int, kernels: None) -> None:
    """bfloat16 features in and out, gradients of the parameters in fp32; fp32 features take stock's promotion."""
    case = Case((2, 32, 14, 14), 3, 16, 4 * width, activation="silu")
    tensors = tensors_of(case)
    half = {**tensors, "x": tensors["x"].to(BF16)}

    def under(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(t: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", BF16):
                return function(t)

        return call

    truth = results(stock(case), half, FP64)
    got, eager = results(under(ours(case, "cpu")), half), results(under(stock(case)), half)
    for name, t in truth.items():
        assert got[name].dtype == eager[name].dtype, name
        error, stock_error = (got[name].double() - t).norm(), (eager[name].double() - t).norm()
        assert error <= 2 * stock_error + 4 * torch.finfo(BF16).eps * t.norm(), name
    assert under(ours(case, "cpu"))(tensors).dtype == under(stock(case))(tensors).dtype == FP32


@pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine: `backend` covers it")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_without_kernels_of_its_own(kernels: None) -> None:
    """The same schedule where the steps are plain torch, as on CUDA: over the Triton kernels, in Triton's interpreter."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    for case in (Case((2, 5, 4, 3), 2, 3, 4), Case((2, 5, 4, 3), 2, 3, 0, memory_efficient=True)):
        tensors = tensors_of(case)
        got, eager = results(ours(case, "triton"), tensors), results(stock(case), tensors)
        got, eager, truth = grouped(got), grouped(eager), grouped(results(stock(case), tensors, FP64))
        for name in truth:
            no_worse_than_torch(got[name], eager[name], truth[name], name)


def test_registered_where_bn_act_is() -> None:
    for namespace, device in itertools.product((CPP, TRITON), ("cpu", "cuda")):
        for name in ("dense_block", "dense_block_bwd"):
            assert has_kernel(name, namespace, device) == has_kernel("bn_act", namespace, device)


def test_second_backward_is_refused(kernels: None) -> None:
    leaves = {n: t.requires_grad_(not is_running(n)) for n, t in tensors_of(Case()).items()}
    (dx,) = torch.autograd.grad(ours(Case(), "cpu")(leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="dense_block: expected a first-order gradient"):
        dx.sum().backward()


def test_a_changed_output_is_noticed(kernels: None) -> None:
    """Backward reads the buffer. A changed input does not matter: it has been copied."""
    tensors = tensors_of(Case())
    leaves = {n: t.requires_grad_(n.endswith("conv")) for n, t in tensors.items()}
    expected = torch.autograd.grad(ours(Case(), "cpu")(leaves).square().sum(), leaves["0.0.conv"])[0]
    x = leaves["x"].detach().clone(memory_format=torch.preserve_format)
    out = ours(Case(), "cpu")({**leaves, "x": x})
    x.zero_()
    assert torch.equal(torch.autograd.grad(out.square().sum(), leaves["0.0.conv"], retain_graph=True)[0], expected)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def _first(p: list[list[F.ConvParams]], **changed: Any) -> list[list[F.ConvParams]]:
    return [[p[0][0]._replace(**changed), p[0][1]], *p[1:]]


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "count": (
        lambda p: [p[0], p[1][:1]], ValueError, r"layers\[1\]: expected 1 or 2 convolutions, as many in every layer, got 1"
    ),
    "norm": (lambda p: _first(p, norm=None), ValueError, r"layers\[0\]\[0\].norm: expected BNParams, got None"),
    "channels": (lambda p: [p[1]], RuntimeError, r"layers\[0\]\[0\].weight: expected 19 channels in"),
    "dtype": (lambda p: _first(p, weight=p[0][0].weight.double()), RuntimeError, "expected dtype torch.float32"),
    "size": (lambda p: _first(p, padding=1), RuntimeError, "keeps height and width, got stride 1, padding 1"),
    "type": (lambda p: [1], TypeError, "layers: expected lists of ConvParams, got list"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, backend: str) -> None:
    change, kind, message = ERRORS[name]
    t = {n: v.to(device_of(backend)) for n, v in tensors_of(Case()).items()}
    with pytest.raises(kind, match=message):
        F.dense_block(t["x"], change(params_of(Case(), t)), training=True, backend=backend)


def test_one_value_per_channel_is_refused(kernels: None) -> None:
    t = tensors_of(Case((1, 19, 1, 1)))
    before = t["0.0.mean"].clone()
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        ours(Case(), "cpu")(t)
    assert torch.equal(t["0.0.mean"], before)


WHOLE = Case((4, 64, 12, 12), 4, 32, 128)
WHOLE_CASES = [
    WHOLE, WHOLE._replace(memory_efficient=True), WHOLE._replace(keep_activations=True), WHOLE._replace(running=False),
    WHOLE._replace(eps_mode="std", activation="silu"), WHOLE._replace(activation="leaky_relu"),
]  # fmt: skip


@pytest.fixture
def whole_layers() -> None:
    """Both convolutions of WHOLE are ours, as a layer in one call asks for."""
    sizes = [((4, 64, 12, 12), (128, 64, 1, 1), 0), ((4, 128, 12, 12), (32, 128, 3, 3), 1)]
    for shape, weight, padding in sizes:
        if not all(_cpu_conv.choose_sizes(shape, torch.empty(weight), ((1, 1), (padding,) * 2, (1, 1), 1))):
            pytest.skip("the engine trains with AVX2 and AVX-512 only")


def same(a: Tensor, b: Tensor) -> bool:
    """Up to the order of sums over a map's pixels."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("case", WHOLE_CASES, ids=lambda case: case.id)
def test_a_layer_in_one_call(case: Case, whole_layers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a layer, and how many of them took the one call: all forward, backward those with one kept tensor.

    The first layer of a backward pass, the last of the block, starts the gradient buffer and goes step by step. The same bits,
    but for gradients behind sums that the first convolution's epilogue takes (where the activation is a clamp).
    """
    layer = importlib.import_module("dl4ds_kernels.ops._dense_layer")
    calls = {"forward": 0, "backward": 0}

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(layer, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return real(*args)

        return call

    for name in calls:
        monkeypatch.setattr(layer, name, counted(name))
    whole = results(ours(case, "cpu"), tensors_of(case), steps=2)
    kept_one = not (case.memory_efficient or case.keep_activations)
    assert calls == {"forward": 2 * case.layers, "backward": (case.layers - 1) * kept_one}
    monkeypatch.setattr(layer, "prepare", lambda *args: None)
    steps = results(ours(case, "cpu"), tensors_of(case), steps=2)
    assert whole.keys() == steps.keys()
    in_registers = case.activation == "relu" and kept_one
    for n in whole:
        summed = in_registers and n.startswith("d")
        assert same(whole[n], steps[n]) if summed else torch.equal(whole[n], steps[n]), n


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("sizes", [(45, 19, 7, 52), (64, 128, 32, 96), (33, 8, 3, 400)], ids=str)
def test_normed_convolution(sizes: tuple[int, int, int, int], activation: str, kernels: None) -> None:
    """The first convolution with its BatchNorm in registers, sizes that fill no vector: against autograd in fp64.

    400 channels of the buffer: rows that are not asked for ahead.
    """
    channels, inner, new, width = sizes
    g = torch.Generator().manual_seed(5)
    rand = lambda *s: torch.randn(s, generator=g)  # noqa: E731
    buffer = (rand(3, width, 9, 7) + 1).contiguous(memory_format=torch.channels_last)
    total = rand(3, width, 9, 7).contiguous(memory_format=torch.channels_last)
    mean, var = buffer.mean((0, 2, 3)), buffer.var((0, 2, 3), unbiased=False)
    vector = lambda n: rand(n) * 0.3 + 1  # noqa: E731
    tensors = [vector(channels), rand(channels), rand(inner, channels, 1, 1) / channels**0.5]
    tensors += [vector(inner), rand(inner), rand(new, inner, 3, 3) / (9 * inner) ** 0.5]
    code = [channels, new, 0, 0, ACTIVATION_CODES[activation], *[1] * 6, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    numbers = [EPS, EPS, 0.0, MOMENTUM]

    def truth(leaves: list[Tensor], features: Tensor) -> Tensor:
        z = features
        for k, padding in ((0, 0), (3, 1)):
            z = apply_activation(TF.batch_norm(z, None, None, *leaves[k : k + 2], True, 0.0, EPS), code[4], SLOPE)
            z = TF.conv2d(z, leaves[k + 2], padding=padding)
        return z

    def leaves_of(dtype: torch.dtype) -> list[Tensor]:
        return [t.to(dtype).requires_grad_() for t in (*tensors, buffer[:, :channels])]

    exact, plain = leaves_of(FP64), leaves_of(FP32)
    for leaves in (exact, plain):
        truth(leaves[:6], leaves[6]).backward(total[:, channels : channels + new].to(leaves[0].dtype))
    grad, linear = total.clone(memory_format=torch.preserve_format), [torch.zeros(width, dtype=FP64) for _ in range(2)]
    out = buffer.clone(memory_format=torch.preserve_format)
    made = op("dense_layer_into")(out, mean.clone(), var.clone(), tensors, code, numbers)
    features = out[:, :channels]
    z = op("bn_act")(features, *tensors[:2], mean[:channels], var[:channels], None, False, 0.0, EPS, False, code[4], 0.0, False)
    assert torch.equal(made[0], op("conv2d_exact")(z[0], tensors[2], None, [1, 1], [0, 0], [1, 1], 1))
    again = out[:, channels : channels + new].clone()
    found = op("dense_layer_back_into")(
        total, grad, *linear, buffer, mean, var, made[0], [*tensors, *made[2:4]], code, numbers
    )  # fmt: skip
    assert torch.equal(grad[:, channels:], total[:, channels:]) and torch.isfinite(again).all()
    rest = op("dense_take_step")(features, features, mean[:channels], *(v[:channels] for v in linear)) - features
    ours = [*found, grad[:, :channels] - total[:, :channels] + rest]
    for i, (a, e, p) in enumerate(zip(ours, exact, plain, strict=True)):
        error, eager = (a.double() - e.grad).abs().max(), (p.grad.double() - e.grad).abs().max()
        assert error <= 3 * eager + 1e-5 * e.grad.abs().max(), (i, float(error), float(eager))


def test_normed_convolution_keeps_nan(kernels: None) -> None:
    """A NaN among the features reaches its own pixel's gradients and its channel's sums, and nothing else."""
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    v, d = torch.rand(64) + 0.5, torch.zeros(64, dtype=FP64)
    tensors = [v[:32], v[:32], torch.randn(32, 32, 1, 1), v[:32], v[:32], torch.randn(32, 32, 3, 3)]
    code, numbers = [32, 32, 0, 0, 1, *[1] * 6, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [EPS, EPS, 0.0, 0.1]
    made = op("dense_layer_into")(x.clone(), v.clone(), v.clone(), tensors, code, numbers)
    dirty = x.clone(memory_format=torch.preserve_format)
    dirty[1, 5, 2, 3] = float("nan")
    grad, factor = x.clone(memory_format=torch.preserve_format), d.clone()
    grads = op("dense_layer_back_into")(
        x, grad, factor, d.clone(), dirty, v, v, made[0], [*tensors, *made[2:4]], code, numbers
    )  # fmt: skip
    assert torch.isfinite(grad).all()  # the gradient passes where z is NaN, as stock's does
    bad = [torch.isnan(t).nonzero().flatten().tolist() for t in (grads[0], grads[1], factor)]
    assert bad == [[5], [], [5]] and torch.isnan(grads[2]).any(0).flatten().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("case", [WHOLE, WHOLE._replace(shape=(2, 124, 9, 11), layers=2, growth=36)], ids=lambda case: case.id)
def test_whole_layers_give_the_same_bits_for_any_number_of_threads(case: Case, whole_layers: None) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(ours(case, "cpu"), tensors_of(case)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in found[0])


def test_gradient_subsets_of_whole_layers(kernels: None) -> None:
    """Frozen parameters: what is asked for is that of a pass that asks for all, which may sum in other orders."""
    tensors = tensors_of(WHOLE)
    full = results(ours(WHOLE, "cpu"), tensors)
    for frozen in ("1.0.conv", "1.1.conv", "2.0.weight", "2.1.bias", "x"):
        leaves = {n: t.detach().clone().requires_grad_(not is_running(n) and n != frozen) for n, t in tensors.items()}
        out = ours(WHOLE, "cpu")(leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=FP64).float()
        out.backward(dout.contiguous(memory_format=torch.channels_last))
        for n, leaf in leaves.items():
            assert leaf.grad is None if is_running(n) or n == frozen else same(leaf.grad, full[f"d{n}"]), (frozen, n)


def test_whole_layers_check_their_arguments(kernels: None) -> None:
    x = torch.randn(2, 40, 8, 8).contiguous(memory_format=torch.channels_last)
    v, d = torch.zeros(40), torch.zeros(40, dtype=FP64)
    tensors = [v[:32], v[:32], torch.randn(16, 32, 1, 1), v[:16], v[:16], torch.randn(8, 16, 3, 3)]
    code, numbers = [32, 8, 0, 0, 1, 1, 2, 1, 2, 1, 2, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [EPS, EPS, 0.0, 0.1]
    forward, back = op("dense_layer_into"), op("dense_layer_back_into")
    made = forward(x.clone(), v.clone(), v.clone(), tensors, code, numbers)
    assert [tuple(t.shape) for t in made] == [(2, 16, 8, 8)] * 2 + [(16,)] * 2 + [(0,)] * 2
    gradients = back(x, x.clone(), d.clone(), d.clone(), x, v, v, made[0], [*tensors, *made[2:4]], code, numbers)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]
    for message, call in {
        "dense_layer_into: code: expected 23": lambda: forward(x, v, v, tensors, code[:-1], numbers),
        "dense_layer_into: tensors: expected 6 or 8": lambda: forward(x, v, v, tensors[:5], code, numbers),
        "dense_layer_into: numbers: expected 4": lambda: forward(x, v, v, tensors, code, numbers[1:]),
        "dense_layer_back_into: tensors: expected": lambda: back(x, x, d, d, x, v, v, made[0], tensors, code, numbers),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_steps_check_what_they_write(kernels: None) -> None:
    """The CPU kernels refuse what would write outside a tensor."""
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    v, d = torch.zeros(4), torch.zeros(4, dtype=FP64)
    append, back, take = (op(f"dense_{name}") for name in ("append_into", "back_into", "take_step"))
    for message, call in {
        "dense_append_into: out: expected shape": lambda: append(x, x[:1], v, v),
        "dense_append_into: out: expected channels_last": lambda: append(x, x.contiguous(), v, v),
        "dense_append_into: mean: expected shape": lambda: append(x, x.clone(), v[:3], v),
        "dense_append_into: var: expected dtype": lambda: append(x, x.clone(), v, d),
        "dense_back_into: grad: expected shape": lambda: back(x, x, None, None, v, v, x[:1], x, d, d, EPS, False, 1, 0.0, True),
        "dense_back_into: factor: expected dtype": lambda: back(x, x, None, None, v, v, x, x, v, d, EPS, False, 1, 0.0, True),
        "dense_take_step: offset: expected shape": lambda: take(x, x, v, d, d[:2]),
        "dense_take_step: grad: expected channels_last": lambda: take(x.contiguous(), x, v, d, d),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    empty = torch.empty(0, 4, 3, 3)
    append(empty, empty, v, v)
    assert all(not t.any() for t in back(empty, empty, None, None, v, v, empty, empty, d, d, EPS, False, 1, 0.0, True))
