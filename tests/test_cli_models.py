"""``python -m dl4ds_kernels models`` and ``detect``."""

from __future__ import annotations

import shutil

import pytest
import torch
from _cli import invoke, strict_json
from PIL import Image

from dl4ds_kernels import models
from dl4ds_kernels.cli import _photo
from dl4ds_kernels.detection import WeightsHeader
from dl4ds_kernels.models import DarknetNet

# Multiply-adds (10^9) of the lecture's reference sheet.
GMACS = {
    "alexnet": 0.714, "alexnet_paper": 0.724, "vgg19": 19.632, "resnet18": 1.814, "resnet34": 3.664, "resnet50": 4.089,
    "resnet101": 7.801, "resnet152": 11.514, "preact_resnet200": 15.007, "densenet121": 2.834, "densenet169": 3.360,
    "densenet201": 4.291, "densenet161": 7.728, "yolov1": 20.285, "yolov1_tiny": 1.608, "unet": 150.43, "unet_bn": 192.69,
    "unet3d": 266.7, "deconvnet": 32.746, "hourglass1": 5.150, "hourglass2": 8.335, "hourglass4": 14.703, "hourglass8": 27.440,
}  # fmt: skip

SMALL_CFG = """[net]
height=64
width=64
channels=3
[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=leaky
[maxpool]
size=8
stride=8
[connected]
output=92
activation=linear
[detection]
classes=3
coords=4
side=2
num=4
sqrt=1
"""


def test_models_as_json() -> None:
    code, out, err = invoke("models", "--json", "--family", "resnet")
    assert code == 0, err
    rows = strict_json(out)["models"]
    assert [row["name"] for row in rows] == [f"resnet{d}" for d in (18, 34, 50, 101, 152, 200)]
    assert all(row["parameters"] == row["expected"] for row in rows) and rows[2]["parameters"] == 25_557_032


def test_models_lists_every_model() -> None:
    code, out, err = invoke("models", "--json")
    assert code == 0, err
    assert [row["name"] for row in strict_json(out)["models"]] == models.list_models()


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_of_the_sheet(name: str) -> None:
    digits = 1 if name == "unet3d" else 2 if name.startswith("unet") else 3
    assert models.macs(name) / 1e9 == pytest.approx(GMACS[name], abs=0.51 * 10**-digits)


def test_models_with_multiply_adds() -> None:
    code, out, _ = invoke("models", "--macs", "--family", "alexnet")
    assert code == 0 and "0.714" in out and "0.724" in out


def test_models_table() -> None:
    code, out, _ = invoke("models", "--family", "hourglass")
    assert code == 0 and "25,434,112" in out and "hourglass8_wide" in out
    code, _, err = invoke("models", "--family", "lenet")
    assert code == 2 and "--family: expected one of alexnet, vgg" in err and "got 'lenet'" in err


def test_models_reports_a_wrong_count(monkeypatch) -> None:
    from dl4ds_kernels.models import _registry

    wrong = _registry.ModelInfo("resnet18", "resnet", models.resnet18, 7, (3, 224, 224), "nowhere")
    monkeypatch.setitem(_registry._MODELS, "resnet18", wrong)
    code, _, err = invoke("models", "--family", "resnet")
    assert code == 1 and "parameter counts differ from their source: resnet18" in err


@pytest.fixture
def files(tmp_path):
    """A small network whose boxes are known, as darknet's two files."""
    torch.manual_seed(0)
    net = DarknetNet.from_text(SMALL_CFG)
    connected = net.layers[-1][1]
    with torch.no_grad():
        connected.weight.zero_()
        connected.bias.zero_()
        layout = net.layout
        classes, confidences, boxes = layout.split(connected.bias.unsqueeze(0))
        classes[0, 0, 2], confidences[0, 0, 1] = 0.9, 0.8
        boxes[0, 0, 1] = torch.tensor([0.5, 0.5, 0.5, 0.5])
        classes[0, 3, 1], confidences[0, 3, 0], confidences[0, 3, 2] = 1.0, 0.5, 0.4
        boxes[0, 3, 0] = boxes[0, 3, 2] = torch.tensor([1.0, 1.0, 0.7, 0.5])
    (tmp_path / "a.cfg").write_text(SMALL_CFG)
    net.save_weights(tmp_path / "a.weights", WeightsHeader(0, 1, 0, 77))
    return tmp_path


def test_detect(files) -> None:
    """Boxes by hand: the centre of the first cell; the corner, clipped, its weaker twin suppressed."""
    picture = files / "<b>[bold] $x$.png"
    shutil.copy(_photo.default_photo(), picture)
    (files / "names").write_text("cat\n$dog$\n<i>bird</i>\n")
    arguments = ("detect", picture, "--cfg", files / "a.cfg", "--weights", files / "a.weights", "--names", files / "names")
    code, out, err = invoke(*arguments, "--panels", files / "out" / "p.png", "--json")
    assert code == 0, err
    document = strict_json(out)
    assert document["weights"]["images_seen"] == 77 and document["weights"]["version"] == "0.1.0"
    found = document["detections"]
    assert [row["class"] for row in found] == ["<i>bird</i>", "$dog$"]
    assert [row["score"] for row in found] == pytest.approx([0.72, 0.5])
    w, h = document["image"]["width"], document["image"]["height"]
    assert found[0]["box"] == pytest.approx([w / 8, h / 8, w * 3 / 8, h * 3 / 8], rel=1e-5)
    assert found[1]["box"] == pytest.approx([w * (1 - 0.245), h * (1 - 0.125), w, h], rel=1e-5)
    with Image.open(files / "out" / "p.png") as image:
        assert image.width == 1200 and len(image.convert("RGB").resize((60, 40)).getcolors(4000)) > 100
    code, out, err = invoke(*arguments, "--panels", files / "p.png", "--iou", 1.0, "--threshold", 0.1)
    assert code == 0 and out.count("$dog$") == 2 and "0.720" in out and picture.name in out


def test_detect_without_weights_says_so(tmp_path) -> None:
    code, out, err = invoke("detect", "--panels", tmp_path / "p.png")
    assert code == 0, err
    assert "Random weights (seed 2015)" in out and (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.png",), "no such file: none.png"),
        (("--cfg", "none.cfg"), "cfg: cannot read none.cfg"),
        (("--model", "yolov9"), "--model: expected one of yolov1, yolov1_darknet, yolov1_tiny, got 'yolov9'"),
        (("--bn", "tpu"), "--bn: expected one of cpu, gpu, opencv, got 'tpu'"),
        (("--cfg", "{folder}/a.cfg", "--weights", "{folder}/a.cfg"), "bytes for this network"),
        (("--cfg", "{folder}/a.cfg", "--names", "{folder}/none"), "--names: cannot read"),
        (("--cfg", "{folder}/a.cfg", "--names", "{folder}/a.cfg"), "--names: expected 3 names for this network, got 23"),
        (("--cfg", "{folder}/plain.cfg"), "--cfg: expected a [detection] section"),
    ],
)
def test_detect_refuses_bad_input(arguments, message, files) -> None:
    (files / "plain.cfg").write_text(SMALL_CFG.split("[detection]")[0])
    code, out, err = invoke("detect", "--panels", files / "p.png", *(a.format(folder=files) for a in arguments))
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err and not (files / "p.png").exists()
