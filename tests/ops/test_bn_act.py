"""bn_act: the six standard tests, running statistics, gradient subsets, determinism and extreme values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import Results, compare, compile_counter, copies_made, run, widen
from _cases import (
    ACTIVATIONS,
    BASE,
    DTYPES,
    LAYOUTS,
    OTHER_RANKS,
    Case,
    bn_vectors,
    each,
    gradient,
    grid,
    images,
    standard_cases,
)
from conftest import device_of
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import op
from dl4ds_kernels.functional import bn_act

WRT = ("x", "weight", "bias", "residual")
SLOPE, MOMENTUM, EPS = 0.1, 0.2, 1e-3
CASES = (
    standard_cases()
    + [replace(BASE, shape=shape, training=training) for shape in OTHER_RANKS for training in (True, False)]
    + [replace(BASE, shape=shape, training=False) for shape in ((1, 1, 1, 1), (1, 5, 1, 1), (0, 3, 4, 5))]
    + [replace(case, training=False) for case in standard_cases() if case.activation == "relu" and case.shape == BASE.shape]
    + [replace(BASE, dtype=d, wide_parameters=True, training=t) for d in DTYPES[2:] for t in (True, False)]
    + [replace(BASE, affine=affine, training=t) for affine in ("", "weight", "bias") for t in (True, False)]
    + [replace(BASE, dtype=d, eps_mode="std", training=t) for d in DTYPES for t in (True, False)]
    + [replace(case, residual="nhwc") for case in grid(activation=ACTIVATIONS, eps_mode=("std",))]
)


def problem(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The tensors of a call."""
    generator = case.generator()
    x = images(case, generator, case.layout)
    tensors = {"x": x, **bn_vectors(case, x), "residual": None}
    if case.residual:
        tensors["residual"] = images(case, generator, case.residual)
    return {name: t if t is None or device == "cpu" else t.to(device) for name, t in tensors.items()}


def ours(case: Case, backend: str) -> Any:
    def call(t: dict[str, Any]) -> Tensor:
        return bn_act(
            t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], residual=t["residual"], training=case.training,
            momentum=MOMENTUM, eps=EPS, eps_mode=case.eps_mode, activation=case.activation, negative_slope=SLOPE,
            backend=backend,
        )  # fmt: skip

    return call


def stock(case: Case) -> Any:
    """What a user writes today; for ``sqrt(var) + eps``, which torch does not have, its steps one by one."""

    def call(t: dict[str, Any]) -> Tensor:
        z = pre_activation(case, t)
        return apply_activation(z, ACTIVATION_CODES[case.activation], SLOPE)

    return call


def pre_activation(case: Case, t: dict[str, Any]) -> Tensor:
    x, mean, var, weight, bias = (t[name] for name in ("x", "running_mean", "running_var", "weight", "bias"))
    if case.eps_mode == "var":
        z = TF.batch_norm(x, mean, var, weight, bias, case.training, MOMENTUM, EPS)
    else:
        z = _batch_norm_std(x, mean, var, weight, bias, case.training)
    return z if t["residual"] is None else z + t["residual"]


def _batch_norm_std(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    dims = [d for d in range(x.dim()) if d != 1]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    if training:
        batch_mean, batch_var = x.mean(dims), x.var(dims, unbiased=False)
        with torch.no_grad():
            mean.lerp_(batch_mean, MOMENTUM)
            var.lerp_(x.var(dims, unbiased=True), MOMENTUM)
        mean, var = batch_mean, batch_var
    return (x - mean.view(shape)) / (var.sqrt() + EPS).view(shape) * weight.view(shape) + bias.view(shape)


def three_ways(case: Case, backend: str, wrt: tuple[str, ...]) -> tuple[Results, Results, Results]:
    """Results of our op, of stock eager at the same dtype, and of stock eager in fp64."""
    tensors = problem(case, device_of(backend))
    dout = wide_dout = None
    if wrt:
        wide = {name: t.clone() if isinstance(t, Tensor) else t for name, t in widen(tensors).items()}
        dout = gradient(case, pre_activation(case, wide), case.layout if case.layout != "expanded" else "nchw")
        wide_dout, dout = dout.double(), dout.to(tensors["x"].device)
    return (
        run(ours(case, backend), tensors, dout, wrt),
        run(stock(case), tensors, dout, wrt),
        run(stock(case), widen(tensors), wide_dout, wrt),
    )


@each(CASES)
def test_forward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend, ()), backend)


@each(CASES)
def test_backward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend, WRT), backend)


SMALL = replace(BASE, shape=(2, 3, 4, 3), dtype=torch.float64)
GRADCHECK_CASES = [
    replace(SMALL, layout=layout, residual=residual, training=training)
    for layout in ("nchw", "nhwc", "nhwc_cslice", "nchw_hwslice", "transposed")
    for residual in ("", layout)
    for training in (True, False)
]
GRADCHECK_CASES += [
    replace(SMALL, activation=activation, residual=residual, eps_mode=eps_mode)
    for activation in ACTIVATIONS
    for residual in ("", "nhwc")
    for eps_mode in ("var", "std")
]


