"""bn_act_conv: forward, backward, gradcheck, layout, compile, errors. It registers no op of its own, so there is no opcheck."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import Results, compare, compile_counter, run, widen
from _cases import ACTIVATIONS, BASE, DTYPES, LAYOUTS, Case, bn_vectors, each, grid, images, randn
from conftest import device_of
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels.functional import bn_act_conv

WRT = ("x", "weight", "bias", "w", "b")
SLOPE, MOMENTUM, EPS = 0.1, 0.2, 1e-3
SMALL = replace(BASE, shape=(2, 6, 9, 7))
# Half precision with smooth activations only: near a kink rounding decides the derivative, in stock torch too.
CASES = (
    [replace(SMALL, layout=layout, training=t) for layout in LAYOUTS if layout != "expanded" for t in (True, False)]
    + [replace(SMALL, dtype=d, layout=n, activation="silu", training=t)
       for d in DTYPES for n in ("nchw", "nhwc") for t in (True, False)]
    + [replace(SMALL, kernel=k, stride=s, groups=g) for k in (1, 3) for s in (1, 2) for g in (1, 2)]
    + [replace(SMALL, shape=shape) for shape in ((2, 64, 28, 28), (1, 16, 33, 21), (4, 7, 3, 1))]
    + [replace(SMALL, activation=a, layout="nhwc") for a in ACTIVATIONS]
    + [replace(SMALL, eps_mode="std", training=t) for t in (True, False)]
    + [replace(SMALL, affine=affine) for affine in ("", "weight", "bias")]
)  # fmt: skip


def geometry(case: Case) -> dict[str, Any]:
    return {"stride": case.stride, "padding": case.kernel // 2, "groups": case.groups}


def problem(case: Case, device: str = "cpu") -> dict[str, Any]:
    """x; running_mean, running_var, weight, bias of the BatchNorm; w and b of the convolution."""
    generator = case.generator()
    x = images(case, generator, case.layout)
    c, k = case.channels, case.kernel
    w = randn(case, generator, (2 * c, c // case.groups, k, k), scale=(c // case.groups * k * k) ** -0.5)
    tensors = {"x": x, "w": w, "b": randn(case, generator, (2 * c,)), **bn_vectors(case, x)}
    return {name: t if t is None else t.to(device) for name, t in tensors.items()}


def ours(case: Case, backend: str | None) -> Any:
    def call(t: dict[str, Any]) -> Tensor:
        return bn_act_conv(
            t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], t["w"], t["b"], training=case.training,
            momentum=MOMENTUM, eps=EPS, eps_mode=case.eps_mode, activation=case.activation, negative_slope=SLOPE,
            backend=backend, **geometry(case),
        )  # fmt: skip

    return call


def stock(case: Case) -> Any:
    def call(t: dict[str, Any]) -> Tensor:
        x, mean, var, weight, bias = (t[name] for name in ("x", "running_mean", "running_var", "weight", "bias"))
        if case.eps_mode == "var":
            z = TF.batch_norm(x, mean, var, weight, bias, case.training, MOMENTUM, EPS)
        else:
            z = _std(x, mean, var, weight, bias, case.training)
        return TF.conv2d(apply_activation(z, ACTIVATION_CODES[case.activation], SLOPE), t["w"], t["b"], **geometry(case))

    return call


def _std(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    """``(x - mean) / (sqrt(var) + eps)`` step by step, which torch does not have."""
    if training:
        batch_mean, batch_var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        with torch.no_grad():
            mean.lerp_(batch_mean, MOMENTUM)
            var.lerp_(x.var((0, 2, 3), unbiased=True), MOMENTUM)
        mean, var = batch_mean, batch_var
    mean, std, weight, bias = (v.view(1, -1, 1, 1) for v in (mean, var.sqrt() + EPS, weight, bias))
    return (x - mean) / std * weight + bias


def three_ways(case: Case, backend: str, wrt: tuple[str, ...]) -> tuple[Results, Results, Results]:
    tensors = problem(case, device_of(backend))
    dout = wide = None
    if wrt:
        shape = stock(case)({k: t if t is None else t.clone() for k, t in tensors.items()}).shape
        dout = torch.randn(shape, generator=case.generator()).to(case.dtype).to(tensors["x"].device)
        wide = dout.double().cpu()
    return (
        run(ours(case, backend), tensors, dout, wrt),
        run(stock(case), tensors, dout, wrt),
        run(stock(case), widen(tensors), wide, wrt),
    )


@each(CASES)
def test_forward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend, ()), backend)


@each(CASES)
def test_backward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend, WRT), backend)


@each(grid(layout=("nchw", "nhwc", "nhwc_cslice"), activation=("relu", "silu"), training=(True, False)))
def test_gradcheck(case: Case, backend: str) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("fp64 is served by the CPU kernels only")
    case = replace(case, shape=(2, 3, 4, 3), dtype=torch.float64)
    tensors = problem(case)

    def function(*leaves: Tensor) -> Tensor:
        statistics = {name: tensors[name].clone() for name in ("running_mean", "running_var")}
        return ours(case, backend)({**tensors, **dict(zip(WRT, leaves, strict=True)), **statistics})

    torch.autograd.gradcheck(function, [tensors[name].detach().requires_grad_() for name in WRT])


@each(grid(layout=("nchw", "nhwc", "nhwc_cslice", "nchw_hwslice")))
def test_layout(case: Case, backend: str) -> None:
    """Strides as stock torch's."""
    tensors = problem(replace(case, training=False), device_of(backend))
    case = replace(case, training=False)
    assert ours(case, backend)(tensors).stride() == stock(case)(tensors).stride()


