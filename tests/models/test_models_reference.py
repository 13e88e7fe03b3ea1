"""Models that no library has, against plain-torch nets written from the papers (reference_*.py)."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from _parity import check_forward, check_training, copy_in_order, image, seeded
from reference_alexnet import PaperAlexNet
from reference_deconvnet import PaperDeconvNet, share_switches
from reference_densenet import PlainDenseNet
from reference_hourglass import PaperHourglass
from reference_resnet import CifarNet, PreNet
from reference_unet import SameUNet, UNet3, ValidUNet
from reference_yolo import Yolo
from torch import nn

from dl4ds_kernels import models
from dl4ds_kernels.modules import PreActBottleneck

SCALE = 0.5**0.5


def twins(ours: nn.Module, reference: nn.Module, gain: float = 1.0) -> tuple[nn.Module, nn.Module]:
    seeded(reference, gain=gain)
    copy_in_order(ours, reference)
    return ours, reference


CIFAR = {
    "cifar_resnet20": (models.cifar_resnet20, lambda: CifarNet(3)),
    "cifar_resnet56": (models.cifar_resnet56, lambda: CifarNet(9)),
    "cifar_plain20": (models.cifar_plain20, lambda: CifarNet(3, skip=False)),
    "cifar_resnet20 scaled": (lambda: models.cifar_resnet20(residual_scale=SCALE), lambda: CifarNet(3, scale=SCALE)),
}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar(name: str) -> None:
    ours, reference = twins(*(build() for build in CIFAR[name]))
    check_forward(ours, reference, image(8, 3, 32, 32), (8, 10))
    check_training(ours, reference, image(8, 3, 32, 32))


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "n", "skip"),
    [
        ("cifar_resnet32", 5, True), ("cifar_resnet44", 7, True), ("cifar_resnet110", 18, True), ("cifar_plain32", 5, False),
        ("cifar_plain44", 7, False), ("cifar_plain56", 9, False), ("cifar_plain110", 18, False),
    ],
)  # fmt: skip
def test_cifar_deep(name: str, n: int, skip: bool) -> None:
    ours, reference = twins(getattr(models, name)(), CifarNet(n, skip))
    check_forward(ours, reference, image(8, 3, 32, 32), (8, 10))
    check_training(ours, reference, image(8, 3, 32, 32), chaotic=name == "cifar_plain110")


@pytest.mark.full
def test_cifar_resnet1202() -> None:
    """600 blocks: scales of 0.2 keep the sum of their branches in range."""
    ours, reference = twins(models.cifar_resnet1202(), CifarNet(200), gain=0.2)
    check_forward(ours, reference, image(2, 3, 32, 32), (2, 10))
    check_training(ours, reference, image(2, 3, 16, 16), chaotic=True)


@pytest.mark.parametrize(("depth", "growth"), [(40, 12), *(pytest.param(100, k, marks=pytest.mark.full) for k in (12, 24))])
def test_cifar_densenet_without_bottlenecks(depth: int, growth: int) -> None:
    ours, reference = twins(getattr(models, f"cifar_densenet{depth}_k{growth}")(), PlainDenseNet(depth, growth))
    check_forward(ours, reference, image(2, 3, 32, 32), (2, 10))
    check_training(ours, reference, image(4, 3, 16, 16))


PREACT = {
    "he": ({}, {}),
    "stride in 1x1, scaled": ({"stride_in_1x1": True, "residual_scale": SCALE}, {"stride_first": True, "scale": SCALE}),
}


@pytest.mark.parametrize("name", PREACT)
def test_preact(name: str) -> None:
    options, reference_options = PREACT[name]
    ours = models.PreActResNet(PreActBottleneck, (2, 2, 2, 2), **options)
    ours, reference = twins(ours, PreNet((2, 2, 2, 2), **reference_options))
    check_forward(ours, reference, image(4, 3, 64, 64), (4, 1000))
    check_training(ours, reference, image(4, 3, 64, 64))


@pytest.mark.full
@pytest.mark.parametrize(("name", "counts"), [("preact_resnet50", (3, 4, 6, 3)), ("preact_resnet200", (3, 24, 36, 3))])
def test_preact_deep(name: str, counts: tuple[int, ...]) -> None:
    ours, reference = twins(getattr(models, name)(), PreNet(counts))
    check_forward(ours, reference, image(2, 3, 96, 96), (2, 1000))
    check_training(ours, reference, image(2, 3, 96, 96), chaotic=name == "preact_resnet200")


def test_alexnet_paper() -> None:
    ours, reference = twins(models.alexnet_paper(num_classes=10), PaperAlexNet(10))
    check_forward(ours, reference, image(2, 3, 227, 227), (2, 10))
    check_training(ours, reference, image(2, 3, 227, 227), steps=1, bn=False)


YOLO = {"paper": models.yolov1, "darknet": models.yolov1_darknet, "tiny": models.yolov1_tiny}


def thin(kind: str, divisor: int) -> models.DarknetNet:
    """The net with every number of filters divided, the last layer as it is."""
    text = models.yolov1_cfg(kind)
    text = re.sub(r"filters=(\d+)", lambda m: f"filters={int(m[1]) // divisor}", text)
    return models.DarknetNet.from_text(text.replace("output=4096", f"output={4096 // divisor}"))


@pytest.mark.parametrize("kind", ["paper", "darknet", "tiny"])
def test_yolov1(kind: str) -> None:
    ours, reference = twins(thin(kind, 8), Yolo(kind, 8))
    out = {"paper": 1470, "darknet": 1715, "tiny": 1470}[kind]
    check_forward(ours, reference, image(2, 3, 448, 448), (2, out))
    check_training(ours, reference, image(2, 3, 448, 448), bn=kind != "paper")


@pytest.mark.parametrize("kind", ["darknet", "tiny"])
def test_yolov1_running_statistics(kind: str) -> None:
    """Darknet's averages (0.99, 0.01) after three batches."""
    ours, reference = twins(thin(kind, 16), Yolo(kind, 16))
    for net in (ours.train(), reference.train()):
        for step in range(3):
            net(image(2, 3, 448, 448, seed=step))
    pairs = [(n, b) for n, b in reference.named_buffers() if "running" in n]
    mine = [b for n, b in ours.named_buffers() if "running" in n]
    assert len(pairs) == len(mine) > 0
    for (name, want), got in zip(pairs, mine, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["paper", "darknet", "tiny"])
