"""Declared bytes (ops/_traffic.py) against the design's table, against a sum over layers, and against the simulator.

The design's figures are MB an image at 2 bytes an element, activations of convolutions, BatchNorms and additions only, forward
and backward: its plan A is the library's convolution and one fused pass a BatchNorm, and keeps every activation. A block that
keeps none (functional/residual_block.py) reads each plain convolution output once more and writes the activation once more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from ptxsim.fixture import require_nvcc, require_simulator
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from dl4ds_kernels import models
from dl4ds_kernels._activation import ACTIVATION_CODES
from dl4ds_kernels._define import op
from dl4ds_kernels.benchmark._bytes import Recorder, model_bytes
from dl4ds_kernels.models import resnet as resnet_models
from dl4ds_kernels.modules import residual
from dl4ds_kernels.modules._run import run_conv_bn_act
from dl4ds_kernels.ops import _conv_bn_act_train, _conv_dgrad
from dl4ds_kernels.ops._traffic import FUSED, PASSES, moved

IMAGES = (2, 3, 224, 224)
# Depth: training eager, training plan A (None: the design gives no figure).
GOLDEN = {18: (99.9, 76.1), 50: (470.8, 367.3), 101: (706.0, 547.0), 152: (997.0, 768.0)}
CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")


def megabytes(recorder: Recorder, images: int = IMAGES[0]) -> float:
    return sum(recorder.bytes.values()) / images / 1e6


def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule that keeps every activation."""
    monkeypatch.setattr(residual, "run_residual_block", lambda *_, **__: None)
    monkeypatch.setattr(resnet_models, "run_conv_bn_act_pool", lambda x, c, bn, act, pool: pool(run_conv_bn_act(x, c, bn, act)))


deep = pytest.mark.full
DEPTHS = [18, 50, pytest.param(101, marks=deep), pytest.param(152, marks=deep)]


