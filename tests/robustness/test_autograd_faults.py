"""Gradients in every order and subset, aliasing, second derivatives, weights that change under a fold: F18, F43, F44, F46."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _stock import STOCK, bn_vectors
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import functional as F

EACH = pytest.mark.parametrize("backend", [None, "cpu"], ids=lambda b: b or "auto")


def image(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@EACH
def test_F18_residual_is_the_input(backend: str | None, kernels: None) -> None:
    """x + x: both operands get their gradient, and nothing is written to x."""
    for shape in ((2, 4, 5, 5), (2, 16, 40, 40)):
        results = []
        for function, bn in ((F.add_act, F.bn_act), (STOCK["add_act"], STOCK["bn_act"])):
            options = {"backend": backend} if function is F.add_act else {}
            x = image(*shape, dtype=torch.float32)
            before, version = x.clone(), x._version
            leaf = x.requires_grad_()
            vectors = bn_vectors(shape[1])
            out = function(leaf, leaf, **options) + bn(leaf, *vectors, residual=leaf, **options)
            results.append((out.detach(), torch.autograd.grad(out.sum(), leaf)[0]))
            assert torch.equal(x.detach(), before) and x._version == version and out.data_ptr() != x.data_ptr()
        for ours, stock in zip(*results, strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@EACH
@pytest.mark.parametrize("op", ["bn_act", "conv_bn_act", "add_act"])
def test_F18_saved_tensor_changed_before_backward(op: str, backend: str | None, kernels: None) -> None:
    """Autograd's own error, not a wrong gradient: what backward needs is saved with its version."""
    x = image(2, 16, 40, 40, dtype=torch.float32)
    if op == "conv_bn_act":
        weight = image(8, 16, 3, 3, dtype=torch.float32).requires_grad_()
        out = F.conv_bn_act(x, weight, running_mean=None, running_var=None, training=True, backend=backend)
    elif op == "bn_act":
        weight = torch.ones(16, requires_grad=True)
        out = F.bn_act(x, None, None, weight, training=True, backend=backend)
    else:
        weight = x.clone().requires_grad_()
        out = F.add_act(weight, x, activation="silu", backend=backend)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@EACH
def test_F18_output_changed_in_place(backend: str | None, kernels: None) -> None:
    """Backward reads x or a bit mask, never the output: writing to the output is fine, as after stock relu it is an error."""
    for activation in ("none", "relu", "silu"):
        x = image(2, 16, 40, 40, dtype=torch.float32).requires_grad_()
        out = F.bn_act(x, None, None, training=True, activation=activation, backend=backend)
        (expected,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        try:
            out.mul_(2.0)
            (dx,) = torch.autograd.grad(out.sum(), x)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(dx, 2 * expected, rtol=1e-4, atol=1e-5)


def test_F18_there_is_no_in_place_op() -> None:
    """An in-place op without an autograd formula gives silently wrong gradients: all that autograd sees are functional."""
    from dl4ds_kernels._define import CPP, TRITON, defined_ops

    for namespace in (CPP, TRITON):
        for name in defined_ops():
            schema = getattr(getattr(torch.ops, namespace), name).default._schema
            # bn_act_into writes to the tensor it is given, has no autograd formula and is called below autograd only.
            assert schema.is_mutable == name.endswith("_into"), schema
            assert all(result.alias_info is None for result in schema.returns), schema


def leaves(*shapes: tuple[int, ...], grads: list[bool] | None = None) -> list[Tensor]:
    made = [image(*shape, seed=i) for i, shape in enumerate(shapes)]
    return [t.requires_grad_(g) for t, g in zip(made, grads or [True] * len(made), strict=True)]


GRADIENTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "add_act": (lambda b, x, r: F.add_act(x, r, activation="silu", backend=b), ((2, 3, 4, 3), (2, 3, 4, 3))),
    "bn_act": (
        lambda b, x, w, c, r: F.bn_act(x, None, None, w, c, residual=r, training=True, activation="silu", backend=b),
        ((3, 2, 4, 3), (2,), (2,), (3, 2, 4, 3)),
    ),
    "bn_act-eval": (
        lambda b, x, w, c, r: F.bn_act(
            x, *bn_vectors(2, torch.float64)[:2], w, c, residual=r, activation="hardswish", backend=b
        ),
        ((3, 2, 4, 3), (2,), (2,), (3, 2, 4, 3)),
    ),
    "conv_bn_act": (
        lambda b, x, w, c, g, h: F.conv_bn_act(
            x, w, c, running_mean=None, running_var=None, bn_weight=g, bn_bias=h, training=True, activation="silu",
            padding=1, backend=b,
        ),
        ((2, 2, 4, 3), (2, 2, 3, 3), (2,), (2,), (2,)),
    ),
    "bn_act_conv": (
        lambda b, x, g, h, w: F.bn_act_conv(x, None, None, g, h, w, training=True, activation="silu", backend=b),
        ((2, 2, 4, 3), (2,), (2,), (2, 2, 3, 3)),
    ),
    "max_pool_indices": (lambda b, x: F.max_pool_indices(x, backend=b)[0], ((2, 2, 4, 6),)),
    "upsample_add": (lambda b, x, s: F.upsample_add(x, s, backend=b), ((2, 2, 2, 3), (2, 2, 4, 6))),
}  # fmt: skip


