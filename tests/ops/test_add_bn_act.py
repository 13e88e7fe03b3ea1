"""add_bn_act: forward, backward, gradcheck, layout, compile, errors. It registers no op of its own, so there is no opcheck."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import Results, compare, compile_counter, run, widen
from _cases import ACTIVATIONS, BASE, DTYPES, LAYOUTS, OTHER_RANKS, Case, bn_vectors, each, gradient, grid, images
from conftest import device_of
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels.functional import add_bn_act

WRT = ("x", "residual", "weight", "bias")
INTEGERS = torch.zeros(2, 63, 7, 5, dtype=torch.int32)
SLOPE, MOMENTUM, EPS = 0.1, 0.2, 1e-3
CASES = (
    [replace(BASE, layout=n, residual=n, training=t) for n in LAYOUTS if n != "expanded" for t in (True, False)]
    + [replace(BASE, dtype=d, layout=n, residual=n) for d in DTYPES for n in ("nchw", "nhwc")]
    + [replace(BASE, layout="nhwc", residual=r) for r in ("nchw", "nhwc_cslice")]
    + [replace(BASE, activation=a, residual="nchw", alpha=alpha) for a in ACTIVATIONS for alpha in (1.0, 0.5**0.5)]
    + [replace(BASE, shape=shape, residual="nchw") for shape in (*OTHER_RANKS, (2, 64, 28, 28))]
    + [replace(BASE, affine=affine, residual="nchw", training=False) for affine in ("", "weight", "bias")]
)


def problem(case: Case, device: str = "cpu") -> dict[str, Any]:
    generator = case.generator()
    x, residual = images(case, generator, case.layout), images(case, generator, case.residual)
    tensors = {"x": x, "residual": residual, **bn_vectors(case, case.alpha * (x.double() + residual.double()))}
    return {name: t if t is None else t.to(device) for name, t in tensors.items()}


def ours(case: Case, backend: str | None) -> Any:
    """Both results in one tensor."""

    def call(t: dict[str, Any]) -> Tensor:
        results = add_bn_act(
            t["x"], t["residual"], t["running_mean"], t["running_var"], t["weight"], t["bias"], alpha=case.alpha,
            training=case.training, momentum=MOMENTUM, eps=EPS, activation=case.activation, negative_slope=SLOPE,
            backend=backend,
        )  # fmt: skip
        return torch.stack(results)

    return call


def stock(case: Case) -> Any:
    def call(t: dict[str, Any]) -> Tensor:
        total = case.alpha * (t["x"] + t["residual"]) if case.alpha != 1.0 else t["x"] + t["residual"]
        z = TF.batch_norm(total, t["running_mean"], t["running_var"], t["weight"], t["bias"], case.training, MOMENTUM, EPS)
        return torch.stack((total, apply_activation(z, ACTIVATION_CODES[case.activation], SLOPE)))

    return call


def three_ways(case: Case, backend: str, wrt: tuple[str, ...]) -> tuple[Results, Results, Results]:
    tensors = problem(case, device_of(backend))
    wide = {name: t if t is None else t.clone() for name, t in widen(tensors).items()}
    dout = None
    if wrt:
        # No gradient where rounding decides on which side of a kink the BatchNorm's result is.
        z = stock(replace(case, activation="none"))(wide)[1]
        first = torch.randn(case.shape, generator=case.generator(), dtype=torch.float64).to(case.dtype)
        dout = torch.stack((first, gradient(case, z, "nchw"))).to(tensors["x"].device)
    return (
        run(ours(case, backend), tensors, dout, wrt),
        run(stock(case), tensors, dout, wrt),
        run(stock(case), widen(tensors), None if dout is None else dout.double().cpu(), wrt),
    )


@each(CASES)
def test_forward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend, ()), backend)


@each(CASES)
def test_backward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend, WRT), backend)


@each(grid(residual=("nchw", "nhwc"), activation=("relu", "silu"), training=(True, False)))
def test_gradcheck(case: Case, backend: str) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("fp64 is served by the CPU kernels only")
    case = replace(case, shape=(2, 3, 4, 3), dtype=torch.float64, residual=case.residual or "nchw", alpha=0.7)
    tensors = problem(case)

    def function(*leaves: Tensor) -> Tensor:
        statistics = {name: tensors[name].clone() for name in ("running_mean", "running_var")}
        return ours(case, backend)({**tensors, **dict(zip(WRT, leaves, strict=True)), **statistics})

    torch.autograd.gradcheck(function, [tensors[name].detach().requires_grad_() for name in WRT])


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nhwc_cslice", "nchw_hwslice"])
def test_layout(layout: str, backend: str) -> None:
    """Strides as stock torch's; neither result is an input."""
    t = problem(replace(BASE, layout=layout, residual=layout), device_of(backend))
    total, out = add_bn_act(t["x"], t["residual"], t["running_mean"], t["running_var"], backend=backend)
    expected = t["x"] + t["residual"]
    assert total.stride() == expected.stride()
    assert out.stride() == TF.batch_norm(expected, t["running_mean"], t["running_var"]).stride()
    assert total.data_ptr() != t["x"].data_ptr() and out.data_ptr() != total.data_ptr()


@pytest.mark.parametrize("choice", ["auto", "kernel"])
def test_compile(choice: str, kernel_backend: str, fresh_dynamo: Any) -> None:
    case = replace(BASE, shape=(2, 64, 28, 28), layout="nhwc", residual="nhwc")
    counter = compile_counter("aot_eager")
    function = ours(case, kernel_backend if choice == "kernel" else None)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    tensors = problem(case, device_of(kernel_backend))
    dout = torch.randn(2, *case.shape, device=tensors["x"].device)
    expected = run(function, tensors, dout, WRT)
    for _ in range(2):
        actual = run(compiled, tensors, dout, WRT)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert counter.graphs == 1


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"residual": 1.0}, TypeError, "add_bn_act: residual: expected a Tensor, got float"),
        ({"residual": torch.zeros(1, 63, 7, 5)}, RuntimeError, "add_bn_act: residual: expected shape (2, 63, 7, 5) like x"),
        ({"weight": torch.zeros(5)}, RuntimeError, "add_bn_act: weight: expected shape (C,) = (63,), got (5,)"),
        ({"x": INTEGERS, "residual": INTEGERS}, NotImplementedError, "add_bn_act: x: expected a float32, float64"),
        ({"activation": "tanh"}, ValueError, "add_bn_act: activation: expected one of"),
        ({"eps_mode": "max"}, ValueError, "add_bn_act: eps_mode: expected 'var' or 'std', got 'max'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_errors(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    t = {**problem(replace(BASE, residual="nchw")), **changes}
    with pytest.raises(kind) as error:
        add_bn_act(**t)
    assert message in str(error.value)
