"""Darknet's .cfg and .weights: byte-exact round trips, published file sizes, OpenCV's importer, clear errors."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch

from dl4ds_kernels import models
from dl4ds_kernels.detection import (
    CfgError,
    WeightsError,
    WeightsHeader,
    YoloLayout,
    file_size,
    parse_cfg,
    read_cfg,
    read_header,
)
from dl4ds_kernels.models import DarknetNet, yolov1_cfg

SMALL = """
[net]
height=8
width=8
channels=3
# a comment
; another
[convolutional]
batch_normalize = 1
filters=4
size=3
pad=1
activation=leaky
[maxpool]
size=2
stride=2
[convolutional]
filters=6
size=1
activation=relu
[local]
filters=2
size=3
pad=1
activation=leaky
[dropout]
probability=.5
[connected]
output=5
activation=linear
"""


def test_cfg_sections_and_options() -> None:
    sections = parse_cfg(SMALL + "filters = 9\noutput=7")
    assert [s.type for s in sections] == ["net", "convolutional", "maxpool", "convolutional", "local", "dropout", "connected"]
    assert sections[1].integer("filters") == 4 and sections[1].line == 8
    assert sections[6].integer("output") == 5  # the first of two, as darknet takes it
    assert sections[5].number("probability") == 0.5 and sections[2].text("activation", "none") == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first section: expected [net], got an empty text"),
        ("[net]\nwidth=8", "expected at least one layer behind [net], got none"),
        ("width=8", "line 1: expected [net] before the first option, got 'width=8'"),
        ("[convolutional]", "first section: expected [net], got [convolutional]"),
        ("[net]\n[yolo]", "line 2: expected a section of avgpool, batchnorm"),
        ("[net\n[maxpool]", "line 1: expected a section of"),
        ("[net]\nwidth\n[maxpool]", "line 2: expected key=value, got 'width'"),
        ("[net]\nwidth=\n[maxpool]", "line 2: expected key=value, got 'width='"),
    ],
)
def test_cfg_errors(text: str, message: str) -> None:
    with pytest.raises(CfgError) as error:
        parse_cfg(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("channels=3\n", ""), "[net] of line 2: channels: expected a value, got none"),
        (("filters=4", "filters=x"), "[convolutional] of line 8: filters: expected a number, got 'x'"),
        (("filters=4", "filters=4.5"), "[convolutional] of line 8: filters: expected an integer, got '4.5'"),
        (("filters=4", "filters=0"), "[convolutional] of line 8: filters: expected 1 or more, got 0"),
        (
            ("activation=relu", "activation=mish"),
            "[convolutional] of line 17: activation: expected leaky, relu, linear, got 'mish'",
        ),
        (("stride=2", "stride=0"), "[maxpool] of line 14: stride: expected 1 or more, got 0"),
        (("height=8", "height=1"), "expected an output of at least 1 x 1"),
        (("output=5", "output=5\nbatch_normalize=1"), "[connected] of line 28: batch_normalize: expected 0"),
        (("[dropout]", "[net]"), "[net] of line 26: expected a layer, got a second [net]"),
        (
            ("activation=linear", "activation=linear\n[maxpool]\nsize=2"),
            "[maxpool] of line 31: expected maps (C, H, W) as input, got (5,)",
        ),
        (
            ("activation=linear", "activation=linear\n[detection]\ncoords=4\nside=1"),
            "[detection] of line 31: expected 6 inputs",
        ),
        (("activation=linear", "activation=linear\n[detection]\nside=1\ncoords=5"), "expected coords=4 and softmax=0, got 5"),
        (("size=1", "groups=3"), "groups: expected a divisor of 4 and 6, got 3"),
    ],
    ids=lambda value: value[1].split("\n")[0] if isinstance(value, tuple) else None,
)
def test_errors_of_the_network(change: tuple[str, str], message: str) -> None:
    text = SMALL
    if change[0] == "height=8":
        text = text.replace("width=8", "width=1").replace("[local]", "[maxpool]\nsize=2\nstride=2\npadding=0\n[local]")
    with pytest.raises(CfgError) as error:
        DarknetNet.from_text(text.replace(*change))
    assert message in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CfgError, match="cannot read"):
        read_cfg(tmp_path / "none.cfg")
    with pytest.raises(WeightsError, match="cannot read"):
        read_header(tmp_path / "none.weights")
    with pytest.raises(WeightsError, match="cannot write"):
        DarknetNet.from_text(SMALL).save_weights(tmp_path / "no" / "folder.weights")


def filled(seed: int = 0) -> DarknetNet:
    torch.manual_seed(seed)
    net = DarknetNet.from_text(SMALL)
    with torch.no_grad():
        for slot in net.weight_slots():
            slot.tensor.normal_()
    net.layers[0].bn.running_var.abs_()
    return net


HEADERS = [
    WeightsHeader(0, 1, 0, 32_013_312),
    WeightsHeader(0, 2, 5, 2**40 + 7),
    WeightsHeader(1, 0, 0, 3),
    WeightsHeader(0, 1001, 0, 9),
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda h: f"{h.major}.{h.minor}")
def test_round_trip_is_byte_exact(header: WeightsHeader, tmp_path: Path) -> None:
    """Bytes written by hand in darknet's order load, and are written again as they were."""
    net = filled()
    connected = net.layers[5][1].weight
    expected = struct.pack("<iii", header.major, header.minor, header.revision)
    expected += struct.pack("<Q" if header.minor in (2, 0) else "<I", header.seen)
    first, second, local = net.layers[0], net.layers[2][0], net.layers[3][0]
    bn = first.bn
    matrix = connected.T if header.minor > 1000 else connected
    for tensor in (
        bn.bias, bn.weight, bn.running_mean, bn.running_var, first.conv.weight, second.bias, second.weight,
        local.bias, local.weight, net.layers[5][1].bias, matrix,
    ):  # fmt: skip
        expected += struct.pack(f"<{tensor.numel()}f", *tensor.detach().flatten().tolist())
    path, again = tmp_path / "a.weights", tmp_path / "b.weights"
    path.write_bytes(expected)
    other = filled(1)
    assert other.load_weights(path) == header
    for a, b in zip(net.weight_slots(), other.weight_slots(), strict=True):
        assert torch.equal(a.tensor, b.tensor), a.name
    other.save_weights(again, header)
    assert again.read_bytes() == expected and len(expected) == file_size(net.weight_slots(), header)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net.eval()(x), other.eval()(x))


