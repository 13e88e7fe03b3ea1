"""Pre-activation pairs: ``add_bn_act`` (the end of one block, the start of the next) and ``bn_act_conv``; inference."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import Tensor

from ... import functional as F
from .._case import Case, randn
from ._function import Function
from .bn_act import EPS, VECTORS, make_vectors

DEFAULT = "256x56x56,512x28x28,1024x14x14"


def _two_maps(case: Case, g: torch.Generator) -> dict[str, Tensor]:
    shape = (case.batch, case.layer.C_out, case.layer.H_out, case.layer.W_out)
    return {"x": randn(case, g, shape), "residual": randn(case, g, shape)} | make_vectors(case, g, case.layer.C_out)


def _map_and_filter(case: Case, g: torch.Generator) -> dict[str, Tensor]:
    """A 1x1 convolution to a quarter of the channels, as a bottleneck starts."""
    c = case.layer.C_out
    found = {"x": randn(case, g, (case.batch, c, case.layer.H_out, case.layer.W_out))}
    found["filter"] = (randn(case, g, (max(1, c // 4), c, 1, 1)) / c**0.5).to(case.torch_dtype)
    return found | make_vectors(case, g, c)


def _bn_relu(x: Tensor, vectors: dict[str, Tensor]) -> Tensor:
    weight, bias, mean, var = (vectors[name] for name in VECTORS)
    return TF.relu(TF.batch_norm(x, mean, var, weight, bias, False, 0.1, EPS))


def _stock_add(x: Tensor, residual: Tensor, **vectors: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, _bn_relu(total, vectors)


def _ours_add(backend: str, x: Tensor, residual: Tensor, **v: Tensor) -> tuple[Tensor, Tensor]:
    return F.add_bn_act(
        x, residual, v["running_mean"], v["running_var"], v["weight"], v["bias"], eps=EPS, backend=backend
    )  # fmt: skip


def _stock_conv(x: Tensor, filter: Tensor, **vectors: Tensor) -> Tensor:
    return torch.conv2d(_bn_relu(x, vectors), filter)


def _ours_conv(backend: str, x: Tensor, filter: Tensor, **v: Tensor) -> Tensor:
    return F.bn_act_conv(
        x, v["running_mean"], v["running_var"], v["weight"], v["bias"], filter, eps=EPS, backend=backend
    )  # fmt: skip


add_bn_act = Function(DEFAULT, _two_maps, _stock_add, _ours_add, ("total", "out"), ("x", "residual"), kinks="relu")
bn_act_conv = Function(DEFAULT, _map_and_filter, _stock_conv, _ours_conv)
