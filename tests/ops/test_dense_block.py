"""dense_block: numbers against stock torch and fp64, gradients, opcheck, what is kept, errors; its steps by themselves."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _assert import compile_counter, no_worse_than_torch
from _dense_block import BF16, EPS, FP16, FP32, FP64, Case, Results, is_running, ours, params_of, results, stock, tensors_of
from conftest import device_of
from test_residual_block_torch import saved_bytes
from torch import Tensor

from dl4ds_kernels import functional as F
from dl4ds_kernels._define import CPP, TRITON, has_kernel, op, triton_interpreted


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
