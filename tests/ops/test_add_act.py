"""add_act: the six standard tests, and what a flat elementwise op can get wrong (tails, mixed layouts, aliasing, masks)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _assert import Results, compare, compile_counter, copies_made, run, same_bits, same_non_finite, widen
from _cases import ACTIVATIONS, BASE, DTYPES, KINKS, LAYOUTS, OTHER_RANKS, Case, each, gradient, grid, randn, standard_cases
from conftest import device_of
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import op
from dl4ds_kernels.functional import add_act

WRT = ("x", "residual")
SLOPE = 0.1
CASES = (
    [replace(case, residual=case.residual or case.layout) for case in standard_cases()]
    + [replace(BASE, shape=shape, residual="nchw") for shape in (*OTHER_RANKS, (3,), (1, 9))]
    + [replace(case, alpha=0.5**0.5, residual="nchw") for case in grid(activation=ACTIVATIONS, dtype=DTYPES)]
    + [replace(BASE, layout=a, residual=b, activation=activation) for activation in ("relu", "silu") for a, b in
       (("nchw", "nhwc"), ("nhwc", "nchw"), ("nhwc", "expanded"), ("transposed", "nchw"), ("nchw_cslice", "nhwc_cslice"))]
)  # fmt: skip


def problem(case: Case, device: str = "cpu") -> dict[str, Any]:
    generator = case.generator()
    tensors = {
        "x": randn(case, generator, case.shape, case.layout, 2),
        "residual": randn(case, generator, case.shape, case.residual, 2),
    }
    return {name: t.to(device) for name, t in tensors.items()}


def ours(case: Case, backend: str | None) -> Any:
    def call(t: dict[str, Any]) -> Tensor:
        return add_act(
            t["x"], t["residual"], alpha=case.alpha, activation=case.activation, negative_slope=SLOPE, backend=backend
        )  # fmt: skip

    return call


def pre_activation(case: Case, t: dict[str, Any]) -> Tensor:
    z = t["x"] + t["residual"]
    return z if case.alpha == 1.0 else case.alpha * z


def stock(case: Case) -> Any:
    return lambda t: apply_activation(pre_activation(case, t), ACTIVATION_CODES[case.activation], SLOPE)


def three_ways(case: Case, backend: str, wrt: tuple[str, ...]) -> tuple[Results, Results, Results]:
    """Results of our op, of stock eager at the same dtype, and of stock eager in fp64."""
    tensors = problem(case, device_of(backend))
    dout = wide_dout = None
    if wrt:
        dout = gradient(case, pre_activation(case, widen(tensors)), "nhwc" if case.layout == "nhwc" else "nchw")
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


GRADCHECK_CASES = [
    replace(BASE, shape=(2, 3, 4, 3), dtype=torch.float64, layout=a, residual=b, activation=activation, alpha=alpha)
    for activation in ACTIVATIONS
    for a, b, alpha in (
        ("nchw", "nchw", 1.0),
        ("nhwc", "nhwc", 0.7),
        ("nhwc_cslice", "nchw", 1.0),
        ("transposed", "transposed", 2.0),
    )
]


@each(GRADCHECK_CASES)
def test_gradcheck(case: Case, backend: str) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("fp64 is served by the CPU kernels only")
    x, residual = (t.requires_grad_() for t in problem(case).values())
    torch.autograd.gradcheck(lambda a, b: ours(case, backend)({"x": a, "residual": b}), (x, residual))


OPCHECK_CASES = [
    replace(BASE, shape=(2, 5, 4, 3), layout=layout, residual=residual, activation=activation)
    for layout, residual in (("nchw", "nchw"), ("nhwc", "nhwc"), ("transposed", "transposed"), ("nhwc", "nchw"))
    for activation in ("relu", "silu")
]


@each(OPCHECK_CASES)
def test_opcheck(case: Case, kernel_backend: str, namespace: str) -> None:
    x, residual = problem(case, device_of(kernel_backend)).values()
    code = ACTIVATION_CODES[case.activation]
    forward = op("add_act", namespace)
    for save_mask in (True, False):
        torch.library.opcheck(forward, (x.requires_grad_(), residual.requires_grad_(), 0.7, code, SLOPE, save_mask))
    x, residual = x.detach(), residual.detach()
    out, mask = forward(x, residual, 0.7, code, SLOPE, True)
    saved = (mask, None, None) if mask.numel() else (None, x, residual)
    torch.library.opcheck(op("add_act_bwd", namespace), (torch.randn_like(out), *saved, 0.7, code, SLOPE))


LAYOUT_CASES = [replace(case, residual=case.layout) for case in grid(layout=LAYOUTS)] + [
    replace(BASE, shape=shape, layout=a, residual=b)
    for shape in ((2, 63, 7, 5), (4, 7, 1, 1), (3, 1, 5, 7), (0, 3, 4, 5))
    for a in ("nchw", "nhwc", "transposed")
    for b in ("nchw", "nhwc")
]


def _steps(t: Tensor) -> list[int]:
    """The strides that address something: torch's own fake add differs from its eager add where a size is 1 or 0."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1] if t.numel() else []


