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
