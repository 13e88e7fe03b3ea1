"""Checkpoint files: Torch7 (with the networks of fb.resnet.torch), safetensors and torch.save, whole and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from _parity import image, seeded
from reference_resnet import CifarNet, PreNet
from t7_writer import Function, Lua, t7
from torch import nn

from dl4ds_kernels import models
from dl4ds_kernels.models.torch7 import T7Error, T7Object, parse_t7
from dl4ds_kernels.modules import PreActBottleneck


def test_values_of_every_kind() -> None:
    shared = torch.arange(12.0)
    value = {
        "number": 2.5, "whole": 7, "yes": True, "no": False, "nothing": None, "text": "straße".encode().decode("latin-1"),
        "list": [1, "two", [3.0]], "mixed": {1: "a", "b": 2}, "empty": {},
        "float": torch.randn(2, 3), "double": torch.randn(4, dtype=torch.float64), "long": torch.arange(5),
        "byte": torch.arange(3, dtype=torch.uint8), "view": shared.view(3, 4)[1:, ::2], "other view": shared[5:7],
    }  # fmt: skip
    read = parse_t7(t7(value))
    assert read.keys() == value.keys()
    for key, want in value.items():
        if isinstance(want, torch.Tensor):
            assert read[key].dtype == want.dtype and torch.equal(read[key], want), key
        elif key == "text":
            assert read[key].encode("latin-1").decode() == "straße"
        else:
            assert read[key] == want, key
    # Views of one storage stay views of one storage, and an object that comes twice is one object.
    assert read["view"].untyped_storage().data_ptr() == read["other view"].untyped_storage().data_ptr()
    twice = Lua("nn.ReLU", inplace=True)
    first, second = parse_t7(t7([twice, twice]))
    assert first is second and first.name == "nn.ReLU" and first.get("inplace") is True


def plain(value: Any) -> Any:
    """A value of either reader without its classes: (name, fields) for objects and functions, tensors as lists."""
    if isinstance(value, T7Object):
        fields = {"upvalues": value.fields["upvalues"]} if value.name == "function" else value.fields
        return value.name, plain(fields)
    if type(value).__name__ == "TorchObject":
        return value._typename.decode(), plain(value._obj)
    if type(value).__name__ == "LuaFunction":
        return "function", {"upvalues": plain(value.upvalues)}
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        return str(value.dtype).removeprefix("torch."), value.tolist()
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.decode("latin-1") if isinstance(value, bytes) else value


def test_another_reader_sees_the_same(tmp_path: Path) -> None:
    """torchfile is an independent port of torch7's File.lua."""
    torchfile = pytest.importorskip("torchfile", reason="torchfile is an independent reader, not installed")
    shared, twice = torch.arange(12.0), Lua("nn.ReLU", inplace=True, val=0)
    value = {
        "network": lua("Sequential", conv(nn.Conv2d(2, 3, 3, bias=False)), norm(nn.BatchNorm2d(3)), twice, twice),
        "view": shared.view(3, 4)[1:, ::2], "other view": shared[5:7], "bytes": torch.arange(3, dtype=torch.uint8),
        "long": torch.arange(5), "double": torch.rand(2, 1, 2, dtype=torch.float64), "empty": torch.empty(0),
        "old": Lua("nn.Identity", version=0, train=False), "hook": Function("\x1bLJ code", x=1.5, y=["a", True]),
        "list": [1, "two", [3.5, None]], "mixed": {1: "a", "b": 2, 4: False},
    }  # fmt: skip
    path = tmp_path / "value.t7"
    path.write_bytes(t7(value))
    mine, theirs = plain(models.load_t7(path)), plain(torchfile.load(str(path)))
    assert mine.keys() == value.keys()
    for key in value:
        assert mine[key] == theirs[key], key
    weight = value["network"].fields["modules"][0].fields["weight"]
    assert mine["network"][1]["modules"][0][1]["weight"] == ("float32", weight.tolist())


def test_a_table_that_holds_itself() -> None:
    loop: dict[str, Any] = {"name": "loop"}
    loop["self"] = loop
    read = parse_t7(t7(loop))
    assert read["self"] is read


def test_every_truncation_is_an_error() -> None:
    data = t7({"a": torch.randn(2, 2), "b": [1, "x", True], "c": Lua("nn.Linear", weight=torch.randn(1, 2))})
    assert parse_t7(data)
    for length in range(len(data)):
        with pytest.raises(T7Error, match="byte"):
            parse_t7(data[:length])
    with pytest.raises(T7Error, match="expected the end of the file at byte .*, got 3 more bytes"):
        parse_t7(data + b"abc")


