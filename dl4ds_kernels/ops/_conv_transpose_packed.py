"""Contract of the packed transposed convolution (2x2, stride 2): ``act(bn(conv_transpose2d(x)))``, CPU inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op


def _fake_pack(weight: Tensor) -> Tensor:
    raise RuntimeError("conv_transpose_bn_act_pack: packed weights are made outside of tracing")


def _fake_packed(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    n, _, height, width = x.shape
    return x.new_empty((n, weight.shape[1], 2 * height, 2 * width)).to(memory_format=torch.channels_last)


define_op("conv_transpose_bn_act_pack", "(Tensor weight) -> Tensor", fake=_fake_pack, stem="conv_bn_act", triton=False)
define_op(
    "conv_transpose_bn_act_packed",
    "(Tensor x, Tensor weight, Tensor packed, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? bn_weight, "
    "Tensor? bn_bias, float eps, bool eps_std, int activation, float negative_slope) -> Tensor",
    fake=_fake_packed,
    stem="conv_bn_act",
    triton=False,
)