@EACH
@pytest.mark.parametrize("name", GRADIENTS)
def test_F43_gradcheck_and_subsets(name: str, backend: str | None, kernels: None) -> None:
    """Numerical gradients in fp64; then every input alone, whose gradient is the one of the joint call."""
    function, shapes = GRADIENTS[name]
    inputs = leaves(*shapes)
    torch.autograd.gradcheck(lambda *t: function(backend, *t), inputs)
    out = function(backend, *inputs)
    dout = image(*out.shape, seed=77)
    joint = torch.autograd.grad(out, inputs, dout, allow_unused=True)
    for i in range(len(shapes)):
        alone = leaves(*shapes, grads=[j == i for j in range(len(shapes))])
        (dx,) = torch.autograd.grad(function(backend, *alone), alone[i], dout)
        torch.testing.assert_close(dx, joint[i])
    assert not function(backend, *leaves(*shapes, grads=[False] * len(shapes))).requires_grad


@EACH
@pytest.mark.parametrize("name", GRADIENTS)
def test_F43_gradients_of_every_layout(name: str, backend: str | None, kernels: None) -> None:
    """An expanded gradient (from sum), a transposed one, a slice and a channels_last one."""
    function, shapes = GRADIENTS[name]
    inputs = leaves(*shapes)
    out = function(backend, *inputs)
    base = image(*out.shape, seed=5)
    wide = torch.full((*out.shape[:3], 2 * out.shape[3]), float("nan"), dtype=torch.float64)
    wide[..., ::2] = base
    same_values = {
        "transposed": base.transpose(2, 3).contiguous().transpose(2, 3), "slice": wide[..., ::2],
        "nhwc": base.contiguous(memory_format=torch.channels_last),
    }  # fmt: skip
    expected = torch.autograd.grad(out, inputs, base, retain_graph=True)
    for layout, dout in same_values.items():
        got = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=layout)
    from_sum = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    from_ones = torch.autograd.grad(out, inputs, torch.ones_like(out))
    for a, b in zip(from_sum, from_ones, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@EACH
def test_F43_none_gradients(backend: str | None, kernels: None) -> None:
    """One of two outputs unused: its gradient is None, not an error or garbage."""
    x, r = leaves((2, 3, 4, 6), (2, 3, 4, 6))
    total, out = F.add_bn_act(x, r, None, None, training=True, backend=backend)
    for used in (total, out):
        assert all(g.isfinite().all() for g in torch.autograd.grad(used.sum(), (x, r), retain_graph=True))
    pooled, where = F.max_pool_indices(x, backend=backend)
    assert not where.requires_grad
    torch.autograd.backward([pooled], [torch.ones_like(pooled)])
    assert x.grad.sum() == pooled.numel()


@EACH
@pytest.mark.parametrize("name", GRADIENTS)
def test_F44_second_derivatives_are_right_or_refused(name: str, backend: str | None, kernels: None) -> None:
    """Through our backward kernels a second derivative is an error that names the op; through stock torch it is right."""
    function, shapes = GRADIENTS[name]
    inputs = leaves(*shapes)
    try:
        grads = torch.autograd.grad(function(backend, *inputs).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
    except RuntimeError as error:
        assert "first-order gradient" in str(error) and name.split("-")[0].split("_conv")[0][:3] in str(error)
        return
    reference = leaves(*shapes)
    out = function("reference", *reference) if name != "max_pool_indices" else STOCK[name](*reference)[0]
    grads = torch.autograd.grad(out.square().sum(), reference, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in grads), reference)
    for a, b in zip(second, expected, strict=True):
        torch.testing.assert_close(a, b)


@EACH
@pytest.mark.parametrize("name", ["add_act", "bn_act", "max_pool_indices", "upsample_add"])
def test_F44_forward_mode(name: str, backend: str | None, kernels: None) -> None:
    """Forward-mode AD: stock's derivative where stock serves, else an error that says it is not there; never zeros."""
    function, shapes = GRADIENTS[name]
    inputs = [t.detach() for t in leaves(*shapes)]
    tangents = tuple(image(*s, seed=50 + i) for i, s in enumerate(shapes))
    try:
        _, derivative = torch.func.jvp(lambda *t: function(backend, *t), tuple(inputs), tangents)
    except (RuntimeError, NotImplementedError) as error:
        assert any(word in str(error) for word in ("forward", "jvp", "not implemented", "derivative")), error
        return
    step = 1e-6
    ahead = function(backend, *(t + step * d for t, d in zip(inputs, tangents, strict=True)))
    behind = function(backend, *(t - step * d for t, d in zip(inputs, tangents, strict=True)))
    if name == "max_pool_indices":
        derivative, ahead, behind = derivative[0], ahead[0], behind[0]
    torch.testing.assert_close(derivative, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-5)


@EACH
def test_F44_forward_mode_is_refused_by_the_kernels(backend: str | None, kernels: None) -> None:
    """Above the sizes from which auto takes the kernels: stock's derivative from auto, an error from an explicit backend."""
    x, tangent = image(2, 16, 64, 64), image(2, 16, 64, 64, seed=2)
    for function in (lambda t: F.add_act(t, t), lambda t: F.bn_act(t, None, None, training=True)):
        _, derivative = torch.func.jvp(function, (x,), (tangent,))
        step = (function(x + 1e-6 * tangent) - function(x - 1e-6 * tangent)) / 2e-6
        assert ((derivative - step).abs() > 1e-4).float().mean() < 1e-3  # but for the kinks
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        with pytest.raises(NotImplementedError, match="add_act: forward-mode AD: expected plain tensors, got a dual tensor"):
            F.add_act(dual, x, backend="cpu")
        assert F.add_act(x, x, backend="cpu").shape == x.shape


@EACH
def test_F44_functional_transforms(backend: str | None, kernels: None) -> None:
    """torch.func.grad, vjp and vmap of grad: autograd's numbers or an error, never something else."""
    for shape in ((2, 4, 5, 5), (2, 16, 64, 64)):
        x = image(*shape)
        for function in (
            lambda t: F.add_act(t, t, activation="silu", backend=backend).square().sum(),
            lambda t: F.bn_act(t, None, None, training=True, activation="silu", backend=backend).square().sum(),
        ):
            leaf = x.clone().requires_grad_()
            (expected,) = torch.autograd.grad(function(leaf), leaf)
            for transform in (
                lambda f, t: torch.func.grad(f)(t),
                lambda f, t: torch.func.vjp(f, t)[1](torch.ones((), dtype=t.dtype))[0],
                lambda f, t: torch.func.vmap(torch.func.grad(f))(torch.stack([t, t]))[0],
                lambda f, t: torch.func.grad(lambda u: torch.func.vmap(f)(torch.stack([u, u])).sum() / 2)(t),
            ):
                try:
                    got = transform(function, x)
                except (RuntimeError, NotImplementedError) as error:
                    assert str(error)
                else:
                    torch.testing.assert_close(got, expected)


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    )


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "weight-in-place": lambda m: m[0].weight.mul_(1.3),
    "bn-weight-in-place": lambda m: m[1].weight.mul_(-0.7),
    "running-var-in-place": lambda m: m[1].running_var.mul_(3.0),
    "running-mean-in-place": lambda m: m[4].running_mean.add_(0.5),
    "load_state_dict": lambda m: m.load_state_dict({k: (v * 1.1).to(v.dtype) for k, v in m.state_dict().items()}),
    "assigned-parameter": lambda m: setattr(m[3], "weight", nn.Parameter(m[3].weight * 0.5)),
    "training-steps": lambda m: (m.train(), m(image(2, 3, 20, 20, dtype=torch.float32)), m.eval()),
    "dtype-round-trip": lambda m: m.double().float() and m[0].weight.mul_(1.2),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_F46_folded_weights_are_never_stale(change: str, kernels: None) -> None:
    """Eval (folds), a change, eval again: always the stock model's result after the same change."""
    stock = net().eval()
    ours = dk.optimize(copy.deepcopy(stock))
    x = image(2, 3, 40, 40, dtype=torch.float32)
    with torch.no_grad():
        for model in (ours, stock):
            model(x), model(x)
            CHANGES[change](model)
        before = stock(x)
        torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)


def test_F46_raw_writes_need_refresh(kernels: None) -> None:
    """A write through .data or numpy leaves no trace in torch: documented, and dk.refresh is the cure."""
    stock = net().eval()
    ours = dk.optimize(copy.deepcopy(stock))
    x = image(2, 3, 40, 40, dtype=torch.float32)
    with torch.no_grad():
        ours(x)
        for model in (ours, stock):
            model[0].weight.detach().numpy()[...] *= 1.5
        dk.refresh(ours)
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)


def test_F46_train_eval_train(kernels: None) -> None:
    """Mode switches at any time: three rounds of a training step and an eval pass."""
    stock, x = net(), image(4, 3, 40, 40, dtype=torch.float32)
    ours = dk.optimize(stock)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (ours, stock)]
    for _ in range(3):
        for model, optimizer in zip((ours, stock), optimizers, strict=True):
            model.train()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(x), stock.eval()(x), rtol=1e-3, atol=1e-4)
