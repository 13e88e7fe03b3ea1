"""A layer of dense_block in one call: against the same step by step, fp64, any number of threads, NaN; its arguments."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _dense_block import EPS, FP32, FP64, MOMENTUM, SLOPE, Case, is_running, ours, results, tensors_of
from torch import Tensor

from dl4ds_kernels import _cpu_conv
from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import op

WHOLE = Case((4, 64, 12, 12), 4, 32, 128)
LARGE = WHOLE._replace(shape=(4, 64, 56, 58), layers=2)  # features enough for the epilogue in backward
WHOLE_CASES = [
    LARGE,
    WHOLE, WHOLE._replace(memory_efficient=True), WHOLE._replace(keep_activations=True), WHOLE._replace(running=False),
    WHOLE._replace(eps_mode="std", activation="silu"), WHOLE._replace(activation="leaky_relu"),
]  # fmt: skip


@pytest.fixture
def whole_layers() -> None:
    """Both convolutions of WHOLE are ours, as a layer in one call asks for."""
    sizes = [((4, 64, 12, 12), (128, 64, 1, 1), 0), ((4, 128, 12, 12), (32, 128, 3, 3), 1)]
    for shape, weight, padding in sizes:
        if not all(_cpu_conv.choose_sizes(shape, torch.empty(weight), ((1, 1), (padding,) * 2, (1, 1), 1))):
            pytest.skip("the engine trains with AVX2 and AVX-512 only")


def same(a: Tensor, b: Tensor) -> bool:
    """Up to the order of sums over a map's pixels."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("case", WHOLE_CASES, ids=lambda case: case.id)
