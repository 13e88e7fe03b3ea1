"""conv_bn_act: the six standard tests over kernel sizes, strides, groups and layouts, and the prepacked CPU path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import Results, compare, compile_counter, run, same_bits, same_non_finite, widen
from _cases import ACTIVATIONS, BASE, DTYPES, LAYOUTS, Case, bn_vectors, each, gradient, grid, images, randn
from conftest import device_of
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import op
from dl4ds_kernels.functional import conv_bn_act

WRT = ("x", "w", "b", "weight", "bias", "residual")
SLOPE, MOMENTUM, EPS = 0.1, 0.2, 1e-3
EVAL = replace(BASE, shape=(2, 6, 9, 7), training=False)
CASES = (
    [replace(EVAL, layout=layout, residual=residual) for layout in LAYOUTS for residual in ("", "nchw", "nhwc")]
    + [replace(EVAL, dtype=dtype, layout=n, residual=n) for dtype in DTYPES for n in ("nchw", "nhwc")]
    + [replace(EVAL, kernel=k, stride=s, groups=g, layout=n)
       for k in (1, 3, 5) for s in (1, 2) for g in (1, 2, 6) for n in ("nchw", "nhwc")]
    + [replace(EVAL, shape=shape, layout=n)
       for shape in ((1, 1, 3, 3), (0, 6, 9, 7), (3, 16, 1, 1), (1, 31, 13, 11), (2, 64, 28, 28)) for n in ("nchw", "nhwc")]
    + [replace(EVAL, activation=a, residual=r, layout="nhwc") for a in ACTIVATIONS for r in ("", "nhwc")]
    + [replace(EVAL, affine=affine) for affine in ("", "weight", "bias")]
    + [replace(EVAL, dtype=dtype, wide_parameters=True) for dtype in DTYPES[2:]]
    + [replace(case, training=True) for case in grid(layout=("nchw", "nhwc"), residual=("nchw",), dtype=DTYPES[2:])]
)  # fmt: skip


def geometry(case: Case) -> dict[str, Any]:
    return {"stride": case.stride, "padding": case.kernel // 2, "groups": case.groups}


def problem(case: Case, device: str = "cpu") -> dict[str, Any]:
    """x, w and b of the convolution; running_mean, running_var, weight, bias of the BatchNorm; residual."""
    generator = case.generator()
    x = images(case, generator, case.layout)
    c, k = case.channels, case.kernel
    fan_in = c // case.groups * k * k
    w = randn(case, generator, (2 * c, c // case.groups, k, k), "nhwc" if case.layout == "nhwc" else "nchw", fan_in**-0.5)
    b = randn(case, generator, (2 * c,))
    y = TF.conv2d(x.double(), w.double(), b.double(), **geometry(case))
    tensors = {"x": x, "w": w, "b": b, **bn_vectors(case, y), "residual": None}
    if case.residual:
        tensors["residual"] = randn(case, generator, tuple(y.shape), case.residual)
    return {name: t if t is None else t.to(device) for name, t in tensors.items()}


def ours(case: Case, backend: str | None) -> Any:
    def call(t: dict[str, Any]) -> Tensor:
        return conv_bn_act(
            t["x"], t["w"], t["b"], running_mean=t["running_mean"], running_var=t["running_var"], bn_weight=t["weight"],
            bn_bias=t["bias"], residual=t["residual"], training=case.training, momentum=MOMENTUM, eps=EPS,
            activation=case.activation, negative_slope=SLOPE, backend=backend, **geometry(case),
        )  # fmt: skip

    return call


def raw(case: Case, namespace: str) -> Any:
    """The dispatcher's op itself, with its own autograd formula."""
    return lambda t: op("conv_bn_act", namespace)(*raw_arguments(case, t))


def raw_arguments(case: Case, t: dict[str, Any]) -> tuple[Any, ...]:
    s, p = case.stride, case.kernel // 2
    tensors = (t[name] for name in ("x", "w", "b", "running_mean", "running_var", "weight", "bias", "residual"))
    return (*tensors, [s, s], [p, p], [1, 1], case.groups, EPS, False, ACTIVATION_CODES[case.activation], SLOPE)


def pre_activation(case: Case, t: dict[str, Any]) -> Tensor:
    y = TF.conv2d(t["x"], t["w"], t["b"], **geometry(case))
    mean, var, weight, bias = (t[name] for name in ("running_mean", "running_var", "weight", "bias"))
    z = TF.batch_norm(y, mean, var, weight, bias, case.training, MOMENTUM, EPS)
    return z if t["residual"] is None else z + t["residual"]


