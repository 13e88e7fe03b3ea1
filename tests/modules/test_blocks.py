"""Residual blocks, FusedSequential, LocallyConnected2d: numbers, keys and options of what they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_modules import randomise
from torch import Tensor, nn
from torchvision.models import resnet

from dl4ds_kernels import modules as M
from dl4ds_kernels.modules.residual import conv1x1


def same_step(ours: nn.Module, stock, x: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    """Output, gradients of input and parameters in fp64, where both must be one function."""
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = ours(leaf), stock(other)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    dout = torch.randn_like(want)
    mine = torch.autograd.grad(out, [leaf, *(dict(ours.named_parameters())[n] for n in parameters)], dout)
    theirs = torch.autograd.grad(want, [other, *parameters.values()], dout)
    for name, a, b in zip(("x", *parameters), mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


BLOCKS = {
    "basic": (M.BasicBlock, resnet.BasicBlock, 16, {}),
    "basic stride 2": (M.BasicBlock, resnet.BasicBlock, 16, {"stride": 2}),
    "bottleneck": (M.Bottleneck, resnet.Bottleneck, 64, {}),
    "bottleneck stride 2": (M.Bottleneck, resnet.Bottleneck, 64, {"stride": 2}),
    "bottleneck, groups and width": (M.Bottleneck, resnet.Bottleneck, 64, {"groups": 4, "base_width": 16}),
    "bottleneck, dilated": (M.Bottleneck, resnet.Bottleneck, 64, {"dilation": 2}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_torchvisions(name: str, training: bool) -> None:
    ours_type, stock_type, channels, options = BLOCKS[name]
    stride = options.get("stride", 1)

    def make(kind: type[nn.Module]) -> nn.Module:
        shortcut = None if stride == 1 else nn.Sequential(conv1x1(channels, 64 if channels == 64 else 16, stride),
                                                          nn.BatchNorm2d(64 if channels == 64 else 16))  # fmt: skip
        return kind(channels, 16, downsample=shortcut, **options)

    stock = randomise(make(stock_type)).double().train(training)
    ours = make(ours_type).double().train(training)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    same_step(ours, stock, torch.randn(3, channels, 12, 10).double(), dict(stock.named_parameters()))
    for a, b in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [M.PreActBasicBlock, M.PreActBottleneck])
@pytest.mark.parametrize("leading", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_preactivation_blocks(kind: type[nn.Module], leading: bool, stride: int) -> None:
    """BN - ReLU - conv in a row, one shared BN + ReLU where the shortcut is a projection, nothing behind the sum."""
    out = 8 * kind.expansion
    shortcut = conv1x1(out, out, stride) if stride == 2 else None
    block = randomise(kind(out, 8, stride, shortcut, leading=leading, residual_scale=0.5**0.5)).double()
    mirror = copy.deepcopy(block)

    def by_hand(x: Tensor) -> Tensor:
        z = F.relu(mirror.bn1(x)) if leading else x
        y = mirror.conv2(F.relu(mirror.bn2(mirror.conv1(z))))
        if kind is M.PreActBottleneck:
            y = mirror.conv3(F.relu(mirror.bn3(y)))
        return 0.5**0.5 * (y + (x if shortcut is None else mirror.downsample(z)))

    same_step(block, by_hand, torch.randn(3, out, 12, 10).double(), dict(mirror.named_parameters()))
    assert ("bn1.weight" in block.state_dict()) == leading


def test_scaled_and_strided_bottleneck() -> None:
    block = randomise(M.Bottleneck(64, 16, 2, conv1x1(64, 64, 2), stride_in_1x1=True, residual_scale=0.5)).eval()
    assert block.conv1.stride == (2, 2) and block.conv2.stride == (1, 1)
    x = torch.randn(2, 64, 9, 9)
    y = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    expected = F.relu(0.5 * (block.bn3(block.conv3(y)) + block.downsample(x)))
    torch.testing.assert_close(block(x), expected)


def test_basic_block_refuses_what_torchvisions_refuses() -> None:
    for options in ({"groups": 2}, {"base_width": 32}, {"dilation": 2}):
        with pytest.raises(ValueError, match="BasicBlock: groups, base_width, dilation: expected 1, 64 and 1"):
            M.BasicBlock(8, 8, **options)


def test_bn_act_conv_module() -> None:
    layer = randomise(M.BNActConv2d(8, 12, 3, 2, 1)).double()
    mirror = copy.deepcopy(layer)
    assert list(layer.state_dict())[0] == "bn.weight"
    by_hand = lambda x: mirror.conv(F.relu(mirror.bn(x)))  # noqa: E731
    same_step(layer, by_hand, torch.randn(3, 8, 11, 9).double(), dict(mirror.named_parameters()))


@pytest.mark.parametrize("order", ["a", "b", "c"])
def test_orders_of_operations(order: str) -> None:
    """The lecture's remarks: (a) values never fall; (b) they may; (c) without biases a negative input is left as it is."""
    block = M.OrderedResidual2d(6, order, bias=False)
    x = torch.randn(4, 6, 9, 9)
    change = block(x) - x
    if order == "a":
        assert (change >= -1e-6).all() and change.max() > 0.1
        assert block.conv2 is None
    else:
        assert change.min() < -0.1 and change.max() > 0.1
        torch.testing.assert_close(block(-x.abs()), -x.abs(), rtol=0, atol=0)
    assert (block.conv2 is None) == (order != "c")
    scaled = M.OrderedResidual2d(6, order, bias=False, scale=0.5)
    scaled.load_state_dict(block.state_dict())
    torch.testing.assert_close(scaled(x), 0.5 * block(x))
    with pytest.raises(ValueError, match="order: expected 'a', 'b' or 'c', got 'd'"):
        M.OrderedResidual2d(6, "d")


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 2.0**3), (0.5**0.5, 1.0)])
def test_scaled_residuals_keep_the_second_moment(scale: float, expected: float) -> None:
    """He-initialised blocks double E[h^2]; with 1 / sqrt(2) behind each sum it stays 1 (away from the padded border)."""
    moments = []
    for seed in range(16):
        torch.manual_seed(seed)
        x = torch.randn(2, 48, 20, 20)
        for _ in range(3):
            block = M.OrderedResidual2d(48, "b", bias=False, scale=scale)
            nn.init.kaiming_normal_(block.conv1.weight)
            x = block(x).detach()
        moments.append(float(x[..., 4:16, 4:16].square().mean()))
    assert sum(moments) / len(moments) == pytest.approx(expected, rel=0.15)


