"""``linear_act``: fp64 truth, every ISA, special values, errors, stock's path for the rest, and dk.optimize."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _isa import every_isa, run_with
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import _extension, reference
from dl4ds_kernels import functional as dkf
from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation

ROOM = sys.modules["dl4ds_kernels.functional.linear_act"]  # the name in the package is the function
OP = torch.ops.dl4ds_kernels.linear_act
kernels = pytest.mark.skipif(not _extension.status()["_C"].loaded, reason="the kernel is in the C++ part")
# (rows, in, out): tails of every vector length, of the pieces of 64 vectors, and of the shares of outputs; and nothing at all.
SIZES = [(m, k, n) for m in (1, 2, 3, 8, 11) for k, n in ((1, 1), (15, 7), (33, 19), (2048, 5), (2049, 33), (5000, 18))]
X, WEIGHT, BIAS = torch.randn(2, 8), torch.randn(6, 8), torch.randn(6)
SIZES += [(m, 100, 21) for m in (4, 5, 6, 7)] + [(0, 5, 4), (2, 0, 3), (2, 5, 0)]


def tensors(rows: int, k: int, n: int, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    return torch.randn(rows, k), torch.randn(n, k) / max(1, k) ** 0.5, torch.randn(n) if bias else None


def check(sizes: tuple[int, int, int], activation: str = "none", bias: bool = True) -> None:
    """Against fp64: at most twice stock's error, or a few roundings of the largest sum."""
    x, w, b = tensors(*sizes, bias)
    z = TF.linear(x.double(), w.double(), None if b is None else b.double())
    truth = apply_activation(z, ACTIVATION_CODES[activation], 0.2)
    with torch.no_grad():
        out = dkf.linear_act(x, w, b, activation=activation, negative_slope=0.2, backend="cpu")
        stock = apply_activation(TF.linear(x, w, b), ACTIVATION_CODES[activation], 0.2)
    assert out.shape == truth.shape and out.is_contiguous() and out.dtype is torch.float32
    if out.numel():
        error, theirs = (out - truth).abs().max().item(), (stock - truth).abs().max().item()
        assert error <= max(2 * theirs, 4e-7 * max(1.0, z.abs().max().item()))


@kernels
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_against_fp64(bias: bool) -> None:
    for sizes in SIZES:
        check(sizes, bias=bias)


@kernels
@pytest.mark.parametrize("activation", ACTIVATION_CODES)
def test_activations(activation: str) -> None:
    for sizes in ((1, 300, 37), (5, 64, 16), (9, 20, 50)):
        check(sizes, activation)


@kernels
def test_a_row_is_the_same_in_any_batch_and_with_any_number_of_threads() -> None:
    x, w, b = tensors(13, 4099, 131)
    with torch.no_grad():
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(OP(x, w, b, 1, 0.0))
        assert all(torch.equal(results[0], other) for other in results[1:])
        for i in range(13):
            assert torch.equal(OP(x[i : i + 1], w, b, 1, 0.0)[0], results[0][i])


@kernels
def test_special_values() -> None:
    """NaN and infinities come out where stock has them; ReLU keeps NaN."""
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in ("x", "w", "b"):
            x, w, b = tensors(3, 70, 40)
            {"x": x[1], "w": w[17], "b": b}[place][5] = value
            for activation in ("none", "relu", "hardswish"):
                with torch.no_grad():
                    out = dkf.linear_act(x, w, b, activation=activation, backend="cpu")
                    stock = apply_activation(TF.linear(x, w, b), ACTIVATION_CODES[activation], 0.0)
                torch.testing.assert_close(out, stock, equal_nan=True, rtol=1e-5, atol=1e-5)
    x, w, _ = torch.full((1, 8), 3e38), torch.full((4, 8), 3e38), None
    assert OP(x, w, None, 0, 0.0).isposinf().all()


