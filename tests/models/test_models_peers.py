"""Models that timm, pytorchcv and kornia have too, with their weights through the documented converters."""

from __future__ import annotations

import pytest
import torch
from _parity import check_forward, check_training, copy_in_order, image, seeded
from torch import nn

from dl4ds_kernels import models


def ptcv(name: str) -> nn.Module:
    provider = pytest.importorskip(
        "pytorchcv.model_provider", reason="pytorchcv is an independent implementation, not installed"
    )
    torch.manual_seed(0)
    net = seeded(provider.get_model(name, pretrained=False), gain=0.3 if "164" in name or "1001" in name else 1.0)
    net.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs takes one size of picture only
    return net


def timm_model(name: str) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is an independent implementation, not installed")
    torch.manual_seed(0)
    return seeded(timm.create_model(name, pretrained=False), gain=0.5 if name.endswith(("101", "152", "200")) else 1.0)


def loaded(ours: nn.Module, stock: nn.Module, source: str) -> tuple[nn.Module, nn.Module]:
    ours.load_state_dict(models.convert_state_dict(stock.state_dict(), source), strict=True)
    return ours, stock


def from_(source: str):
    return lambda tensors: models.convert_state_dict(tensors, source)


PTCV = {
    "preresnet50": (lambda: models.preact_resnet50(stem="ptcv", stride_in_1x1=True), "ptcv_preresnet"),
    "preresnet18": (lambda: models.preact_resnet18(stem="ptcv"), "ptcv_preresnet"),
    "resnet20_cifar10": (lambda: models.cifar_resnet20(shortcut="B"), "ptcv_resnet"),
    "resnet56_cifar10": (lambda: models.cifar_resnet56(shortcut="B"), "ptcv_resnet"),
}
PTCV_DEEP = {
    # The paper's code has the stride on the 1x1 convolution, pytorchcv on the 3x3.
    "preresnet164bn_cifar10": (lambda: models.cifar_preact164(stride_in_1x1=False), "ptcv_preresnet"),
    "resnet110_cifar10": (lambda: models.cifar_resnet110(shortcut="B"), "ptcv_resnet"),
    "resnet50": (lambda: models.resnet50(stride_in_1x1=True), "ptcv_resnet"),
    "preresnet34": (lambda: models.preact_resnet34(stem="ptcv"), "ptcv_preresnet"),
    "preresnet200": (lambda: models.preact_resnet200(stem="ptcv", stride_in_1x1=True), "ptcv_preresnet"),
    "preresnet1001_cifar10": (lambda: models.cifar_preact1001(stride_in_1x1=False), "ptcv_preresnet"),
}


def size_of(name: str) -> int:
    return 32 if "cifar" in name else 64


@pytest.mark.parametrize("name", PTCV)
def test_pytorchcv(name: str) -> None:
    build, source = PTCV[name]
    x = image(4, 3, size_of(name), size_of(name))
    check_forward(*loaded(build(), ptcv(name), source), x)
    check_training(*loaded(build(), ptcv(name), source), x, rename=from_(source))


@pytest.mark.full
@pytest.mark.parametrize("name", PTCV_DEEP)
def test_pytorchcv_deep(name: str) -> None:
    build, source = PTCV_DEEP[name]
    x = image(4, 3, size_of(name), size_of(name))
    check_forward(*loaded(build(), ptcv(name), source), x)
    if name == "preresnet1001_cifar10":  # three steps of 1001 layers in fp64: maps of 8 x 8 keep them under a minute
        x = image(4, 3, 8, 8)
    check_training(*loaded(build(), ptcv(name), source), x, rename=from_(source), chaotic="1001" in name)


DENSENETS = {
    # pytorchcv compresses and widens its stem without bottlenecks too; the paper does not.
    "densenet40_k12_cifar10": lambda: models.DenseNet(
        12, (12, 12, 12), 24, bn_size=None, compression=0.5, num_classes=10, small=True
    ),
    "densenet100_k12_bc_cifar10": models.cifar_densenet100_k12_bc,
}


@pytest.mark.parametrize("name", DENSENETS)
def test_pytorchcv_densenet(name: str) -> None:
    """Both define the layers in the order of the paper, so tensors are matched in order."""
    ours, stock = DENSENETS[name](), ptcv(name)
    copy_in_order(ours, stock)
    check_forward(ours, stock, image(2, 3, 16, 16), (2, 10))
    check_training(ours, stock, image(2, 3, 16, 16))


@pytest.mark.full
@pytest.mark.parametrize("name", ["densenet190_k40_bc_cifar10", "densenet250_k24_bc_cifar10"])
def test_pytorchcv_densenet_deep(name: str) -> None:
    ours, stock = getattr(models, f"cifar_{name.removesuffix('_cifar10')}")(), ptcv(name)
    copy_in_order(ours, stock)
    check_forward(ours, stock, image(2, 3, 16, 16), (2, 10))
    check_training(ours, stock, image(4, 3, 8, 8), chaotic=True)