def test_nan_payloads_survive(tmp_path: Path) -> None:
    net = filled()
    net.save_weights(tmp_path / "a.weights")
    data = bytearray((tmp_path / "a.weights").read_bytes())
    data[20:24] = struct.pack("<I", 0x7FC12345)
    (tmp_path / "a.weights").write_bytes(data)
    net.load_weights(tmp_path / "a.weights")
    net.save_weights(tmp_path / "b.weights")
    assert (tmp_path / "b.weights").read_bytes() == bytes(data)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (-1, "the file ends in layer 5 [connected] weights"),
        (20 + 4 * 3, "the file ends in layer 0 [convolutional] biases"),
        (20 + 4 * 4 * 4, "the file ends in layer 0 [convolutional] weights"),
        (18, "expected a header of 20 bytes, got a file of 18"),
        (0, "expected a header of 16 or 20 bytes, got a file of 0"),
    ],
)
def test_truncated_files(cut: int, message: str, tmp_path: Path) -> None:
    net, path = filled(), tmp_path / "a.weights"
    net.save_weights(path)
    path.write_bytes(path.read_bytes()[:cut])
    before = [slot.tensor.clone() for slot in net.weight_slots()]
    with pytest.raises(WeightsError) as error:
        net.load_weights(path)
    assert message in str(error.value)
    assert all(torch.equal(a, b.tensor) for a, b in zip(before, net.weight_slots(), strict=True))


