"""Every torchvision family that the kernels are made for: all chains found, same results, same state_dict."""

import copy

import pytest
import torch
from convert_models import assert_same, image, seeded, stock_calls

import dl4ds_kernels as dk

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")

CHAINS = {
    "resnet18": 20, "resnet34": 36, "resnet50": 53, "resnet101": 104, "resnet152": 155,
    "wide_resnet50_2": 53, "wide_resnet101_2": 104, "resnext50_32x4d": 53, "resnext101_32x8d": 104, "resnext101_64x4d": 104,
    "vgg11_bn": 8, "vgg13_bn": 10, "vgg16_bn": 13, "vgg19_bn": 16,
    "densenet121": 181, "densenet161": 241, "densenet169": 253, "densenet201": 301,
    "vgg16": 13, "alexnet": 5,
    "mobilenet_v2": 52, "shufflenet_v2_x1_0": 56, "mnasnet0_5": 52,
}  # fmt: skip
SEGMENTATION = {"fcn_resnet50": 57, "deeplabv3_resnet50": 63}


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_is_found(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    report = dk.analyze(model)
    assert (len(report.replaced), len(report.kept)) == (CHAINS[name], 0), report.summary()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", SEGMENTATION)
def test_every_segmentation_chain_is_found(name):
    with torch.device("meta"):
        model = getattr(models.segmentation, name)(weights=None, weights_backbone=None, aux_loss=True)
    report = dk.analyze(model)
    assert (len(report.replaced), len(report.kept)) == (SEGMENTATION[name], 0), report.summary()


def _vgg_features():
    return models.vgg11_bn(num_classes=2, init_weights=False).features


PARITY = {
    "resnet18": lambda: models.resnet18(num_classes=7),
    "resnet50": lambda: models.resnet50(num_classes=7),
    "resnext50_32x4d": lambda: models.resnext50_32x4d(num_classes=7),
    "vgg11_bn.features": _vgg_features,
    "densenet121": lambda: models.densenet121(num_classes=7),
}
KEYS = {"resnet18": 122, "resnet50": 320}


@pytest.mark.parametrize("name", PARITY)
def test_same_results_and_state_dict(name):
    torch.manual_seed(0)
    stock = seeded(PARITY[name]())
    keys = {key: (value.shape, value.dtype) for key, value in stock.state_dict().items()}
    parameters = dict(stock.named_parameters())
    fused = dk.optimize(copy.deepcopy(stock), inplace=True)
    assert {key: (value.shape, value.dtype) for key, value in fused.state_dict().items()} == keys
    assert len(keys) == KEYS.get(name, len(keys))
    assert not fused.dl4ds_report.kept
    x = image(2, size=64)
    with torch.no_grad():
        want = stock(x)
        with stock_calls() as calls:
            got = fused(x)
    assert calls["BatchNorm2d"] == (1 if name == "densenet121" else 0)  # DenseNet's last BatchNorm has no activation beside it
    assert_same(got, want, 1e-4)
    same = dk.optimize(stock, inplace=True)
    assert same is stock and all(same.get_parameter(key) is value for key, value in parameters.items())


@pytest.mark.parametrize("name", ["resnet18", "densenet_small"])
def test_training_step_is_the_stock_one(name):
    torch.manual_seed(0)
    if name == "resnet18":
        stock = models.resnet18(num_classes=7)
    else:
        stock = models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8, num_classes=7)
    stock = seeded(stock.double()).train()
    fused = dk.optimize(stock)
    x = image(2, size=64, dtype=torch.float64)
    for model in (stock, fused):
        model(x).square().sum().backward()
    for want, got in zip(stock.parameters(), fused.parameters(), strict=True):
        assert_same(got.grad, want.grad, 1e-8)
    for (key, want), got in zip(stock.named_buffers(), fused.buffers(), strict=True):
        assert torch.equal(got, want) if "num_batches" in key else torch.allclose(got, want, 1e-9, 1e-9), key


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_parity(name):
    torch.manual_seed(0)
    stock = seeded(getattr(models.segmentation, name)(weights=None, weights_backbone=None, num_classes=3, aux_loss=True))
    fused = dk.optimize(stock)
    x = image(1, size=48)
    with torch.no_grad():
        want, got = stock(x), fused(x)
    assert list(got) == ["out", "aux"]
    for key in want:
        assert_same(got[key], want[key])


def test_densenet_layer_takes_a_tensor_or_a_list_and_checkpoints_itself():
    layer = seeded(models.densenet._DenseLayer(6, growth_rate=4, bn_size=2, drop_rate=0.0))
    fused = dk.optimize(layer)
    x, y = image(1, 2), image(1, 4, seed=2)
    with torch.no_grad(), stock_calls() as calls:
        assert_same(fused([x, y]), fused(torch.cat([x, y], 1)))
    assert calls["BatchNorm2d"] == 0
    with torch.no_grad():
        assert_same(fused([x, y]), layer([x, y]))
    fused.memory_efficient = True
    x.requires_grad_()
    with stock_calls() as calls:
        fused([x, y]).sum().backward()
    assert calls["BatchNorm2d"] > 2 and x.grad is not None  # stock forward, recomputed by the checkpoint
    fused.memory_efficient, fused.drop_rate = False, 0.5
    torch.manual_seed(3)
    fused.train(), layer.train()
    layer.drop_rate = 0.5
    got = fused([x, y])
    torch.manual_seed(3)
    assert_same(got, layer([x, y]))


@pytest.mark.parametrize(
    ("change", "options", "reasons"),
    [
        (lambda layer: layer.relu1.register_forward_hook(lambda *args: None), {}, ["HOOKS"]),
        (lambda layer: layer.conv1.register_forward_hook(lambda *args: None), {}, ["HOOKS"]),
        (lambda layer: None, {"exclude": "norm1"}, ["EXCLUDED"]),
        (lambda layer: setattr(layer, "norm2", layer.norm1), {}, ["SHARED_MODULE", "SHARED_MODULE"]),
    ],
    ids=["first", "second", "excluded", "shared"],
)
@pytest.mark.filterwarnings("ignore:.*changed nothing")
def test_densenet_layer_kept_in_part(change, options, reasons):
    layer = seeded(models.densenet._DenseLayer(8, growth_rate=4, bn_size=2, drop_rate=0.0))
    change(layer)
    fused = dk.optimize(layer, **options)
    assert [row.reason for row in fused.dl4ds_report.kept] == reasons
    x = image(1, 8)
    with torch.no_grad():
        want = layer([x])
        with stock_calls() as calls:
            got = fused([x])
    assert calls["BatchNorm2d"] == len(reasons)
    assert_same(got, want)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in CHAINS if name not in PARITY and not name.startswith("vgg")])
def test_parity_of_the_large_models(name):
    torch.manual_seed(0)
    stock = seeded(getattr(models, name)())
    fused = dk.optimize(stock)
    x = image(1, size=64)
    with torch.no_grad():
        assert_same(fused(x), stock(x), 1e-3)


def test_frozen_batch_norm_is_kept_and_the_additions_behind_it_fuse():
    norm = pytest.importorskip("torchvision.ops").misc.FrozenBatchNorm2d
    model = models.resnet18(norm_layer=norm)
    model.eval()
    fused = dk.optimize(model)
    assert [row.pattern for row in fused.dl4ds_report.replaced] == ["add_act"] * 8
    assert [row.reason for row in fused.dl4ds_report.kept] == ["SUBCLASS"] * 20
    x = image(1, size=32)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    assert isinstance(fused.bn1, norm)
