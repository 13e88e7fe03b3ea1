"""Layers beyond convolution and BatchNorm that ``optimize`` replaces: local response normalisation."""

from __future__ import annotations

import copy

import torch
from convert_models import assert_same, seeded
from torch import nn

import dl4ds_kernels as dk


def lrn_net() -> nn.Sequential:
    return seeded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0), nn.MaxPool2d(2)))


def test_local_response_norm_is_replaced() -> None:
    model, x = lrn_net().double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    report = dk.analyze(model)
    assert sorted(row.pattern for row in report.replaced) == ["conv_act", "local_response_norm"] and not report.kept
    fused = dk.optimize(copy.deepcopy(model))
    assert type(fused[2]) is nn.LocalResponseNorm
    for training in (False, True):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outs = [net.train(training)(leaf) for net, leaf in zip((model, fused), leaves, strict=True)]
        assert_same(outs[1], outs[0], 1e-12)
        for out in outs:
            out.square().sum().backward()
        assert_same(leaves[1].grad, leaves[0].grad, 1e-12)


def test_a_hook_on_it_still_runs() -> None:
    model, seen = lrn_net().eval(), []
    fused = dk.optimize(copy.deepcopy(model))
    fused[2].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        assert_same(fused(x), model(x), 1e-6)
    assert seen == [1]


def test_transposed_convolutions_are_replaced() -> None:
    """With BatchNorm, with an activation alone; one that stands alone if it is 2x2 with stride 2, else it is not reported."""
    layers = [
        nn.ConvTranspose2d(3, 6, 2, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 3, 2, 1, 1),
        nn.LeakyReLU(0.2),
    ]
    model = seeded(nn.Sequential(*layers, nn.ConvTranspose2d(5, 4, 2, 2), nn.ConvTranspose2d(4, 4, 3))).double()
    report = dk.analyze(model)
    patterns = ["conv_transpose", "conv_transpose_act", "conv_transpose_bn_act"]
    assert sorted(row.pattern for row in report.replaced) == patterns and not report.kept
    fused, x = dk.optimize(copy.deepcopy(model)), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for training in (True, False):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outs = [net.train(training)(leaf) for net, leaf in zip((model, fused), leaves, strict=True)]
        assert_same(outs[1], outs[0], 1e-12)
        for out in outs:
            out.square().sum().backward()
        assert_same(leaves[1].grad, leaves[0].grad, 1e-9)
    for ours, theirs in zip(fused.buffers(), model.buffers(), strict=True):
        assert_same(ours.double(), theirs.double(), 1e-12)


def test_a_transposed_convolution_before_an_addition() -> None:
    """Its kernels take no residual: BatchNorm, addition and activation are fused without it."""

    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.bn = nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.bn(self.up(x)) + skip)

    model, x, skip = seeded(Up()).eval(), torch.randn(1, 3, 4, 4), torch.randn(1, 4, 8, 8)
    assert [row.pattern for row in dk.analyze(model).replaced] == ["conv_transpose", "bn_add_act"]
    with torch.no_grad():
        assert_same(dk.optimize(copy.deepcopy(model))(x, skip), model(x, skip), 1e-6)
