"""conv_transpose_bn_act: inference op and composition against stock torch, layouts, geometries, gradients, contract, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import Results, compare, compile_counter, run, same_bits, widen
from _cases import ACTIVATIONS, BASE, DTYPES, Case, bn_vectors, each, gradient, images, randn
from _offline import run_offline
from conftest import device_of
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import TRITON, has_kernel, op, triton_interpreted
from dl4ds_kernels.functional import conv_transpose_bn_act

EPS, SLOPE, K = 1e-3, 0.1, 7
SMALL = replace(BASE, shape=(2, 9, 5, 4), training=False, kernel=2, stride=2)
WRT = ("x", "conv_weight", "conv_bias", "weight", "bias")
CASES = (
    [replace(SMALL, dtype=d, layout=n) for d in DTYPES for n in ("nchw", "nhwc")]
    + [replace(SMALL, activation=a, layout="nhwc") for a in ACTIVATIONS]
    + [replace(SMALL, layout=n) for n in ("nhwc_cslice", "nchw_hwslice", "transposed", "nslice")]
    + [replace(SMALL, shape=s) for s in ((1, 1, 1, 1), (1, 40, 3, 9), (0, 9, 4, 5))]
    + [replace(SMALL, kernel=3, stride=1), replace(SMALL, kernel=3, stride=2, layout="nhwc"), replace(SMALL, eps_mode="std")]
)
OWN_ONLY = [c for c in CASES if c.kernel == 2 and 0 not in c.shape]


def problem(case: Case, norm: bool, device: str = "cpu") -> dict[str, Any]:
    generator = case.generator()
    x = images(case, generator, case.layout)
    weight = randn(case, generator, (case.channels, K, case.kernel, case.kernel), scale=(case.channels) ** -0.5)
    bias = randn(case, generator, (K,))
    t = {"x": x, "conv_weight": weight, "conv_bias": bias}
    y = torch.conv_transpose2d(x.double(), weight.double(), bias.double(), case.stride)
    t |= bn_vectors(case, y) if norm else dict.fromkeys(("running_mean", "running_var", "weight", "bias"))
    return {name: v if v is None else v.to(device) for name, v in t.items()}


def ours(case: Case, backend: str | None) -> Any:
    return lambda t: conv_transpose_bn_act(
        t["x"], t["conv_weight"], t["conv_bias"], running_mean=t["running_mean"], running_var=t["running_var"],
        bn_weight=t["weight"], bn_bias=t["bias"], stride=case.stride, training=case.training, eps=EPS,
        eps_mode=case.eps_mode, activation=case.activation, negative_slope=SLOPE, backend=backend,
    )  # fmt: skip


def stock(case: Case, activation: str | None = None) -> Any:
    """Stock torch; BatchNorm of the lecture's kind by its formula."""

    def call(t: dict[str, Any]) -> Tensor:
        y = torch.conv_transpose2d(t["x"], t["conv_weight"], t["conv_bias"], case.stride)
        if t["running_mean"] is not None and case.eps_mode == "std":
            per_channel = [t[n].view(1, -1, 1, 1) for n in ("running_mean", "running_var", "weight", "bias")]
            y = (y - per_channel[0]) / (per_channel[1].sqrt() + EPS) * per_channel[2] + per_channel[3]
        elif t["running_mean"] is not None:
            y = TF.batch_norm(y, t["running_mean"], t["running_var"], t["weight"], t["bias"], case.training, 0.1, EPS)
        return apply_activation(y, ACTIVATION_CODES[activation or case.activation], SLOPE)

    return call


def three_ways(case: Case, norm: bool, backend: str, wrt: tuple[str, ...] = ()) -> tuple[Results, ...]:
    t = problem(case, norm, "cpu" if triton_interpreted() else device_of(backend))
    dout = None
    if wrt:
        z = stock(case, "none")({n: v if v is None else v.clone() for n, v in widen(t).items()})
        dout = gradient(case, z, "nhwc" if case.layout == "nhwc" else "nchw").to(t["x"].device)
    wide = None if dout is None else dout.double().cpu()
    return run(ours(case, backend), t, dout, wrt), run(stock(case), t, dout, wrt), run(stock(case), widen(t), wide, wrt)