def test_yolov1_full_width(kind: str) -> None:
    """The paper's 271,703,550 parameters with real numbers in them, 197,301,875 and 27,095,374."""
    ours, reference = twins(YOLO[kind](), Yolo(kind))
    check_forward(ours, reference, image(1, 3, 448, 448), (1, 1715 if kind == "darknet" else 1470))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["paper", "darknet", "tiny"])
def test_yolov1_full_width_training(kind: str) -> None:
    """A step of the whole nets, in fp64 too: 13 GB of memory for the paper's."""
    ours, reference = twins(YOLO[kind](), Yolo(kind))
    check_training(ours, reference, image(1, 3, 448, 448), bn=kind != "paper", steps=1 if kind == "paper" else 3)


UNETS = {
    "valid": (lambda w: models.unet(2, 3, width=w), lambda w: ValidUNet(2, 3, w), (1, 2, 204, 188), (1, 3, 20, 4)),
    "same": (lambda w: models.unet_bn(width=w), lambda w: SameUNet(3, 2, w, False), (2, 3, 48, 64), (2, 2, 48, 64)),
    "same, odd": (lambda w: models.unet_bn(width=w), lambda w: SameUNet(3, 2, w, False), (2, 3, 49, 71), (2, 2, 49, 71)),
    "bilinear": (
        lambda w: models.unet_bn_bilinear(width=w), lambda w: SameUNet(3, 2, w, True), (2, 3, 48, 71), (2, 2, 48, 71)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    build, reference, shape, out = UNETS[name]
    ours, stock = twins(build(16), reference(16))
    check_forward(ours, stock, image(*shape), out)
    check_training(ours, stock, image(*shape), bn=name != "valid")


@pytest.mark.full
def test_unet_full_width() -> None:
    ours, stock = twins(models.unet(), ValidUNet(1, 2, 64))
    check_forward(ours, stock, image(1, 1, 572, 572), (1, 2, 388, 388))
    check_training(ours, stock, image(1, 1, 204, 188), bn=False)


@pytest.mark.full
@pytest.mark.parametrize(("name", "bilinear"), [("unet_bn", False), ("unet_bn_bilinear", True)])
def test_unet_bn_full_width(name: str, bilinear: bool) -> None:
    ours, stock = twins(getattr(models, name)(), SameUNet(3, 2, 64, bilinear))
    check_forward(ours, stock, image(1, 3, 128, 144), (1, 2, 128, 144))
    check_training(ours, stock, image(2, 3, 64, 64))


@pytest.mark.full
def test_unet3d_full_width() -> None:
    ours, stock = twins(models.unet3d(), UNet3(3, 3, 32))
    check_forward(ours, stock, image(1, 3, 92, 92, 92), (1, 3, 4, 4, 4))
    check_training(ours, stock, image(1, 3, 92, 92, 92), steps=1)  # three in fp64 take a quarter of an hour; width 4 has them


def test_unet3d() -> None:
    ours, stock = twins(models.unet3d(2, 3, width=4), UNet3(2, 3, 4))
    check_forward(ours, stock, image(1, 2, 92, 100, 92), (1, 3, 4, 12, 4))
    check_training(ours, stock, image(1, 2, 92, 100, 92))


def test_unet3d_same_padding() -> None:
    """Same-padded: the size of the output is that of the input."""
    assert models.unet3d(1, 2, padding="same", width=4)(image(1, 1, 16, 24, 8)).shape == (1, 2, 16, 24, 8)


def _check_deconvnet(ours: nn.Module, stock: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """check_forward with the fp64 net's switches in all of them, and the recorded forward beside the plain one.

    Of a few million maxima some are closer to the next value than rounding, in stock torch as in ours, and one that goes
    elsewhere changes a thousand outputs behind it. So every net must choose the fp64 net's switches up to rounding, and takes
    them.
    """
    _copy_deconvnet(ours, stock)
    x = image(1, 3, 224, 224)
    with torch.no_grad():
        recorded = copy.deepcopy(ours).eval()  # what is recorded runs past the patch below
        recorded(x)
        out = recorded(x)
        assert torch.equal(recorded(x), out), "a repeated recording"
    with monkeypatch.context() as patch:
        share_switches(patch, stock, x, sys.modules[type(ours).__module__])
        check_forward(ours, stock, x, (1, 21, 224, 224))


@pytest.mark.slow
def test_deconvnet(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_deconvnet(models.deconvnet(fc_channels=32), seeded(PaperDeconvNet(21, 32)), monkeypatch)


@pytest.mark.full
def test_deconvnet_full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_deconvnet(models.deconvnet(), seeded(PaperDeconvNet(21, 4096)), monkeypatch)


@pytest.mark.full
def test_deconvnet_without_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = models.deconvnet(batch_norm=False, fc_channels=32), seeded(PaperDeconvNet(21, 32, norm=False))
    _check_deconvnet(ours, stock, monkeypatch)
    ours_name = {id(tensor): name for name, tensor in _our_names(stock).items()}
    names = {name: ours_name[id(tensor)] for name, tensor in stock.named_parameters()}
    check_training(
        ours, stock, image(1, 3, 224, 224), bn=False, steps=1, rename=lambda ts: {names[k]: t for k, t in ts.items()}
    )


@pytest.mark.full
def test_deconvnet_training() -> None:
    ours, stock = models.deconvnet(fc_channels=32), seeded(PaperDeconvNet(21, 32))
    _copy_deconvnet(ours, stock)
    # The reference's tensors under our names: those that are the same object.
    ours_name = {id(tensor): name for name, tensor in _our_names(stock).items()}
    names = {name: ours_name[id(tensor)] for name, tensor in (*stock.named_parameters(), *stock.named_buffers())}
    check_training(ours, stock, image(2, 3, 224, 224), rename=lambda ts: {names[k]: t for k, t in ts.items()})


def _places(stock: PaperDeconvNet) -> dict[str, nn.Module]:
    """Our prefix of each of the reference's steps: convolution, BatchNorm where there is one, ReLU."""
    places, apart = {}, 3 if isinstance(stock.back.norm, nn.BatchNorm2d) else 2
    for ours, theirs in (("encoder", stock.down), ("decoder", stock.up)):
        for s, stage in enumerate(theirs):
            places |= {f"{ours}.{s}.{apart * k}": step for k, step in enumerate(stage)}
    return places | {f"middle.{apart * k}": step for k, step in enumerate((stock.fc6, stock.fc7, stock.back))}


def _our_names(stock: PaperDeconvNet) -> dict[str, torch.Tensor]:
    named = {f"head.{k}": v for k, v in stock.scores.state_dict(keep_vars=True).items()}
    for place, step in _places(stock).items():
        prefix, number = place.rsplit(".", 1)
        named |= {f"{prefix}.{number}.{k}": v for k, v in step.layer.state_dict(keep_vars=True).items()}
        named |= {f"{prefix}.{int(number) + 1}.{k}": v for k, v in step.norm.state_dict(keep_vars=True).items()}
    return named


def _copy_deconvnet(ours: nn.Module, stock: PaperDeconvNet) -> None:
    ours.load_state_dict(_our_names(stock), strict=True)


def test_hourglass() -> None:
    ours, stock = models.hourglass(2, joints=5), seeded(PaperHourglass(2, 5))
    _copy_hourglass(ours, stock)
    check_forward(ours, stock, image(2, 3, 64, 128), (2, 5, 16, 32))
    names = _hourglass_names(stock)
    # The lowest maps have four values a channel: a larger step amplifies rounding through their BatchNorms.
    check_training(ours, stock, image(2, 3, 64, 128), lr=1e-7, rename=lambda ts: {names[k]: t for k, t in ts.items()})


@pytest.mark.full
@pytest.mark.parametrize("stacks", [1, 2, 4, 8])
def test_hourglass_stacks(stacks: int) -> None:
    ours, stock = getattr(models, f"hourglass{stacks}")(), seeded(PaperHourglass(stacks, 16))
    _copy_hourglass(ours, stock)
    check_forward(ours, stock, image(1, 3, 128, 128), (1, 16, 32, 32))
    names = _hourglass_names(stock)
    # As above; every further stack amplifies rounding again.
    check_training(
        ours, stock, image(2, 3, 128, 128), lr=1e-7, rename=lambda ts: {names[k]: t for k, t in ts.items()}, chaotic=stacks > 2
    )


def _copy_hourglass(ours: nn.Module, stock: PaperHourglass) -> None:
    ours.load_state_dict(_hourglass_state(stock), strict=True)


def _hourglass_names(stock: PaperHourglass) -> dict[str, str]:
    """The reference's names -> ours: the tensors of both dictionaries are the same memory."""
    ours = {tensor.data_ptr(): name for name, tensor in _hourglass_state(stock).items()}
    return {name: ours[tensor.data_ptr()] for name, tensor in stock.state_dict().items()}


def _hourglass_state(stock: PaperHourglass) -> dict[str, torch.Tensor]:
    """The reference nests its levels, ours lists them: tensors go by their place in the figure."""

    def residual(prefix: str, res: nn.Module) -> dict[str, torch.Tensor]:
        names = {"n1": "bn1", "c1": "conv1", "n2": "bn2", "c2": "conv2", "n3": "bn3", "c3": "conv3", "skip": "downsample.0"}
        return {f"{prefix}.0.{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in res.state_dict().items()}

    state = {f"conv1.{k}": v for k, v in stock.first.state_dict().items()}
    state |= {f"bn1.{k}": v for k, v in stock.norm.state_dict().items()}
    for i, res in enumerate((stock.r1, stock.r2, stock.r3)):
        state |= residual(f"layer{i + 1}", res)
    for s, glass in enumerate(stock.glasses):
        for level in range(3, -1, -1):
            parts = [glass.up1, glass.low1, glass.low3] + ([glass.low2] if level == 0 else [])
            for k, res in enumerate(parts):
                state |= residual(f"hg.{s}.hg.{level}.{k}", res)
            glass = glass.inner
    for ours_name, theirs in (
        ("fc", stock.lin),
        ("score", stock.maps),
        ("fc_", stock.back_features),
        ("score_", stock.back_maps),
    ):
        state |= {f"{ours_name}.{k}": v for k, v in theirs.state_dict().items()}
    for s, res in enumerate(stock.after):
        state |= residual(f"res.{s}", res)
    return state
