"""The list of models: exact parameter counts and output shapes of every one of them, without memory for a single weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import dl4ds_kernels as dk
from dl4ds_kernels import models

NAMES = models.list_models()
# Outputs for a batch of two at the registered input size; the rest are classifiers with the default number of classes.
SHAPES = {
    "unet": (2, 2, 388, 388),
    "unet_bn": (2, 2, 512, 512),
    "unet_bn_bilinear": (2, 2, 512, 512),
    "unet3d": (2, 3, 44, 44, 28),
    "deconvnet": (2, 21, 224, 224),
    "yolov1": (2, 1470),
    "yolov1_darknet": (2, 1715),
    "yolov1_tiny": (2, 1470),
}
# Counts of the lecture's reference sheet that are not those of a default model.
VARIANTS = {
    "alexnet_paper without groups": (lambda: _without_groups(), 62_378_344),
    "unet 1 to 1": (lambda: models.unet(1, 1), 31_030_593),
    "unet 3 to 2": (lambda: models.unet(3, 2), 31_031_810),
    "unet 3 to 1": (lambda: models.unet(3, 1), 31_031_745),
    "unet3d with biases of the up-convolutions": (lambda: models.unet3d(up_bias=True), 19_075_523),
    "deconvnet without BatchNorm": (lambda: models.deconvnet(batch_norm=False), 251_772_245),
    "cifar_resnet20 shortcut B": (lambda: models.cifar_resnet20(shortcut="B"), 272_474),
    "cifar_resnet32 shortcut B": (lambda: models.cifar_resnet32(shortcut="B"), 466_906),
    "cifar_resnet44 shortcut B": (lambda: models.cifar_resnet44(shortcut="B"), 661_338),
    "cifar_resnet56 shortcut B": (lambda: models.cifar_resnet56(shortcut="B"), 855_770),
    "cifar_resnet110 shortcut B": (lambda: models.cifar_resnet110(shortcut="B"), 1_730_714),
    "preact_resnet50 timm": (lambda: models.preact_resnet50(stem="timm"), 25_549_352),
    "preact_resnet50 ptcv": (lambda: models.preact_resnet50(stem="ptcv"), 25_549_480),
    "preact_resnet200 ptcv": (lambda: models.preact_resnet200(stem="ptcv"), 64_666_280),
    "resnet50 stride in 1x1": (lambda: models.resnet50(stride_in_1x1=True), 25_557_032),
}


def _without_groups() -> nn.Module:
    net = models.alexnet_paper()
    for i, layer in enumerate(net.features):
        if isinstance(layer, nn.Conv2d) and layer.groups == 2:
            net.features[i] = nn.Conv2d(2 * layer.weight.shape[1], layer.out_channels, layer.kernel_size, padding=layer.padding)
    return net


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_output_shape(name: str) -> None:
    info = models.model_info(name)
    model = models.build_on_meta(name).eval()
    assert models.count_parameters(model) == info.parameters
    with torch.no_grad():
        out = model(torch.empty(2, *info.input_size, device="meta"))
    if name.startswith("hourglass"):
        stacks = int(name.removeprefix("hourglass")[0])
        assert [tuple(o.shape) for o in out] == [(2, 16, 64, 64)] * stacks
    else:
        classes = 10 if name.startswith("cifar") else 1000
        assert tuple(out.shape) == SHAPES.get(name, (2, classes))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_of_variants(name: str) -> None:
    build, expected = VARIANTS[name]
    with torch.device("meta"):
        assert models.count_parameters(build()) == expected


def test_the_papers_remarks() -> None:
    """Most of AlexNet is in its dense layers; the 3-D U-Net's published count leaves BatchNorm out."""
    alexnet = models.build_on_meta("alexnet_paper")
    dense = sum(p.numel() for m in alexnet.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    assert dense == 58_631_144 and dense / models.count_parameters(alexnet) > 0.96
    unet3d = models.build_on_meta("unet3d")
    norms = sum(p.numel() for m in unet3d.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters())
    assert norms == 4_672 and models.count_parameters(unet3d) - norms == 19_069_955


@pytest.mark.parametrize(("depth", "growth", "paper"), [(40, 12, 1.0), (100, 12, 7.0), (100, 24, 27.2)])
def test_cifar_densenets_without_bottlenecks_by_the_papers_rule(depth: int, growth: int, paper: float) -> None:
    """Layer by layer: BatchNorm and a 3x3 convolution a layer, BatchNorm and a 1x1 convolution a transition, no compression."""
    channels, count = 16, 3 * 16 * 9
    for block in range(3):
        for _ in range((depth - 4) // 3):
            count += 2 * channels + 9 * channels * growth
            channels += growth
        if block < 2:
            count += 2 * channels + channels * channels
    count += 2 * channels + 10 * channels + 10
    assert models.model_info(f"cifar_densenet{depth}_k{growth}").parameters == count
    assert round(count / 1e6, 1) == pytest.approx(paper, abs=0.051)


def test_channels_of_the_dense_blocks_in_the_figures() -> None:
    """3 -> 35 -> 67 -> 99 with growth 32, and k0 + 4l with growth 4 and five layers."""
    from dl4ds_kernels.models.densenet import DenseBlock

    for channels, growth, layers, expected in ((3, 32, 3, [3, 35, 67]), (6, 4, 5, [6, 10, 14, 18, 22])):
        block = DenseBlock(layers, channels, growth, None, 0.0, False)
        assert [layer.norm1.num_features for layer in block.values()] == expected
        assert block(torch.randn(2, channels, 5, 5)).shape[1] == channels + layers * growth


def test_create_and_options() -> None:
    net = models.create("cifar_resnet20", num_classes=7)
    assert net.fc.out_features == 7
    assert dk.models.resnet18 is models.resnet18
    assert models.list_models("alexnet") == ["alexnet", "alexnet_paper"]
    assert sorted(NAMES) == sorted({name for family in {models.model_info(n).family for n in NAMES}
                                    for name in models.list_models(family)})  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.create("resnet5"), "resnet50"),
        (lambda: models.list_models("lenet"), "expected one of alexnet, vgg"),
        (lambda: models.VGG(12), "VGG: depth: expected one of [11, 13, 16, 19], got 12"),
        (lambda: models.CifarResNet(21), "CifarResNet: depth: expected 6n + 2 from 8 on, got 21"),
        (lambda: models.CifarResNet(20, shortcut="C"), "CifarResNet: shortcut: expected 'A', 'B' or 'none', got 'C'"),
        (lambda: models.CifarPreActResNet(20), None),
        (lambda: models.CifarPreActResNet(21), "CifarPreActResNet: depth: expected 9n + 2 from 11 on, got 21"),
        (lambda: models.cifar_densenet(41, 12), "cifar_densenet: depth: expected 4 + 6n, got 41"),
        (lambda: models.preact_resnet18(stem="fb"), "PreActResNet: stem: expected 'he', 'timm' or 'ptcv', got 'fb'"),
        (lambda: models.preact_resnet18(stride_in_1x1=True), "PreActBasicBlock: stride_in_1x1: expected False"),
        (lambda: models.resnet18(stride_in_1x1=True), "ResNet: stride_in_1x1: expected False for BasicBlock"),
        (lambda: models.UNet(padding="full"), "UNet: padding: expected 'valid' or 'same', got 'full'"),
        (lambda: models.hourglass(features=6), "StackedHourglass: features: expected a multiple of 4, got 6"),
        (lambda: models.hourglass(0), "StackedHourglass: stacks, joints, depth: expected 1 or more, got 0"),
    ],
)
def test_wrong_options(call, message: str | None) -> None:
    if message is None:
        assert call() is not None
        return
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("alexnet_paper", (1, 3, 224, 224), "alexnet_paper: x: expected shape (N, 3, 227, 227), got (1, 3, 224, 224)"),
        ("unet", (1, 1, 570, 572), "UNet: x: expected sides of 188 + 16n with valid convolutions (next: (572, 572))"),
        ("unet_bn", (1, 3, 8, 64), "UNet: x: expected sides from 16 on, got (8, 64)"),
        ("unet3d", (1, 3, 132, 132, 115), "UNet3d: x: expected sides of 92 + 8n (valid), got (132, 132, 115)"),
        ("deconvnet", (1, 3, 200, 224), "DeconvNet: x: expected sides that are multiples of 32 from 224 on, got (200, 224)"),
        ("hourglass1", (1, 3, 250, 256), "StackedHourglass: x: expected sides that are multiples of 64, got (250, 256)"),
        ("yolov1_tiny", (1, 3, 416, 416), "DarknetNet: x: expected shape (N, 3, 448, 448), got (1, 3, 416, 416)"),
    ],
)
def test_wrong_input_size(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        models.build_on_meta(name)(torch.empty(shape, device="meta"))
    assert message in str(error.value)


def test_valid_sizes_of_the_unet() -> None:
    """Every size that the helper names works, and the table of the paper's figure comes out."""
    assert [models.UNet.valid_size(s) for s in (1, 188, 189, 572, 573)] == [188, 188, 204, 572, 588]
    net = models.build_on_meta("unet")
    for size in (188, 204, 572):
        out = net(torch.empty(1, 1, size, size + 16, device="meta"))
        assert tuple(out.shape[2:]) == (size - 184, size - 168)
    seen = []
    for level in net.down:
        level.register_forward_hook(lambda module, args, out: seen.append((args[0].shape[2], out.shape[2], out.shape[1])))
    for level in net.decode:
        level.register_forward_hook(lambda module, args, out: seen.append((args[0].shape[2], out.shape[2], out.shape[1])))
    net(torch.empty(1, 1, 572, 572, device="meta"))
    assert seen == [
        (572, 568, 64), (284, 280, 128), (140, 136, 256), (68, 64, 512), (32, 28, 1024),
        (56, 52, 512), (104, 100, 256), (200, 196, 128), (392, 388, 64),
    ]  # fmt: skip


def test_narrow_hourglasses() -> None:
    """Every width of the stem and the hourglasses follows ``features``."""
    with torch.device("meta"):
        narrow, wide = models.hourglass(2, 3, features=64), models.hourglass(2, 3)
    assert [tuple(o.shape) for o in narrow.eval()(torch.empty(1, 3, 64, 64, device="meta"))] == [(1, 3, 16, 16)] * 2
    for (name, a), (other, b) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        assert name == other
        fixed = {3}  # channels of the picture, joints and kernels
        assert all(4 * s == t or s == t and s in {*fixed, 1, 7} for s, t in zip(a.shape, b.shape, strict=True)), name


def test_meta_models_hold_no_memory() -> None:
    model = models.build_on_meta("vgg19")
    assert all(p.is_meta for p in model.parameters())
    assert math.prod(model.classifier[0].weight.shape) == 25_088 * 4096
    assert nn.init.normal_(torch.empty(1000)).std() > 0.5  # initialisation works again