def test_reference_in_fp64_and_its_gradient() -> None:
    x, w, b = (t.double().requires_grad_() for t in tensors(3, 6, 4))
    assert torch.equal(reference.linear_act(x, w, b), x @ w.t() + b)
    torch.autograd.gradcheck(lambda *a: dkf.linear_act(*a, activation="silu"), (x, w, b))
    torch.testing.assert_close(reference.linear_act(x, w, b, "relu"), dkf.linear_act(x, w, b, activation="relu"))
    with torch.no_grad():
        assert torch.equal(dkf.linear_act(x, w, b, backend="reference"), reference.linear_act(x, w, b))


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_the_rest_is_stock(backend: str | None) -> None:
    """Gradients, other dtypes, autocast, one dimension and many."""
    x, w, b = tensors(2, 1024, 600)
    for dtype in (torch.float64, torch.bfloat16):
        args = [t.to(dtype) for t in (x, w, b)]
        assert torch.equal(dkf.linear_act(*args, activation="relu", backend=backend), torch.relu(TF.linear(*args)))
    leaves = [[t.clone().requires_grad_() for t in (x, w, b)] for _ in range(2)]
    outs = [dkf.linear_act(*leaves[0], activation="relu", backend=backend), torch.relu(TF.linear(*leaves[1]))]
    grads = [torch.autograd.grad(o.sum(), leaf) for o, leaf in zip(outs, leaves, strict=True)]
    assert torch.equal(*outs) and all(torch.equal(a, c) for a, c in zip(*grads, strict=True))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert dkf.linear_act(x, w, b, backend=backend).dtype is torch.bfloat16
        for shape in ((1024,), (2, 3, 1024), (1, 1, 1, 1024)):
            y = torch.randn(shape)
            out = dkf.linear_act(y, w, b, backend=backend)
            torch.testing.assert_close(out, TF.linear(y, w, b))
            assert out.shape == TF.linear(y, w, b).shape
        t = torch.randn(1024, 2).t()  # not contiguous, nor the weight
        torch.testing.assert_close(dkf.linear_act(t, w.t().contiguous().t(), b, backend=backend), TF.linear(t, w, b))


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "list-x": (([1.0], WEIGHT, BIAS), "x: expected a Tensor, got list"),
    "none-weight": ((X, None, BIAS), "weight: expected a Tensor, got NoneType"),
    "float-bias": ((X, WEIGHT, 3.0), "bias: expected a Tensor, got float"),
    "scalar-x": ((X[0, 0], WEIGHT, BIAS), "x: expected (…, in_features), got a scalar"),
    "features": ((X[:, :5], WEIGHT, BIAS), "x: expected 8 features for weight (6, 8), got 5 (shape (2, 5))"),
    "features-4d": ((X[None, None, :, :7], WEIGHT, None), "x: expected 8 features for weight (6, 8), got 7"),
    "features-vector": ((X[0, :7], WEIGHT, BIAS), "x: expected 8 features for weight (6, 8), got 7 (shape (7,))"),
    "rank-3-weight": ((X, WEIGHT[None], BIAS), "weight: expected shape (out_features, in_features), got (1, 6, 8)"),
    "vector-weight": ((X, WEIGHT[0], BIAS), "weight: expected shape (out_features, in_features), got (8,)"),
    "scalar-weight": ((X, WEIGHT[0, 0], None), "weight: expected shape (out_features, in_features), got ()"),
    "short-bias": ((X, WEIGHT, BIAS[:3]), "bias: expected shape (out_features,) = (6,), got (3,)"),
    "fp64-x": ((X.double(), WEIGHT, BIAS), "weight: expected dtype torch.float64 like x, got torch.float32"),
    "fp16-x": ((X.half(), WEIGHT, None), "weight: expected dtype torch.float16 like x, got torch.float32"),
    "fp64-bias": ((X, WEIGHT, BIAS.double()), "bias: expected dtype torch.float32 like x, got torch.float64"),
    "meta-bias": ((X, WEIGHT, BIAS.to("meta")), "bias: expected a tensor on cpu like x, got meta"),
    "meta-x": ((X.to("meta"), WEIGHT, BIAS), "weight: expected a tensor on meta like x, got cpu"),
    "int": ((X.int(), WEIGHT.int(), None), "x: expected a floating-point tensor for activation 'silu', got torch.int32"),
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", [None, "cpu"])
@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_bad_input(row: tuple[tuple[Any, ...], str], backend: str | None, grad: bool) -> None:
    """torch's exception type, and a message with op, argument, what was expected and what came."""
    arguments, message = row
    with torch.set_grad_enabled(grad), pytest.raises(Exception) as expected:
        TF.silu(TF.linear(*arguments))
    with torch.set_grad_enabled(grad), pytest.raises(expected.type) as got:
        dkf.linear_act(*arguments, activation="silu", backend=backend)
    assert str(got.value).startswith(f"linear_act: {message}")


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_what_torch_takes_is_no_error(backend: str | None) -> None:
    """A vector as weight, biases that broadcast, integers: computed as torch computes them."""
    rows = ((X, WEIGHT[0], None), (X, WEIGHT, BIAS[:1]), (X, WEIGHT, BIAS[0]), (X, WEIGHT, torch.randn(2, 6)),
            (X.int(), WEIGHT.int(), BIAS.int()))  # fmt: skip
    for arguments in rows:
        with torch.no_grad():
            assert torch.equal(dkf.linear_act(*arguments, backend=backend), TF.linear(*arguments))


