"""Convolutions that feed one another run as one op call in inference, and as themselves wherever something changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.densenet import _Transition
from torchvision.models.resnet import BasicBlock, Bottleneck

import dl4ds_kernels as dk
from dl4ds_kernels import _extension
from dl4ds_kernels.modules import _chain
from dl4ds_kernels.modules._chain import Step, residual_steps, run_chain
from dl4ds_kernels.modules._run import NO_ACT, ActSpec

pytestmark = pytest.mark.skipif(
    _extension.host() is None or _extension.host().cpu_features()["isa"] not in ("avx512", "avx2"),
    reason="the engine is chosen with AVX2 and AVX-512 only",
)


def seeded(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


def downsample(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class Pair(nn.Sequential):
    """U-Net's two convolutions."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for c in (32, 48):
            layers += [nn.Conv2d(c, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(inplace=True)]
        super().__init__(*layers)


BLOCKS = {
    "bottleneck": (lambda: Bottleneck(64, 16), 64),
    "bottleneck down": (lambda: Bottleneck(32, 16, 2, downsample(32, 64, 2)), 32),
    "basic": (lambda: BasicBlock(48, 48), 48),
    "basic down": (lambda: BasicBlock(32, 64, 2, downsample(32, 64, 2)), 32),
    "pair": (Pair, 32),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of steps of every conv_chain call."""
    found: list[int] = []
    call = _chain.call

    def counted(overload: Any, differentiable: bool, *args: Any) -> Any:
        found.append(len(args[3]) // 3)
        return call(overload, differentiable, *args)

    monkeypatch.setattr(_chain, "call", counted)
    return found


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, channels = BLOCKS[name]
    return seeded(make()), torch.randn(2, channels, 24, 20)


@torch.no_grad()
def run(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, layout: torch.memory_format, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = build(name)
    x = x.to(memory_format=layout)
    truth = run(copy.deepcopy(net).double(), x.double())
    fused = dk.optimize(net)
    before = x.clone()
    with monkeypatch.context() as patch:
        patch.setattr(_chain, "_choose_ahead", lambda *_: None)
        first = run(copy.deepcopy(fused), x)  # layer by layer, each choosing for itself
    assert calls == []
    second = run(fused, x)
    assert calls == [(3 if "bottleneck" in name else 2) + ("down" in name)]
    assert torch.equal(first, second) and torch.equal(x, before)
    assert float((second - truth).abs().max()) <= 2e-5 * float(truth.abs().max())


def stage() -> nn.Module:
    """Three blocks, the first with a projection."""
    return seeded(nn.Sequential(Bottleneck(32, 16, 2, downsample(32, 64, 2)), Bottleneck(64, 16), Bottleneck(64, 16)))


def test_blocks_in_a_row(calls: list[int]) -> None:
    """One call, in which every block adds to its input in place: the same bits as block by block, and x stays as it was."""
    net, x = stage(), torch.randn(4, 32, 24, 20)
    truth, before = run(copy.deepcopy(net).double(), x.double()), x.clone()
    fused = dk.optimize(net)
    y = x
    for block in copy.deepcopy(fused):
        y = run(block, y)
    assert calls == [4, 3, 3]
    calls.clear()
    for _ in range(2):
        out = run(fused, x)
        assert torch.equal(out, y) and torch.equal(x, before)
    assert calls == [10, 10]
    assert float((out - truth).abs().max()) <= 2e-5 * float(truth.abs().max())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_own_stages(name: str, calls: list[int]) -> None:
    """Our own nets: a call for each stage, the same bits as block by block."""
    net, x = seeded(dk.models.create(name, num_classes=3)), torch.randn(1, 3, 64, 64)
    first = run(net, x)
    assert calls == ([4, 5, 5, 5] if name == "resnet18" else [10, 13, 19, 10])
    y = run(nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool), x)
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            y = run(block, y)
    torch.testing.assert_close(net.fc(y.mean((2, 3))), first, rtol=1e-4, atol=1e-5)
    seen: list[int] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(1) if m is net.layer1[1] else None)
    run(net, x)
    handle.remove()
    assert seen == [1]


@pytest.mark.parametrize("change", ["hook", "hook inside", "excluded", "options", "another block", "train", "grad", "empty"])
def test_blocks_in_a_row_fall_back(change: str, calls: list[int]) -> None:
    net, x = stage(), torch.randn(4, 32, 24, 20)
    fused = dk.optimize(net, exclude="1" if change == "excluded" else None)
    seen: list[int] = []
    if change == "hook":
        fused[1].register_forward_hook(lambda *_: seen.append(1))
    elif change == "hook inside":
        fused[0].downsample[1].register_forward_hook(lambda *_: seen.append(1))
    elif change == "options":
        dk.optimize(fused[2], exact=True, inplace=True)
    elif change == "another block":
        for m in (net, fused):
            m[1] = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU())
            torch.manual_seed(1)
            nn.init.normal_(m[1][0].weight)
            nn.init.zeros_(m[1][0].bias)
    elif change == "train":
        for m in (net, fused):
            m[1].train()
    elif change == "empty":
        x = x[:0]
    if change == "grad":
        assert fused(x).requires_grad
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)
    else:
        for _ in range(2):
            torch.testing.assert_close(run(fused, x), run(net, x), rtol=1e-4, atol=1e-4)
    assert 10 not in calls
    assert len(seen) == (2 if "hook" in change else 0)


def test_values_are_read_at_every_call(calls: list[int]) -> None:
    """Statistics, affine parameters, weights in place and weights replaced are never stale."""
    net, x = build("bottleneck")
    fused = dk.optimize(net)
    for _ in range(2):
        run(fused, x)
    with torch.no_grad():
        for target in (fused, net):
            target.bn1.running_mean += 0.5
            target.bn3.weight *= 2
            target.conv2.weight *= 1.5
            target.conv3.weight = nn.Parameter(target.conv3.weight * 0.5)
            target.bn2.eps = 0.1
    for _ in range(3):
        torch.testing.assert_close(run(fused, x), run(net, x), rtol=1e-4, atol=1e-4)
    assert calls[-1] == 3


@pytest.mark.parametrize(
    "change", ["hook", "patched", "train", "grad", "autocast", "dtype", "subclass", "relu6", "global hook", "bn vector dtype"]
)
def test_falls_back(change: str, calls: list[int]) -> None:
    net, x = build("pair" if change == "autocast" else "basic")
    fused = dk.optimize(net)
    for _ in range(2):
        run(fused, x)
    calls.clear()
    seen: list[int] = []
    both = (net, fused)
    if change == "hook":
        fused.bn1.register_forward_hook(lambda *_: seen.append(1))
    elif change == "patched":
        fused.conv2.forward = lambda z: seen.append(1) or nn.Conv2d.forward(fused.conv2, z)
    elif change == "train":
        for m in both:
            m.bn2.train()
    elif change == "dtype":
        for m in both:
            m.double()
        x = x.double()
    elif change == "subclass":
        for m in both:
            m.conv1.__class__ = type("Mine", (nn.Conv2d,), {"forward": lambda self, z: 2 * nn.Conv2d.forward(self, z)})
    elif change == "relu6":
        for m in both:
            m.relu = nn.ReLU6()
    elif change == "bn vector dtype":
        for m in both:
            m.bn1.running_mean = m.bn1.running_mean.double()
    if change == "bn vector dtype":
        with pytest.raises(RuntimeError):
            run(net, x)
        with pytest.raises(RuntimeError):
            run(fused, x)
        return
    if change == "grad":
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)
        assert fused(x).requires_grad
    elif change == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert run(fused, x).dtype is run(net, x).dtype
    elif change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        run(fused, x)
        handle.remove()
    else:
        torch.testing.assert_close(run(fused, x), run(net, x), rtol=1e-4, atol=1e-4)
    assert calls == []
    if change in ("hook", "patched", "global hook"):
        assert seen


def test_new_sizes_threads_and_copies(calls: list[int]) -> None:
    net, x = build("basic down")
    fused = dk.optimize(net)
    expected = run(net, x)
    for _ in range(2):
        run(fused, x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for _ in range(2):
            torch.testing.assert_close(run(fused, x), expected, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)
    for z in (x[:1], x[:, :, :15], x[:0]):
        for _ in range(2):
            torch.testing.assert_close(run(fused, z), run(net, z), rtol=1e-4, atol=1e-4)
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(run(clone, x), expected, rtol=1e-4, atol=1e-4)


def test_pooling_behind_a_convolution_is_read_at_every_call(calls: list[int]) -> None:
    """DenseNet's transition: a mean over 2x2 pixels is part of the call, another one is not."""
    net, x = seeded(_Transition(32, 48)), torch.randn(2, 32, 24, 20)
    fused = dk.optimize(net)
    for _ in range(2):
        torch.testing.assert_close(run(fused, x), run(net, x), rtol=1e-4, atol=1e-4)
    assert calls == [1, 1]
    for name, value in (("stride", 1), ("kernel_size", 3), ("padding", 1), ("ceil_mode", True)):
        for model in (net, fused):
            setattr(model.pool, name, value)
        torch.testing.assert_close(run(fused, x), run(net, x), rtol=1e-4, atol=1e-4)
    assert calls == [1, 1]


def test_wrong_channels_raise_as_stock() -> None:
    net, x = build("basic")
    fused = dk.optimize(net)
    for _ in range(2):
        run(fused, x)
    with pytest.raises(RuntimeError):
        run(fused, x[:, :40])
    with pytest.raises((RuntimeError, ValueError)):
        run(fused, x[0, 0])


def test_what_stands_between_must_not_write() -> None:
    """A branch that changes the block's input in place is not moved before the block's first convolution."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
            self.bn_a, self.bn_b = nn.BatchNorm2d(32), nn.BatchNorm2d(32)
            self.side = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(32, 32, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.bn_a(self.a(x)))
            side = self.side(x)
            return torch.relu(self.bn_b(self.b(y)) + side)

    net = seeded(Net())
    x = torch.randn(2, 32, 24, 20)
    fused = dk.optimize(net)
    for _ in range(3):
        torch.testing.assert_close(run(fused, x.clone()), run(net, x.clone()), rtol=1e-4, atol=1e-4)


def test_residual_of_the_chain_itself() -> None:
    """A residual made by an earlier step gives its memory to the output."""
    convs = [nn.Conv2d(32, 32, 1).eval() for _ in range(3)]
    bns = [seeded(nn.BatchNorm2d(32)) for _ in range(3)]
    relu = ActSpec("relu")
    steps = (
        Step(convs[0], bns[0], NO_ACT, (0,)),
        Step(convs[1], bns[1], relu, (0,)),
        Step(convs[2], bns[2], relu, (2,), residual=1),
    )
    x = torch.randn(2, 32, 24, 20)
    with torch.no_grad():
        expected = torch.relu(bns[2](convs[2](torch.relu(bns[1](convs[1](x))))) + bns[0](convs[0](x)))
        for _ in range(3):
            torch.testing.assert_close(run_chain((x,), steps), expected, rtol=1e-4, atol=1e-4)


def test_bad_code() -> None:
    """The op checks what it is told before it reads anything."""
    op = torch.ops.dl4ds_kernels.conv_chain
    x = torch.randn(1, 16, 4, 4)
    for code, match in (([], "at least one step"), ([1, 2], "whole steps"), ([1] * 26 + [3], "source registers")):
        with pytest.raises(RuntimeError, match=match):
            op([x], [], code, [0.0] * 3)
    step = [1, 0, 1, -1, *[-1] * 8, -1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 5]
    with pytest.raises(RuntimeError, match="reads register 5"):
        op([x], [], step, [0.0] * 3)
    step[-1] = 0
    with pytest.raises(RuntimeError, match="tensor 0 of 0"):
        op([x], [], step, [0.0] * 3)
    with pytest.raises(RuntimeError, match="numbers"):
        op([x], [], step, [0.0])


def pair_of_convolutions() -> nn.Module:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for c, k in ((8, 24), (24, 16)):
        layers += [nn.Conv2d(c, k, 3, padding=1, bias=False), nn.BatchNorm2d(k), nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Sequential(*layers)).to(memory_format=torch.channels_last)


def trained(model: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """(output, gradients and buffers of a training call, bytes that it keeps for backward besides x and parameters)."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = model(x)
    out.square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()], sum(kept.values())


def test_a_chain_trains_as_one_op(monkeypatch: pytest.MonkeyPatch, kernels: None) -> None:
    """The same bits as layer by layer; the activation between the convolutions is not kept."""
    x = torch.randn(2, 8, 20, 20).to(memory_format=torch.channels_last)
    with dk.backend("cpu"):  # a small input would go to torch's layers
        one, less = trained(dk.optimize(pair_of_convolutions()), x)
        monkeypatch.setattr(_chain, "_run_block", lambda *_: None)
        single, more = trained(dk.optimize(pair_of_convolutions()), x)
    assert all(torch.equal(a, b) for a, b in zip(one, single, strict=True))
    assert more - less >= 2 * 24 * 20 * 20 * 4


def test_what_is_no_plain_chain_trains_layer_by_layer(kernels: None) -> None:
    """A frozen BatchNorm, two activations, a hook: the stock modules' values all the same."""
    x = torch.randn(2, 8, 12, 12)
    for change in (
        lambda m: m[0][1].eval(),
        lambda m: m[0].__setitem__(2, nn.SiLU()),
        lambda m: m[0][2].register_forward_hook(lambda module, args, out: out * 2),
    ):
        stock, ours = pair_of_convolutions().train(), dk.optimize(pair_of_convolutions()).train()
        change(stock), change(ours)
        expected = trained(stock, x)[0]
        with dk.backend("cpu"):
            found = trained(ours, x)[0]
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_projection_without_a_stride_goes_first(stride: int) -> None:
    """Registers of a block that reads register 2 and fills those from 3 on; the branch's end is then one after the other."""
    branch = [(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) for _ in range(3)]
    projection = nn.Conv2d(8, 8, 1, stride), nn.BatchNorm2d(8)
    act = ActSpec("relu")
    steps = residual_steps(branch, act, projection, 2, 3)
    assert [step.conv is projection[0] for step in steps].index(True) == (0 if stride == 1 else 2)
    assert [step.sources for step in steps] == ([(2,), (2,), (4,), (5,)] if stride == 1 else [(2,), (3,), (2,), (4,)])
    assert [step.residual for step in steps] == [-1, -1, -1, 3 if stride == 1 else 5]
    assert [step.residual for step in residual_steps(branch, act, None, 2, 3)] == [-1, -1, 2]
