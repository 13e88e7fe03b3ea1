"""What ``optimize`` does with the CPU engine: DenseNet blocks, exact mode, and which algorithm a layer took."""

from __future__ import annotations

import copy

import pytest
import torch
from convert_models import image, seeded
from torch import nn

import dl4ds_kernels as dk
from dl4ds_kernels import _extension

densenet = pytest.importorskip("torchvision.models.densenet", reason="torchvision is not installed")
pytestmark = pytest.mark.skipif(
    not _extension.status()["_C"].loaded or _extension.host().cpu_features()["isa"] not in ("avx512", "avx2"),
    reason="the engine is chosen with AVX2 and AVX-512 only",
)
X = image(2, size=64)


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return seeded(densenet.DenseNet(16, (3, 3), 16, num_classes=5)).float().eval()


def run(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x.float())


def test_dense_block_is_one_call(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers read their inputs where they lie; the features are joined inside the op."""
    expected, fused = run(net), dk.optimize(net)
    near(run(fused), expected)  # every convolution chooses its algorithm
    cat, joined = torch.cat, []

    def counted(tensors: list[torch.Tensor], *args: object, **kwargs: object) -> torch.Tensor:
        joined.append(len(tensors))
        return cat(tensors, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", counted)
    near(run(fused), expected)
    assert joined == []


@pytest.mark.parametrize("change", ["hook", "exclude", "replaced", "preserve", "odd width"])
def test_dense_block_falls_back(net: nn.Module, change: str) -> None:
    """A changed layer takes its own way; the others keep theirs."""
    calls = []
    options = {"exclude": "features.denseblock1.denselayer2.conv2"} if change == "exclude" else {}
    if change == "preserve":
        options["memory_format"] = "preserve"
    if change == "odd width":
        net = seeded(densenet.DenseNet(12, (3, 2), 20, num_classes=5)).float().eval()
    fused = dk.optimize(net, **options)
    layer = fused.features.denseblock1.denselayer2
    if change == "hook":
        layer.register_forward_hook(lambda *args: calls.append(1))
    if change == "replaced":
        layer.conv1 = copy.deepcopy(layer.conv1).requires_grad_(False)
        with torch.no_grad():
            net.features.denseblock1.denselayer2.conv1.weight.mul_(2)
            layer.conv1.weight.mul_(2)
    near(run(fused), run(net))
    assert calls == ([1] if change == "hook" else [])


def test_dense_block_trains_as_stock(net: nn.Module) -> None:
    fused, stock = dk.optimize(net).double().train(), copy.deepcopy(net).double().train()
    for model in (fused, stock):
        model(X.double()).square().mean().backward()
    for (name, a), b in zip(fused.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_algorithms_names_what_ran() -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, groups=32))

    net = layers().eval()
    x = torch.randn(1, 16, 40, 40)
    fused, exact = dk.optimize(net), dk.optimize(net, exact=True)
    assert dk.algorithms(fused) == {}
    run(fused, x), run(exact, x)
    found, careful = dk.algorithms(fused), dk.algorithms(exact)
    assert found["0"] == ("Winograd F(4x4, 3x3)",) and found["2"] == ("direct",)
    assert careful["0"] == ("Winograd F(2x2, 3x3)",) and careful["2"] == ("direct",)
    fused.train()
    fused(x)
    assert dk.algorithms(fused) == {}  # training frees the packs
