"""bn_act beyond the case list: which gradients are asked for, determinism, extreme values, the kinks themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import compare, run, same_bits, same_non_finite, widen
from _cases import ACTIVATIONS, BASE, KINKS, Case, each, lay_out
from conftest import device_of
from test_bn_act import EPS, MOMENTUM, SLOPE, WRT, ours, problem, stock
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import op
from dl4ds_kernels.functional import bn_act

# Derivatives at NaN on which torch's own vector and scalar loops disagree.
UNSURE_AT_NAN = ("relu6", "hardswish")
LARGE = replace(BASE, shape=(3, 37, 33, 65))
LARGE_CASES = [
    replace(LARGE, layout=layout, residual=layout if residual else "", dtype=dtype)
    for layout, residual, dtype in (
        ("nchw", True, torch.float32),
        ("nhwc", True, torch.float32),
        ("nhwc_cslice", False, torch.float32),
        ("nchw", False, torch.bfloat16),
        ("nhwc", True, torch.bfloat16),
    )
]


@each(LARGE_CASES)
def test_same_bits(case: Case, kernel_backend: str) -> None:
    """20 runs, half of them on one thread: forward, gradients and running statistics."""
    tensors = problem(case, device_of(kernel_backend))
    dout = torch.randn(case.shape, device=tensors["x"].device).to(case.dtype)
    first = run(ours(case, kernel_backend), tensors, dout, WRT)
    for i in range(19):
        torch.set_num_threads(1 + i % 2)
        same_bits(run(ours(case, kernel_backend), tensors, dout, WRT), first)


@pytest.mark.parametrize("wanted", [w for n in range(1, 16) for w in [tuple(a for i, a in enumerate(WRT) if n >> i & 1)]])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_subsets(wanted: tuple[str, ...], training: bool, kernel_backend: str) -> None:
    """Every subset of inputs that want a gradient gets the gradient it has in the full set."""
    case = replace(BASE, residual="nhwc", layout="nhwc", training=training)
    tensors = problem(case, device_of(kernel_backend))
    dout = torch.randn(case.shape, device=tensors["x"].device)
    full = run(ours(case, kernel_backend), tensors, dout, WRT)
    part = run(ours(case, kernel_backend), tensors, dout, wanted)
    same_bits(part, {name: full[name] for name in part})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["", "nchw"])
def test_expanded_gradient(activation: str, residual: str, kernel_backend: str) -> None:
    """The 0-stride gradient that ``sum()`` sends is the gradient of ones."""
    for layout in ("nchw", "nhwc"):
        case = replace(BASE, activation=activation, residual=residual and layout, layout=layout)
        tensors = problem(case, device_of(kernel_backend))
        ones = torch.ones(case.shape, device=tensors["x"].device)
        same_bits(
            run(ours(case, kernel_backend), tensors, ones[:1, :1, :1, :1].expand(case.shape), WRT),
            run(ours(case, kernel_backend), tensors, ones, WRT),
        )


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(4, 5, 31, 33), (64, 3, 7, 7), (2, 40, 100, 100)])
def test_large_mean_small_spread(shape: tuple[int, ...], layout: str, backend: str) -> None:
    """mean / std = 1e4: a sum of squares in fp32 would lose every digit of the variance."""
    case = Case(shape, layout=layout)
    generator = case.generator()
    tensors = problem(case)
    tensors["x"] = lay_out(100 + 0.01 * torch.randn(shape, generator=generator), layout)
    device = device_of(backend)
    tensors = {name: t if t is None else t.to(device) for name, t in tensors.items()}
    results = [run(f, t, None, ()) for f, t in _with_truth(case, backend, tensors)]
    compare(*results, backend)


def _with_truth(case: Case, backend: str, tensors: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    return [(ours(case, backend), tensors), (stock(case), tensors), (stock(case), widen(tensors))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_nan_and_inf(activation: str, training: bool, layout: str, backend: str) -> None:
    """NaN and Inf in x, residual, gradient and parameters reach the same places as in stock torch, ReLU included."""
    case = replace(BASE, activation=activation, training=training, layout=layout, residual=layout)
    device = device_of(backend)
    inf, nan = float("inf"), float("nan")
    # An infinite weight is left out: whether inf - inf arises there depends on the order of the operations.
    for name, value in [*product(("x", "residual", "bias", "dout"), (nan, inf, -inf)), ("weight", nan)]:
        tensors = problem(case)
        tensors["dout"] = torch.randn(case.shape)
        target = tensors[name]
        target[(1, 3, 2, 4) if target.dim() == 4 else 3] = value
        tensors = {key: t if t is None else t.to(device) for key, t in tensors.items()}
        dout = tensors.pop("dout")
        got, expected = run(ours(case, backend), tensors, dout, WRT), run(stock(case), tensors, dout, WRT)
        for key in expected:
            if key.startswith("running"):  # Inf or NaN: depends on how the sum is split up
                assert torch.equal(got[key].isfinite(), expected[key].isfinite()), f"{key} for {value} in {name}"
            elif not (activation in UNSURE_AT_NAN and key.startswith("d")):
                same_non_finite(got[key], expected[key], f"{key} for {value} in {name}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("repeats", [1, 3])
def test_kinks_and_signed_zero(activation: str, residual: bool, repeats: int, kernel_backend: str) -> None:
    """At the very points where derivatives jump, at -0.0, NaN and Inf, value and derivative are stock torch's, bit for bit."""
    points = [-0.0, 0.0, 1e-30, -1e-30, 1e-42, -1e-42, float("inf"), float("-inf"), 5.5, -7.0]
    points += [] if activation in UNSURE_AT_NAN else [float("nan")]
    for kink in KINKS.get(activation, ()):
        points += [torch.nextafter(torch.tensor(kink), torch.tensor(kink + d)).item() for d in (-1.0, 0.0, 1.0)]
    x = torch.tensor(points, device=device_of(kernel_backend)).repeat(repeats).view(1, 1, 1, -1).requires_grad_()
    zero, one = torch.zeros(1, device=x.device), torch.ones(1, device=x.device)
    other = torch.full_like(x, -0.0) if residual else None
    out = bn_act(x, zero, one, residual=other, eps=0.0, activation=activation, negative_slope=SLOPE, backend=kernel_backend)
    z = TF.batch_norm(x, zero, one, eps=0.0)
    expected = apply_activation(z if other is None else z + other, ACTIVATION_CODES[activation], SLOPE)
    gradients = [torch.autograd.grad(o, x, torch.ones_like(x))[0] for o in (out, expected)]
    bound = 1e-6 if activation in ("silu", "hardswish") else 0
    for got, want in ((out, expected), gradients):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=bound, atol=bound)
        sure = ~want.isnan() & (want.abs() >= bound)
        assert torch.equal(got[sure].signbit(), want[sure].signbit())


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_variance(layout: str, dtype: torch.dtype, backend: str) -> None:
    """Constant channels: eps keeps them finite; with eps = 0 in eval they are NaN or Inf where stock's are."""
    x = lay_out(torch.tensor([0.0, 3.0, -2.0]).view(1, 3, 1, 1).expand(2, 3, 5, 7).to(dtype).contiguous(), layout)
    x = x.to(device_of(backend))
    mean, var = torch.tensor([0.0, 3.0, 1.0], dtype=dtype, device=x.device), torch.zeros(3, dtype=dtype, device=x.device)
    for training, eps in ((True, 1e-5), (False, 1e-5), (False, 0.0)):
        pairs = []
        for function in (lambda a, *v, **k: bn_act(a, *v, activation="none", backend=backend, **k), TF.batch_norm):
            leaf = x.detach().requires_grad_()
            out = function(leaf, mean.clone(), var.clone(), training=training, eps=eps)
            pairs.append((out, torch.autograd.grad(out, leaf, torch.ones_like(out))[0]))
        for got, want in zip(*pairs, strict=True):
            same_non_finite(got, want)
            torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_overflow_and_denormals(layout: str, dtype: torch.dtype, backend: str) -> None:
    """Statistics of the largest values stay finite in fp32 where the dtype is half; tiny values keep their digits."""
    for scale in (6e4, 1e-6) if dtype == torch.float16 else (1e15, 1e-20):
        case = Case((4, 9, 16, 17), dtype=dtype, layout=layout)
        x = lay_out((torch.rand(case.shape, generator=case.generator()) * scale).to(dtype), layout)
        tensors = {"x": x, **dict.fromkeys(("running_mean", "running_var", "weight", "bias", "residual"))}
        tensors = {name: t if t is None else t.to(device_of(backend)) for name, t in tensors.items()}
        compare(*(run(f, t, None, ()) for f, t in _with_truth(case, backend, tensors)), backend)