def test_a_layer_in_one_call(case: Case, whole_layers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a block's layers, and how often they took the one call: forward always, backward with one kept tensor.

    The same bits, but for gradients behind sums that the first convolution's epilogue takes (where the activation is a clamp).
    """
    layer = importlib.import_module("dl4ds_kernels.ops._dense_layer")
    calls = {"forward": 0, "backward": 0}

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(layer, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return real(*args)

        return call

    for name in calls:
        monkeypatch.setattr(layer, name, counted(name))
    whole = results(ours(case, "cpu"), tensors_of(case), steps=2)
    kept_one = not (case.memory_efficient or case.keep_activations)
    assert calls == {"forward": 2, "backward": int(kept_one)}
    monkeypatch.setattr(layer, "prepare", lambda *args: None)
    steps = results(ours(case, "cpu"), tensors_of(case), steps=2)
    assert whole.keys() == steps.keys()
    in_registers = case == LARGE and kept_one
    for n in whole:
        summed = in_registers and n.startswith("d")
        assert same(whole[n], steps[n]) if summed else torch.equal(whole[n], steps[n]), n


SIZES = [(45, 19, 7, 52, 9, 7), (45, 19, 7, 52, 77, 79), (64, 128, 32, 96, 64, 65), (33, 8, 3, 400, 91, 89)]


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_normed_convolution(sizes: tuple[int, ...], activation: str, kernels: None) -> None:
    """The first convolution with its BatchNorm in registers, sizes that fill no vector: against autograd in fp64.

    400 channels of the buffer: rows that are not asked for ahead. Maps of both kinds: small ones go step by step in backward.
    """
    channels, inner, new, width, *size = sizes
    g = torch.Generator().manual_seed(5)
    rand = lambda *s: torch.randn(s, generator=g)  # noqa: E731
    buffer = (rand(3, width, *size) + 1).contiguous(memory_format=torch.channels_last)
    total = rand(3, width, *size).contiguous(memory_format=torch.channels_last)
    mean, var = buffer.mean((0, 2, 3)), buffer.var((0, 2, 3), unbiased=False)
    vector = lambda n: rand(n) * 0.3 + 1  # noqa: E731
    tensors = [vector(channels), rand(channels), rand(inner, channels, 1, 1) / channels**0.5]
    tensors += [vector(inner), rand(inner), rand(new, inner, 3, 3) / (9 * inner) ** 0.5]
    code = [channels, new, 0, 0, ACTIVATION_CODES[activation], *[1] * 6, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    numbers = [EPS, EPS, 0.0, MOMENTUM]

    def truth(leaves: list[Tensor], features: Tensor) -> Tensor:
        z = features
        for k, padding in ((0, 0), (3, 1)):
            z = apply_activation(TF.batch_norm(z, None, None, *leaves[k : k + 2], True, 0.0, EPS), code[4], SLOPE)
            z = TF.conv2d(z, leaves[k + 2], padding=padding)
        return z

    def leaves_of(dtype: torch.dtype) -> list[Tensor]:
        return [t.to(dtype).requires_grad_() for t in (*tensors, buffer[:, :channels])]

    exact, plain = leaves_of(FP64), leaves_of(FP32)
    for leaves in (exact, plain):
        truth(leaves[:6], leaves[6]).backward(total[:, channels : channels + new].to(leaves[0].dtype))
    grad, linear = total.clone(memory_format=torch.preserve_format), [torch.zeros(width, dtype=FP64) for _ in range(2)]
    out = buffer.clone(memory_format=torch.preserve_format)
    made = op("dense_layers_into")(out, mean.clone(), var.clone(), tensors, code, numbers, 2)
    features = out[:, :channels]
    z = op("bn_act")(features, *tensors[:2], mean[:channels], var[:channels], None, False, 0.0, EPS, False, code[4], 0.0, False)
    assert torch.equal(made[0], op("conv2d_exact")(z[0], tensors[2], None, [1, 1], [0, 0], [1, 1], 1))
    again = out[:, channels : channels + new].clone()
    found = op("dense_layers_back_into")(
        total, grad, *linear, buffer, mean, var, made[:1], [*tensors, *made[2:4]], code, numbers
    )  # fmt: skip
    assert torch.equal(grad[:, channels:], total[:, channels:]) and torch.isfinite(again).all()
    rest = op("dense_take_step")(features, features, mean[:channels], *(v[:channels] for v in linear)) - features
    ours = [*found, grad[:, :channels] - total[:, :channels] + rest]
    for i, (a, e, p) in enumerate(zip(ours, exact, plain, strict=True)):
        error, eager = (a.double() - e.grad).abs().max(), (p.grad.double() - e.grad).abs().max()
        assert error <= 3 * eager + 1e-5 * e.grad.abs().max(), (i, float(error), float(eager))


def test_normed_convolution_keeps_nan(kernels: None) -> None:
    """A NaN among the features reaches its own pixel's gradients and its channel's sums, and nothing else."""
    x = torch.randn(2, 64, 112, 112).contiguous(memory_format=torch.channels_last)
    v, d = torch.rand(64) + 0.5, torch.zeros(64, dtype=FP64)
    tensors = [v[:32], v[:32], torch.randn(32, 32, 1, 1), v[:32], v[:32], torch.randn(32, 32, 3, 3)]
    code, numbers = [32, 32, 0, 0, 1, *[1] * 6, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [EPS, EPS, 0.0, 0.1]
    made = op("dense_layers_into")(x.clone(), v.clone(), v.clone(), tensors, code, numbers, 2)
    dirty = x.clone(memory_format=torch.preserve_format)
    dirty[1, 5, 2, 3] = float("nan")
    grad, factor = x.clone(memory_format=torch.preserve_format), d.clone()
    grads = op("dense_layers_back_into")(
        x, grad, factor, d.clone(), dirty, v, v, made[:1], [*tensors, *made[2:4]], code, numbers
    )  # fmt: skip
    assert torch.isfinite(grad).all()  # the gradient passes where z is NaN, as stock's does
    bad = [torch.isnan(t).nonzero().flatten().tolist() for t in (grads[0], grads[1], factor)]
    assert bad == [[5], [], [5]] and torch.isnan(grads[2]).any(0).flatten().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("case", [WHOLE, WHOLE._replace(shape=(2, 124, 57, 59), layers=2, growth=36)], ids=lambda case: case.id)
def test_whole_layers_give_the_same_bits_for_any_number_of_threads(case: Case, whole_layers: None) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(ours(case, "cpu"), tensors_of(case)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in found[0])


def test_gradient_subsets_of_whole_layers(kernels: None) -> None:
    """Frozen parameters: what is asked for is that of a pass that asks for all, which may sum in other orders."""
    tensors = tensors_of(WHOLE)
    full = results(ours(WHOLE, "cpu"), tensors)
    for frozen in ("1.0.conv", "1.1.conv", "2.0.weight", "2.1.bias", "x"):
        leaves = {n: t.detach().clone().requires_grad_(not is_running(n) and n != frozen) for n, t in tensors.items()}
        out = ours(WHOLE, "cpu")(leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=FP64).float()
        out.backward(dout.contiguous(memory_format=torch.channels_last))
        for n, leaf in leaves.items():
            assert leaf.grad is None if is_running(n) or n == frozen else same(leaf.grad, full[f"d{n}"]), (frozen, n)


def test_whole_layers_check_their_arguments(kernels: None) -> None:
    x = torch.randn(2, 40, 8, 8).contiguous(memory_format=torch.channels_last)
    v, d = torch.zeros(40), torch.zeros(40, dtype=FP64)
    tensors = [v[:32], v[:32], torch.randn(16, 32, 1, 1), v[:16], v[:16], torch.randn(8, 16, 3, 3)]
    code, numbers = [32, 8, 0, 0, 1, 1, 2, 1, 2, 1, 2, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [EPS, EPS, 0.0, 0.1]
    forward, back = op("dense_layers_into"), op("dense_layers_back_into")
    made = forward(x.clone(), v.clone(), v.clone(), tensors, code, numbers, 2)
    assert [tuple(t.shape) for t in made] == [(2, 16, 8, 8)] * 2 + [(16,)] * 2 + [(0,)] * 2
    more = [*tensors, *made[2:4]]
    gradients = back(x, x.clone(), d.clone(), d.clone(), x, v, v, made[:1], more, code, numbers)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]
    for message, call in {
        "dense_layers_into: code: expected 23": lambda: forward(x, v, v, tensors, code[:-1], numbers, 2),
        "dense_layers_into: tensors: expected 6 or 8": lambda: forward(x, v, v, tensors[:5], code, numbers, 2),
        "dense_layers_into: numbers: expected 4": lambda: forward(x, v, v, tensors, code, numbers[1:], 2),
        "dense_layers_into: keep: expected 0, 1 or 2, got 3": lambda: forward(x, v, v, tensors, code, numbers, 3),
        "dense_layers_back_into: tensors: expected": lambda: back(x, x, d, d, x, v, v, made[:1], tensors, code, numbers),
        "dense_layers_back_into: ys: expected one a layer": lambda: back(x, x, d, d, x, v, v, [], more, code, numbers),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
