"""Models with torchvision's names: its state_dicts load strictly, and the numbers are its own."""

from __future__ import annotations

import io

import pytest
import torch
import torchvision
from _parity import check_forward, check_training, image, seeded
from torch import nn

from dl4ds_kernels import models

# The two heavy dense layers of AlexNet and VGG train as stock torch; most training tests leave them out.
SHARED = [n for n in models.list_models() if hasattr(torchvision.models, n)]


@pytest.mark.parametrize("name", SHARED)
def test_state_dict_is_torchvisions(name: str) -> None:
    """Same keys in the same order, same shapes, and loading either way is strict."""
    ours = models.build_on_meta(name)
    with torch.device("meta"):
        stock = getattr(torchvision.models, name)()
    a, b = ours.state_dict(), stock.state_dict()
    assert list(a) == list(b)
    assert [t.shape for t in a.values()] == [t.shape for t in b.values()]
    ours.load_state_dict(b, strict=True, assign=True)
    stock.load_state_dict(a, strict=True, assign=True)


def pair(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = seeded(getattr(torchvision.models, name)(**options))
    ours = getattr(models, name)(**options)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


FORWARD = {"alexnet": 95, "resnet18": 75, "resnet50": 64, "densenet121": 64, "vgg11_bn": 64}
FULL_FORWARD = [n for n in SHARED if n not in FORWARD]


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    size = FORWARD[name]
    check_forward(*pair(name), image(3, 3, size, size + 2), (3, 1000))


@pytest.mark.full
@pytest.mark.parametrize("name", FULL_FORWARD)
def test_forward_every_depth(name: str) -> None:
    check_forward(*pair(name), image(2, 3, 64, 96), (2, 1000))


def small_head(net: nn.Module) -> nn.Module:
    """The convolutions with one dense layer."""
    torch.manual_seed(1)
    net.classifier = nn.Linear(net.classifier[1 if isinstance(net.classifier[0], nn.Dropout) else 0].in_features, 10)
    return net


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121"])
def test_training(name: str) -> None:
    check_training(*pair(name, num_classes=10), image(4, 3, 64, 64))


@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn"])
def test_training_with_a_small_head(name: str) -> None:
    check_training(*map(small_head, pair(name)), image(3, 3, 95, 95), bn=name == "vgg11_bn")


@pytest.mark.full
@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnet152", "densenet161", "densenet169", "densenet201"])
def test_training_every_depth(name: str) -> None:
    check_training(*pair(name, num_classes=10), image(4, 3, 96, 96))


@pytest.mark.full
@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19", "vgg13_bn", "vgg16_bn", "vgg19_bn"])
def test_training_every_vgg_with_a_small_head(name: str) -> None:
    check_training(*map(small_head, pair(name)), image(3, 3, 64, 64), bn=name.endswith("_bn"))


@pytest.mark.full
@pytest.mark.parametrize("name", ["alexnet", "vgg16", "vgg16_bn"])
def test_training_with_every_dense_layer(name: str) -> None:
    check_training(*pair(name), image(3, 3, 64 if "vgg" in name else 95, 64 if "vgg" in name else 95), bn=name == "vgg16_bn")


def test_training_memory_efficient_densenet() -> None:
    ours, stock = pair("densenet121", num_classes=10)
    ours = models.densenet121(num_classes=10, memory_efficient=True)
    ours.load_state_dict(stock.state_dict())
    check_training(ours, stock, image(4, 3, 64, 64))


def test_wide_and_dilated_options() -> None:
    """Options that torchvision's constructor has mean the same."""
    options = {"groups": 4, "width_per_group": 8, "replace_stride_with_dilation": (False, True, True)}
    stock = seeded(torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 2, 1], 10, **options))
    ours = models.ResNet(models.resnet50.__globals__["Bottleneck"], [1, 2, 2, 1], 10, **options)
    ours.load_state_dict(stock.state_dict())
    check_forward(ours, stock, image(2, 3, 64, 64), (2, 10))


def test_checkpoint_files() -> None:
    """torch.save (weights only) and safetensors, from torchvision to ours and back."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is an extra")
    ours, stock = pair("resnet18", num_classes=10)
    fresh = models.resnet18(num_classes=10)
    buffer = io.BytesIO()
    torch.save(stock.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    back = torchvision.models.resnet18(num_classes=10)
    back.load_state_dict(safetensors.load(safetensors.save(fresh.state_dict())), strict=True)
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(back.eval()(x), stock.eval()(x))


def test_zero_init_residual() -> None:
    """Every block starts as the identity (behind its ReLU)."""
    net = models.resnet50(zero_init_residual=True)
    x = image(2, 256, 8, 8).relu()
    block = net.layer1[1].train()
    assert torch.equal(block(x), x)
