"""DenseNet's blocks in training on the CPU: one op over one buffer, in our models and in optimized torchvision ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _parity import image, seeded
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock

import dl4ds_kernels as dk
from dl4ds_kernels.models.densenet import DenseBlock
from dl4ds_kernels.modules import _dense

C, GROWTH, LAYERS = 24, 8, 3


def stock_block(**options: Any) -> nn.Module:
    return seeded(_DenseBlock(LAYERS, C, 4, GROWTH, 0.0, **options)).double().train()


def our_block(stock: nn.Module, **options: Any) -> nn.Module:
    block = DenseBlock(LAYERS, C, GROWTH, 4, 0.0, options.get("memory_efficient", False))
    block.load_state_dict(stock.state_dict())
    return block.double().train()


def optimized(stock: nn.Module, **options: Any) -> nn.Module:
    return dk.optimize(stock, **options)


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each block that runs as one op: its number of layers."""
    calls: list[int] = []
    run = _dense.run_dense_layers
    monkeypatch.setattr(_dense, "run_dense_layers", lambda x, layers, **kw: calls.append(len(layers)) or run(x, layers, **kw))
    return calls


def batch(steps: int = 0) -> Tensor:
    return image(4, C, 20, 20, seed=steps).double().contiguous(memory_format=torch.channels_last)


def check_steps(block: nn.Module, stock: nn.Module, batches: list[Tensor]) -> None:
    """Every output, gradient and buffer of these steps is stock's, in fp64."""
    for values in batches:
        results = []
        for model in (block, stock):
            model.zero_grad()
            x = values.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            torch.manual_seed(1)  # dropout
            out = model(x)
            out.square().sum().backward()
            results.append([out.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"memory_efficient": True}], ids=["default", "memory_efficient"])
@pytest.mark.parametrize("make", [our_block, optimized])
def test_three_steps_are_the_stock_ones(
    make: Callable[..., nn.Module], options: dict[str, bool], op_calls: list[int], kernels: None
) -> None:
    """Running statistics see each batch once with memory_efficient too."""
    stock = stock_block()
    check_steps(make(stock, **options), stock, [batch(i) for i in range(3)])
    assert op_calls == [LAYERS] * 3


def _momentum(block: nn.Module) -> None:
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None


def _untracked(block: nn.Module) -> None:
    for layer in block.values():
        for name in ("norm1", "norm2"):
            plain = nn.BatchNorm2d(getattr(layer, name).num_features, track_running_stats=False, dtype=torch.float64)
            setattr(layer, name, plain)


def _frozen_weights(block: nn.Module) -> None:
    for layer in list(block.values())[:2]:
        layer.requires_grad_(False)


@pytest.mark.parametrize("change", [_momentum, _untracked])
@pytest.mark.parametrize("make", [our_block, optimized])
def test_settings_of_the_batch_norms(
    make: Callable[..., nn.Module], change: Callable[[nn.Module], None], op_calls: list[int], kernels: None
) -> None:
    """The cumulative average, and BatchNorms without running statistics (which optimize leaves alone)."""
    stock = stock_block()
    block = our_block(stock) if make is our_block else copy.deepcopy(stock)
    change(stock), change(block)
    check_steps(dk.optimize(block) if make is optimized else block, stock, [batch(0), batch(1)])
    assert op_calls == ([] if (make, change) == (optimized, _untracked) else [LAYERS] * 2)


def _eval_norm(block: nn.Module) -> None:
    block["denselayer2"].norm1.eval()


def _all_eval(block: nn.Module) -> None:
    block.eval()


def _dropout(block: nn.Module) -> None:
    for layer in block.values():
        layer.drop_rate = 0.5


def _hook(name: str) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        block.get_submodule(name).register_forward_hook(lambda *_: None)

    change.__name__ = f"hook_{name.replace('.', '_')}"
    return change


def _other_norm(block: nn.Module) -> None:
    block["denselayer1"].norm2 = nn.GroupNorm(4, 4 * GROWTH).double()


HOOKS = [_hook(f"denselayer2{part}") for part in ("", ".norm1", ".relu2", ".conv2")]


@pytest.mark.parametrize("change", [_eval_norm, _all_eval, _dropout, _other_norm, *HOOKS], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", [our_block, optimized])
def test_other_blocks_go_layer_by_layer(
    make: Callable[..., nn.Module], change: Callable[[nn.Module], None], op_calls: list[int], kernels: None
) -> None:
    stock = stock_block()
    block = make(stock)
    change(stock), change(block)
    check_steps(block, stock, [batch()])
    assert op_calls == []


@pytest.mark.parametrize("make", [our_block, optimized])
def test_nchw_goes_layer_by_layer(make: Callable[..., nn.Module], op_calls: list[int], kernels: None) -> None:
    stock = stock_block()
    block = make(stock)
    check_steps(block, stock, [batch().contiguous()])
    assert op_calls == []


def test_checkpointing_torchvision_blocks_stay_stock(op_calls: list[int], kernels: None) -> None:
    """memory_efficient of torchvision's own layers counts a batch twice; optimize leaves that as it is."""
    stock = stock_block(memory_efficient=True)
    check_steps(optimized(stock), stock, [batch()])
    assert op_calls == []


def test_frozen_layers(kernels: None) -> None:
    """Gradients where they are wanted only, with the input's or without."""
    stock = stock_block()
    block = our_block(stock)
    _frozen_weights(stock), _frozen_weights(block)
    for wanted in (True, False):
        grads = []
        for model in (block, stock):
            model.zero_grad()
            x = batch().requires_grad_(wanted)
            model(x).square().sum().backward()
            grads.append([x.grad, *(p.grad for p in model.parameters())])
        for got, want in zip(*grads, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_saved_bytes_in_channels_last(kernels: None) -> None:
    """The one buffer saves more than NCHW's layers do (test_models_saved_bytes.py has those budgets)."""
    from test_models_saved_bytes import saved_bytes

    from dl4ds_kernels import models

    x = torch.randn(2, 3, 64, 64)
    last = x.contiguous(memory_format=torch.channels_last)
    for options in ({}, {"memory_efficient": True}):
        net = models.densenet121(**options)
        layers = saved_bytes(net, x)
        assert saved_bytes(net.to(memory_format=torch.channels_last), last) < (1.0 if options else 0.75) * layers