@pytest.mark.parametrize("depth", DEPTHS)
def test_training_is_plan_a(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer: the design's figure. As blocks: two passes more for every activation that is made again."""
    make = getattr(models, f"resnet{depth}")
    blocks = model_bytes(make, IMAGES, training=True)
    layer_by_layer(monkeypatch)
    layers = model_bytes(make, IMAGES, training=True)
    eager, plan_a = GOLDEN[depth]
    assert megabytes(layers) == pytest.approx(plan_a, rel=0.02)
    assert megabytes(layers) < megabytes(blocks) <= 1.08 * plan_a < eager
    assert megabytes(blocks) <= {50: 368.0}.get(depth, eager)  # the budget of the library's own plan A
    # A block with a projection takes the end of its branch and of its shortcut in one op.
    pairs = {18: 3}.get(depth, 4)
    assert pairs == blocks.launches["dl4ds_kernels::bn_act_pair"] == blocks.launches["dl4ds_kernels::bn_act_pair_bwd"]
    again = blocks.launches["dl4ds_kernels::bn_act"] + 2 * pairs - layers.launches["dl4ds_kernels::bn_act"]
    plain = {18: 9, 50: 33, 101: 67, 152: 101}[depth]  # the stem's and one or two a block
    assert again == plain
    norms = blocks.launches["dl4ds_kernels::bn_act_bwd"] + 2 * pairs
    assert layers.launches["dl4ds_kernels::bn_act"] == norms == layers.launches["aten::convolution"]
    sums = blocks.launches["aten::add_"] - norms  # without num_batches_tracked; one of the gradients of each block's input
    assert sums == {18: 8, 50: 16, 101: 33, 152: 50}[depth]


@deep
@pytest.mark.parametrize("depth", GOLDEN)
def test_the_table_describes_eager_too(depth: int) -> None:
    """The same count over torchvision's models and torch's ops is the design's figure for them."""
    recorder = model_bytes(getattr(torchvision.models, f"resnet{depth}"), IMAGES, training=True)
    assert megabytes(recorder) == pytest.approx(GOLDEN[depth][0], rel=0.01)


@pytest.mark.parametrize("depth", [50, pytest.param(18, marks=deep)])
def test_training_with_statistics_epilogue(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass less over every convolution's output but the stem's, which the kernel cannot serve. Forward alone: the design's
    plan B (280.7 MB for ResNet-50) also takes the gradients' sums in dgrad's epilogue, which is the library's here.
    """
    make = getattr(models, f"resnet{depth}")
    layer_by_layer(monkeypatch)
    plan_a = model_bytes(make, IMAGES, training=True)
    monkeypatch.setattr(_conv_bn_act_train, "has_train", lambda namespace, x: True)
    library = model_bytes(make, IMAGES, training=True)
    fused = model_bytes(make, IMAGES, training=True, table=PASSES | FUSED)
    assert megabytes(library) == pytest.approx(megabytes(plan_a), rel=1e-9)
    outputs = {18: 2.48, 50: 11.11}[depth]  # million elements of all convolutions, an image
    stem = 64 * 112 * 112 / 1e6
    assert megabytes(plan_a) - megabytes(fused) == pytest.approx(2 * (outputs - stem), rel=0.005)
    assert fused.launches["dl4ds_kernels::conv_bn_act_train"] == {18: 20, 50: 53}[depth]


def plan_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both epilogues wherever their kernels can run."""
    monkeypatch.setattr(_conv_bn_act_train, "has_train", lambda namespace, x: True)
    monkeypatch.setattr(_conv_dgrad, "has_dgrad", lambda namespace, x: True)

    def serves(
        namespace: str, x: Tensor, weight: Tensor, geometry: Any, step: int = 0, site: _conv_dgrad.Site | None = None,
        masked: bool = False,
    ) -> bool:  # fmt: skip
        wanted = step > 0 or site is not None
        return wanted and tuple(geometry[0]) == (1, 1) and geometry[3] == 1 and weight.shape[0] % 8 == 0

    monkeypatch.setattr(_conv_dgrad, "serves", serves)


def test_training_with_both_epilogues(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-50 with dgrad's epilogue too. Every gradient sum but those in front of strided 3x3 layers, the stem's and the last
    block's is taken there, those of a projection's BatchNorm with the other one's, and so is every addition of two gradients.
    The shortcut's BatchNorm is part of the block's last pass: 6.0 MB less forward, 3.2 backward (dout and its bits once for
    both).

    Less than the design's plan B (280.7), which takes all sums in epilogues (the rest is 4.6 MB) but normalises the shortcut in
    a pass of its own.
    """
    plan_b(monkeypatch)
    blocks = model_bytes(models.resnet50, IMAGES, training=True, table=PASSES | FUSED)
    assert megabytes(blocks) <= 295.0
    assert blocks.launches["dl4ds_kernels::conv_bn_act_dgrad_bwd"] == 45
    # The stem's, three in front of a strided 3x3, and the last block's, whose output is pooled; four blocks have a projection.
    assert blocks.launches["dl4ds_kernels::bn_act_bwd"] == 1 + 3 + 1 and blocks.launches["dl4ds_kernels::bn_act_pair_bwd"] == 4
    assert blocks.launches["dl4ds_kernels::bn_act_apply_bwd"] == 53 - 5 - 2 * 4
    monkeypatch.setattr(residual._Residual, "keep_activations", True)
    monkeypatch.setattr(resnet_models, "run_conv_bn_act_pool", lambda x, c, bn, act, pool: pool(run_conv_bn_act(x, c, bn, act)))
    kept = model_bytes(models.resnet50, IMAGES, training=True, table=PASSES | FUSED)
    assert megabytes(kept) <= 278.6
    assert kept.launches["dl4ds_kernels::bn_act"] == 0 and kept.launches["dl4ds_kernels::bn_act_bwd"] == 5
    assert kept.launches["dl4ds_kernels::conv_bn_stats"] == 2 * 4 == 2 * kept.launches["dl4ds_kernels::bn_act_pair"]
    layer_by_layer(monkeypatch)
    layers = model_bytes(models.resnet50, IMAGES, training=True, table=PASSES | FUSED)
    assert megabytes(layers) <= 311
    print(megabytes(blocks), megabytes(kept), megabytes(layers))


def test_inference() -> None:
    """ResNet-50: 54.6 MB with the epilogue in the convolution (CPU, Triton), two passes an output more behind a library's."""
    fused = model_bytes(models.resnet50, IMAGES, training=False, table=PASSES | FUSED)
    assert megabytes(fused) == pytest.approx(54.6, rel=0.005) and megabytes(fused) <= 55
    assert fused.launches == {"dl4ds_kernels::conv_bn_act": 53}
    library = model_bytes(models.resnet50, IMAGES, training=False)
    assert megabytes(library) == pytest.approx(54.6 + 2 * 2 * 11.11, rel=0.005)


@deep
def test_inference_of_eager() -> None:
    assert megabytes(model_bytes(torchvision.models.resnet50, IMAGES, training=False)) == pytest.approx(159.6, rel=0.005)


def layer_sum(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[float, float]:
    """(convolutions' own bytes, those of BatchNorm and activation) of a training step, from the sizes that hooks see.

    A convolution: input and output, three times each; not the gradient of the image. A BatchNorm: 3 passes forward, 5 back.
    """
    seen: list[tuple[str, int, int, bool]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append((type(module).__name__, args[0].numel(), out.numel(), args[0].requires_grad))

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make()
        for module in model.modules():
            name = type(module).__name__
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) or "Norm" in name or "ConvBNAct" in name:
                module.register_forward_hook(note)
        model(torch.empty(shape))
    convs = [(i, o, need) for name, i, o, need in seen if name in ("Conv2d", "ConvTranspose2d")]
    own = sum(2 * (3 if need else 2) * (i + o) for i, o, need in convs)
    norms = sum(2 * 8 * o for name, _, o, _ in seen if "Norm" in name or "ConvBNAct" in name)
    return own / shape[0] / 1e6, norms / shape[0] / 1e6


PLAIN = {
    "unet": (partial(models.unet, batch_norm=True), (16, 1, 188, 188)),
    "yolov1_tiny": (models.yolov1_tiny, (2, 3, 448, 448)),
    "vgg16_bn": (models.vgg16_bn, (2, 3, 64, 64)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_nets(name: str) -> None:
    """Without residuals: every convolution's own traffic, 8 passes a BatchNorm; 2 more where a pool follows, and where a
    chain of layers on the CPU makes its activations again in backward (U-Net's pairs).
    """
    make, shape = PLAIN[name]
    recorder = model_bytes(make, shape, training=True)
    own, norms = layer_sum(make, shape)
    mine = sum(recorder.bytes[name] for name in CONVOLUTIONS) / shape[0] / 1e6
    fused = sum(size for name, size in recorder.bytes.items() if "bn_act" in name) / shape[0] / 1e6
    assert mine == pytest.approx(own, rel=1e-6)
    again = recorder.launches["dl4ds_kernels::bn_act"] - recorder.launches["dl4ds_kernels::bn_act_bwd"]
    assert (again > 0) == (name in ("vgg16_bn", "unet"))
    assert norms <= fused <= 1.25 * norms if again else fused == pytest.approx(norms, rel=1e-6)


# ---- The declarations against what the kernels touch, in the simulator.

N, C, H, W = 4, 64, 14, 12
SHAPES = [torch.channels_last, torch.contiguous_format]


def randn(memory_format: torch.memory_format) -> Tensor:
    return torch.randn(N, C, H, W).half().contiguous(memory_format=memory_format)


def touched(reports: list[Any]) -> dict[str, tuple[int, int]]:
    """{tensor: (distinct bytes read, written)}, summed over the kernels of a call."""
    found: dict[str, tuple[int, int]] = {}
    for report in reports:
        for name, t in report.tensors.items():
            read, written = found.get(name, (0, 0))
            found[name] = (read + t["read"], written + t["written"])
    return found


def agree(declared: dict[str, tuple[int, int]] | None, reports: list[Any], rest: float = 0.05) -> None:
    """Maps and masks exactly; vectors and workspaces, which are not declared, under ``rest`` of it all."""
    found, total = touched(reports), 0
    assert declared
    names = {"result": "out" if "out" in found else "dx"}
    for name, both in declared.items():
        assert found.pop(names.get(name, name)) == both, name
        total += sum(both)
    assert sum(map(sum, found.values())) <= rest * total, found


@pytest.fixture
def simulator() -> Any:
    require_nvcc()
    require_simulator()
    import _cuda_launch

    return _cuda_launch


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", SHAPES, ids=["nhwc", "nchw"])
def test_bn_act_touches_what_it_declares(memory_format: torch.memory_format, simulator: Any) -> None:
    relu, none = ACTIVATION_CODES["relu"], 0
    x, residual, dout = (randn(memory_format) for _ in range(3))
    vectors = [torch.rand(C) + 0.5 for _ in range(4)]
    bn, bwd = op("bn_act"), op("bn_act_bwd")
    for training, added, save in ((True, None, False), (True, residual, True), (False, None, False), (False, residual, False)):
        results, reports = simulator.bn_act_fwd(x, *vectors, added, relu, training=training, save_mask=save)
        returned = (results["out"], None, None, results.get("mask"), None, None)
        args = (x, *vectors, added, training, 0.1, 1e-5, False, relu, 0.0, save)
        agree(moved(bn, args, returned), reports)
    mean, rstd = torch.zeros(C), torch.ones(C)
    mask = torch.randint(0, 256, (x.numel() // 8,), dtype=torch.uint8)
    for training, bits, act, needs in (
        (True, None, relu, ("dx", "dweight", "dbias")),
        (True, mask, relu, ("dx", "dweight", "dbias", "dresidual")),
        (True, None, none, ("dx", "dweight", "dbias")),
        (False, None, relu, ("dx", "dweight", "dbias")),
    ):
        results, reports = simulator.bn_act_bwd(
            dout, x, *vectors[:2], mean, rstd, None, bits, act, training=training, needs=needs
        )
        returned = tuple(results.get(name) for name in ("dx", "dweight", "dbias", "dresidual"))
        args = (
            dout,
            x,
            *vectors[:2],
            mean,
            rstd,
            None,
            bits,
            training,
            1e-5,
            False,
            act,
            0.0,
            True,
            True,
            "dresidual" in needs,
        )
        agree(moved(bwd, args, returned), reports)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", SHAPES, ids=["nhwc", "nchw"])
def test_bn_act_pair_touches_what_it_declares(memory_format: torch.memory_format, simulator: Any) -> None:
    """The sums before the elementwise pass are of both maps, by bn_act_bwd's own kernels of the residual alone, or known."""
    from _cuda_pair import Norm, pair_bwd, pair_fwd, pair_sums

    relu = ACTIVATION_CODES["relu"]
    x, residual, dout = (randn(memory_format) for _ in range(3))
    norm = Norm(torch.zeros(C), torch.ones(C), torch.ones(C), torch.ones(C), torch.zeros(C))
    results, reports = pair_fwd(x, residual, norm, norm, relu, save_mask=True)
    args = (x, *norm[:4], residual, *norm[:4], relu, 0.0, True)
    agree(moved(op("bn_act_pair"), args, (results["out"], results["mask"])), reports)
    mask = results["mask"]
    results, reports = pair_bwd(dout, mask, x, residual, norm, norm, torch.zeros(C), relu)
    _, sums = simulator.bn_act_bwd(dout, residual, *[None] * 2, *norm[:2], None, mask, relu, needs=("dweight", "dbias"))
    for report in sums:
        report.tensors = {{"x": "residual"}.get(name, name): t for name, t in report.tensors.items()}
    _, both = pair_sums(dout, mask, x, residual, norm, norm, relu)
    map_args = (x, None, *norm[:2], 1e-5, False, residual, None, *norm[:2], 1e-5, False)
    zeros = torch.zeros(C)
    for known, before in (((zeros, zeros, None), sums), ((None,) * 3, both), ((zeros,) * 3, [])):
        returned = (results["dx"], results["dresidual"], *[torch.zeros(C)] * 3)
        agree(moved(op("bn_act_pair_bwd"), (dout, mask, relu, 0.0, *map_args, *known), returned), before + reports)


@pytest.mark.slow
def test_add_act_touches_what_it_declares(simulator: Any) -> None:
    x, residual, dout = (randn(torch.channels_last) for _ in range(3))
    for name, save in (("relu", True), ("none", False), ("silu", False)):
        code = ACTIVATION_CODES[name]
        out, mask, reports = simulator.add_act_fwd(x, residual, 1.0, code, 0.0, save)
        agree(moved(op("add_act"), (x, residual, 1.0, code, 0.0, save), (out, mask)), reports)
        if name == "none":
            continue
        inputs = (None, None) if save else (x, residual)
        dx, reports = simulator.add_act_bwd(dout, mask, *inputs, 1.0, code, 0.0)
        agree(moved(op("add_act_bwd"), (dout, mask, *inputs, 1.0, code, 0.0), dx), reports)


def test_every_row_is_an_op() -> None:
    for name in PASSES | FUSED:
        namespace, stem = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), stem), name
