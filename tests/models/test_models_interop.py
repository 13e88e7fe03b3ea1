"""Models as modules: copies, hooks, compile, export, tracing, autocast, half precision, ``dk.optimize``; multi-crops."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from _parity import image, seeded
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import models

YOLO = models.yolov1_cfg("tiny").replace("filters=1024", "filters=32")
SMALL = {
    "resnet": (lambda: models.ResNet(dk.modules.Bottleneck, (1, 1, 1, 1), 10), (2, 3, 64, 64)),
    "preact": (lambda: models.PreActResNet(dk.modules.PreActBottleneck, (1, 1, 1, 1), 10), (2, 3, 64, 64)),
    "cifar": (models.cifar_resnet20, (2, 3, 32, 32)),
    "densenet": (lambda: models.DenseNet(16, (2, 2), 16, num_classes=10), (2, 3, 64, 64)),
    "densenet buffer": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=10), (2, 3, 64, 64)),
    "vgg": (lambda: models.vgg11_bn().features, (2, 3, 64, 64)),
    "unet": (lambda: models.unet_bn(width=8), (1, 3, 64, 48)),
    "unet3d": (lambda: models.unet3d(1, 2, padding="same", width=4), (1, 1, 16, 16, 16)),
    "hourglass": (lambda: models.hourglass(1, 4, depth=2), (1, 3, 64, 64)),
    "yolo": (
        lambda: models.DarknetNet.from_text(models.yolov1_cfg("tiny").replace("filters=1024", "filters=32")),
        (1, 3, 448, 448),
    ),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = SMALL[name]
    torch.manual_seed(0)
    return seeded(build()).eval(), image(*shape)


def near(got: Tensor, want: Tensor) -> None:
    """Within 1e-4 of the largest value."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def last(result: Any) -> Tensor:
    return result[-1] if isinstance(result, (list, tuple)) else result


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_pickles(name: str) -> None:
    net, x = made(name)
    with torch.no_grad():
        expected = last(net(x))
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(last(twin(x)), expected)
            assert twin.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", SMALL)
def test_optimize_leaves_the_numbers_alone(name: str) -> None:
    """Our models are fused already: ``dk.optimize`` may find nothing, and must not change a result."""
    net, x = made(name)
    with torch.no_grad():
        expected = last(net(x))
        optimized = dk.optimize(net, (x,))
        assert type(optimized) is type(net)
        near(last(optimized(x)), expected)


@pytest.mark.parametrize("name", ["resnet", "preact", "densenet", "unet", "hourglass"])
def test_hooks_see_the_stock_values(name: str) -> None:
    """A hook on a BatchNorm gets what the stock layers would give it, and the result stays."""
    net, x = made(name)
    expected, seen = last(net(x)), []
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(
            lambda module, args, out: seen.append((module, args[0].clone(), out.clone()))
        )  # ReLUs are in place
    near(last(net(x)), expected)
    assert len(seen) == len(norms)
    for module, value, out in seen:
        shape = (1, -1, 1, 1)
        by_hand = (value - module.running_mean.view(shape)) / (module.running_var + module.eps).sqrt().view(shape)
        near(out, by_hand * module.weight.view(shape) + module.bias.view(shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "preact", "densenet", "unet", "hourglass"])
def test_compile(name: str, fresh_dynamo: Any) -> None:
    net, x = made(name)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        near(last(compiled(x)), last(net(x)))


