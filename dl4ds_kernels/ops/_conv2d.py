"""Contract of a training step's convolutions by our own kernels, and ``conv2d_step``, which chooses pass by pass.

``conv2d_step`` is ``torch.conv2d`` with gradients: the output, the gradient of the input and that of the weight are each
computed by the fastest of the library, our direct product (``conv2d_exact``, algorithm 1) and Winograd's F(2x2, 3x3)
(algorithm 2), whose rounding errors are at most twice that of stock torch (tests hold them to that). The algorithms of
inference with a larger error are never taken: training is exact. ``DL4DS_WINOGRAD=0`` leaves Winograd out,
``DL4DS_TRAIN_GEMM=0`` the direct product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._cpu_conv import LIBRARY, Geometry, choose
from .._define import define_op, op
from ._layout import conv_out_shape
from .conv_bn_act import _convolve


def _fake_exact(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int], algorithm: int
) -> Tensor:
    shape = conv_out_shape(x.shape, weight.shape, stride, padding, dilation)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def _fake_exact_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], dgrad: int, wgrad: int
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last) if dgrad else x.new_empty(0)
    return dx, torch.empty_like(weight) if wgrad else x.new_empty(0)


define_op(
    "conv2d_exact",
    "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int algorithm) -> Tensor",
    fake=_fake_exact,
    stem="conv_bn_act",
    triton=False,
)
define_op(  # dgrad, wgrad: algorithms, 0 for a gradient that is not wanted
    "conv2d_exact_bwd",
    "(Tensor dout, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, int dgrad, int wgrad) "
    "-> (Tensor dx, Tensor dweight)",
    fake=_fake_exact_bwd,
    stem="conv_bn_act",
    triton=False,
)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``conv2d(x, weight, bias)`` of a training step; no gradients of its own."""
    code = choose(x, weight, geometry)[0]
    if code != LIBRARY:
        return op("conv2d_exact")(x, weight, bias, *geometry[:3], code)
    return _convolve(x, weight, bias, geometry)


def convolve_back(
    dout: Tensor, x: Tensor, weight: Tensor, bias: bool, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of (x, weight, bias), None for those not ``wanted``. ``bias``: whether there is one."""
    need_x, need_weight, need_bias = wanted
    _, dgrad, wgrad = choose(x, weight, geometry)
    ours = dgrad if need_x else LIBRARY, wgrad if need_weight else LIBRARY
    grads: list[Tensor | None] = [None, None, None]
    if any(ours):
        dx, dweight = op("conv2d_exact_bwd")(dout, x, weight, *geometry[:3], *ours)
        grads = [dx if ours[0] else None, dweight if ours[1] else None, None]
        if need_bias:
            grads[2] = dout.sum((0, 2, 3))
            need_bias = False
    left = need_x and not ours[0], need_weight and not ours[1], need_bias
    if any(left):
        stride, padding, dilation, groups = geometry
        found = torch.ops.aten.convolution_backward(
            dout, x, weight, [weight.shape[0]] if bias else None, stride, padding, dilation, False, [0] * len(stride),
            groups, list(left),
        )  # fmt: skip
        grads = [new if take else old for new, old, take in zip(found, grads, left, strict=True)]
    return grads


def _fake_step(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return _convolve(x, weight, bias, geometry)


def _compose(namespace: str, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return convolve(x, weight, bias, geometry)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *geometry = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias, ctx.geometry = bias is not None, geometry


def _backward(namespace: str, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    wanted = need_x, need_weight, ctx.has_bias and need_bias
    grads = op("conv2d_step_bwd", namespace)(dout, x, weight, ctx.has_bias, *ctx.geometry, *wanted)
    return (*(grad if need else None for grad, need in zip(grads, wanted, strict=True)), *(None,) * 4)


def _compose_bwd(namespace: str, dout: Tensor, x: Tensor, weight: Tensor, bias: bool, *rest: Any) -> list[Tensor]:
    wanted = rest[4:]
    grads = convolve_back(dout, x, weight, bias, rest[:4], wanted)
    return [dout.new_empty(0) if grad is None else grad for grad in grads]


def _fake_step_bwd(dout: Tensor, x: Tensor, weight: Tensor, bias: bool, *rest: Any) -> list[Tensor]:
    need_x, need_weight, need_bias = rest[4:]
    return [
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else x.new_empty(0),
        x.new_empty(weight.shape[0] if need_bias else 0),
    ]


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
define_op(
    "conv2d_step",
    f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    fake=_fake_step,
    stem="conv_bn_act",
    setup_context=_setup_context,
    backward=_backward,
    composed_of="conv2d_exact",
    compose=_compose,
)
define_op(
    "conv2d_step_bwd",
    f"(Tensor dout, Tensor x, Tensor weight, bool bias, {_GEOMETRY}, bool need_x, bool need_weight, bool need_bias) "
    "-> Tensor[]",
    fake=_fake_step_bwd,
    stem="conv_bn_act",
    composed_of="conv2d_exact_bwd",
    compose=_compose_bwd,
)