def test_damaged_files_do_not_allocate_what_they_claim() -> None:
    huge = t7(torch.zeros(2)).replace((2).to_bytes(8, "little"), (2**60).to_bytes(8, "little"))
    for data, message in (
        (b"\x09\0\0\0", "expected a tag from 0 to 8, got 9"),
        (b"4\n1\n3\nV 1\n", "expected a tag"),  # an ASCII file
        (b"\x03\0\0\0\x01\0\0\0\xff\xff\xff\x7f", "expected what fits into the file"),
        (huge, "expected"),
    ):
        with pytest.raises(T7Error, match=message):
            parse_t7(data)
    deep: Any = 1
    for _ in range(250):
        deep = [deep]
    with pytest.raises(T7Error, match="at most 200 levels"):
        parse_t7(t7(deep))
    outside = t7(torch.arange(6.0).view(2, 3)).replace((3).to_bytes(8, "little"), (9).to_bytes(8, "little"), 1)
    with pytest.raises(T7Error, match="expected a view within 6 values"):
        parse_t7(outside)


def conv(layer: nn.Conv2d, matrix: bool = False) -> Lua:
    o, i, h, w = layer.weight.shape
    weight = layer.weight.detach().reshape(o, -1) if matrix else layer.weight.detach()
    return Lua("nn.SpatialConvolutionMM" if matrix else "cudnn.SpatialConvolution", weight=weight, nOutputPlane=o,
               nInputPlane=i, kH=h, kW=w)  # fmt: skip


def norm(layer: nn.BatchNorm2d) -> Lua:
    tensors = {"weight": layer.weight, "bias": layer.bias, "running_mean": layer.running_mean, "running_var": layer.running_var}
    return Lua("nn.SpatialBatchNormalization", **{k: v.detach() for k, v in tensors.items()}, eps=1e-5)


def lua(name: str, *children: Lua) -> Lua:
    return Lua(f"nn.{name}", modules=list(children))


def lua_resnet(net: nn.Module) -> Lua:
    """torchvision's network in the form that resnet.lua builds."""
    stages = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        blocks = []
        for block in stage:
            branch = []
            for k in (1, 2, 3) if hasattr(block, "conv3") else (1, 2):
                branch += [conv(getattr(block, f"conv{k}"), k == 1), norm(getattr(block, f"bn{k}")), lua("ReLU")]
            down = block.downsample
            short = lua("Identity") if down is None else lua("Sequential", conv(down[0]), norm(down[1]))
            table = lua("ConcatTable", lua("Sequential", *branch[:-1]), short)
            blocks.append(lua("Sequential", table, lua("CAddTable"), lua("ReLU")))
        stages.append(lua("Sequential", *blocks))
    linear = Lua("nn.Linear", weight=net.fc.weight.detach(), bias=net.fc.bias.detach())
    return lua("Sequential", conv(net.conv1), norm(net.bn1), lua("ReLU"), lua("SpatialMaxPooling"), *stages,
               lua("SpatialAveragePooling"), lua("View"), linear)  # fmt: skip


def lua_preresnet(net: PreNet, counts: tuple[int, ...]) -> Lua:
    """The reference network in the form that preresnet.lua builds."""
    blocks, stages = iter(net.blocks), []
    for count in counts:
        made = []
        for k in range(count):
            block = next(blocks)
            head = [norm(block.n1), lua("ReLU")] if block.lead else []
            rest = [conv(block.c1), norm(block.n2), lua("ReLU"), conv(block.c2), norm(block.n3), lua("ReLU"), conv(block.c3)]
            short = lua("Identity") if block.short is None else lua("Sequential", conv(block.short))
            shared = k == 0  # the projection shares the leading BatchNorm
            table = lua("ConcatTable", lua("Sequential", *([] if shared else head), *rest), short)
            made.append(lua("Sequential", *(head if shared else []), table, lua("CAddTable")))
        stages.append(lua("Sequential", *made))
    linear = Lua("nn.Linear", weight=net.last.weight.detach(), bias=net.last.bias.detach())
    return lua("Sequential", conv(net.first), norm(net.norm), lua("ReLU"), lua("SpatialMaxPooling"), *stages, norm(net.end),
               lua("ReLU"), lua("SpatialAveragePooling"), lua("View"), linear)  # fmt: skip


