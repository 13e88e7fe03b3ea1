"""Prepacked convolution weights never go stale, never travel with a module, and are freed in training."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dl4ds_kernels import _extension, _packing
from dl4ds_kernels.modules import ConvBNAct2d

pytestmark = pytest.mark.skipif(
    not (_extension.status()["_C"].loaded and torch.backends.mkldnn.is_available()),
    reason="weights are prepacked for the C++ part with oneDNN only",
)
X = torch.randn(1, 8, 12, 12)


@pytest.fixture(autouse=True)
def prepack_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers here are small: let them take the prepacked path that real layers take."""
    monkeypatch.setattr(_packing, "MIN_MACS", 0)
    monkeypatch.setattr(_packing, "MIN_LIBRARY_MACS", 0)


@pytest.fixture
def layer() -> ConvBNAct2d:
    """In eval, with a pack made."""
    made = ConvBNAct2d(8, 16, 3, padding=1).eval()
    nn.init.uniform_(made.bn.weight, 0.5, 1.5)
    made.bn.running_mean.normal_()
    infer(made)
    assert holder(made).packs
    return made


def holder(layer: ConvBNAct2d) -> _packing.PackedWeight:
    return layer.conv.__dict__["_dl4ds_packed"]


def infer(layer: ConvBNAct2d) -> Tensor:
    with torch.no_grad():
        return layer(X.to(layer.conv.weight.dtype))


def stock(layer: ConvBNAct2d) -> Tensor:
    with torch.no_grad():
        x = X.to(layer.conv.weight.dtype)
        y = nn.functional.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1)
        bn = layer.bn
        return nn.functional.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps).relu()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within what the default algorithms may differ by: Winograd's F(4x4) is chosen without ``exact``."""
    assert actual.dtype == expected.dtype
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * scale)


def sgd_step(layer: ConvBNAct2d) -> None:
    layer(X).mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def replace_parameter(layer: ConvBNAct2d) -> None:
    layer.conv.weight = nn.Parameter(torch.randn_like(layer.conv.weight))


def swap_data(layer: ConvBNAct2d) -> None:
    layer.conv.weight.data = torch.randn_like(layer.conv.weight)


def load(layer: ConvBNAct2d) -> None:
    layer.load_state_dict({k: v * 0.5 + 0.1 if v.is_floating_point() else v for k, v in layer.state_dict().items()})


def in_place(layer: ConvBNAct2d) -> None:
    with torch.no_grad():
        layer.conv.weight.mul_(-2)


def through_a_view(layer: ConvBNAct2d) -> None:
    with torch.no_grad():
        layer.conv.weight[3].zero_()


def train_step(layer: ConvBNAct2d) -> None:
    layer.train()
    sgd_step(layer)
    layer.eval()


def statistics(layer: ConvBNAct2d) -> None:
    layer.bn.running_mean.add_(1)
    layer.bn.running_var.data.mul_(3)  # not even counted: the BatchNorm vectors are read live
    layer.bn.weight.data.neg_()


def to_double(layer: ConvBNAct2d) -> None:
    layer.double()


def to_double_and_back(layer: ConvBNAct2d) -> None:
    layer.double()
    in_place(layer)
    layer.float()


def same_address(layer: ConvBNAct2d) -> None:
    """What ``.to(bfloat16)`` and back does when the allocator hands out the freed address: another storage, same pointer."""
    weight, shape = layer.conv.weight, layer.conv.weight.shape
    memory = bytearray(weight.numel() * 4)

    def fill(value: float) -> None:
        weight.data = torch.frombuffer(memory, dtype=torch.float32).view(shape)
        weight.data.copy_(torch.linspace(-value, value, weight.numel()).view(shape))

    fill(0.1)
    pointer, version = weight.data_ptr(), weight._version
    infer(layer)
    weight.data = torch.empty(0)
    fill(0.7)
    assert (weight.data_ptr(), weight._version) == (pointer, version)


def another_view(layer: ConvBNAct2d) -> None:
    """Two weights in one storage: same storage and version, another address."""
    weight = layer.conv.weight
    both = torch.randn(2, *weight.shape)
    weight.data = both[0]
    infer(layer)
    weight.data = both[1]