def stock(case: Case) -> Any:
    return lambda t: apply_activation(pre_activation(case, t), ACTIVATION_CODES[case.activation], SLOPE)


def three_ways(case: Case, function: Any, backend: str, wrt: tuple[str, ...]) -> tuple[Results, Results, Results]:
    """Results of our op, of stock eager at the same dtype, and of stock eager in fp64."""
    tensors = problem(case, device_of(backend))
    dout = wide_dout = None
    if wrt:
        wide = {name: t.clone() if isinstance(t, Tensor) else t for name, t in widen(tensors).items()}
        dout = gradient(case, pre_activation(case, wide), "nhwc" if case.layout == "nhwc" else "nchw")
        wide_dout, dout = dout.double(), dout.to(tensors["x"].device)
    return (
        run(function, tensors, dout, wrt),
        run(stock(case), tensors, dout, wrt),
        run(stock(case), widen(tensors), wide_dout, wrt),
    )


@each(CASES)
def test_forward(case: Case, backend: str) -> None:
    compare(*three_ways(case, ours(case, backend), backend, ()), backend)


@each(CASES)
def test_backward(case: Case, backend: str) -> None:
    """What training and frozen-BatchNorm fine-tuning run: the library convolution and bn_act, differentiable."""
    compare(*three_ways(case, ours(case, backend), backend, WRT), backend)


@each([case for case in CASES if not case.training and case.shape[0]])
def test_backward_of_the_inference_op(case: Case, kernel_backend: str, namespace: str) -> None:
    """The fused op's own formula recomputes the convolution's output."""
    compare(*three_ways(case, raw(case, namespace), kernel_backend, WRT), kernel_backend)


GRADCHECK_CASES = [
    replace(
        EVAL, shape=(1, 4, 4, 3), dtype=torch.float64, layout=n, residual=n if g == 1 else "", kernel=k, groups=g, activation=a
    )
    for n in ("nchw", "nhwc")
    for k, g, a in ((1, 1, "relu"), (3, 1, "silu"), (3, 2, "leaky_relu"), (3, 4, "hardswish"))
]


@each(GRADCHECK_CASES)
def test_gradcheck(case: Case, kernel_backend: str, namespace: str) -> None:
    if device_of(kernel_backend) != "cpu":
        pytest.skip("fp64 is served by the CPU kernels only")
    tensors = problem(case)
    names = [name for name in WRT if tensors[name] is not None]

    def function(*leaves: Tensor) -> Tensor:
        return raw(case, namespace)({**tensors, **dict(zip(names, leaves, strict=True))})

    torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


@each([replace(EVAL, layout=n, residual=r) for n in ("nchw", "nhwc", "transposed") for r in ("", "nhwc")])
def test_opcheck(case: Case, kernel_backend: str, namespace: str) -> None:
    tensors = problem(case, device_of(kernel_backend))
    for name in WRT:
        if tensors[name] is not None:
            tensors[name].requires_grad_()
    torch.library.opcheck(op("conv_bn_act", namespace), raw_arguments(case, tensors))


@each([replace(EVAL, layout=layout, kernel=k) for layout in LAYOUTS for k in (1, 3)])
def test_layout(case: Case, kernel_backend: str, namespace: str) -> None:
    """Laid out as the library lays out the convolution; the fake kernel agrees; x and residual are not touched."""
    tensors = problem(case, device_of(kernel_backend))
    before = tensors["x"].clone()
    with torch.no_grad():
        out = ours(case, kernel_backend)(tensors)
        assert out.stride() == TF.conv2d(tensors["x"], tensors["w"], tensors["b"], **geometry(case)).stride()
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in raw_arguments(case, tensors)]
        assert op("conv_bn_act", namespace)(*fakes).stride() == out.stride()
    assert torch.equal(tensors["x"], before)


@pytest.mark.parametrize("grad", [False, True])
@each([EVAL, replace(EVAL, shape=(2, 16, 28, 28), layout="nhwc"), replace(EVAL, training=True)])
def test_compile(case: Case, grad: bool, kernel_backend: str, fresh_dynamo: Any) -> None:
    """One graph, no recompile for the same shapes, and the results of the uncompiled call."""
    counter = compile_counter("aot_eager")
    function = ours(case, kernel_backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    tensors = problem(case, device_of(kernel_backend))
    dout = torch.randn_like(function(dict(tensors))) if grad else None
    expected = run(function, tensors, dout, WRT)
    for _ in range(2):
        actual = run(compiled, tensors, dout, WRT)
        for name, value in expected.items():
            scale = 1e-5 * float(value.detach().abs().max())
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=scale, msg=lambda text, n=name: f"{n}: {text}")
    assert counter.graphs == 1


