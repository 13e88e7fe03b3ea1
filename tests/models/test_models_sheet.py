"""The lecture's reference sheet (systems.md), sections 3 to 8, row by row: which model it is, how many parameters, and which
tests compare it with an independent implementation. A row without a model or without a test fails here.

This file is the map; the tests that it names do the comparing, the ``full`` ones of them in ``make test-full``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from dl4ds_kernels import models

TESTS = Path(__file__).resolve().parents[1]
TORCHVISION, PEERS, REFERENCE = (f"models/test_models_{name}.py::test_" for name in ("torchvision", "peers", "reference"))
YOLO, DARKNET, SEGMENTATION = (
    f"{name}.py::test_" for name in ("detection/test_yolo", "detection/test_darknet_files", "segmentation/test_segmentation")
)
POSE, REGISTRY, INTEROP = (
    f"{name}.py::test_" for name in ("pose/test_pose", "models/test_models_registry", "models/test_models_interop")
)


class Row(NamedTuple):
    """``model``: a registered name, or a builder where a row is an option of one; ``tests``: ids, or their beginning."""

    section: str
    what: str
    model: str | Callable[[], nn.Module]
    parameters: int
    tests: tuple[str, ...]


def _vgg(depth: int, plain: int, bn: int) -> list[Row]:
    def tests(name: str) -> tuple[str, ...]:
        if name == "vgg11_bn":
            return (f"{TORCHVISION}forward[{name}]", f"{TORCHVISION}training_with_a_small_head[{name}]")
        return (f"{TORCHVISION}forward_every_depth[{name}]", f"{TORCHVISION}training_every_vgg_with_a_small_head[{name}]")

    names = ((f"vgg{depth}", plain), (f"vgg{depth}_bn", bn))
    return [Row("4", name, name, count, tests(name)) for name, count in names]


def _resnet(depth: int, post: int, pre: int) -> list[Row]:
    small = depth in (18, 50)
    after = {
        200: (f"{PEERS}timm_resnet200",),
    }.get(depth, (f"{TORCHVISION}forward{'' if small else '_every_depth'}[resnet{depth}]",
                  f"{TORCHVISION}training{'' if small else '_every_depth'}[resnet{depth}]"))  # fmt: skip
    before = {
        18: (f"{PEERS}pytorchcv[preresnet18]",),
        34: (f"{PEERS}pytorchcv_deep[preresnet34]",),
        50: (f"{PEERS}pytorchcv[preresnet50]", f"{PEERS}timm_resnetv2[resnetv2_50]", f"{REFERENCE}preact_deep[preact_resnet50"),
        200: (f"{PEERS}pytorchcv_deep[preresnet200]", f"{REFERENCE}preact_deep[preact_resnet200"),
    }.get(depth, (f"{PEERS}timm_resnetv2[resnetv2_{depth}]",))
    return [
        Row("7.1", f"ResNet-{depth}", f"resnet{depth}", post, after),
        Row("7.1", f"pre-activation ResNet-{depth}", f"preact_resnet{depth}", pre, (*before, f"{REFERENCE}preact[he]")),
    ]


def _cifar(depth: int, count: int, b: int) -> list[Row]:
    early = depth in (20, 56)

    def test(name: str) -> tuple[str, ...]:
        return (f"{REFERENCE}cifar{'' if early and name != 'cifar_plain56' else '_deep'}[{name}",)

    deep = "" if early else "_deep"
    other = f"{PEERS}pytorchcv{deep}[resnet{depth}_cifar10]"
    b_tests = (other if depth in (20, 56, 110) else f"{PEERS}pytorchcv_other_depths[{depth}]",)
    return [
        Row("7.2", f"ResNet-{depth}", f"cifar_resnet{depth}", count, test(f"cifar_resnet{depth}")),
        Row("7.2", f"plain {depth}", f"cifar_plain{depth}", count, test(f"cifar_plain{depth}")),
        Row("7.2", f"ResNet-{depth}, shortcut B", lambda: models.CifarResNet(depth, shortcut="B"), b, b_tests),
    ]


def _hourglass(stacks: int, count: int) -> Row:
    return Row("8", f"{stacks} stacks", f"hourglass{stacks}", count,
               (f"{REFERENCE}hourglass_stacks[{stacks}]", f"{REFERENCE}hourglass"))  # fmt: skip


def _densenet(depth: int, count: int) -> Row:
    name, rest = f"densenet{depth}", "" if depth == 121 else "_every_depth"
    return Row("7.4", name, name, count, (f"{TORCHVISION}forward{rest}[{name}]", f"{TORCHVISION}training{rest}[{name}]"))


def _paper_densenet(depth: int, k: int, count: int) -> Row:
    name = f"cifar_densenet{depth}_k{k}"
    return Row("7.4", name, name, count, (f"{REFERENCE}cifar_densenet_without_bottlenecks[{depth}-{k}]",
                                          f"{REGISTRY}cifar_densenets_without_bottlenecks_by_the_papers_rule"))  # fmt: skip


ROWS = [
    Row("3", "AlexNet 2012", "alexnet_paper", 60_965_224, (f"{REFERENCE}alexnet_paper", f"{REGISTRY}the_papers_remarks")),
    Row("3", "torchvision's AlexNet", "alexnet", 61_100_840,
        (f"{TORCHVISION}forward[alexnet]", f"{TORCHVISION}training_with_a_small_head[alexnet]")),
    *_vgg(11, 132_863_336, 132_868_840), *_vgg(13, 133_047_848, 133_053_736), *_vgg(16, 138_357_544, 138_365_992),
    *_vgg(19, 143_667_240, 143_678_248),
    Row("5.1", "paper net", "yolov1", 271_703_550,
        (f"{REFERENCE}yolov1[paper]", f"{REFERENCE}yolov1_full_width[paper]", f"{REFERENCE}yolov1_full_width_training[paper]")),
    Row("5.1", "yolov1.cfg", "yolov1_darknet", 197_301_875,
        (f"{REFERENCE}yolov1[darknet]", f"{REFERENCE}yolov1_full_width[darknet]",
         f"{REFERENCE}yolov1_full_width_training[darknet]", f"{REFERENCE}yolov1_running_statistics[darknet]")),
    Row("5.1", "yolov1-tiny.cfg", "yolov1_tiny", 27_095_374,
        (f"{REFERENCE}yolov1[tiny]", f"{REFERENCE}yolov1_full_width[tiny]", f"{REFERENCE}yolov1_full_width_training[tiny]",
         f"{REFERENCE}yolov1_running_statistics[tiny]", f"{DARKNET}opencv_reads_the_same_network")),
    Row("6.1", "U-Net 2015", "unet", 31_030_658, (f"{REFERENCE}unet[valid]", f"{REFERENCE}unet_full_width")),
    Row("6.1", "U-Net, same, BN", "unet_bn", 31_037_698, (f"{REFERENCE}unet[same]", f"{REFERENCE}unet_bn_full_width[unet_bn-")),
    Row("6.1", "U-Net, bilinear", "unet_bn_bilinear", 17_263_042,
        (f"{REFERENCE}unet[bilinear]", f"{REFERENCE}unet_bn_full_width[unet_bn_bilinear-")),
    # The paper's 19,069,955 leaves the 4,672 of BatchNorm out.
    Row("6.2", "3-D U-Net", "unet3d", 19_069_955 + 4_672, (f"{REFERENCE}unet3d", f"{REFERENCE}unet3d_full_width")),
    Row("6.2", "3-D U-Net with biases", lambda: models.unet3d(up_bias=True), 19_075_523, (f"{REFERENCE}unet3d",)),
    Row("6.3", "DeconvNet", "deconvnet", 251_805_653,
        (f"{REFERENCE}deconvnet", f"{REFERENCE}deconvnet_full_width", f"{REFERENCE}deconvnet_training")),
    Row("6.3", "DeconvNet without BN", lambda: models.deconvnet(batch_norm=False), 251_772_245,
        (f"{REFERENCE}deconvnet_without_batch_norm",)),
    *_resnet(18, 11_689_512, 11_687_720), *_resnet(34, 21_797_672, 21_795_880), *_resnet(50, 25_557_032, 25_549_352),
    *_resnet(101, 44_549_160, 44_541_480), *_resnet(152, 60_192_808, 60_185_128), *_resnet(200, 64_673_832, 64_666_152),
    Row("7.1", "stem of pytorchcv", lambda: models.preact_resnet50(stem="ptcv"), 25_549_480,
        (f"{PEERS}pytorchcv[preresnet50]",)),
    Row("7.1", "stem of pytorchcv, 200", lambda: models.preact_resnet200(stem="ptcv"), 64_666_280,
        (f"{PEERS}pytorchcv_deep[preresnet200]",)),
    Row("7.1", "stem of timm", lambda: models.preact_resnet50(stem="timm"), 25_549_352,
        (f"{PEERS}timm_resnetv2[resnetv2_50]", f"{PEERS}stems_agree_in_eval_where_the_first_scale_is_positive")),
    Row("7.1", "stride in the 1x1", lambda: models.resnet50(stride_in_1x1=True), 25_557_032,
        (f"{PEERS}pytorchcv_deep[resnet50]", f"{REFERENCE}preact[stride in 1x1, scaled]")),
    *_cifar(20, 269_722, 272_474), *_cifar(32, 464_154, 466_906), *_cifar(44, 658_586, 661_338), *_cifar(56, 853_018, 855_770),
    *_cifar(110, 1_727_962, 1_730_714),
    Row("7.2", "ResNet-1202", "cifar_resnet1202", 19_421_274, (f"{REFERENCE}cifar_resnet1202",)),
    Row("7.2", "pre-activation 164", "cifar_preact164", 1_703_258, (f"{PEERS}pytorchcv_deep[preresnet164bn_cifar10]",)),
    Row("7.2", "pre-activation 1001", "cifar_preact1001", 10_327_706, (f"{PEERS}pytorchcv_deep[preresnet1001_cifar10]",)),
    _densenet(121, 7_978_856), _densenet(169, 14_149_480), _densenet(201, 20_013_928), _densenet(161, 28_681_000),
    _paper_densenet(40, 12, 1_019_722), _paper_densenet(100, 12, 6_979_642), _paper_densenet(100, 24, 27_249_082),
    Row("7.4", "BC (100, 12)", "cifar_densenet100_k12_bc", 769_162,
        (f"{PEERS}pytorchcv_densenet[densenet100_k12_bc_cifar10]",)),
    Row("7.4", "BC (250, 24)", "cifar_densenet250_k24_bc", 15_324_406,
        (f"{PEERS}pytorchcv_densenet_deep[densenet250_k24_bc_cifar10]",)),
    Row("7.4", "BC (190, 40)", "cifar_densenet190_k40_bc", 25_624_430,
        (f"{PEERS}pytorchcv_densenet_deep[densenet190_k40_bc_cifar10]",)),
    _hourglass(1, 3_426_448), _hourglass(2, 6_570_400), _hourglass(4, 12_858_304), _hourglass(8, 25_434_112),
    Row("8", "stem of pytorch-pose", "hourglass8_wide", 25_594_624,
        (f"{PEERS}kornia_hourglass[2]", f"{PEERS}kornia_hourglass[8]")),
]  # fmt: skip

# What the sheet says beside the nets, and where it is tested.
FACTS = {
    "3 ten-crop evaluation": (f"{INTEROP}multi_crop",),
    "5.2 output layout, decode, class-wise NMS": (
        f"{YOLO}split_and_join", f"{YOLO}decode_index_by_index", f"{YOLO}detect_is_darknets_class_wise_suppression"
    ),
    "5.3 loss, targets": (f"{YOLO}loss_term_by_term", f"{YOLO}darknets_gradient_is_scale_times_difference", f"{YOLO}targets"),
    "5.5 .weights, .cfg, pooling, BN": (
        f"{DARKNET}published_file_sizes", f"{DARKNET}round_trip_is_byte_exact", f"{DARKNET}truncated_files",
        f"{DARKNET}bn_conventions", f"{DARKNET}training_normalises_by_the_unbiased_variance", f"{DARKNET}maxpool_is_darknets",
    ),
    "6.1 sizes, overlap tiles, weights": (
        f"{REGISTRY}valid_sizes_of_the_unet", f"{SEGMENTATION}overlap_tile_through_the_unet",
        f"{SEGMENTATION}separation_weights_pixel_by_pixel", f"{SEGMENTATION}weighted_cross_entropy",
    ),
    "6.2 vote of five, components": (
        f"{SEGMENTATION}unanimous_vote_of_five", f"{SEGMENTATION}connected_components_are_scipys"
    ),
    "6.3 mean IoU": (f"{SEGMENTATION}mean_iou",),
    "7.4 channels of the figures": (f"{REGISTRY}channels_of_the_dense_blocks_in_the_figures",),
    "8 heatmaps, loss, PCK": (
        f"{POSE}heatmaps_pixel_by_pixel", f"{POSE}decode_moves_a_quarter_towards_the_higher_neighbour", f"{POSE}stacked_mse",
        f"{POSE}pck_joint_by_joint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section} {row.what}")
def test_row_has_its_model(row: Row) -> None:
    if isinstance(row.model, str):
        assert models.model_info(row.model).parameters == row.parameters
        model = models.build_on_meta(row.model)
    else:
        with torch.device("meta"):
            model = row.model()
    assert models.count_parameters(model) == row.parameters


def test_every_model_is_a_row() -> None:
    assert sorted(row.model for row in ROWS if isinstance(row.model, str)) == sorted(models.list_models())


@pytest.mark.slow
def test_every_row_has_its_parity_tests() -> None:
    """The tests that the rows name are there: collected by pytest, not searched for in the text."""
    folders = ("models", "detection", "segmentation", "pose")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    found = subprocess.run([*command, *(str(TESTS / f) for f in folders)], capture_output=True, text=True, cwd=TESTS.parent)
    ids = {line.removeprefix("tests/") for line in found.stdout.splitlines() if "::" in line}
    assert found.returncode == 0 and len(ids) > 200, found.stdout[-2000:]
    wanted = [(f"{row.section} {row.what}", test) for row in ROWS for test in row.tests]
    wanted += [(fact, test) for fact, tests in FACTS.items() for test in tests]
    for what, test in wanted:
        exact = test.endswith("]") or "[" not in test
        there = any(i == test or i.startswith(f"{test}[") for i in ids) if exact else any(i.startswith(test) for i in ids)
        assert there, f"{what}: no test {test}"


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_layer_by_layer() -> None:
    """The counts of single layers in the sheet's tables."""
    alexnet = models.build_on_meta("alexnet_paper")
    layers = [m for m in alexnet.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [parameters(m) for m in layers] == [
        34_944, 307_456, 885_120, 663_936, 442_624, 37_752_832, 16_781_312, 4_097_000
    ]  # fmt: skip
    paper, darknet = models.build_on_meta("yolov1"), models.build_on_meta("yolov1_darknet")
    by_kind: dict[tuple[str, str], list[int]] = {}
    for name, net in (("paper", paper), ("darknet", darknet)):
        for kind, layer in zip(net.kinds, net.layers, strict=True):
            by_kind.setdefault((name, kind), []).append(parameters(layer))
    assert len(by_kind["paper", "convolutional"]) == len(by_kind["darknet", "convolutional"]) == 24
    assert sum(by_kind["paper", "convolutional"]) == 60_155_968 and sum(by_kind["darknet", "convolutional"]) == 60_169_152
    assert by_kind["paper", "connected"] == [205_524_992, 6_022_590]
    assert by_kind["darknet", "local"] == [115_618_048] and by_kind["darknet", "connected"] == [21_514_675]
    hourglass = models.build_on_meta("hourglass1")
    assert parameters(hourglass.hg[0]) == 2_788_864 and parameters(hourglass.res[0]) == 214_528