def test_longer_files_and_pretrained_trunks(tmp_path: Path) -> None:
    net, path = filled(), tmp_path / "a.weights"
    net.save_weights(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"xyz")
    with pytest.raises(WeightsError, match=f"expected {len(whole)} bytes for this network, got {len(whole) + 3}: 3 too many"):
        net.load_weights(path)
    trunk = 20 + 4 * sum(slot.tensor.numel() for slot in net.weight_slots()[:5])
    path.write_bytes(whole[:trunk])
    with pytest.raises(WeightsError, match=r"the file ends in layer 2 \[convolutional\] biases"):
        net.load_weights(path)
    other = filled(1)
    kept = other.weight_slots()[5].tensor.clone()
    other.load_weights(path, allow_shorter=True)
    assert torch.equal(other.layers[0].conv.weight, net.layers[0].conv.weight)
    assert torch.equal(other.weight_slots()[5].tensor, kept)
    path.write_bytes(whole[: trunk + 2])
    with pytest.raises(WeightsError, match="the file ends in"):
        other.load_weights(path, allow_shorter=True)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"layer 0 \[convolutional\] biases: expected float32"):
        filled().double().save_weights(tmp_path / "a.weights")
    with pytest.raises(WeightsError, match="header: expected 32-bit versions"):
        filled().save_weights(tmp_path / "a.weights", WeightsHeader(0, 1, 0, 2**40))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "size"), [("yolov1_darknet", 789_312_988), ("yolov1_tiny", 108_399_816), ("yolov1", 16 + 4 * 271_703_550)]
)
def test_published_file_sizes(name: str, size: int) -> None:
    """Of the files for YOLOv1, whose header has 16 bytes."""
    assert file_size(models.build_on_meta(name).weight_slots(), WeightsHeader(0, 1)) == size


def test_layouts() -> None:
    for name, boxes in (("yolov1", 2), ("yolov1_darknet", 3), ("yolov1_tiny", 2)):
        assert models.build_on_meta(name).layout == YoloLayout(7, boxes, 20, sqrt=True)
    with pytest.raises(ValueError, match="kind: expected 'paper', 'darknet' or 'tiny', got 'fast'"):
        yolov1_cfg("fast")
    with pytest.raises(ValueError, match="bn: expected one of cpu, gpu, opencv, got 'tpu'"):
        DarknetNet.from_text(SMALL, bn="tpu")


@pytest.mark.parametrize(("bn", "divisor"), [("cpu", lambda v: v**0.5 + 1e-6), ("gpu", lambda v: (v + 1e-5) ** 0.5),
                                             ("opencv", lambda v: (v + 1e-6) ** 0.5)])  # fmt: skip
def test_bn_conventions(bn: str, divisor) -> None:
    """A channel of tiny variance shows whose BatchNorm it is; constant channels stay finite."""
    net = DarknetNet.from_text("[net]\nheight=4\nwidth=4\nchannels=2\n[batchnorm]\n", bn=bn).eval()
    norm = net.layers[0]
    norm.running_var.copy_(torch.tensor([1e-6, 0.0]))
    x = torch.full((1, 2, 4, 4), 1e-3)
    expected = torch.tensor([1e-3 / divisor(1e-6), 1e-3 / divisor(0.0)])
    torch.testing.assert_close(net(x)[0, :, 0, 0], expected, rtol=1e-5, atol=0)
    assert net.train()(x).isfinite().all()