def near(ours: nn.Module, stock: nn.Module) -> None:
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        want = stock.eval()(x)
        torch.testing.assert_close(ours.eval()(x), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_fb_resnet(name: str, tmp_path: Path) -> None:
    stock, path = seeded(getattr(torchvision.models, name)(num_classes=7)), tmp_path / "model.t7"
    parallel = {"modules": [lua_resnet(stock)], "gpuAssignments": [1, 2]}
    for network in (lua_resnet(stock), *(Lua("nn.DataParallelTable", version, **parallel) for version in (1, 3))):
        ours = getattr(models, name)(num_classes=7)
        path.write_bytes(t7(network))
        models.load_checkpoint(ours, path)
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True))
    near(ours, stock)


def test_fb_cifar_resnet(tmp_path: Path) -> None:
    """resnet.lua's nets for CIFAR: three stages of basic blocks, a pooled and zero-padded shortcut without parameters."""
    stock, ours = seeded(CifarNet(2)), models.CifarResNet(14)
    stages: list[list[Lua]] = [[], [], []]
    for i, block in enumerate(stock.blocks):
        branch = lua("Sequential", conv(block.a), norm(block.na), lua("ReLU"), conv(block.b), norm(block.nb))
        pad = lua("Sequential", lua("SpatialAveragePooling"), lua("Concat", lua("Identity"), lua("MulConstant")))
        table = lua("ConcatTable", branch, pad if block.extra else lua("Identity"))
        stages[i // 2].append(lua("Sequential", table, lua("CAddTable"), lua("ReLU")))
    linear = Lua("nn.Linear", weight=stock.last.weight.detach(), bias=stock.last.bias.detach())
    network = lua("Sequential", conv(stock.first), norm(stock.norm), lua("ReLU"), *(lua("Sequential", *s) for s in stages),
                  lua("SpatialAveragePooling"), lua("View"), linear)  # fmt: skip
    path = tmp_path / "cifar.t7"
    path.write_bytes(t7(network))
    models.load_checkpoint(ours, path)
    near(ours, stock)


def test_fb_preresnet(tmp_path: Path) -> None:
    counts = (1, 2, 1, 1)
    stock, ours = seeded(PreNet(counts)), models.PreActResNet(PreActBottleneck, counts)
    path = tmp_path / "model.t7"
    path.write_bytes(t7(lua_preresnet(stock, counts)))
    models.load_checkpoint(ours, path)
    near(ours, stock)


def test_fb_networks_of_another_form() -> None:
    small = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 3)
    good = lua_resnet(small)
    assert models.fb_state_dict(parse_t7(t7(good))).keys() == small.state_dict().keys()
    for wrong, message in (
        (lua("Parallel"), "expected an nn.Sequential, got nn.Parallel"),
        (lua("Sequential", *good.fields["modules"][:-1]), "expected one stem convolution, stages and a linear layer"),
        (lua("Sequential", *good.fields["modules"], Lua("nn.PReLU", weight=torch.ones(1))), "got nn.PReLU at the top"),
    ):
        with pytest.raises(ValueError, match=message):
            models.fb_state_dict(parse_t7(t7(wrong)))
    with pytest.raises(ValueError, match="expected an nn.Sequential, got dict"):
        models.fb_state_dict(parse_t7(t7({"epoch": 3})))
    assert isinstance(parse_t7(t7(good)), T7Object)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_checkpoint_round_trip(suffix: str, tmp_path: Path) -> None:
    if suffix == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is an extra")
    ours, path = seeded(models.cifar_resnet20()), tmp_path / f"net.{suffix}"
    models.save_checkpoint(ours, path)
    other = models.cifar_resnet20()
    models.load_checkpoint(other, path)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), other.state_dict().values(), strict=True))
    stock = seeded(torchvision.models.resnet18(num_classes=4))
    models.save_checkpoint(stock, path)  # any module
    fresh = models.resnet18(num_classes=4)
    models.load_checkpoint(fresh, path)
    near(fresh, stock)


def test_checkpoint_errors(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "a.npz", "expected .safetensors, .pt, .pth, .bin or .t7, got 'a.npz'"),):
        with pytest.raises(ValueError, match=message):
            models.read_state_dict(path)
    with pytest.raises(ValueError, match="expected .safetensors"):
        models.save_checkpoint(models.cifar_resnet20(), tmp_path / "a.t7")
    torch.save({"epoch": 3, "state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "b.pt")
    assert models.read_state_dict(tmp_path / "b.pt").keys() == {"conv1.weight"}
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: expected tensors by name, got a list"):
        models.read_state_dict(tmp_path / "c.pt")