def largest_gradient(case: Case) -> float:
    """Of a training step, the largest absolute value of the gradient behind the convolution, in fp64."""
    t = widen(problem(case, True))
    y = torch.conv_transpose2d(t["x"], t["conv_weight"], t["conv_bias"], case.stride).requires_grad_()
    z = TF.batch_norm(y, None, None, t["weight"], t["bias"], True, 0.1, EPS)
    dout = gradient(case, z.detach(), "nhwc" if case.layout == "nhwc" else "nchw")
    out = apply_activation(z, ACTIVATION_CODES[case.activation], SLOPE)
    return float(torch.autograd.grad(out, y, dout.double())[0].abs().max())


@pytest.mark.parametrize("norm", [True, False], ids=["bn", "plain"])
@each(CASES)
def test_inference(case: Case, norm: bool, backend: str) -> None:
    with torch.no_grad():
        compare(*three_ways(case, norm, backend), backend)
        if backend == "cpu" and case.shape[0]:
            t = problem(case, norm)
            assert ours(case, backend)(t).stride() == stock(case)(t).stride()


@pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine")
@pytest.mark.parametrize("norm", [True, False], ids=["bn", "plain"])
@each(CASES)
def test_interpreter(case: Case, norm: bool) -> None:
    with torch.no_grad():
        if case.dtype != torch.bfloat16:  # the interpreter truncates where a GPU rounds
            compare(*three_ways(case, norm, "triton"), "triton")
        t = problem(case, norm)
        if case.shape[0]:
            assert ours(case, "triton")(t).stride() == stock(case)(t).stride()


@pytest.mark.parametrize("norm", [True, False], ids=["bn", "plain"])
@each([replace(c, training=t) for c in (CASES[0], CASES[1], replace(SMALL, kernel=3, stride=1)) for t in (True, False)])
def test_gradients(case: Case, norm: bool, backend: str) -> None:
    """The composition: library and fused bn_act, in training and with frozen statistics."""
    case = replace(case, training=case.training and norm)
    results = three_ways(case, norm, backend, WRT if norm else WRT[:3])
    # Behind the BatchNorm of a batch a shift does nothing: its gradient is what rounding leaves of the one behind the
    # convolution, whose sum over a channel is zero.
    sizes = {"dconv_bias": largest_gradient(case)} if case.training else {}
    compare(*results, backend, sizes)


@pytest.mark.parametrize("norm", [True, False], ids=["bn", "plain"])
@pytest.mark.parametrize("activation", ["relu", "silu", "none"])
def test_gradients_of_the_op(activation: str, norm: bool, kernels: None) -> None:
    """The inference op differentiates too: against stock in fp64."""
    case = replace(SMALL, activation=activation, dtype=torch.float64)
    t = problem(case, norm)
    dout = gradient(case, stock(case, "none")(t), "nchw")
    wrt = WRT if norm else WRT[:3]

    def call(t: dict[str, Any]) -> Tensor:
        vectors = (t["running_mean"], t["running_var"], t["weight"], t["bias"])
        geometry = ([2, 2], [0, 0], [0, 0], [1, 1], 1)
        arguments = (t["x"], t["conv_weight"], t["conv_bias"], *vectors, *geometry)
        return op("conv_transpose_bn_act")(*arguments, EPS, False, ACTIVATION_CODES[activation], SLOPE)

    for name, got in run(call, t, dout, wrt).items():
        torch.testing.assert_close(got, run(stock(case), t, dout, wrt)[name])


