"""Backward passes that take sums and additions from the convolution's epilogue, over the PTX simulator: the schedule of blocks
and layers, and what goes from one node of the autograd graph to another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _cuda_conv import channels_last, require_fused_conv
from _cuda_host import host
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import models
from dl4ds_kernels._define import op
from dl4ds_kernels.ops import _bn_act_pair, _conv_bn_act_train, _conv_dgrad, _residual_step
from dl4ds_kernels.ops._conv2d import convolve


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()


class Fused:
    """Inside, the schedule finds the kernels of the simulator where a GPU has its own; calls are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.kinds: Counter[tuple[bool, bool, bool]] = Counter()  # (something is added, by bits, sums)
        self.two: list[int] = []  # known sums of each call of bn_act_pair_bwd
        monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
        monkeypatch.setattr(_conv_dgrad, "has_dgrad", self.has_dgrad)
        monkeypatch.setattr(_conv_dgrad, "op", lambda name, namespace: lambda *args: self(name, *args))
        monkeypatch.setattr(_bn_act_pair, "op", self.pair)
        monkeypatch.setattr(_residual_step, "plan", lambda *args: None)  # the CPU's alone: a GPU has steps

    @staticmethod
    def has_dgrad(namespace: str, x: Tensor) -> bool:
        return x.dtype != torch.float64

    def pair(self, name: str, namespace: str) -> Any:
        """TF32 in a forward convolution would put activations on other sides of their kinks."""
        return op(name, namespace) if name == "conv_bn_stats" else lambda *args: self(name, *args)

    def __call__(self, name: str, *args: Any) -> Any:
        self.calls[name] += 1
        if name == "conv_bn_act_dgrad_bwd":
            self.kinds[args[5] is not None, args[6] is not None, args[10] is not None] += 1
        if name == "bn_act_pair_bwd":
            self.two.append(sum(known is not None for known in args[-3:]))
        return host()(name, *args)


def gradients(make: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], Fused | None]:
    """Of the input and all parameters of a module."""
    torch.manual_seed(11)
    module = make().to(memory_format=torch.channels_last).train()
    x = channels_last(torch.randn(2, 16, 12, 11)).requires_grad_()
    before = torch.backends.cudnn.conv.fp32_precision
    with monkeypatch.context() as patch:
        kernels = Fused(patch) if fused else None
        try:
            torch.backends.cudnn.conv.fp32_precision = "tf32"
            with dk.backend("cpu"):
                out = module(x)
            dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
            found = torch.autograd.grad(out, [x, *module.parameters()], dout.to(memory_format=torch.channels_last))
        finally:
            torch.backends.cudnn.conv.fp32_precision = before
    return list(found), kernels


def agree(got: list[Tensor], want: list[Tensor]) -> None:
    """Within what TF32's products cost: of the gradients' size, in the mean of their elements."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm() / b.norm().clamp_min(1e-6)) < 6e-3


class Chain(nn.Module):
    """Three bottlenecks: a projection with stride, then two identities; `more`: the first block's output is read twice."""

    def __init__(self, kind: type, more: bool = False) -> None:
        super().__init__()
        width = 8 if kind.expansion == 4 else 32
        down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.first = kind(16, width, 2, down)
        self.second, self.third, self.more = kind(32, width), kind(32, width), more

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.third(self.second(x))
        return out + x.mean() if self.more else out