WRITES: list[Callable[[ConvBNAct2d], None]] = [
    in_place, same_address,
    another_view, through_a_view, load, sgd_step, train_step, replace_parameter, swap_data, statistics, to_double,
    to_double_and_back,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_every_counted_write_is_seen(layer: ConvBNAct2d, write: Callable[[ConvBNAct2d], None]) -> None:
    before = infer(layer)
    write(layer)
    after = infer(layer)
    assert_near(after, stock(layer))
    assert after.dtype != before.dtype or not torch.allclose(after, before)


def test_raw_write_needs_a_drop(layer: ConvBNAct2d) -> None:
    """The documented limit: torch does not count a write through ``.data``; dropping the pack shows it."""
    before = infer(layer)
    layer.conv.weight.data.mul_(-1)
    assert torch.equal(infer(layer), before)
    _packing.drop(layer.conv)
    assert_near(infer(layer), stock(layer))


def test_pack_is_reused(layer: ConvBNAct2d) -> None:
    before = dict(holder(layer).packs)
    infer(layer)
    after = holder(layer).packs
    assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)


def test_other_input_sizes_reuse_the_pack(layer: ConvBNAct2d) -> None:
    with torch.no_grad():
        for shape in ((3, 8, 30, 17), (1, 8, 3, 3)):
            x = torch.randn(shape)
            y = layer.conv(x)
            expected = nn.functional.batch_norm(
                y, layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias
            ).relu()
            assert_near(layer(x), expected)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_carry_no_pack(layer: ConvBNAct2d, make: Callable[[ConvBNAct2d], ConvBNAct2d]) -> None:
    copied = make(layer)
    assert not holder(copied).packs and holder(copied) is not holder(layer)
    in_place(copied)
    assert_near(infer(copied), stock(copied))
    assert_near(infer(layer), stock(layer))


def test_pack_is_no_state(layer: ConvBNAct2d) -> None:
    assert not any("packed" in key for key in layer.state_dict())
    assert len(list(layer.parameters())) == 3 and len(pickle.dumps(layer)) < 2 * 8 * 16 * 9 * 4


def test_training_frees_the_memory(layer: ConvBNAct2d) -> None:
    layer.train()
    layer(X)
    assert not holder(layer).packs
    layer.eval()
    assert_near(infer(layer), stock(layer))


def test_pack_dies_with_its_module() -> None:
    layer = ConvBNAct2d(8, 16, 3, padding=1).eval()
    infer(layer)
    probe = weakref.ref(holder(layer))
    del layer
    gc.collect()
    assert probe() is None


def test_inference_mode_parameters_are_not_packed() -> None:
    """torch counts no writes on inference tensors: they go the way without a pack."""
    with torch.inference_mode():
        layer = ConvBNAct2d(8, 16, 3, padding=1).eval()
        layer(X)
        assert layer.conv.__dict__.get("_dl4ds_packed") is None
        layer.conv.weight.mul_(-1)
        assert_near(layer(X), stock(layer))


def test_inference_mode_call_with_normal_parameters(layer: ConvBNAct2d) -> None:
    _packing.drop(layer.conv)
    with torch.inference_mode():
        assert_near(layer(X), stock(layer))
    in_place(layer)
    assert_near(infer(layer), stock(layer))
    with torch.inference_mode():
        assert_near(layer(X), stock(layer))


def test_half_precision_is_not_packed() -> None:
    layer = ConvBNAct2d(8, 16, 3, padding=1).eval().bfloat16()
    torch.testing.assert_close(infer(layer).float(), stock(layer).float(), rtol=2e-2, atol=2e-2)
    assert layer.conv.__dict__.get("_dl4ds_packed") is None


def test_forget_removes_the_holder(layer: ConvBNAct2d) -> None:
    _packing.forget(layer.conv)
    assert "_dl4ds_packed" not in layer.conv.__dict__
    _packing.forget(layer.conv)
    assert_near(infer(layer), stock(layer))