@pytest.mark.parametrize("name", ["resnet", "densenet", "unet", "unet3d"])
def test_export_is_standard_ops(name: str) -> None:
    net, x = made(name)
    program = torch.export.export(net, (x,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names and not [n for n in names if "dl4ds" in n]
    near(program.module()(x), net(x))


def test_jit_trace() -> None:
    net, x = made("resnet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, x)
    near(traced(x), net(x))


@pytest.mark.parametrize("name", ["resnet", "densenet", "unet"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(name: str, training: bool) -> None:
    net, x = made(name)
    net.train(training)
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.2, atol=0.2 * float(expected.detach().abs().max()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net.eval()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["resnet", "preact", "unet", "hourglass"])
def test_half_precision_models(name: str) -> None:
    net, x = made(name)
    with torch.no_grad():
        expected = last(net(x))
        out = last(net.bfloat16()(x.bfloat16()))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.2, atol=0.1 * float(expected.abs().max()))


def test_empty_batch_and_single_image() -> None:
    net, x = made("resnet")
    with torch.no_grad():
        assert net(x[:0]).shape == (0, 10)
        near(net(x[:1]), net(x)[:1])


@pytest.mark.parametrize("name", ["densenet", "densenet buffer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_densenet_concatenates_nothing_in_inference(dtype: torch.dtype, name: str) -> None:
    """A block is one op call (fp32 on the CPU, channels by sixteens) or fills one buffer; with gradients the same numbers."""
    net, x = made(name)
    net, x = net.to(dtype), x.to(dtype)
    counts: Counter[str] = Counter()

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[str(function)] += 1
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        net(x)  # the first call goes layer by layer and chooses their algorithms
        with Counting():
            buffered = net(x)
    assert counts["aten.cat.default"] == 0
    with Counting():
        concatenated = net(x)
    assert counts["aten.cat.default"] > 0
    near(buffered, concatenated)


def test_multi_crop() -> None:
    """Five and ten crops as torchvision cuts them; the average of the probabilities."""
    from torchvision.transforms import functional as TF

    net, _ = made("cifar")
    pictures = image(3, 3, 41, 37)
    five, ten = models.five_crops(pictures, 32), models.ten_crops(pictures, (32, 30))
    assert torch.equal(five, torch.stack(TF.five_crop(pictures, [32, 32]), 1))
    assert torch.equal(ten, torch.stack(TF.ten_crop(pictures, [32, 30]), 1))
    with torch.no_grad():
        for crops, views in ((5, five), (1, five[:, 4:])):
            expected = torch.stack([net(views[:, i]).softmax(1) for i in range(views.shape[1])]).mean(0)
            torch.testing.assert_close(models.multi_crop(net, pictures, 32, crops), expected)
        torch.testing.assert_close(models.multi_crop(net, pictures, 32).sum(1), torch.ones(3))
    with pytest.raises(ValueError, match="crops: expected 1, 5 or 10, got 3"):
        models.multi_crop(net, pictures, 32, 3)
    with pytest.raises(ValueError, match="size: expected at most 41 x 37, got 42 x 42"):
        models.five_crops(pictures, 42)


def test_import_is_light() -> None:
    """``import dl4ds_kernels`` leaves models, segmentation and pose for later."""
    import subprocess
    import sys

    code = (
        "import sys, dl4ds_kernels as dk\n"
        "late = [m for m in sys.modules if m.startswith(('dl4ds_kernels.models', 'dl4ds_kernels.pose'))]\n"
        "assert not late, late\n"
        "dk.models.list_models; dk.segmentation.mean_iou; dk.pose.pck; dk.detection.decode\n"
        "assert 'scipy' not in sys.modules and 'torchvision' not in sys.modules\n"
        "try:\n    dk.nothing\nexcept AttributeError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "has no attribute 'nothing'" in result.stdout


HEADS = {
    "resnet18": (models.resnet18, (3, 64, 64), "fc"),
    "preact_resnet18": (models.preact_resnet18, (3, 64, 64), "fc"),
    "cifar_resnet8": (lambda: models.CifarResNet(8, 8000), (3, 32, 32), "fc"),
    "cifar_preact11": (lambda: models.CifarPreActResNet(11, 2000), (3, 32, 32), "fc"),
    "densenet": (lambda: models.DenseNet(16, (2, 2), 16, num_classes=15_000), (3, 64, 64), "classifier"),
    "yolov1_tiny": (lambda: models.DarknetNet.from_text(YOLO), (3, 448, 448), "layers.14.1"),
}


class Record(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of every op by its name."""

    def __init__(self, names: Counter[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function).partition(".default")[0]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", HEADS)
def test_heads_take_the_fully_connected_kernel(name: str) -> None:
    """In inference on few rows; a hook, an exchanged head and training are served by the stock layer."""
    build, shape, head = HEADS[name]
    net, x = seeded(build()).eval(), image(2, *shape)
    layer = net.get_submodule(head)
    assert type(layer) is nn.Linear and f"{head}.weight" in net.state_dict()
    names: Counter[str] = Counter()
    with torch.no_grad(), Record(names):
        fused = net(x)
    assert names["dl4ds_kernels.linear_act"] == 1 and names["aten.addmm"] == 0
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        near(net(x), fused)
    handle.remove()
    assert len(seen) == 1
    near(seen[0], fused)
    names.clear()
    with Record(names):
        out = net.train()(x)
    assert names["aten.addmm"] == 1 and names["dl4ds_kernels.linear_act"] == 0 and out.requires_grad
    parent, _, child = head.rpartition(".")
    setattr(net.get_submodule(parent), child, nn.Identity())
    with torch.no_grad():
        assert net.eval()(x).shape == (2, layer.in_features)


def test_yolo_of_the_paper_runs_on_the_engine() -> None:
    """Convolutions without BatchNorm, with their leaky ReLU; poolings; both connected layers."""
    import re

    text = re.sub(r"filters=(\d+)", lambda m: f"filters={int(m[1]) // 4}", models.yolov1_cfg("paper"))
    net, x = seeded(models.DarknetNet.from_text(text)).eval(), image(1, 3, 448, 448)
    names: Counter[str] = Counter()
    with torch.no_grad(), Record(names):
        net(x)
    assert names["dl4ds_kernels.conv_bn_act_packed"] == 24 and names["dl4ds_kernels.linear_act"] == 2
    assert not [n for n in names if n.startswith(("aten.convolution", "aten.addmm", "aten.leaky_relu"))]
