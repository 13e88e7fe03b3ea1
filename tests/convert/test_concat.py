"""Convolutions behind a concatenation: they read its parts, in models of ours and in optimized ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convert_models import assert_same, seeded
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import _packing
from dl4ds_kernels.convert import concat
from dl4ds_kernels.modules import FusedSequential, sequential


@pytest.fixture(autouse=True)
def _pack_small_layers(monkeypatch: pytest.MonkeyPatch, kernels: None) -> None:
    monkeypatch.setattr(_packing, "MIN_MACS", 0)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parts of every chain that began with more than one."""
    seen: list[int] = []
    original = sequential.run_chain

    def counted(inputs: tuple[Tensor, ...], *args: Any, **keywords: Any) -> Tensor:
        if len(inputs) > 1:
            seen.append(len(inputs))
        return original(inputs, *args, **keywords)

    monkeypatch.setattr(sequential, "run_chain", counted)
    return seen


def double(a: int, b: int, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c in (a, b):
        layers += [nn.Conv2d(c, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return kind(*layers)


class Double(nn.Module):
    """A module that does nothing but call a Sequential, as in many U-Nets."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.body = double(a, b)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Up(nn.Module):
    """The decoder's step of the most copied U-Net: the smaller map is padded to the skip's size."""

    def __init__(self, a: int, b: int, block: type[nn.Module] = Double) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(a, a // 2, 2, 2)
        self.conv = block(a, b) if block is Double else double(a, b)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        dy, dx = skip.size()[2] - x.size()[2], skip.size()[3] - x.size()[3]
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([skip, x], dim=1))


@pytest.mark.parametrize("block", [Double, nn.Sequential])
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_decoder_of_a_foreign_unet(block: type[nn.Module], size: tuple[int, int], parts: list[int]) -> None:
    stock = seeded(Up(64, 32, block)).eval()
    model = dk.optimize(copy.deepcopy(stock))
    x, skip = torch.randn(2, 64, 4, 3), torch.randn(2, 32, *size)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, skip = x.contiguous(memory_format=layout), skip.contiguous(memory_format=layout)
        with torch.no_grad():
            for _ in range(3):
                assert_same(model(x, skip), stock(x, skip), 1e-4)
    assert parts and set(parts) == {2}
    del parts[:]
    assert_same(model(x, skip), stock(x, skip), 1e-4)  # with gradients
    inner = model.conv.body if block is Double else model.conv
    seen: list[int] = []
    inner.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        assert_same(model(x, skip), stock(x, skip), 1e-4)
    assert seen == [64] and not parts


@pytest.mark.parametrize("channels", [(16, 32), (32, 16, 16), (24, 40), (16, 7), (7, 16)])
@pytest.mark.parametrize("exact", [False, True])
def test_any_parts(channels: tuple[int, ...], exact: bool) -> None:
    """Also parts that a chunk of 16 channels does not divide, which the op joins, and views with gaps."""
    block = seeded(double(sum(channels), 24, FusedSequential)).eval()
    dk.optimize(block, inplace=True, exact=exact)
    xs = [torch.randn(2, c, 19, 21) for c in channels]
    xs[0] = torch.randn(2, channels[0], 25, 27).contiguous(memory_format=torch.channels_last)[:, :, 3:22, 2:23]
    with torch.no_grad():
        want = nn.Sequential.forward(copy.deepcopy(block).double(), torch.cat(xs, 1).double()).float()
        for _ in range(3):
            got = sequential.run_concat(tuple(xs), block)
            assert_same(got, want, 3e-5)
            assert torch.equal(got, block(torch.cat(xs, 1)))
        xs[1][0, 0, 0, 0] = float("nan")
        assert torch.equal(sequential.run_concat(tuple(xs), block).isnan(), block(torch.cat(xs, 1)).isnan())


def test_errors_and_gradients_are_those_of_the_concatenation() -> None:
    block = double(48, 16, FusedSequential).eval()
    a, b = torch.randn(1, 16, 8, 8, requires_grad=True), torch.randn(1, 32, 8, 8)
    sequential.run_concat((a, b), block).sum().backward()
    assert a.grad is not None
    with torch.no_grad():
        for other in (torch.randn(1, 32, 8, 9), torch.randn(2, 32, 8, 8), torch.randn(32, 8, 8)):
            with pytest.raises(RuntimeError) as stock:
                torch.cat((a, other), 1)
            with pytest.raises(RuntimeError) as ours:
                sequential.run_concat((a, other), block)
            assert str(ours.value) == str(stock.value)
        with pytest.raises(RuntimeError, match="48"):
            sequential.run_concat((a, torch.randn(1, 16, 8, 8)), block)


class Written(nn.Module):
    """A part is written to between the concatenation and the block that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = double(32, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = torch.cat([x, y], 1)
        y.add_(1)
        return self.conv(z)


class ReadTwice(Written):
    """Somebody else reads the concatenation."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = torch.cat([x, y], 1)
        return self.conv(z) + z.mean()


class OtherDim(Written):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(torch.cat([x, y], 2))


class ThreeParts(Written):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(torch.concat((x[:, :16], y, x[:, :0]), axis=1))


@pytest.mark.parametrize("kind", [Written, ReadTwice, OtherDim, ThreeParts])
def test_what_is_kept_and_what_not(kind: type[nn.Module], parts: list[int]) -> None:
    stock = seeded(kind()).eval()
    model = dk.optimize(copy.deepcopy(stock))
    channels = 32 if kind is OtherDim else 16
    x, y = torch.randn(1, channels, 8, 8), torch.randn(1, channels, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            assert_same(model(x.clone(), y.clone()), stock(x.clone(), y.clone()), 1e-4)
    assert bool(parts) == (kind is ThreeParts)


def test_an_excluded_block_is_called() -> None:
    model = dk.optimize(seeded(Up(64, 32, nn.Sequential)).eval(), exclude="conv.3")
    assert concat.whole_forward(model.conv) is None
    stock = dk.restore(copy.deepcopy(model))
    x, skip = torch.randn(1, 64, 4, 4), torch.randn(1, 32, 8, 8)
    with torch.no_grad():
        assert_same(model(x, skip), stock(x, skip), 1e-4)


def test_function_poolings_are_replaced() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.bn(self.conv(x))
            return (
                torch.max_pool2d(x, 2), F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True), F.avg_pool2d(x, 2),
                F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (2, 2)), F.max_pool2d(x, 2, return_indices=True)[0],
            )  # fmt: skip

    stock = seeded(Pooled()).eval()
    model, x = dk.optimize(copy.deepcopy(stock)), torch.randn(1, 3, 20, 21)
    source = model.forward.plan.__code__.co_names
    assert sum("pool2d" in name and "dl4ds" in name for name in source) == 3, source  # maximum, average, global average
    with torch.no_grad():
        for got, want in zip(model(x), stock(x), strict=True):
            assert_same(got, want, 1e-4)
    for got, want in zip(model.train()(x), stock.train()(x), strict=True):
        assert_same(got, want, 1e-4)