@each(LAYOUT_CASES)
def test_layout(case: Case, kernel_backend: str, namespace: str) -> None:
    """Strides as ``torch.add``'s and as the fake kernel says; dense pairs of one layout are read in place."""
    tensors = problem(case, device_of(kernel_backend))
    out = ours(case, kernel_backend)(tensors)
    assert out.stride() == torch.add(*tensors.values()).stride()
    arguments = (*tensors.values(), 1.0, 1, SLOPE, False)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        assert _steps(op("add_act", namespace)(*fakes)[0]) == _steps(out)
    if case.layout == case.residual and case.layout in ("nchw", "nhwc", "transposed", "offset"):
        assert copies_made(lambda: op("add_act", namespace)(*arguments)) == []


@pytest.mark.parametrize("choice", ["auto", "kernel"])
@each([replace(BASE, residual="nchw"), replace(BASE, shape=(2, 64, 28, 28), layout="nhwc", residual="nhwc", activation="silu")])
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
    """The mask lies in memory order: Inductor must not lay an argument out anew."""
    case = replace(BASE, shape=(2, 64, 28, 28), layout="nhwc", residual="nhwc")
    tensors = problem(case, device_of(kernel_backend))
    dout = torch.randn(case.shape, device=tensors["x"].device)

    def function(t: dict[str, Any]) -> Tensor:
        return ours(case, kernel_backend)({"x": t["x"] * 2, "residual": t["residual"]}).sin()

    expected, actual = run(function, tensors, dout, WRT), run(torch.compile(function, fullgraph=True), tensors, dout, WRT)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1023, 32767, 32769, 65537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tail(numel: int, dtype: torch.dtype, kernel_backend: str) -> None:
    """Sizes around each vector width, each mask byte and each chunk of work; bit for bit stock's result for alpha = 1."""
    device = device_of(kernel_backend)
    x, residual = (torch.randn(numel, device=device).to(dtype).requires_grad_() for _ in range(2))
    dout = torch.randn(numel, device=device).to(dtype)
    for activation in ("relu", "leaky_relu", "relu6"):
        out = add_act(x, residual, activation=activation, negative_slope=SLOPE, backend=kernel_backend)
        expected = apply_activation(x + residual, ACTIVATION_CODES[activation], SLOPE)
        assert torch.equal(out, expected) or activation == "leaky_relu"
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, x, dout), torch.autograd.grad(expected, x, dout))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_same_bits(activation: str, layout: str, kernel_backend: str) -> None:
    case = replace(BASE, shape=(3, 37, 33, 65), layout=layout, residual=layout, activation=activation)
    tensors = problem(case, device_of(kernel_backend))
    dout = torch.randn(case.shape, device=tensors["x"].device)
    first = run(ours(case, kernel_backend), tensors, dout, WRT)
    for i in range(19):
        torch.set_num_threads(1 + i % 2)
        same_bits(run(ours(case, kernel_backend), tensors, dout, WRT), first)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_values(activation: str, dtype: torch.dtype, backend: str) -> None:
    """NaN, Inf, overflow, denormals, signed zeros and the kinks: values and derivatives of stock torch."""
    inf, nan, tiny = float("inf"), float("nan"), torch.finfo(dtype).smallest_normal
    points = [-0.0, 0.0, tiny / 4, -tiny / 4, 1.0, -1.0, 5.5, 6.5, inf, -inf, 6e4, -6e4, *KINKS.get(activation, ())]
    points += [] if activation in ("relu6", "hardswish") else [nan]  # torch's own loops disagree on these derivatives
    values = torch.tensor(points, dtype=dtype, device=device_of(backend))
    x = values.repeat_interleave(len(points)).requires_grad_()
    residual = values.repeat(len(points))
    out = add_act(x, residual, activation=activation, negative_slope=SLOPE, backend=backend)
    expected = apply_activation(x + residual, ACTIVATION_CODES[activation], SLOPE)
    gradients = [torch.autograd.grad(o, x, torch.ones_like(x))[0] for o in (out, expected)]
    z = (x + residual).detach()
    # Stock rounds the sum to half precision, and to Inf, before the activation; the kernels round once, at the end.
    once = z.isfinite() | ~(x.isfinite() & residual.isfinite())
    for got, want in ((out, expected), gradients):
        sure = once & (~z.isnan() | (activation not in ("relu6", "hardswish")))
        same_non_finite(got[sure], want[sure])
        torch.testing.assert_close(got[sure], want[sure], equal_nan=True)
        if activation not in ("silu", "hardswish"):
            sure &= ~want.isnan()
            assert torch.equal(got[sure].signbit(), want[sure].signbit())


