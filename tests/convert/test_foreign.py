"""Other libraries' models under ``dk.optimize``: how much of them is replaced, with what reasons for the rest, equal results.

The sites are counted without the package: hooks on a run of the stock model say which BatchNorms get a convolution's output,
and a site is replaced if that BatchNorm's own forward does not run in the optimized model.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from convert_models import assert_same, seeded
from torch import Tensor, nn

import dl4ds_kernels as dk

LIBRARIES = {"tv": "torchvision.models", "timm": "timm", "smp": "segmentation_models_pytorch", "monai": "monai.networks.nets"}
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
UNET = {"channels": (8, 16, 32, 64), "strides": (2, 2, 2)}


def tv(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda lib: getattr(lib, name)(num_classes=5, **options)


def tv_segmentation(name: str) -> Callable[[Any], nn.Module]:
    return lambda lib: getattr(lib.segmentation, name)(weights=None, weights_backbone=None, num_classes=3)


def timm(name: str) -> Callable[[Any], nn.Module]:
    return lambda lib: lib.create_model(name, pretrained=False, num_classes=5)


def smp(kind: str, encoder: str) -> Callable[[Any], nn.Module]:
    return lambda lib: getattr(lib, kind)(encoder, encoder_weights=None, classes=2)


def monai_unet(dims: int = 2, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda lib: lib.UNet(dims, 1, 2, **{**UNET, "num_res_units": 2, "norm": "batch", "act": "relu", **options})


IMAGE, ONE, VOLUME = (1, 3, 64, 64), (1, 1, 64, 48), (1, 1, 32, 16, 16)
# name: (builder from the library, input, conv-BN sites)
MODELS: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...], int]] = {
    "tv resnet18": (tv("resnet18"), IMAGE, 20),
    "tv mobilenet_v2": (tv("mobilenet_v2"), IMAGE, 52),
    "timm resnet18": (timm("resnet18"), IMAGE, 20),
    "timm resnetv2_50": (timm("resnetv2_50"), IMAGE, 32),
    "timm mobilenetv2_100": (timm("mobilenetv2_100"), IMAGE, 52),
    "smp Unet resnet18": (smp("Unet", "resnet18"), IMAGE, 30),
    "monai UNet": (monai_unet(), ONE, 13),
    "monai UNet dropout": (monai_unet(num_res_units=0, dropout=0.2), ONE, 6),
    "monai UNet 3-D": (monai_unet(3), VOLUME, 13),
    "monai BasicUNet": (lambda lib: lib.BasicUNet(2, 1, 2, (8, 8, 16, 32, 64, 8), norm="batch", act="relu"), ONE, 18),
}
LARGE = {
    "tv resnet50": (tv("resnet50"), IMAGE, 53),
    "tv resnext50_32x4d": (tv("resnext50_32x4d"), IMAGE, 53),
    "tv wide_resnet50_2": (tv("wide_resnet50_2"), IMAGE, 53),
    "tv vgg16_bn": (tv("vgg16_bn"), IMAGE, 13),
    "tv densenet121": (tv("densenet121"), IMAGE, 59),
    "tv mobilenet_v3_large": (tv("mobilenet_v3_large"), IMAGE, 46),
    "tv mnasnet1_0": (tv("mnasnet1_0"), IMAGE, 52),
    "tv shufflenet_v2_x1_0": (tv("shufflenet_v2_x1_0"), IMAGE, 56),
    "tv efficientnet_b0": (tv("efficientnet_b0"), IMAGE, 49),
    "tv regnet_y_400mf": (tv("regnet_y_400mf"), IMAGE, 53),
    "tv googlenet": (tv("googlenet", aux_logits=False, init_weights=False), IMAGE, 57),
    "tv inception_v3": (tv("inception_v3", aux_logits=False, init_weights=False), (1, 3, 96, 96), 94),
    "tv fcn_resnet50": (tv_segmentation("fcn_resnet50"), IMAGE, 54),
    "tv deeplabv3_resnet50": (tv_segmentation("deeplabv3_resnet50"), IMAGE, 60),
    "timm resnet50": (timm("resnet50"), IMAGE, 53),
    "timm seresnet50": (timm("seresnet50"), IMAGE, 53),
    "timm resnetv2_101": (timm("resnetv2_101"), IMAGE, 66),
    "timm densenet121": (timm("densenet121"), IMAGE, 59),
    "timm efficientnet_b0": (timm("efficientnet_b0"), IMAGE, 49),
    "timm regnetx_004": (timm("regnetx_004"), IMAGE, 71),
    "timm cspdarknet53": (timm("cspdarknet53"), IMAGE, 67),
    "timm darknet53": (timm("darknet53"), IMAGE, 52),
    "timm hrnet_w18": (timm("hrnet_w18"), IMAGE, 325),
    "timm inception_v3": (timm("inception_v3"), (1, 3, 96, 96), 94),
    "timm repvgg_a0": (timm("repvgg_a0"), IMAGE, 44),
    "timm dla34": (timm("dla34"), IMAGE, 37),
    "timm vgg16_bn": (timm("vgg16_bn"), IMAGE, 13),
    "smp Unet resnet34": (smp("Unet", "resnet34"), IMAGE, 46),
    "smp Unet resnet50": (smp("Unet", "resnet50"), IMAGE, 63),
    "smp Unet vgg16_bn": (smp("Unet", "vgg16_bn"), IMAGE, 25),
    "smp UnetPlusPlus": (smp("UnetPlusPlus", "resnet18"), IMAGE, 42),
    "smp FPN": (smp("FPN", "resnet18"), IMAGE, 20),
    "smp Linknet": (smp("Linknet", "resnet18"), IMAGE, 35),
    "smp PSPNet": (smp("PSPNet", "resnet18"), IMAGE, 14),
    "smp DeepLabV3Plus": (smp("DeepLabV3Plus", "resnet18"), IMAGE, 29),
    "smp MAnet": (smp("MAnet", "resnet18"), IMAGE, 38),
}
ALL = {**MODELS, **LARGE}
SHARE = 0.95


def built(name: str) -> tuple[nn.Module, Tensor, int]:
    build, shape, sites = ALL[name]
    package = LIBRARIES[name.split()[0]]
    library = pytest.importorskip(package, reason=f"{package.partition('.')[0]} is a foreign implementation, not installed")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = seeded(build(library))
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(1)), sites


def answers(output: Any) -> list[Tensor]:
    if isinstance(output, dict):
        return list(output.values())
    return [output] if isinstance(output, Tensor) else list(output)


def conv_bn_sites(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the BatchNorms that get a convolution's output in a run of ``model``."""
    outputs: dict[tuple[Any, ...], Tensor] = {}  # alive, so that no address comes twice
    sites, handles = set(), []

    def key(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.data_ptr(), tensor.shape

    for name, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS):
            handles.append(module.register_forward_hook(lambda m, args, out: outputs.update({key(out): out})))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):

            def note(m: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                if key(args[0]) in outputs:
                    sites.add(name)

            handles.append(module.register_forward_pre_hook(note))
    model(x)
    for handle in handles:
        handle.remove()
    return sites


@contextlib.contextmanager
def norms_that_run(model: nn.Module) -> Iterator[set[str]]:
    """Names of the BatchNorms of ``model`` whose own forward is called."""
    names = {id(module): name for name, module in model.named_modules()}
    called: set[str] = set()
    kinds = {cls for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for cls in type(m).__mro__}

    def noting(stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.add(names[id(self)])
            return stock(self, *args, **kwargs)

        return forward

    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if "forward" in vars(kind) and issubclass(kind, nn.modules.batchnorm._BatchNorm):
                stack.enter_context(mock.patch.object(kind, "forward", noting(kind.forward)))
        yield called


def check(name: str) -> None:
    stock, x, expected_sites = built(name)
    keys = {key: (value.shape, value.dtype) for key, value in stock.state_dict().items()}
    with torch.no_grad():
        sites = conv_bn_sites(stock, x)
        assert len(sites) == expected_sites, f"{len(sites)} conv-BN sites in the stock run, the table says {expected_sites}"
        want = answers(stock(x))
        fused = dk.optimize(stock)
        with norms_that_run(fused) as called:
            got = answers(fused(x))
    report = fused.dl4ds_report
    missed = sites & called
    assert len(missed) <= (1 - SHARE) * len(sites), f"{sorted(missed)[:5]}\n{report.summary()}"
    # What stays stock is in the report with its reason.
    assert all(row.reason in dk.convert.REASONS for row in report.kept)
    assert missed <= {member for row in report.kept for member in row.members}
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, 1e-4)
    assert {key: (value.shape, value.dtype) for key, value in fused.state_dict().items()} == keys
    fused.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(fused.state_dict(), strict=True)
    with torch.no_grad():
        for a, b in zip(answers(dk.restore(fused)(x)), want, strict=True):
            assert torch.equal(a, b)
    assert not any("forward" in module.__dict__ for module in fused.modules())


@pytest.mark.parametrize("name", MODELS)
def test_foreign(name: str) -> None:
    check(name)


@pytest.mark.full
@pytest.mark.parametrize("name", LARGE)
def test_foreign_large(name: str) -> None:
    check(name)


def test_prelu_stays_stock() -> None:
    """monai's default activation has a learned slope, which no kernel knows: its convolutions fuse with the BatchNorm alone."""
    ALL["monai UNet PReLU"] = (monai_unet(act="prelu"), ONE, 13)
    stock, x, _ = built("monai UNet PReLU")
    fused = dk.optimize(stock)
    patterns = [row.pattern for row in fused.dl4ds_report.replaced]
    assert (patterns.count("conv_bn"), patterns.count("conv_transpose_bn"), fused.dl4ds_report.kept) == (10, 3, [])
    with torch.no_grad():
        want = stock(x)
        with norms_that_run(fused) as called:
            assert_same(fused(x), want, 1e-4)
    assert not called


TRAINED = {
    "timm resnetv2": lambda: pytest.importorskip("timm").create_model("resnetv2_18", num_classes=5),
    "timm mobilenetv2": lambda: pytest.importorskip("timm").create_model("mobilenetv2_035", num_classes=5),
    "monai UNet": lambda: built("monai UNet")[0],
    "monai UNet dropout": lambda: built("monai UNet dropout")[0],
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_training_step_is_the_stock_one(name: str) -> None:
    torch.manual_seed(0)
    stock = seeded(TRAINED[name]()).double().train()
    fused = dk.optimize(stock)
    assert fused.dl4ds_report.replaced
    x = torch.randn(2, 1 if "monai" in name else 3, 64, 64, dtype=torch.float64)
    for model in (stock, fused):
        torch.manual_seed(5)  # dropout
        answers(model(x))[0].square().sum().backward()
    for (key, want), got in zip(stock.named_parameters(), fused.parameters(), strict=True):
        assert want.grad is not None, key
        assert_same(got.grad, want.grad, 1e-7)
    for (key, want), got in zip(stock.named_buffers(), fused.buffers(), strict=True):
        assert torch.equal(got, want) if "num_batches" in key else torch.allclose(got, want, 1e-9, 1e-9), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm mobilenetv2_100", "monai UNet"])
def test_compile_export_and_trace(name: str, fresh_dynamo: Any) -> None:
    stock, x, _ = built(name)
    fused = dk.optimize(stock)
    with torch.no_grad():
        want = stock(x)
        assert_same(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), want)
        program = torch.export.export(fused, (x,))
        assert not [node for node in program.graph.nodes if "dl4ds" in str(node.target)]
        assert_same(program.module()(x), want)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(torch.jit.trace(fused, x)(x), want)
        assert_same(copy.deepcopy(fused)(x), want)
