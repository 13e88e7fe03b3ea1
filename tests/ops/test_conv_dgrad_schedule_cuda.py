"""Backward passes that take sums and additions from the convolution's epilogue: host functions over the PTX simulator, the
schedule of blocks and layers, and what goes from one node of the autograd graph to another.
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
from dl4ds_kernels import _cuda_conv, models
from dl4ds_kernels._define import op
from dl4ds_kernels.ops import _bn_act_pair, _conv_bn_act_train, _conv_dgrad
from dl4ds_kernels.ops._conv2d import convolve
from dl4ds_kernels.ops._conv_dgrad import Added, Site

HALF = torch.float16


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()


def operands(dtype: torch.dtype, residual: bool) -> tuple[Tensor, Tensor, Site, Added]:
    """dy, weight, the BatchNorm in front, and another gradient."""
    torch.manual_seed(7)
    dy, weight = channels_last(torch.randn(2, 24, 9, 8).to(dtype)), channels_last((torch.randn(24, 40, 3, 3) / 15).to(dtype))
    y, other = (channels_last(torch.randn(2, 40, 9, 8).to(dtype)) for _ in range(2))
    bits = lambda: torch.randint(0, 256, (y.numel() // 8,), dtype=torch.uint8)  # noqa: E731
    vectors = torch.randn(40), torch.randn(40), torch.randn(40) / 4, torch.rand(40) + 0.5
    site = Site(y, *vectors, bits() if residual else None, 1e-3, False, 1, 0.1)
    return dy, weight, site, Added(other, bits(), 1, 0.1)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_host_functions(dtype: torch.dtype, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient, table and elementwise pass: as bn_act's own gradient of the very dx that the convolution stored."""
    monkeypatch.setattr(_conv_dgrad, "op", lambda name, namespace: lambda *args: host()(name, *args))
    dy, weight, site, added = operands(dtype, residual)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    dx, sums = _conv_dgrad.dgrad("dl4ds_kernels", dy, weight, (9, 8), geometry, added, site)
    want = torch.nn.grad.conv2d_input(site.y.shape, weight.double(), dy.double(), 1, 1)
    kept = torch.stack([(added.mask >> k) & 1 for k in range(8)], 1).flatten().view(2, 9, 8, 40).permute(0, 3, 1, 2).bool()
    want = want + torch.where(kept, added.gradient.double(), 0.0)
    torch.testing.assert_close(dx.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)
    vectors = site.weight, site.bias, site.mean, site.rstd
    rest = True, site.eps, False, 1, 0.1, True, True, residual
    dy_want, dweight, dbias, dres = host()("bn_act_bwd", dx, site.y, *vectors, None, site.mask, *rest)
    torch.testing.assert_close(sums[1], dweight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[2], dbias, rtol=1e-5, atol=1e-4)
    dy_got, dres_got = _conv_dgrad.apply("dl4ds_kernels", dx, sums[0], site, residual)
    torch.testing.assert_close(dy_got, dy_want, rtol=torch.finfo(dtype).eps * 2, atol=1e-5)
    assert torch.equal(dres_got, dres)
    again, same = _conv_dgrad.dgrad("dl4ds_kernels", dy, weight, (9, 8), geometry, added, site)
    assert torch.equal(again, dx) and all(map(torch.equal, same, sums))


def test_errors() -> None:
    """Calls that do not fit say which argument; a layer that the kernel cannot serve is named."""
    dy, weight, site, added = operands(HALF, False)
    call = lambda dy, weight, added, site: host()(  # noqa: E731
        "conv_bn_act_dgrad_bwd", dy, weight, [9, 8], [1, 1], [1, 1], *added, *site
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="added: expected shape"):
        call(dy, weight, added._replace(gradient=added.gradient[:1]), site)
    with pytest.raises(RuntimeError, match="weight: expected dtype"):
        call(dy, weight.float(), added, site)
    with pytest.raises(RuntimeError, match=r"not served \(reason 14"):
        call(dy, weight, added, site._replace(activation=4))
    with pytest.raises(RuntimeError, match="dout: expected shape"):
        call(dy[:, :16], weight, added, site)
    with pytest.raises(RuntimeError, match="table: expected shape"):
        host()("bn_act_apply_bwd", site.y, torch.zeros(4), site.y, None, 1, 0.1, False)


def test_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """1x1 layers with something to save take the kernel; without it, with a stride or deep 3x3 filters the library does."""
    last = lambda *shape: torch.empty(shape, dtype=HALF, memory_format=torch.channels_last)  # noqa: E731

    def reason(x: Tensor, weight: Tensor, added: int, sums: bool, stride: int = 1, activation: int = 1) -> int:
        padding = [weight.shape[2] // 2] * 2
        return host()("conv_bn_act_dgrad_route", x, weight, [stride] * 2, padding, [1, 1], 1, added, False, sums, activation)[0]

    x, weight = last(64, 256, 56, 56), last(64, 256, 1, 1)
    assert reason(x, weight, 1, True) == 0 and reason(x, weight, 2, True) == 0 and reason(x, weight, 0, True) == 0
    words = _cuda_conv.REASONS
    assert "no faster" in words[reason(x, weight, 0, False)]
    assert "stride" in words[reason(x, weight, 1, True, stride=2)]
    assert "no faster" in words[reason(last(64, 512, 14, 14), last(512, 512, 3, 3), 0, True)]
    assert "argument" in words[reason(x, weight, 0, True, activation=4)]
    assert "channels_last" in words[reason(x.contiguous(), weight, 1, True)]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "library")
    assert "asked for" in words[reason(x, weight, 1, True)]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
    assert reason(last(64, 512, 14, 14), last(512, 512, 3, 3), 0, True) == 0


class Fused:
    """Inside, the schedule finds the kernels of the simulator where a GPU has its own; calls are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.kinds: Counter[tuple[bool, bool, bool]] = Counter()  # (something is added, by bits, sums)
        monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
        monkeypatch.setattr(_conv_dgrad, "has_dgrad", lambda namespace, x: x.dtype != torch.float64)
        monkeypatch.setattr(_conv_dgrad, "op", lambda name, namespace: lambda *args: self(name, *args))
        monkeypatch.setattr(_bn_act_pair, "op", self.pair)

    def pair(self, name: str, namespace: str) -> Any:
        """TF32 in a forward convolution would put activations on other sides of their kinks."""
        return op(name, namespace) if name == "conv_bn_stats" else lambda *args: self(name, *args)

    def __call__(self, name: str, *args: Any) -> Any:
        self.calls[name] += 1
        if name == "conv_bn_act_dgrad_bwd":
            self.kinds[args[5] is not None, args[6] is not None, args[10] is not None] += 1
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
    # The first block's end and its shortcut's are one op each way; its sums are known unless its output is read twice.
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
