"""The drop-in layers: numbers, state_dict keys, train/eval, hooks, copies and options of the stock modules they stand for."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from _assert import no_worse_than_torch
from torch import Tensor, nn

from dl4ds_kernels.modules import AddAct, BNAct2d, ConvBNAct2d


def randomise(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters away from 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            if m.running_mean is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return module


class StockConvBNAct(nn.Module):
    """The layers one by one, under the same attribute names."""

    def __init__(self, *conv: Any, activation: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*conv, **{"bias": False, **options})
        self.bn = nn.BatchNorm2d(self.conv.out_channels)
        self.activation = activation or nn.ReLU()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.bn(self.conv(x))
        return self.activation(z if residual is None else z + residual)


CONVOLUTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "1x1": ((16, 24, 1), {}),
    "3x3": ((16, 24, 3), {"padding": 1}),
    "7x7-stride2": ((3, 24, 7), {"stride": 2, "padding": 3}),
    "3x3-stride2-bias": ((16, 24, 3), {"stride": 2, "padding": 1, "bias": True}),
    "depthwise": ((16, 16, 3), {"padding": 1, "groups": 16}),
    "dilated": ((16, 24, 3), {"padding": 2, "dilation": 2}),
    "same": ((16, 24, 3), {"padding": "same"}),
    "rectangle": ((16, 24, (1, 5)), {"padding": (0, 2)}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_bn_act(name: str, last: bool, training: bool) -> None:
    """Output, gradients, running statistics as the stock layers', for a checkpoint of the stock layers."""
    positional, options = CONVOLUTIONS[name]
    stock = randomise(StockConvBNAct(*positional, **options)).train(training)
    ours = ConvBNAct2d(*positional, **options).train(training)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    ours.load_state_dict(stock.state_dict())
    truth = copy.deepcopy(stock).double()
    x = torch.randn(3, positional[0], 21, 19)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    results = []
    for module, image in ((ours, x), (stock, x), (truth, x.double())):
        out = module(image)
        grads = torch.autograd.grad(out, list(module.parameters()), torch.ones_like(out) / 7)
        with torch.no_grad():
            inference = module.eval()(image)
        results.append([out, inference, *grads, *module.buffers()])
    names = ["out", "inference", *(n for n, _ in stock.named_parameters()), *(n for n, _ in stock.named_buffers())]
    for label, got, want, true in zip(names, *results, strict=True):
        if got.is_floating_point():
            no_worse_than_torch(got, want, true, label, factor=3.0 if label == "inference" else 2.0)
        else:
            assert torch.equal(got, want), label


@pytest.mark.parametrize("grad", [False, True])
def test_conv_bn_act_residual(grad: bool) -> None:
    stock, ours = randomise(StockConvBNAct(8, 8, 3, padding=1)).eval(), ConvBNAct2d(8, 8, 3, padding=1).eval()
    ours.load_state_dict(stock.state_dict())
    x, residual = torch.randn(2, 8, 9, 7), torch.randn(2, 8, 9, 7)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x, residual), stock(x, residual))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum-none": {"momentum": None},
    "no-affine": {"affine": False},
    "no-running-stats": {"track_running_stats": False},
    "eps": {"eps": 1e-2, "momentum": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bn_act_options(name: str) -> None:
    """Row by row what nn.BatchNorm2d does with its options, over two training steps and one in eval."""
    options = OPTIONS[name]
    stock, ours = randomise(nn.BatchNorm2d(16, **options)), BNAct2d(16, **options)
    ours.load_state_dict(stock.state_dict())
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for _ in range(2):
        x = torch.randn(4, 16, 33, 21)
        torch.testing.assert_close(ours(x), torch.relu(stock(x)))
    for (key, a), b in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(ours.eval()(x), torch.relu(stock.eval()(x)))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "silu", "hardswish", "none"])
def test_bn_act_activations(activation: str) -> None:
    functions = {
        "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2), "relu6": nn.ReLU6(), "silu": nn.SiLU(), "hardswish": nn.Hardswish(),
        "none": nn.Identity(),
    }  # fmt: skip
    x, residual = torch.randn(4, 16, 33, 21) * 3, torch.randn(4, 16, 33, 21)
    ours, stock = BNAct2d(16, activation=activation, negative_slope=0.2), nn.BatchNorm2d(16)
    torch.testing.assert_close(ours(x, residual), functions[activation](stock(x) + residual))
    added = AddAct(activation, negative_slope=0.2, alpha=0.5)(x, residual)
    torch.testing.assert_close(added, functions[activation](0.5 * (x + residual)))


def test_eps_mode_std() -> None:
    x = torch.randn(4, 16, 33, 21)
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / (x.std((0, 2, 3), correction=0, keepdim=True) + 0.1)
    torch.testing.assert_close(BNAct2d(16, eps=0.1, eps_mode="std", activation="none")(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module", [BNAct2d(8), ConvBNAct2d(4, 8, 3), AddAct("silu", alpha=0.5)], ids=lambda m: type(m).__name__
)
def test_copies(module: nn.Module) -> None:
    """deepcopy, pickle and torch.save (weights only) keep options and numbers."""
    module = randomise(module).eval()
    x = torch.randn(2, 4 if isinstance(module, ConvBNAct2d) else 8, 9, 9)
    call = (lambda m: m(x, x)) if isinstance(module, AddAct) else (lambda m: m(x))
    with torch.no_grad():
        expected = call(module)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(call(copied), expected) and repr(copied) == repr(module)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    module.load_state_dict(torch.load(buffer, weights_only=True))


def test_hooks_run() -> None:
    """A hook on the inner layers sees what the stock layers would show it; the result does not change."""
    layer = randomise(ConvBNAct2d(4, 8, 3)).eval()
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        expected, seen = layer(x), []
        handle = layer.bn.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(seen[0][0], layer.conv(x))
        handle.remove()
        layer.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        torch.testing.assert_close(layer(x), torch.relu(layer.bn(layer.conv(x))))


def test_sync_batchnorm_conversion() -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ConvBNAct2d(4, 8, 3))
    assert type(converted.bn) is nn.SyncBatchNorm
    assert converted.eval()(torch.randn(2, 4, 9, 9)).shape == (2, 8, 7, 7)


def test_wrong_input_raises_what_stock_raises() -> None:
    for ours, stock, x in (
        (BNAct2d(8), nn.BatchNorm2d(8), torch.randn(2, 8, 3)),
        (BNAct2d(8), nn.BatchNorm2d(8), torch.randn(1, 8, 1, 1)),
        (BNAct2d(8), nn.BatchNorm2d(8), torch.randn(2, 7, 3, 3)),
        (ConvBNAct2d(8, 4, 3), StockConvBNAct(8, 4, 3), torch.randn(2, 7, 9, 9)),
        (ConvBNAct2d(8, 4, 3), StockConvBNAct(8, 4, 3), torch.randn(2, 8, 9, 9, dtype=torch.float64)),
    ):
        with pytest.raises(Exception) as expected:
            stock(x)
        with pytest.raises(expected.type):
            ours(x)


def test_options_are_checked() -> None:
    for make in (lambda: BNAct2d(4, activation="gelu"), lambda: BNAct2d(4, eps_mode="max"), lambda: AddAct("tanh")):
        with pytest.raises(ValueError, match="expected"):
            make()


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    stock, ours = randomise(StockConvBNAct(8, 8, 3)).train(training), ConvBNAct2d(8, 8, 3).train(training)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 8, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), stock(x)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2)
    a.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
