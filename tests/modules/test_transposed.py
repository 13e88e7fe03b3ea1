"""Transposed convolutions as modules: the packed path, staleness, training, and the falls back to stock."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dl4ds_kernels import _packing
from dl4ds_kernels.modules import ConvTransposeBNAct2d, FusedSequential, _transposed


@pytest.fixture(autouse=True)
def _pack_small_layers(monkeypatch: pytest.MonkeyPatch, kernels: None) -> None:
    monkeypatch.setattr(_packing, "MIN_MACS", 0)
    monkeypatch.setattr(_transposed, "_LEAST_ALONE", 0)
    monkeypatch.setattr(_transposed, "_LEAST_FUSED", 0)


def packs_here() -> bool:
    """Whether this machine has the direct algorithm."""
    up = nn.ConvTranspose2d(2, 2, 2, 2)
    return _packing.transposed_weight(up, up.weight) is not None


def stock(module: ConvTransposeBNAct2d, x: Tensor) -> Tensor:
    y = module.conv(x)
    return torch.relu(y if module.bn is None else nn.BatchNorm2d.forward(copy.deepcopy(module.bn), y))


def made(norm: bool = True, channels: tuple[int, int] = (24, 16), **options: Any) -> ConvTransposeBNAct2d:
    module = ConvTransposeBNAct2d(*channels, batch_norm=norm, **options)
    if norm:
        module.bn = nn.BatchNorm2d(channels[1])
        nn.init.uniform_(module.bn.running_mean, -1, 1)
        nn.init.uniform_(module.bn.running_var, 0.5, 2)
        nn.init.uniform_(module.bn.weight, -1, 1)
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("channels", [(24, 16), (7, 5), (64, 33)])
def test_packed_inference(channels: tuple[int, int], norm: bool, layout: torch.memory_format) -> None:
    module = made(norm, channels)
    x = torch.randn(2, channels[0], 5, 9).contiguous(memory_format=layout)
    truth = stock(copy.deepcopy(module).double(), x.double())
    error, stock_error = ((out.double() - truth).abs().max() for out in (module(x), stock(module, x)))
    assert error <= 2 * stock_error + 1e-6
    if packs_here():
        assert _packing.algorithms(module.conv) == ("transposed 2x2",)
        assert module(x).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_writes_to_the_weight_are_seen() -> None:
    module, x = made(), torch.randn(1, 24, 6, 6)
    module(x)
    module.conv.weight.mul_(2)
    module.bn.running_mean.add_(1)
    torch.testing.assert_close(module(x), stock(module, x), rtol=1e-4, atol=1e-5)
    module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()})
    torch.testing.assert_close(module(x), stock(module, x), rtol=1e-4, atol=1e-5)
    assert not _packing.algorithms(copy.deepcopy(module).conv)


@torch.no_grad()
def test_nan_and_infinity_spread_as_in_stock() -> None:
    module, x = made(), torch.randn(1, 24, 6, 6)
    x[0, 3, 2, 2], x[0, 5, 4, 1] = float("nan"), float("inf")
    torch.testing.assert_close(module(x), stock(module, x), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_training_step_equals_stock() -> None:
    module, x = made().train(), torch.randn(3, 24, 5, 4, dtype=torch.float64)
    module.double()
    other = nn.Sequential(copy.deepcopy(module.conv), copy.deepcopy(module.bn), nn.ReLU())
    for net in (module, other):
        net(x).square().sum().backward()
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(module.bn.running_var, other[1].running_var)
    assert module.bn.num_batches_tracked == other[1].num_batches_tracked


@torch.no_grad()
@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 2, "stride": 1}, {"output_padding": 1}, {"groups": 2}])
def test_other_geometries(options: dict[str, Any]) -> None:
    module, x = made(**options), torch.randn(1, 24, 5, 6)
    torch.testing.assert_close(module(x), stock(module, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sequential_and_hooks() -> None:
    module = made()
    net = FusedSequential(module.conv, module.bn, nn.ReLU()).eval()
    x, seen = torch.randn(1, 24, 4, 4), []
    torch.testing.assert_close(net(x), stock(module, x), rtol=1e-4, atol=1e-5)
    net[1].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(net(x), stock(module, x), rtol=1e-4, atol=1e-5)
    assert seen == [1]
