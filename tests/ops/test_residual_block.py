"""basic_block, bottleneck and the pre-activation twins: numbers, gradients, opcheck, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _assert import no_worse_than_torch
from _cases import lay_out
from _residual_block import BF16, FP16, FP64, KINDS, Case, grouped, ours, params_of, results, stock, tensors_of
from conftest import device_of
from torch import Tensor

from dl4ds_kernels import functional as F
from dl4ds_kernels._define import op
from dl4ds_kernels.ops._block_code import IDENTITY, PROJECTION, Block, Conv, Norm, decode, encode

CASES = [Case(kind, stride, training=training) for kind in KINDS for stride in (1, 2) for training in (True, False)]
CASES += [Case(kind, stride, memory_efficient=True) for kind in KINDS for stride in (1, 2)]
CASES += [Case(kind, stride, layout=layout) for kind in KINDS for stride in (1, 2) for layout in ("nhwc", "transposed")]
CASES += [Case(stride=2, dtype=dtype, layout="nhwc", wide=wide) for dtype in (FP64, BF16, FP16) for wide in (False, True)]
CASES += [Case(activation=a, stride=s, memory_efficient=a == "silu") for a in ("none", "leaky_relu", "silu") for s in (1, 2)]
CASES += [Case(stride=2, affine=False), Case(groups=2), Case(stride=2, conv_bias=True), Case(eps_mode="std", stride=2)]
CASES += [Case("preact_bottleneck", stride, leading=False) for stride in (1, 2)]
CASES += [Case("basic_block", 2, shape=(2, 32, 28, 28), layout="nhwc"), Case("basic_block", 1, layout="nhwc_cslice")]
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


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
    got, eager, truth = grouped(got), grouped(eager), grouped(truth)
    for name in truth:  # the reference is written to be obvious, and its sums may err more
        no_worse_than_torch(got[name], eager[name], truth[name], name, 8.0 if backend == "reference" else 2.0)


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
