"""Recorded forwards: the same bits as the forward itself, and given up as soon as anything that they rely on is different."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import _extension, _packing, models
from dl4ds_kernels.modules import _replay

pytestmark = pytest.mark.usefixtures("kernels")  # recordings are compared in the C++ part
SIZE = 64


class Block(nn.Module):
    """Two convolutions and a sum; the forward reads a number and a flag of the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.scale, self.skip = 1.0, True

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = y + x if self.skip else y
        return self.relu(y * self.scale)


class Net(nn.Module):
    """A stem, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = torch.max_pool2d(torch.relu(x), 2)
        return self.head(torch.flatten(self.pool(x), 1))


def statistics(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


def image(n: int = 1, size: int = SIZE) -> Tensor:
    return torch.randn(n, 3, size, size)


def tapes(module: nn.Module) -> dict[Any, Any]:
    known = module.__dict__.get("_dl4ds_replay")
    return {} if known is None else known.tapes


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call that was answered by a recording."""
    found: list[int] = []
    original = _replay._tensors_of

    def counted(*args: Any) -> Any:
        tensors = original(*args)
        if tensors is not None:
            found.append(1)
        return tensors

    monkeypatch.setattr(_replay, "_tensors_of", counted)
    return found


class Pair:
    """A stock model and an optimized copy whose forward has been recorded."""

    def __init__(self, make: Callable[[], nn.Module] = Net) -> None:
        self.stock = statistics(make())
        self.fused = dk.optimize(copy.deepcopy(self.stock))
        self.x = image()
        for _ in range(4):
            self.check()
        assert tapes(self.fused)

    def check(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        with torch.no_grad():
            want, got = self.stock(x), self.fused(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        return got

    def both(self, change: Callable[[nn.Module], Any]) -> None:
        for model in (self.stock, self.fused):
            change(model)


def test_a_recording_answers_with_the_same_bits(runs: list[int]) -> None:
    pair = Pair()
    assert runs
    del runs[:]
    with torch.no_grad():
        replayed = pair.fused(pair.x)
        other = image()
        a = pair.fused(other)
    assert len(runs) == 2
    for x, out in ((pair.x, replayed), (other, a)):
        fresh = dk.optimize(copy.deepcopy(pair.stock))
        with torch.no_grad():
            assert torch.equal(fresh(x), out)
        assert not tapes(fresh)  # a size that came once


def set_attribute(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.blocks[1], name, value)


def swap(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.blocks[0].conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)


def other_geometry(model: nn.Module) -> None:
    model.blocks[0].conv1.padding, model.blocks[0].conv1.dilation = (2, 2), (2, 2)


def write(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[0].conv1.weight.mul_(1.5)


def replace_parameter(model: nn.Module) -> None:
    torch.manual_seed(6)
    model.blocks[0].conv1.weight = nn.Parameter(torch.randn(32, 32, 3, 3) / 17)


def replace_data(model: nn.Module) -> None:
    torch.manual_seed(7)
    model.blocks[1].conv1.weight.data = torch.randn(32, 32, 3, 3) / 17


def write_statistics(model: nn.Module) -> None:
    model.blocks[0].bn1.running_mean.add_(0.5)


def replace_buffer(model: nn.Module) -> None:
    model.blocks[0].bn1.running_var = torch.full((32,), 2.0)


def other_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {k: v + 0.1 * torch.rand(v.shape) if v.is_floating_point() else v for k, v in model.state_dict().items()}


def load(model: nn.Module) -> None:
    model.load_state_dict(other_state(model, 8))


def assign(model: nn.Module) -> None:
    model.load_state_dict(other_state(model, 9), assign=True)


def add_a_block(model: nn.Module) -> None:
    torch.manual_seed(10)
    model.blocks.append(statistics(Block()))


def remove_a_block(model: nn.Module) -> None:
    del model.blocks[1]


def patch(model: nn.Module) -> None:
    block = model.blocks[0]
    block.forward = lambda x: type(block).forward(block, x) + 1


def patch_a_leaf(model: nn.Module) -> None:
    model.blocks[0].bn2.forward = lambda x: x * 2


def turn_off_statistics(model: nn.Module) -> None:
    model.blocks[1].bn1.train()


def unbias(model: nn.Module) -> None:
    model.stem[0].bias = None


CHANGES = {
    "number": set_attribute("scale", 0.5), "flag": set_attribute("skip", False), "swap": swap, "geometry": other_geometry,
    "eps": lambda model: setattr(model.blocks[0].bn1, "eps", 0.5), "write": write, "parameter": replace_parameter,
    "data": replace_data, "statistics": write_statistics, "buffer": replace_buffer, "load": load, "assign": assign,
    "append": add_a_block, "remove": remove_a_block, "patch": patch, "leaf": patch_a_leaf, "mode": turn_off_statistics,
    "bias": unbias, "inplace": lambda model: setattr(model.blocks[0].relu, "inplace", True),
    "hook": lambda model: model.blocks[0].register_forward_hook(lambda m, a, out: out + 1),
    "pre-hook": lambda model: model.blocks[1].conv1.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "root hook": lambda model: model.register_forward_hook(lambda m, a, out: out + 1),
    "activation": lambda model: setattr(model.blocks[0], "relu", nn.SiLU()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    pair = Pair()
    before = pair.check()
    pair.both(CHANGES[change])
    after = pair.check()
    if change not in ("inplace", "mode"):
        assert after.shape != before.shape or (after - before).abs().max() > 1e-4
    for _ in range(4):  # recorded anew, or not at all
        pair.check()


def test_a_hook_is_called_every_time() -> None:
    pair, seen = Pair(), []
    handle = pair.fused.blocks[1].relu.register_forward_hook(lambda *_: seen.append(1))
    for i in range(1, 5):
        pair.check()
        assert len(seen) == 2 * i
    handle.remove()
    for _ in range(4):
        pair.check()
    assert len(seen) == 8 and tapes(pair.fused)


def test_global_hooks_and_function_modes_are_served(runs: list[int]) -> None:
    pair, seen = Pair(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    with torch.no_grad():
        pair.fused(pair.x)
    handle.remove()
    assert pair.fused.blocks[0].relu in seen

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    del runs[:]
    with torch.no_grad(), Mode():
        pair.fused(pair.x)
    assert torch.flatten in seen and not runs


def test_what_lies_around_a_call_is_asked_each_time(runs: list[int]) -> None:
    pair = Pair()

    def used(x: Tensor | None = None) -> bool:
        del runs[:]
        pair.check(x)
        return bool(runs)

    assert used()
    with dk.backend("reference"):
        assert not used()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        del runs[:]
        assert pair.fused(pair.x).dtype == torch.bfloat16 and not runs
    out = pair.fused(pair.x)
    assert out.requires_grad and not runs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert not used()
    torch.set_num_threads(threads)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not used()
    assert used() and not used(image(2)) and not used(image(1, 96))
    assert not used(pair.x.contiguous(memory_format=torch.channels_last))
    double = pair.fused.double()
    with torch.no_grad():
        assert double(pair.x.double()).dtype == torch.float64
    pair.fused.float()
    pair.check()


def test_modes_of_the_whole_model() -> None:
    pair = Pair()
    pair.both(lambda model: model.train())
    torch.testing.assert_close(pair.fused(pair.x), pair.stock(pair.x), rtol=1e-3, atol=1e-3)
    for m in pair.fused.modules():
        if isinstance(m, nn.Conv2d):
            assert not _packing.packs(m)  # a recording does not keep them alive
    pair.both(lambda model: model.eval())
    for _ in range(4):
        pair.check()
    assert tapes(pair.fused)


def test_packs_of_a_written_weight_are_made_once() -> None:
    pair = Pair()
    with torch.no_grad():
        pair.both(write)
        pair.check()
        packs = {id(p) for m in pair.fused.modules() for p in _packing.packs(m).values()}
        pair.check()
        pair.check()
    assert packs == {id(p) for m in pair.fused.modules() for p in _packing.packs(m).values()}


def test_functional_call() -> None:
    pair = Pair()
    other = {k: v * 1.5 for k, v in pair.stock.named_parameters()}
    with torch.no_grad():
        for _ in range(3):
            got = torch.func.functional_call(pair.fused, other, (pair.x,))
            torch.testing.assert_close(got, torch.func.functional_call(pair.stock, other, (pair.x,)), rtol=1e-3, atol=1e-3)
            pair.check()


def test_copies_and_pickles_record_for_themselves() -> None:
    pair = Pair()
    twin = copy.deepcopy(pair.fused)
    assert not tapes(twin)
    for _ in range(4):
        assert torch.equal(twin(pair.x).detach(), pair.fused(pair.x).detach())
        with torch.no_grad():
            twin(pair.x)
    assert tapes(twin)
    with torch.no_grad():
        twin.head.weight.zero_()
        assert torch.equal(twin(pair.x), twin.head.bias[None]) and not torch.equal(pair.fused(pair.x), twin(pair.x))
    file = io.BytesIO()
    torch.save(pair.fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not tapes(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(pair.x), pair.fused(pair.x))


def test_nothing_is_kept_alive() -> None:
    pair = Pair()
    model, weight, packed = weakref.ref(pair.fused), weakref.ref(pair.fused.head.weight), None
    for m in pair.fused.modules():
        for p in _packing.packs(m).values():
            packed = weakref.ref(p)
    del pair.fused, m, p
    gc.collect()
    assert model() is None and weight() is None and packed is not None and packed() is None


def test_intermediate_maps_are_freed(runs: list[int]) -> None:
    """Neither a recording nor making it holds a map longer than the forward does."""
    layers = [nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()) for _ in range(12)]
    model = dk.optimize(statistics(nn.Sequential(*layers)))
    x = torch.randn(1, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    peaks = []
    with torch.no_grad():
        for _ in range(5):
            before = _extension.host().pool_stats()["used_bytes"]
            _extension.host().pool_trim()
            model(x)
            peaks.append(_extension.host().pool_stats()["peak_used_bytes"] - before)
    assert runs and max(peaks[1:]) <= peaks[0] + x.numel() * 4


def test_restore_and_refresh() -> None:
    pair = Pair()
    with torch.no_grad():
        pair.fused.blocks[0].conv1.weight.data.view(-1)[0:9].add_(1.0)  # torch does not count it
        pair.stock.blocks[0].conv1.weight.data.view(-1)[0:9].add_(1.0)
    dk.refresh(pair.fused)
    pair.check()
    dk.restore(pair.fused)
    assert not any("_dl4ds_replay" in m.__dict__ for m in pair.fused.modules())
    pair.check()


def test_data_dependent_values_are_not_recorded() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.conv, self.bn = Net(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x))
            return self.net(x) / float(x.abs().max())

    stock = statistics(Scaled())
    model = dk.optimize(copy.deepcopy(stock))
    with torch.no_grad():
        for i in range(6):
            x = image() * (i + 1)
            torch.testing.assert_close(model(x), stock(x), rtol=1e-3, atol=1e-4)
    assert not tapes(model)


def test_side_effects_of_unknown_modules_happen() -> None:
    calls = []

    class Logged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(tuple(x.shape))
            return x * 2

    model = Net()
    model.blocks.append(Logged())
    model = dk.optimize(statistics(model))
    with torch.no_grad():
        for i in range(1, 6):
            model(image())
            assert len(calls) == i


def test_recording_imports_nothing() -> None:
    code = """
import sys, torch, dl4ds_kernels as dk
from torch import nn
model = dk.optimize(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval())
with torch.no_grad():
    model(torch.zeros(1, 16, 32, 32))
    before = set(sys.modules)
    model(torch.zeros(1, 16, 32, 32))
assert model.__dict__["_dl4ds_replay"].tapes
assert set(sys.modules) == before, set(sys.modules) - before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_special_values_go_the_same_way() -> None:
    pair = Pair()
    x = pair.x.clone()
    x[0, 1, 3, 4] = float("nan")
    with torch.no_grad():
        assert torch.equal(pair.fused(x).isnan(), pair.stock(x).isnan())
        x[0, 1, 3, 4] = float("inf")
        assert torch.equal(pair.fused(x).isnan(), pair.stock(x).isnan())


def test_many_sizes_and_threads() -> None:
    pair = Pair()
    for size in range(32, 32 + 2 * _replay._MAX_SIZES):
        for _ in range(2):
            with torch.no_grad():
                pair.fused(image(1, size))
    assert len(tapes(pair.fused)) <= _replay._MAX_SIZES
    pair.check()
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            g = torch.Generator().manual_seed(seed)
            for _ in range(20):
                pair.check(torch.randn(1, 3, 32 + seed, SIZE, generator=g))
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "mobilenet_v2"])
def test_torchvision(name: str, runs: list[int]) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    stock = statistics(torchvision.models.get_model(name, weights=None, **options))
    model = dk.optimize(copy.deepcopy(stock), exact=True)
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        want = stock(x)
        for _ in range(4):
            torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    assert runs


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 64), ("vgg11", 64), ("densenet121", 64), ("unet_bn", 64), ("cifar_resnet20", 32), ("hourglass1", 128)],
)
def test_models_of_ours(name: str, size: int, runs: list[int]) -> None:
    model, x = statistics(models.create(name)), image(1, size)
    with torch.no_grad():
        outs = [model(x) for _ in range(4)]
    flat = [o if isinstance(o, list) else [o] for o in outs]
    assert runs and all(torch.equal(a, b) for other in flat[1:] for a, b in zip(flat[0], other, strict=True))