def test_second_backward_raises(kernel_backend: str) -> None:
    """First order only: a double backward says so instead of being silently wrong."""
    tensors = problem(BASE, device_of(kernel_backend))
    x = tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(ours(BASE, kernel_backend)(tensors).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bn_act"):
        dx.square().sum().backward()


def test_saved_tensors_are_watched(kernel_backend: str) -> None:
    """A running statistic that changes between forward and backward in eval is noticed by autograd."""
    case = replace(BASE, training=False)
    tensors = problem(case, device_of(kernel_backend))
    out = ours(case, kernel_backend)({**tensors, "x": tensors["x"].requires_grad_()})
    tensors["running_var"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_memory_kept_for_backward(kernel_backend: str) -> None:
    """With a residual and ReLU, backward keeps x and one bit an element: neither the residual nor the output."""
    case = replace(BASE, shape=(2, 64, 28, 28), residual="nchw")
    tensors = problem(case, device_of(kernel_backend))
    leaves = {name: tensors[name].requires_grad_() for name in WRT}
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(0 if t.data_ptr() == leaves["x"].data_ptr() else t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bn_act(
            *(tensors[n] for n in ("x", "running_mean", "running_var", "weight", "bias")), residual=tensors["residual"],
            training=True, momentum=MOMENTUM, eps=EPS, backend=kernel_backend,
        )  # fmt: skip
    numel = leaves["x"].numel()
    assert sum(sizes) <= numel // 8 + 6 * 4 * case.channels


def test_ops_neither_alias_nor_mutate(kernel_backend: str, namespace: str) -> None:
    """No output shares memory with an input, also where the op does nothing (activation none, alpha 1)."""
    case = replace(BASE, activation="none", residual="nchw")
    tensors = problem(case, device_of(kernel_backend))
    names = ("x", "weight", "bias", "running_mean", "running_var", "residual")
    inputs = [tensors[name] for name in names]
    before = [t.clone() for t in inputs]
    outputs = op("bn_act", namespace)(*inputs, True, MOMENTUM, EPS, False, 0, SLOPE, True)
    pointers = {t.data_ptr() for t in inputs}
    assert not any(t.numel() and t.data_ptr() in pointers for t in outputs)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(1, 3, 96, 128), (6, 5, 40, 40), (700, 3, 3, 3)], ids=str)
def test_variance_between_the_pieces(shape: tuple[int, ...], layout: str, kernel_backend: str) -> None:
    """A mean that drifts through the tensor: almost all variance lies between the pieces whose moments are merged.

    Random data do not show it: their pieces all have nearly the same mean.
    """
    n, c, h, w = shape
    drift = torch.linspace(-8, 8, n * h * w).view(n, 1, h, w)
    x = (drift + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device_of(kernel_backend))
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    mean, var = torch.zeros(c, device=x.device), torch.zeros(c, device=x.device)
    bn_act(x, mean, var, training=True, momentum=1.0, backend=kernel_backend)
    wide = x.double()
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)


def test_lanes_past_the_plane_stay_out(kernel_backend: str) -> None:
    """Planes that end inside a vector, whose zeros behind the end normalise to -inf: silu's derivative there is NaN."""
    generator = torch.Generator().manual_seed(0)
    x = (1e37 * (1 + 1e-3 * torch.randn(2, 3, 5, 7, generator=generator))).to(device_of(kernel_backend))
    weight, mean, var = (torch.full((3,), value, device=x.device) for value in (1e3, 1e37, 1.0))
    bias = torch.zeros(3, device=x.device, requires_grad=True)
    out = bn_act(x, mean, var, weight, bias, training=False, activation="silu", backend=kernel_backend)
    dout = torch.randn(x.shape, generator=generator).to(x.device)
    (dbias,) = torch.autograd.grad(out, bias, dout)
    z = (x.double() - mean.double().view(-1, 1, 1)) * ((var.double() + EPS).rsqrt() * weight).view(-1, 1, 1)
    assert dbias.isfinite().all()
    torch.testing.assert_close(dbias.double(), (dout.double() * (z > 0)).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
