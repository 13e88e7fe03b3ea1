"""Sub-blocks of monai and segmentation-models-pytorch, whose whole nets are not the papers', with their weights in ours."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _parity import check_forward, check_training, copy_in_order, image, seeded
from torch import Tensor, nn

from dl4ds_kernels import models

unet = importlib.import_module("dl4ds_kernels.models.unet")
unet3d = importlib.import_module("dl4ds_kernels.models.unet3d")


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is an independent implementation, not installed")


def check(ours: nn.Module, stock: nn.Module, x: Tensor, shape: tuple[int, ...]) -> None:
    seeded(stock)
    copy_in_order(ours, stock)
    # By default a 3x3 layer may be Winograd F(4,3); its bound is the documented 1e-4 of the output's scale, not twice eager's.
    truth = copy.deepcopy(stock).double().eval()(x.double())
    with torch.no_grad():
        got = ours.eval()(x)
    assert tuple(got.shape) == shape
    assert (got - truth).abs().max() <= 1e-5 * truth.abs().max()
    check_training(ours, stock, x)


def test_monai_two_convolutions() -> None:
    basic = library("monai.networks.nets.basic_unet")
    ours = unet._double(3, 10, 10, padding=1, batch_norm=True)
    check(ours, basic.TwoConv(2, 3, 10, act="relu", norm="batch", bias=False), image(2, 3, 17, 14), (2, 10, 17, 14))


def test_monai_two_convolutions_3d() -> None:
    basic = library("monai.networks.nets.basic_unet")
    ours = unet3d._double(2, 6, 6, 1)
    check(ours, basic.TwoConv(3, 2, 6, act="relu", norm="batch", bias=True), image(2, 2, 9, 7, 8), (2, 6, 9, 7, 8))


class Level(nn.Module):
    """One level up of our U-Net as its forward runs it; the skip is made from the input."""

    def __init__(self, net: models.UNet, level: int) -> None:
        super().__init__()
        self.up, self.decode = net.up[level], net.decode[level]

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.cat((skip_of(x), self.up(x)), 1))


def skip_of(x: Tensor) -> Tensor:
    return F.interpolate(x[:, : x.shape[1] // 2], scale_factor=2) + 0.5


class MonaiLevel(nn.Module):
    def __init__(self, up_cat: nn.Module) -> None:
        super().__init__()
        self.up_cat = up_cat

    def forward(self, x: Tensor) -> Tensor:
        return self.up_cat(x, skip_of(x))


def test_monai_level_up() -> None:
    """Up-convolution, concatenation with the skip first, two convolutions: monai's UpCat is the paper's level."""
    basic = library("monai.networks.nets.basic_unet")
    theirs = basic.UpCat(2, 32, 16, 16, act="relu", norm="batch", bias=False, upsample="deconv")
    check(Level(models.unet_bn(width=16), 3), MonaiLevel(theirs), image(2, 32, 9, 11), (2, 16, 18, 22))


def test_monai_densenet() -> None:
    nets = library("monai.networks.nets")
    ours, stock = models.densenet121(num_classes=5), seeded(nets.DenseNet121(2, 3, 5))
    copy_in_order(ours, stock)
    check_forward(ours, stock, image(2, 3, 64, 64), (2, 5))


def test_smp_decoder_block() -> None:
    """smp's block upsamples by nearest neighbours; its two convolutions are those of our decoder."""
    decoder = library("segmentation_models_pytorch.decoders.unet.decoder")
    block = decoder.UnetDecoderBlock(12, 8, 8)
    ours = unet._double(20, 8, 8, padding=1, batch_norm=True)
    check(ours, nn.Sequential(block.conv1, block.conv2), image(2, 20, 12, 15), (2, 8, 12, 15))


class Features(nn.Module):
    """What the last stage of one of our ResNets gives."""

    def __init__(self, net: models.ResNet) -> None:
        super().__init__()
        self.net = net
        net.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        handle = self.net.layer4.register_forward_hook(lambda module, args, out: found.append(out))
        self.net(x)
        handle.remove()
        return found[0]


class LastFeature(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)[-1]


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.full)])
def test_smp_encoder(name: str) -> None:
    smp = library("segmentation_models_pytorch")
    encoder = smp.Unet(name, encoder_weights=None).encoder
    channels = 512 if name == "resnet18" else 2048
    check(Features(getattr(models, name)()), LastFeature(encoder), image(3, 3, 64, 96), (3, channels, 2, 3))