@pytest.mark.full
@pytest.mark.parametrize("depth", [32, 44])
def test_pytorchcv_other_depths(depth: int) -> None:
    """Depths for which pytorchcv registers no name, from its constructor."""
    cifar = pytest.importorskip(
        "pytorchcv.models.resnet_cifar", reason="pytorchcv is an independent implementation, not installed"
    )
    torch.manual_seed(0)
    stock = seeded(cifar.get_resnet_cifar(num_classes=10, blocks=depth, bottleneck=False))
    ours, x = models.CifarResNet(depth, shortcut="B"), image(4, 3, 32, 32)
    check_forward(*loaded(ours, stock, "ptcv_resnet"), x, (4, 10))
    check_training(ours, stock, x, rename=from_("ptcv_resnet"))


@pytest.mark.full
def test_timm_resnet200() -> None:
    """timm's keys are torchvision's."""
    ours, stock = models.resnet200(), timm_model("resnet200")
    ours.load_state_dict(stock.state_dict(), strict=True)
    check_forward(ours, stock, image(2, 3, 64, 64), (2, 1000))
    check_training(ours, stock, image(2, 3, 64, 64), chaotic=True)  # the last maps have eight values a channel


@pytest.mark.parametrize(
    "name", ["resnetv2_50", *(pytest.param(f"resnetv2_{depth}", marks=pytest.mark.full) for depth in (101, 152))]
)
def test_timm_resnetv2(name: str) -> None:
    build = getattr(models, f"preact_resnet{name.removeprefix('resnetv2_')}")
    x = image(4, 3, 64, 64)
    check_forward(*loaded(build(stem="timm"), timm_model(name), "timm_resnetv2"), x, (4, 1000))
    check_training(*loaded(build(stem="timm"), timm_model(name), "timm_resnetv2"), x, rename=from_("timm_resnetv2"))


def test_stems_agree_in_eval_where_the_first_scale_is_positive() -> None:
    """BN + ReLU and max-pooling commute for non-negative scales, so the "he" and "timm" stems are one function in eval."""
    he, timm_stem = seeded(models.preact_resnet50()).eval(), models.preact_resnet50(stem="timm").eval()
    state = {("layer1.0." + k if k.startswith("bn1.") else k): v for k, v in he.state_dict().items()}
    timm_stem.load_state_dict(state, strict=True)
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(he(x), timm_stem(x), rtol=1e-4, atol=1e-4)
        he.bn1.weight.neg_()
        timm_stem.layer1[0].bn1.weight.neg_()
        assert (he(x) - timm_stem(x)).abs().max() > 1e-2


class KorniaHeatmaps(nn.Module):
    """kornia's forward returns the last features only; hooks on the score layers give what the paper's net returns."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.found = net, []
        for layer in net.score:
            layer.register_forward_hook(lambda module, args, out: self.found.append(out))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.found.clear()
        self.net(x)
        return list(self.found)

    def __deepcopy__(self, memo):
        import copy

        for layer in self.net.score:
            layer._forward_hooks.clear()
        clone = KorniaHeatmaps(copy.deepcopy(self.net, memo))
        self.__init__(self.net)
        return clone


@pytest.mark.parametrize("stacks", [2, pytest.param(8, marks=pytest.mark.full)])
def test_kornia_hourglass(stacks: int) -> None:
    backbones = pytest.importorskip(
        "kornia.feature.sold2.backbones", reason="kornia is an independent implementation, not installed"
    )
    torch.manual_seed(0)
    net = seeded(backbones.HourglassNet(backbones.Bottleneck2D, lambda c: nn.Conv2d(c, 16, 1), 4, stacks, 1, 16, 3))
    ours = models.hourglass(2, wide_stem=True) if stacks == 2 else models.hourglass8_wide()
    ours.load_state_dict(net.state_dict(), strict=True)
    stock, x = KorniaHeatmaps(net), image(2, 3, 64, 128)
    check_forward(ours, stock, x, (2, 16, 16, 32))
    if stacks == 2:
        check_training(ours, stock, x, rename=lambda tensors: {k.removeprefix("net."): v for k, v in tensors.items()})


def test_converter_errors() -> None:
    with pytest.raises(ValueError, match="source: expected one of torchvision, timm_resnetv2"):
        models.convert_state_dict({}, "fb")
    with pytest.raises(ValueError, match="expected keys of timm_resnetv2, got 'fc.weight'"):
        models.convert_state_dict({"fc.weight": torch.zeros(1)}, "timm_resnetv2")