class Sequences:
    """Chains with every neighbourhood that fuses and some that do not."""

    two_d = (
        lambda: [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)],
        lambda: [nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)],
        lambda: [nn.ConvTranspose2d(4, 8, 2, 2), nn.BatchNorm2d(8), nn.SiLU(), nn.BatchNorm2d(8), nn.Tanh()],
        lambda: [nn.Conv2d(4, 4, 1), nn.Dropout(0.0), nn.BatchNorm2d(4), nn.ReLU6()],
        lambda: [],
    )


@pytest.mark.parametrize("number", range(len(Sequences.two_d)))
@pytest.mark.parametrize("training", [True, False])
def test_fused_sequential(number: int, training: bool) -> None:
    layers = Sequences.two_d[number]()
    stock = randomise(nn.Sequential(*layers)).double().train(training)
    ours = M.FusedSequential(*copy.deepcopy(list(stock))).double().train(training)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    same_step(ours, stock, torch.randn(3, 4, 12, 10).double(), dict(stock.named_parameters()))
    assert type(ours[1:]) is M.FusedSequential


def test_fused_sequential_in_three_dimensions() -> None:
    stock = randomise(
        nn.Sequential(nn.Conv3d(3, 5, 3), nn.BatchNorm3d(5), nn.ReLU(), nn.ConvTranspose3d(5, 4, 2, 2), nn.BatchNorm3d(4))
    )
    stock = stock.double()
    ours = M.FusedSequential(*copy.deepcopy(list(stock)))
    same_step(ours, stock, torch.randn(2, 3, 6, 7, 8).double(), dict(stock.named_parameters()))


def test_fused_sequential_honours_hooks_and_exchanges() -> None:
    ours = randomise(M.FusedSequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).eval()
    x, seen = torch.randn(2, 4, 5, 5), []
    expected = ours(x)
    handle = ours[1].register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(ours(x), expected)
    assert len(seen) == 1 and (seen[0] < 0).any()
    handle.remove()
    ours[2] = nn.Identity()
    torch.testing.assert_close(ours(x), seen[0])


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (2, 2, 0), (3, 2, 1)])
def test_locally_connected(size: int, stride: int, padding: int) -> None:
    """Place by place; with one kernel everywhere it is a convolution."""
    layer = M.LocallyConnected2d(2, 3, size, (4, 5), stride, padding).double()
    x = torch.randn(2, 2, 4, 5).double()
    padded = F.pad(x, (padding,) * 4)
    rows, columns = layer.output_size
    out = layer(x)
    assert out.is_contiguous()
    for r in range(rows):
        for c in range(columns):
            patch = padded[:, :, r * stride : r * stride + size, c * stride : c * stride + size].flatten(1)
            expected = patch @ layer.weight[r * columns + c].T + layer.bias[:, r, c]
            torch.testing.assert_close(out[:, :, r, c], expected)
    kernel = torch.randn(3, 2, size, size).double()
    with torch.no_grad():
        layer.weight.copy_(kernel.flatten(1).expand_as(layer.weight))
        layer.bias.zero_()
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, None, stride, padding))
    torch.autograd.gradcheck(lambda w, b, v: torch.func.functional_call(layer, {"weight": w, "bias": b}, (v,)),
                             (layer.weight, layer.bias, x.requires_grad_()))  # fmt: skip
    with pytest.raises(RuntimeError, match="x: expected shape \\(N, 2, 4, 5\\)"):
        layer(x[..., :4])
    with pytest.raises(ValueError, match="kernel_size: expected at most"):
        M.LocallyConnected2d(3, 5, 9, (6, 8))
