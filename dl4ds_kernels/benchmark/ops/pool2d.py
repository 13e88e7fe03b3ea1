"""Inference poolings ``max_pool2d`` (3x3/2), ``avg_pool2d`` (2x2/2), ``global_avg_pool2d``, and ``max_unpool`` (2x2/2)."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import Tensor

from ... import functional as F
from .._case import Case, randn
from ._function import Function

# The stems of ResNet and DenseNet, DenseNet's transitions, GoogLeNet's poolings.
DEFAULT = "64x112x112,256x56x56,480x28x28"


def _map(case: Case, g: torch.Generator) -> dict[str, Tensor]:
    return {"x": randn(case, g, (case.batch, case.layer.C_out, case.layer.H_out, case.layer.W_out))}


def _pooled(case: Case, g: torch.Generator) -> dict[str, Tensor]:
    y = _map(case, g)["x"]
    return {"y": y, "where": torch.randint(4, y.shape, generator=g, dtype=torch.uint8)}


def _stock_unpool(y: Tensor, where: Tensor) -> Tensor:
    n, c, h, w = y.shape
    rows = torch.arange(h, device=y.device)[:, None] * 2 + where // 2
    columns = torch.arange(w, device=y.device) * 2 + where % 2
    return TF.max_unpool2d(y, rows * (2 * w) + columns, 2, 2)


max_pool2d = Function(
    DEFAULT, _map, lambda x: TF.max_pool2d(x, 3, 2, 1), lambda backend, x: F.max_pool2d(x, 3, 2, 1, backend=backend)
)
avg_pool2d = Function(DEFAULT, _map, lambda x: TF.avg_pool2d(x, 2), lambda backend, x: F.avg_pool2d(x, 2, backend=backend))
global_avg_pool2d = Function(
    "512x7x7,1024x7x7,2048x7x7",
    _map,
    lambda x: TF.adaptive_avg_pool2d(x, 1),
    lambda backend, x: F.global_avg_pool2d(x, backend=backend),
)
max_unpool = Function(
    "64x112x112,128x56x56,256x28x28",
    _pooled,
    _stock_unpool,
    lambda backend, y, where: F.max_unpool(y, where, backend=backend),
    wrt=("y",),
)