def test_gradcheck(backend: str) -> None:
    case = replace(SMALL, shape=(1, 2, 2, 3), dtype=torch.float64, activation="silu")
    t = problem(case, True, device_of(backend))
    leaves = [t[n].requires_grad_() for n in WRT]
    torch.autograd.gradcheck(lambda *v: ours(case, backend)(t | dict(zip(WRT, v, strict=True))), leaves)


@pytest.mark.parametrize("namespace", ["dl4ds_kernels", TRITON])
@each([replace(SMALL, layout=n) for n in ("nchw", "nhwc", "nhwc_cslice", "transposed")])
def test_opcheck(case: Case, namespace: str, kernels: None) -> None:
    if namespace == TRITON and not triton_interpreted():
        pytest.skip("Triton compiles for the GPU of this machine")
    for norm in (True, False):
        t = problem(case, norm)
        vectors = [t[n] for n in ("running_mean", "running_var", "weight", "bias")]
        arguments = (
            t["x"],
            t["conv_weight"],
            t["conv_bias"],
            *vectors,
            [2, 2],
            [0, 0],
            [0, 0],
            [1, 1],
            1,
            EPS,
            False,
            1,
            SLOPE,
        )
        torch.library.opcheck(op("conv_transpose_bn_act", namespace), arguments)


def test_compile(kernels: None, fresh_dynamo: Any) -> None:
    case = replace(SMALL, shape=(2, 8, 32, 32), layout="nhwc")
    counter = compile_counter("aot_eager")
    compiled = torch.compile(ours(case, None), fullgraph=True, backend=counter)
    t = problem(case, True)
    with torch.no_grad():
        for _ in range(2):
            same_bits(run(compiled, t, None, ()), run(ours(case, None), t, None, ()))
    assert counter.graphs == 1


@each([replace(SMALL, training=True)])
def test_running_statistics_move(case: Case, kernels: None) -> None:
    t = problem(case, True)
    dout = torch.randn(2, K, 10, 8)
    got, want = run(ours(case, None), t, dout, WRT), run(stock(case), t, dout, WRT)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(got[name], want[name])
        assert not torch.equal(got[name], t[name])


X, W = torch.zeros(2, 3, 4, 5), torch.zeros(3, 6, 2, 2)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda f: f([1.0], W), TypeError, "x: expected a Tensor, got list"),
        (lambda f: f(X[0, 0], W), RuntimeError, "x: expected (N, C_in, H, W), got (4, 5)"),
        (lambda f: f(X, W[0]), RuntimeError, "weight: expected (C_in, C_out / groups, kH, kW), got (6, 2, 2)"),
        (lambda f: f(X[:, :2], W), RuntimeError, "x: expected 3 channels for weight (3, 6, 2, 2), got 2"),
        (lambda f: f(X, W.double()), RuntimeError, "weight: expected dtype torch.float32 like x, got torch.float64"),
        (lambda f: f(X, W, torch.zeros(5)), RuntimeError, "bias: expected shape (C,) = (6,), got (5,)"),
        (lambda f: f(X, W, running_mean=torch.zeros(6), running_var=X), RuntimeError, "running_var: expected shape"),
        (lambda f: f(X, W, activation="gelu"), ValueError, "activation: expected one of none, relu"),
    ],
)  # fmt: skip
def test_errors(call: Any, kind: type[Exception], message: str) -> None:
    for backend in (None, "cpu"):
        with pytest.raises(kind) as error:
            call(lambda *a, b=backend, **k: conv_transpose_bn_act(*a, **k, stride=2, backend=b))
        assert f"conv_transpose_bn_act: {message}" in str(error.value)


def test_cuda_tensors_have_a_kernel() -> None:
    assert has_kernel("conv_transpose_bn_act", TRITON, "cuda")


@pytest.mark.slow
def test_kernels_for_gpus() -> None:
    """Compiled for four architectures and run on the simulator (_conv_transpose_bn_act_triton_offline.py)."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    run_offline("_conv_transpose_bn_act_triton_offline.py")
