"""Contract of ``linear_act``, inference of a fully connected layer for a few rows: fp32, no gradient (training takes stock)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._define import define_op


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


define_op(
    "linear_act",
    "(Tensor x, Tensor weight, Tensor? bias, int activation, float negative_slope) -> Tensor",
    fake=_fake,
    triton=False,
)