def test_errors_of_the_options() -> None:
    with pytest.raises(ValueError, match="linear_act: activation: expected one of none, relu"):
        dkf.linear_act(X, WEIGHT, BIAS, activation="gelu")
    with pytest.raises(RuntimeError, match="linear_act: weight: expected a tensor on cpu like x, got meta"):
        dkf.linear_act(X, WEIGHT.to("meta"), None)  # stock torch returns numbers from nowhere
    with pytest.raises(RuntimeError, match="linear_act: x: expected 8 features"):
        dkf.linear_act(X[:, :5], WEIGHT, BIAS, backend="reference")


@kernels
def test_errors_of_the_op_and_opcheck() -> None:
    x, w, b = tensors(2, 8, 6)
    for arguments, message in (
        ((x[0], w, b), r"linear_act: x: expected shape \(rows, 8\), got \(8,?\)"),
        ((x[:, :5], w, b), r"linear_act: x: expected shape \(rows, 8\)"),
        ((x, w[0], b), r"linear_act: weight: expected shape \(out_features, in_features\)"),
        ((x, w, b[:3]), r"linear_act: bias: expected shape \(6,\)"),
        ((x.double(), w, b), "linear_act: x: expected dtype float32"),
        ((x, w.half(), b), "linear_act: weight: expected dtype float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(*arguments, 0, 0.0)
    for bias in (b, None):
        torch.library.opcheck(OP.default, (x, w, bias, 2, 0.1), test_utils=("test_schema", "test_faketensor"))


@kernels
def test_which_calls_are_taken() -> None:
    big, small = torch.randn(600, 1024), torch.randn(10, 1024)
    with torch.no_grad():
        for rows, weight, taken in ((1, big, True), (16, big, True), (17, big, False), (1, small, False), (0, big, False)):
            assert (ROOM._path(torch.randn(rows, 1024), weight, None, None) == "dl4ds_kernels") is taken
        assert ROOM._path(torch.randn(1, 1024), big.half(), None, None) == "stock"
    assert ROOM._path(torch.randn(1, 1024), big.requires_grad_(), None, None) == "stock"


class Head(nn.Module):
    """A module and a function as activation, a layer alone, and one whose output is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.classifier = nn.Sequential(nn.Linear(1024, 600), nn.ReLU(True), nn.Dropout(), nn.Linear(600, 900))
        self.a, self.b = nn.Linear(900, 700), nn.Linear(700, 800)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3)).repeat(1, 64)
        y = TF.leaky_relu(self.a(self.classifier(x)), 0.3)
        z = self.b(y)
        return torch.relu(z) + z


@kernels
def test_optimize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which activations are taken along; excluded, hooked, changed in place, trained, restored."""
    seen: list[str] = []
    module = sys.modules["dl4ds_kernels.modules._linear"]
    function = module.linear_act
    monkeypatch.setattr(module, "linear_act", lambda *a, **k: (seen.append(k["activation"]), function(*a, **k))[1])
    stock, x = Head().eval(), torch.randn(2, 3, 9, 9)
    model = dk.optimize(stock)

    def run(net: nn.Module) -> list[str]:
        seen.clear()
        with torch.no_grad():
            torch.testing.assert_close(net(x), stock(x), rtol=1e-4, atol=1e-5)
        return list(seen)

    assert run(model) == ["relu", "none", "leaky_relu", "none"]
    assert run(dk.optimize(stock, exclude="classifier.1")) == ["none", "leaky_relu", "none"]
    assert run(dk.optimize(stock, exclude="classifier")) == ["leaky_relu", "none"]
    with torch.no_grad():
        for net in (stock, model):  # nothing is kept of a weight
            net.a.weight.data.mul_(2)
    run(model)
    model.a.register_forward_hook(lambda module, args, out: out * 0)
    with torch.no_grad():
        assert not torch.allclose(model(x), stock(x), rtol=1e-4)
    dk.restore(model)
    model.a._forward_hooks.clear()
    assert run(model) == []
    trained = dk.optimize(stock).train()
    torch.manual_seed(1)
    out = trained(x)
    out.sum().backward()
    assert trained.a.weight.grad is not None and out.requires_grad


RUN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_linear_act as tests
torch.manual_seed(0)
tests.test_against_fp64(True)
for activation in tests.ACTIVATION_CODES:
    tests.test_activations(activation)
tests.test_special_values()
"""


@kernels
@every_isa
def test_every_instruction_set(isa: str) -> None:
    run_with(isa, RUN, __file__)
