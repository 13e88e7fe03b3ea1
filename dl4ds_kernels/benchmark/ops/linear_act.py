"""``linear_act``: the fully connected layers behind a convolutional network, x (batch, C H W), ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import Tensor

from ... import functional as F
from .._case import Case, randn
from ._function import Function

_MOST_WEIGHTS = 1 << 27  # of fp32: half a gibibyte
_OUTPUTS = 4096


def _layer(case: Case, g: torch.Generator) -> dict[str, Tensor]:
    k = case.layer.C_out * case.layer.H_out * case.layer.W_out
    outputs = min(_OUTPUTS, _MOST_WEIGHTS // k)
    weight = randn(case, g, (outputs, k)) / k**0.5
    return {"x": randn(case, g, (case.batch, k)), "weight": weight, "bias": randn(case, g, (outputs,))}


# The first and second of VGG-16, the last one's inputs of ResNet-50.
linear_act = Function(
    "512x7x7,4096x1x1,2048x1x1",
    _layer,
    lambda x, weight, bias: torch.relu(TF.linear(x, weight, bias)),
    lambda backend, x, weight, bias: F.linear_act(x, weight, bias, activation="relu", backend=backend),
)