def test_same_tensor_twice(backend: str) -> None:
    """``x + x``: one tensor in both places has both gradients."""
    x = torch.randn(4, 5, 6, 7, device=device_of(backend), requires_grad=True)
    (dx,) = torch.autograd.grad(add_act(x, x, backend=backend), x, torch.ones_like(x))
    assert torch.equal(dx, 2.0 * (x > 0))


@pytest.mark.parametrize("other", [(1, 7, 1, 1), (5, 1), (7, 3, 5), ()])
def test_broadcast_goes_to_torch(other: tuple[int, ...], backend: str) -> None:
    x = (
        torch.randn(2, 7, 3, 5, device=device_of(backend))
        if other != (5, 1)
        else torch.randn(2, 7, 5, 3, device=device_of(backend))
    )
    residual = torch.randn(other, device=x.device)
    assert torch.equal(add_act(x, residual, backend=backend), torch.relu(x + residual))


def test_promotion_goes_to_torch(backend: str) -> None:
    x = torch.randn(2, 7, 3, 5, device=device_of(backend))
    for residual in (x.half(), x.to(torch.int32)):
        torch.testing.assert_close(add_act(x, residual, backend=backend), torch.relu(x + residual), rtol=0, atol=0)


def test_gradient_subsets_and_expanded_gradient(kernel_backend: str) -> None:
    case = replace(BASE, layout="nhwc", residual="nhwc")
    tensors = problem(case, device_of(kernel_backend))
    dout = torch.ones(1, device=tensors["x"].device).expand(case.shape)
    full = run(ours(case, kernel_backend), tensors, dout, WRT)
    same_bits(full, run(ours(case, kernel_backend), tensors, dout.contiguous(), WRT))
    for name in WRT:
        same_bits(run(ours(case, kernel_backend), tensors, dout, (name,)), {key: full[key] for key in ("out", f"d{name}")})


def test_memory_kept_for_backward(kernel_backend: str) -> None:
    """ReLU keeps one bit an element."""
    x, residual = (torch.randn(2, 64, 28, 28, device=device_of(kernel_backend), requires_grad=True) for _ in range(2))
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel() * t.element_size()), t)[1], lambda t: t):
        add_act(x, residual, backend=kernel_backend)
    assert sum(sizes) == x.numel() // 8


def test_second_backward_raises(kernel_backend: str) -> None:
    x, residual = (torch.randn(2, 5, 4, 3, device=device_of(kernel_backend), requires_grad=True) for _ in range(2))
    out = add_act(x, residual, activation="silu", backend=kernel_backend)
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="add_act"):
        dx.square().sum().backward()