@pytest.mark.slow
def test_compile_inductor(kernel_backend: str, fresh_dynamo: Any) -> None:
    case = replace(EVAL, shape=(2, 16, 28, 28), layout="nhwc", residual="nhwc")
    tensors = problem(case, device_of(kernel_backend))
    function = ours(case, kernel_backend)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(tensors), function(tensors), rtol=1e-5, atol=1e-5)


def packed(case: Case, t: dict[str, Any]) -> dict[str, Any]:
    s, p = [case.stride] * 2, [case.kernel // 2] * 2
    weight = torch.ops.mkldnn._reorder_convolution_weight(t["w"], p, s, [1, 1], case.groups, list(t["x"].shape))
    return {**t, "w": weight}


PACKED_CASES = [case for case in CASES if case.dtype == torch.float32 and not case.training and case.shape[0]]


@each(PACKED_CASES)
def test_prepacked_weight(case: Case) -> None:
    """The inference path of modules and optimized models: oneDNN's own weight layout, computed in channels_last as stock is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    tensors = problem(case)
    last = {name: t.contiguous(memory_format=torch.channels_last) if name in ("x", "w") else t for name, t in tensors.items()}
    with torch.no_grad():
        got = run(lambda t: raw(case, "dl4ds_kernels")(packed(case, t)), tensors, None, ())
    compare(got, run(stock(case), last, None, ()), run(stock(case), widen(tensors), None, ()), "cpu")


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_same_bits(layout: str, prepack: bool, kernel_backend: str, namespace: str) -> None:
    if prepack and kernel_backend != "cpu":
        pytest.skip("weights are prepacked on the CPU only")
    case = replace(EVAL, shape=(2, 32, 30, 29), layout=layout, residual=layout)
    tensors = problem(case, device_of(kernel_backend))
    tensors = packed(case, tensors) if prepack else tensors
    with torch.no_grad():
        first = run(raw(case, namespace), tensors, None, ())
        for _ in range(19):
            same_bits(run(raw(case, namespace), tensors, None, ()), first)


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf(activation: str, prepack: bool, kernel_backend: str, namespace: str) -> None:
    """oneDNN's own activations erase NaN; ours keep it, behind a prepacked convolution too."""
    if prepack and kernel_backend != "cpu":
        pytest.skip("weights are prepacked on the CPU only")
    case = replace(EVAL, activation=activation, residual="nchw")
    for name in ("x", "residual"):
        for value in (float("nan"), float("inf"), float("-inf")):
            tensors = problem(case, device_of(kernel_backend))
            tensors[name][1, 3, 2, 4] = value
            with torch.no_grad():
                expected = stock(case)(tensors)
                got = raw(case, namespace)(packed(case, tensors) if prepack else tensors)
            same_non_finite(got, expected, f"out for {value} in {name}")


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding_and_unbatched(padding: str, backend: str) -> None:
    case = replace(EVAL, shape=(1, 6, 9, 7))
    t = problem(case, device_of(backend))
    vectors = {
        "running_mean": t["running_mean"],
        "running_var": t["running_var"],
        "bn_weight": t["weight"],
        "bn_bias": t["bias"],
    }
    y = TF.conv2d(t["x"], t["w"], padding=padding)
    expected = TF.relu(TF.batch_norm(y, t["running_mean"], t["running_var"], t["weight"], t["bias"]))
    with torch.no_grad():
        torch.testing.assert_close(conv_bn_act(t["x"], t["w"], padding=padding, backend=backend, **vectors), expected)
        unbatched = conv_bn_act(t["x"][0], t["w"], padding=padding, residual=y[0], backend=backend, **vectors)
        torch.testing.assert_close(
            unbatched, conv_bn_act(t["x"], t["w"], padding=padding, residual=y, backend=backend, **vectors)[0]
        )


def test_residual_that_broadcasts(backend: str) -> None:
    t = problem(EVAL, device_of(backend))
    residual = torch.randn(12, 1, 1, device=t["x"].device)
    with torch.no_grad():
        got = ours(EVAL, backend)({**t, "residual": residual})
        torch.testing.assert_close(got, stock(EVAL)({**t, "residual": residual}))


def test_autocast(kernel_backend: str, namespace: str) -> None:
    """The convolution runs in the autocast dtype; BatchNorm's vectors stay fp32."""
    t = problem(EVAL, device_of(kernel_backend))
    with torch.no_grad(), torch.autocast(device_of(kernel_backend), torch.bfloat16):
        out, expected = raw(EVAL, namespace)(t), stock(EVAL)(t)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)
