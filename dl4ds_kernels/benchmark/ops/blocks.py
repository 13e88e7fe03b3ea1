"""Whole residual blocks, the pooled stem (in inference) and a dense block (in training): stock layers against one call of ours.

Forward only: inside a block a pre-activation within rounding of zero may fall on either side of it, in stock torch as in ours,
so that gradients have no truth of one element; tests/ops/test_residual_block.py compares them away from the kinks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from ... import functional as F
from .._case import Case, randn
from ._function import Function
from .bn_act import EPS, VECTORS, make_vectors

DEFAULT = "64x56x56,256x56x56,512x28x28"
DENSE_LAYERS = 3


def _norm(prefix: str, t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """(running mean, running variance, weight, bias), the order of our functions."""
    weight, bias, mean, var = (t[f"{prefix}_{name}"] for name in VECTORS)
    return mean, var, weight, bias


def _batch_norm(y: Tensor, prefix: str, t: dict[str, Tensor]) -> Tensor:
    return TF.batch_norm(y, *_norm(prefix, t), False, 0.1, EPS)


def _block(kernels: tuple[int, ...], width: Callable[[int], int], preact: bool) -> Function:
    """A block with an identity shortcut whose convolutions have these kernel sizes and, inside, ``width(C)`` channels."""

    def inputs(case: Case, g: torch.Generator) -> dict[str, Tensor]:
        c = case.layer.C_out
        found = {"x": randn(case, g, (case.batch, c, case.layer.H_out, case.layer.W_out))}
        channels = [c, *[max(1, width(c))] * (len(kernels) - 1), c]
        for i, k in enumerate(kernels):
            fan_in = channels[i] * k * k
            filters = randn(case, g, (channels[i + 1], channels[i], k, k)) * (2 / fan_in) ** 0.5
            found[f"filter{i}"] = filters.to(case.torch_dtype)
            vectors = make_vectors(case, g, channels[i if preact else i + 1])
            found |= {f"bn{i}_{name}": vector for name, vector in vectors.items()}
        return found

    def stock(x: Tensor, **t: Tensor) -> Tensor:
        z = x
        for i, k in enumerate(kernels):
            if preact:
                z = torch.conv2d(TF.relu(_batch_norm(z, f"bn{i}", t)), t[f"filter{i}"], padding=k // 2)
            else:
                z = _batch_norm(torch.conv2d(z, t[f"filter{i}"], padding=k // 2), f"bn{i}", t)
                z = z + x if i == len(kernels) - 1 else z
                z = TF.relu(z)
        return z + x if preact else z

    name = ("preact_" if preact else "") + ("basic_block" if len(kernels) == 2 else "bottleneck")
    function = getattr(F, name)

    def ours(backend: str, x: Tensor, **t: Tensor) -> Tensor:
        params = [
            F.ConvParams(t[f"filter{i}"], F.BNParams(*_norm(f"bn{i}", t), eps=EPS), padding=k // 2)
            for i, k in enumerate(kernels)
        ]
        return function(x, params, backend=backend)

    return Function(DEFAULT, inputs, stock, ours)


def _stem(case: Case, g: torch.Generator) -> dict[str, Tensor]:
    c = case.layer.C_out
    vectors = {f"bn_{name}": vector for name, vector in make_vectors(case, g, c).items()}
    return {"x": randn(case, g, (case.batch, c, case.layer.H_out, case.layer.W_out))} | vectors


def _stock_stem(x: Tensor, **t: Any) -> Tensor:
    return TF.max_pool2d(TF.relu(_batch_norm(x, "bn", t)), 3, 2, 1)


def _ours_stem(backend: str, x: Tensor, **t: Any) -> Tensor:
    return F.bn_act_max_pool(x, *_norm("bn", t), eps=EPS, backend=backend)


def _dense(case: Case, g: torch.Generator) -> dict[str, Tensor]:
    """Layers that each make C / 2 channels from four times as many; x in channels_last, where we have an op."""
    c = case.layer.C_out
    growth = max(1, c // 2)
    x = randn(case, g, (case.batch, c, case.layer.H_out, case.layer.W_out))
    found = {"x": x.contiguous(memory_format=torch.channels_last)}
    for layer in range(DENSE_LAYERS):
        shapes = ((c + layer * growth, 4 * growth, 1), (4 * growth, growth, 3))
        for i, (channels, filters, k) in enumerate(shapes):
            weight = randn(case, g, (filters, channels, k, k)) * (2 / (channels * k * k)) ** 0.5
            found[f"filter{layer}{i}"] = weight.to(case.torch_dtype)
            found |= {f"bn{layer}{i}_{name}": vector for name, vector in make_vectors(case, g, channels).items()}
    return found


def _stock_dense(x: Tensor, **t: Tensor) -> Tensor:
    for layer in range(DENSE_LAYERS):
        z = x
        for i in range(2):
            weight, bias = (t[f"bn{layer}{i}_{name}"] for name in VECTORS[:2])
            z = TF.relu(TF.batch_norm(z, None, None, weight, bias, True, 0.1, EPS))
            z = torch.conv2d(z, t[f"filter{layer}{i}"], padding=i)
        x = torch.cat([x, z], 1)
    return x


def _ours_dense(backend: str, x: Tensor, **t: Tensor) -> Tensor:
    layers = [
        [
            F.ConvParams(
                t[f"filter{layer}{i}"], F.BNParams(None, None, *(t[f"bn{layer}{i}_{name}"] for name in VECTORS[:2]), eps=EPS),
                padding=i,
            )
            for i in range(2)
        ]
        for layer in range(DENSE_LAYERS)
    ]  # fmt: skip
    return F.dense_block(x, layers, training=True, backend=backend)


basic_block = _block((3, 3), lambda c: c, preact=False)
bottleneck = _block((1, 3, 1), lambda c: c // 4, preact=False)
preact_basic_block = _block((3, 3), lambda c: c, preact=True)
preact_bottleneck = _block((1, 3, 1), lambda c: c // 4, preact=True)
dense_block = Function(DEFAULT, _dense, _stock_dense, _ours_dense)
bn_act_max_pool = Function("64x112x112", _stem, _stock_stem, _ours_stem)