@pytest.mark.parametrize("choice", ["auto", "kernel"])
def test_compile(choice: str, kernel_backend: str, fresh_dynamo: Any) -> None:
    case = replace(SMALL, shape=(2, 16, 28, 28), layout="nhwc")
    counter = compile_counter("aot_eager")
    function = ours(case, kernel_backend if choice == "kernel" else None)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    tensors = problem(case, device_of(kernel_backend))
    dout = torch.randn(2, 32, 28, 28, device=tensors["x"].device)
    expected = run(function, tensors, dout, WRT)
    for _ in range(2):
        actual = run(compiled, tensors, dout, WRT)
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=lambda text, n=name: f"{n}: {text}"
            )
    assert counter.graphs == 1


def call(**changes: Any) -> Tensor:
    t = problem(SMALL)
    arguments = {
        "x": t["x"], "running_mean": t["running_mean"], "running_var": t["running_var"], "bn_weight": t["weight"],
        "bn_bias": t["bias"], "weight": t["w"], "bias": t["b"], "padding": 1, **changes,
    }  # fmt: skip
    return bn_act_conv(**arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": [1.0]}, TypeError, "bn_act_conv: x: expected a Tensor, got list"),
        ({"x": torch.zeros(6, 9, 7)}, RuntimeError, "bn_act_conv: x: expected (N, C, H, W), got (6, 9, 7)"),
        ({"x": torch.zeros(2, 5, 9, 7)}, RuntimeError, "bn_act_conv: x: expected 6 channels for weight (12, 6, 3, 3)"),
        (
            {"weight": torch.zeros(4, 6)},
            RuntimeError,
            "bn_act_conv: weight: expected (C_out, C_in / groups, kH, kW), got (4, 6)",
        ),
        ({"weight": torch.zeros(12, 6, 3, 3).double()}, RuntimeError, "bn_act_conv: weight: expected dtype torch.float32"),
        ({"running_mean": torch.zeros(5)}, RuntimeError, "bn_act_conv: running_mean: expected shape (C,) = (6,), got (5,)"),
        ({"bias": torch.zeros(5)}, RuntimeError, "bn_act_conv: bias: expected shape (C,) = (12,), got (5,)"),
        ({"activation": "gelu"}, ValueError, "bn_act_conv: activation: expected one of none, relu"),
        ({"eps_mode": "max"}, ValueError, "bn_act_conv: eps_mode: expected 'var' or 'std', got 'max'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_errors(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        call(**changes)
    assert message in str(error.value)


def test_traces_as_one_call() -> None:
    """fx records the functional and not its insides."""

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor, w: Tensor) -> Tensor:
            return bn_act_conv(x, mean, var, None, None, w)

    graph = torch.fx.symbolic_trace(Net())
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [bn_act_conv]