@pytest.mark.parametrize("bn", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["batchnorm", "convolutional"])
def test_training_normalises_by_the_unbiased_variance(bn: str, kind: str) -> None:
    """Darknet divides by N - 1 in the batch's own normalisation too: outputs, gradients and averages in fp64, N = 8."""
    layer = (
        "[batchnorm]\n" if kind == "batchnorm" else "[convolutional]\nbatch_normalize=1\nfilters=3\nsize=1\nactivation=leaky\n"
    )
    net = DarknetNet.from_text(f"[net]\nheight=2\nwidth=2\nchannels=3\n{layer}", bn=bn).double().train()
    norm = net.layers[0] if kind == "batchnorm" else net.layers[0].bn
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(3, generator=generator, dtype=torch.float64))
        norm.bias.copy_(torch.randn(3, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) * 1e-3
    results = []
    for by_hand in (False, True):
        leaf = x.clone().requires_grad_()
        net.zero_grad()
        if by_hand:
            y = leaf if kind == "batchnorm" else torch.nn.functional.conv2d(leaf, net.layers[0].conv.weight)
            mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), correction=1, keepdim=True)
            std = var.sqrt() + 1e-6 if bn == "cpu" else (var + 1e-5).sqrt()
            y = (y - mean) / std * norm.weight[:, None, None] + norm.bias[:, None, None]
            out = y if kind == "batchnorm" else torch.where(y > 0, y, 0.1 * y)
            averages = (0.01 * mean.flatten(), 0.99 + 0.01 * var.flatten())
        else:
            out = net(leaf)
        (out * torch.arange(24, dtype=torch.float64).view(out.shape)).sum().backward()
        results.append((out.detach(), leaf.grad, *(p.grad.clone() for p in net.parameters())))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))
    torch.testing.assert_close(norm.running_mean, averages[0].detach())
    torch.testing.assert_close(norm.running_var, averages[1].detach())


@pytest.mark.parametrize(("size", "stride", "padding"), [(2, 2, None), (2, 1, None), (3, 2, 0), (3, 1, 2), (3, 2, None)])
@pytest.mark.parametrize("side", [8, 7])
def test_maxpool_is_darknets(size: int, stride: int, padding: int | None, side: int) -> None:
    """Against the loop over output pixels and offsets."""
    line = "" if padding is None else f"padding={padding}\n"
    net = DarknetNet.from_text(
        f"[net]\nheight={side}\nwidth={side}\nchannels=2\n[maxpool]\nsize={size}\nstride={stride}\n{line}"
    )
    padding = size - 1 if padding is None else padding
    x = torch.randn(1, 2, side, side)
    out = (side + padding - size) // stride + 1
    expected = torch.full((1, 2, out, out), -torch.inf)
    for i in range(out):
        for j in range(out):
            for di in range(size):
                for dj in range(size):
                    r, c = i * stride + di - padding // 2, j * stride + dj - padding // 2
                    if 0 <= r < side and 0 <= c < side:
                        expected[..., i, j] = torch.maximum(expected[..., i, j], x[..., r, c])
    assert torch.equal(net(x), expected)


def test_crop_scales_to_minus_one_to_one() -> None:
    net = DarknetNet.from_text(
        "[net]\nheight=6\nwidth=6\nchannels=1\n[crop]\ncrop_height=4\ncrop_width=2\n[avgpool]\n[softmax]"
    )
    x = torch.rand(2, 1, 6, 6)
    assert torch.equal(net.layers[0](x), x[:, :, 1:5, 2:4] * 2 - 1)
    assert net(x).shape == (2, 1)


def random_statistics(net: DarknetNet) -> DarknetNet:
    torch.manual_seed(3)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
    return net.eval()


@pytest.mark.parametrize("kind", ["tiny", "paper"])
def test_opencv_reads_the_same_network(kind: str, tmp_path: Path) -> None:
    """OpenCV's darknet importer, an independent reader of both files, gives the same outputs (without ``[detection]``)."""
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless < 5 is an independent importer, not installed")
    text = yolov1_cfg(kind).split("[detection]")[0]
    if kind == "paper":
        text = re.sub(r"filters=(\d+)", lambda m: f"filters={int(m[1]) // 4}", text).replace("output=4096", "output=256")
    net = random_statistics(DarknetNet.from_text(text, bn="opencv"))
    net.save_weights(tmp_path / "a.weights", WeightsHeader(0, 1))
    (tmp_path / "a.cfg").write_text(text)
    other = cv2.dnn.readNetFromDarknet(str(tmp_path / "a.cfg"), str(tmp_path / "a.weights"))
    x = torch.rand(1, 3, 448, 448)
    other.setInput(x.numpy())
    expected = torch.from_numpy(other.forward()).flatten()
    with torch.no_grad():
        got = net(x).flatten()
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 1e-3  # not a constant