@each(GRADCHECK_CASES)
def test_gradcheck(case: Case, backend: str) -> None:
    tensors = problem(case, "cpu")
    if device_of(backend) != "cpu":
        pytest.skip("fp64 is served by the CPU kernels only")
    names = [name for name in WRT if tensors[name] is not None]

    def function(*leaves: Tensor) -> Tensor:
        statistics = {name: tensors[name].clone() for name in ("running_mean", "running_var")}
        return ours(case, backend)({**tensors, **dict(zip(names, leaves, strict=True)), **statistics})

    torch.autograd.gradcheck(function, [tensors[name].detach().requires_grad_() for name in names])


OPCHECK_CASES = [
    replace(BASE, shape=(2, 5, 4, 3), layout=layout, residual=residual, training=training)
    for layout in ("nchw", "nhwc", "transposed")
    for residual, training in (("", True), (layout, True), (layout, False))
]


def raw_arguments(case: Case, tensors: dict[str, Any], save_mask: bool) -> tuple[Any, ...]:
    names = ("x", "weight", "bias", "running_mean", "running_var", "residual")
    code = ACTIVATION_CODES[case.activation]
    return (*(tensors[name] for name in names), case.training, MOMENTUM, EPS, False, code, SLOPE, save_mask)


@each(OPCHECK_CASES)
def test_opcheck(case: Case, kernel_backend: str, namespace: str) -> None:
    tensors = problem(case, device_of(kernel_backend))
    for name in WRT:
        if tensors[name] is not None:
            tensors[name].requires_grad_()
    torch.library.opcheck(op("bn_act", namespace), raw_arguments(case, tensors, bool(case.residual)))
    with torch.no_grad():
        arguments = raw_arguments(case, tensors, bool(case.residual))
        out, mean, rstd, mask, _, _ = op("bn_act", namespace)(*arguments)
        if not case.training:
            mean, rstd = tensors["running_mean"], tensors["running_var"].add(EPS).rsqrt()
        x, weight, bias, residual = (t if t is None else t.detach() for t in (tensors[name] for name in WRT))
        backward = (torch.randn_like(out), x, weight, bias, mean, rstd, residual, mask if mask.numel() else None, case.training)
        options = (EPS, False, ACTIVATION_CODES[case.activation], SLOPE)
        for needs in ((True, True, bool(case.residual)), (False, True, False), (True, False, False)):
            torch.library.opcheck(op("bn_act_bwd", namespace), (*backward, *options, *needs))


LAYOUT_CASES = grid(layout=LAYOUTS) + [
    replace(BASE, shape=shape, layout=layout)
    for shape in ((4, 7, 1, 1), (3, 1, 5, 7), (1, 1, 1, 3), (0, 3, 4, 5), (2, 3, 4, 5, 6))
    for layout in ("nchw", "nhwc")
]


@each(LAYOUT_CASES)
def test_layout(case: Case, kernel_backend: str, namespace: str) -> None:
    """Strides as stock torch's and as the fake kernel says; sliced input is read in place."""
    tensors = problem(case, device_of(kernel_backend))
    out = ours(case, kernel_backend)(dict(tensors))
    assert out.stride() == stock(case)(dict(tensors)).stride()
    if out.numel() == 0:
        return  # goes to stock torch
    arguments = raw_arguments(case, tensors, False)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        assert op("bn_act", namespace)(*fakes)[0].stride() == out.stride()
    if case.layout not in ("transposed", "expanded"):
        assert copies_made(lambda: op("bn_act", namespace)(*arguments)) == []


@pytest.mark.parametrize("choice", ["auto", "kernel"])
@each(
    [BASE, replace(BASE, shape=(2, 64, 28, 28), layout="nhwc", residual="nhwc"), replace(BASE, residual="nchw", training=False)]
)
def test_compile(case: Case, kernel_backend: str, choice: str, fresh_dynamo: Any) -> None:
    """One graph, no recompile for the same shapes, and the results of the uncompiled call."""
    counter = compile_counter("aot_eager")
    function = ours(case, kernel_backend if choice == "kernel" else None)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    tensors = problem(case, device_of(kernel_backend))
    dout = torch.randn(case.shape, device=tensors["x"].device)
    expected = run(function, tensors, dout, WRT)
    for _ in range(2):
        actual = run(compiled, tensors, dout, WRT)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert counter.graphs == 1


@pytest.mark.slow
def test_compile_inductor(kernel_backend: str, fresh_dynamo: Any) -> None:
    case = replace(BASE, shape=(2, 64, 28, 28), layout="nhwc", residual="nhwc")
    tensors = problem(case, device_of(kernel_backend))
    dout = gradient(case, pre_activation(case, widen(tensors)), "nchw").to(tensors["x"].device)
    function = ours(case, kernel_backend)
    expected, actual = run(function, tensors, dout, WRT), run(torch.compile(function, fullgraph=True), tensors, dout, WRT)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