@pytest.mark.parametrize("more", [False, True])
def test_chain_of_blocks(more: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the CPU's schedule; sums cross blocks, and are taken again where the gradient that arrives is another tensor."""
    make = lambda: Chain(models.resnet.Bottleneck, more)  # noqa: E731
    want, _ = gradients(make, False, monkeypatch)
    got, kernels = gradients(make, True, monkeypatch)
    agree(got, want)
    # The strided 3x3 of the first block is the library's; the other eight take the kernel: two sites within a block.
    assert kernels.kinds == {(False, False, True): 5, (True, True, True): 2, (True, False, False): 1}
    # The first block's end and its shortcut's are one op each way; the sums of both are known unless its output is read twice.
    assert kernels.two == [0 if more else 3]
    assert kernels.calls["bn_act_apply_bwd"] == 5 + 1 and kernels.calls["bn_act_pair_bwd"] == kernels.calls["bn_act_pair"] == 1


def test_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left with a node is taken once, and only in the backward pass that left it."""
    node = torch.nn.Module()
    node.known, node.left = None, None
    dx, sums = torch.zeros(2), (torch.zeros(1),) * 3
    _conv_dgrad.hand_over(node, dx, sums)
    assert _conv_dgrad.known_sums(node, dx) is sums and _conv_dgrad.known_sums(node, dx) is None
    for spoil in (lambda: torch.zeros(2), lambda: dx.add_(1)):
        _conv_dgrad.hand_over(node, dx, sums)
        assert _conv_dgrad.known_sums(node, spoil()) is None
    _conv_dgrad.hand_over(node, dx, sums)
    node.known = (node.known[0] + 1, *node.known[1:])
    assert _conv_dgrad.known_sums(node, dx) is None


@pytest.fixture
def train_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """conv_bn_act_train and conv_bn_stats by the CPU's ops, so that layers are the autograd nodes that they are on CUDA."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, mean: Any, var: Any, *rest: Any) -> tuple[Tensor, ...]:
        bn_weight, bn_bias, residual, *rest = rest
        geometry, (momentum, eps, eps_std, activation, slope, save_mask) = rest[:4], rest[4:]
        y = convolve(x, weight, bias, geometry)
        out, *others = op("bn_act")(
            y, bn_weight, bn_bias, mean, var, residual, True, momentum, eps, eps_std, activation, slope, save_mask
        )  # fmt: skip
        return out, y, *others

    def statistics(x: Tensor, weight: Tensor, bias: Tensor | None, mean: Any, var: Any, *rest: Any) -> tuple[Tensor, ...]:
        y = convolve(x, weight, bias, rest[:4])
        return y, *op("bn_stats")(y, mean, var, *rest[4:])

    library = torch.library.Library("dl4ds_kernels", "IMPL")
    library.impl("conv_bn_act_train", forward, "CPU", allow_override=True)
    library.impl("conv_bn_stats", statistics, "CPU", allow_override=True)
    monkeypatch.setattr(_conv_bn_act_train, "has_train", lambda namespace, x: True)
    yield
    library._destroy()


@pytest.mark.parametrize("hook", [False, True])
def test_chain_of_layers(hook: bool, train_nodes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer a node: sums go from layer to layer, a residual's gradient to the convolution that reads the residual too."""
    seen: list[Tensor] = []

    def make() -> nn.Module:
        chain = Chain(models.resnet.Bottleneck)
        for block in (chain.first, chain.second, chain.third):
            block.forward = block._run
        if hook:  # of the second block's input: the whole gradient, and as it is
            chain.second.register_forward_pre_hook(lambda module, args: args[0].register_hook(seen.append) and None)
        return chain

    want, _ = gradients(make, False, monkeypatch)
    got, kernels = gradients(make, True, monkeypatch)
    agree(got, want)
    # Of nine convolutions two read a residual's tensor (one adds its gradient by bits), five what another layer normalised.
    assert kernels.kinds == {(False, False, True): 5, (True, True, True): 2}
    assert kernels.calls["bn_act_apply_bwd"] == 7
    if hook:
        agree(seen[1:], seen[:1])


def test_under_saved_tensor_hooks(train_nodes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What hooks unpack (a checkpoint computes it again) is for the node that saved it: nothing is asked of neighbours."""
    make = lambda: Chain(models.resnet.Bottleneck)  # noqa: E731
    want, _ = gradients(make, False, monkeypatch)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        got, kernels = gradients(make, True, monkeypatch)
    agree(got, want)
    assert kernels.kinds == {(False, False, True): 5, (True, True, False): 2, (True, False, False): 1}


def test_a_projection_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Basic blocks make its output again (few multiplications): what is left with them are the sums of the other BatchNorm."""
    make = lambda: Chain(models.resnet.BasicBlock)  # noqa: E731
    want, _ = gradients(make, False, monkeypatch)
    got, kernels = gradients(make, True, monkeypatch)
    agree(got, want)
    assert kernels.two == [2]


def test_maps_that_the_pair_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of bn_act_bwd take their sums themselves: nobody leaves any with such a block."""
    monkeypatch.setattr(_bn_act_pair, "fits", lambda y: False)
    make = lambda: Chain(models.resnet.Bottleneck)  # noqa: E731
    want, _ = gradients(make, False, monkeypatch)
    got, kernels = gradients(make, True, monkeypatch)
    agree(got, want)
    assert not kernels.two
    assert kernels.kinds == {(False, False, True): 5, (True, True, True): 1, (True, True, False): 1, (True, False, False): 1}


def test_a_block_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are left with a block of another namespace (Triton), which has no op for them, are taken again."""
    make = lambda: Chain(models.resnet.Bottleneck)  # noqa: E731
    want, _ = gradients(make, True, monkeypatch)
    lean = Fused.has_dgrad
    monkeypatch.setattr(Fused, "has_dgrad", staticmethod(lambda namespace, x: x.shape[1] != 16 and lean(namespace, x)))
    got, kernels = gradients(make, True, monkeypatch)
    agree(got, want)
    assert kernels.two == [0] and kernels.calls["conv_bn_act_dgrad_bwd"] == 6


def test_kept_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients, bit for bit, from activations that are kept; sums and additions as before."""

    def make() -> nn.Module:
        chain = Chain(models.resnet.Bottleneck)
        for block in (chain.first, chain.second, chain.third):
            block.keep_activations = True
        return chain

    again, _ = gradients(lambda: Chain(models.resnet.Bottleneck), True, monkeypatch)
    kept, kernels = gradients(make, True, monkeypatch)
    assert all(map(torch.equal, again, kept)) and kernels.calls["conv_bn_act_dgrad_bwd"] == 8
