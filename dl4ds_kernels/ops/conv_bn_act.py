"""Contract of ``conv_bn_act``: ``act(batch_norm(conv2d(x)) [+ residual])`` with running statistics.

The inference op; training is _conv_bn_act_train.py. Backward recomputes the convolution's output: frozen-BN fine-tuning through
this op trades one convolution for memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _cuda_autotune, _cuda_candidates
from .._define import define_op, define_question, op
from .bn_act import eval_statistics

_ARGS = 16


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
) -> Tensor:
    return _convolve(x, weight, bias, (stride, padding, dilation, groups))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.geometry, ctx.scalars = inputs[8:12], inputs[12:]


def _backward(namespace: str, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual = ctx.saved_tensors
    eps, eps_std, activation, negative_slope = ctx.scalars
    stride, padding, dilation, groups = ctx.geometry
    needs = ctx.needs_input_grad
    y = _convolve(x, weight, bias, ctx.geometry)
    mean, rstd = eval_statistics(y, running_mean, running_var, eps, eps_std)
    dy, dbn_weight, dbn_bias, dresidual = op("bn_act_bwd", namespace)(
        dout, y, bn_weight, bn_bias, mean, rstd, residual, None, False, eps, eps_std, activation, negative_slope,
        any(needs[:3]), needs[5] or needs[6], needs[7],
    )  # fmt: skip
    grads: list[Any] = [None] * _ARGS
    if any(needs[:3]):
        grads[:3] = torch.ops.aten.convolution_backward(
            dy, x, weight, None if bias is None else list(bias.shape), stride, padding, dilation, False,
            [0] * len(stride), groups, [needs[0], needs[1], needs[2]],
        )  # fmt: skip
    if needs[5]:
        grads[5] = dbn_weight.to(bn_weight.dtype)
    if needs[6]:
        grads[6] = dbn_bias.to(bn_bias.dtype)
    if needs[7]:
        grads[7] = dresidual
    return tuple(grads)


def _autocast(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    """Convolution operands and residual run in the autocast dtype; BatchNorm vectors stay fp32."""

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)

    x, weight, bias, *vectors, residual = args[:8]
    return (cast(x), cast(weight), cast(bias), *vectors, cast(residual), *args[8:])


define_op(
    "conv_bn_act",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor running_mean, Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, float eps, bool eps_std, int activation, "
    "float negative_slope) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)


def tf32_allowed() -> bool:
    """Whether torch's own fp32 convolutions may use TF32 on CUDA now; then the fused kernel may."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


define_question("conv_tf32_allowed", "bool", tf32_allowed)
for _kind in (_cuda_candidates.LAYER, _cuda_candidates.DGRAD, _cuda_candidates.TAIL):  # asked with DL4DS_AUTOTUNE=1 only
    define_question(_kind.name, "int", partial(_cuda_autotune.choose, _kind), "int[] call")


def _fake_route(*args: Any) -> list[int]:
    raise RuntimeError("conv_bn_act_route: asks about eager calls; it needs tensors with memory")


# What dk.explain tells of a CUDA call: dl4ds_kernels/_cuda_conv.py.
define_op(
    "conv_bn_act_route",
    "(Tensor x, Tensor weight, bool residual, int[] stride, int[] padding, int[] dilation, int groups, "
    "int activation, bool training) -> int[]",
    fake=_fake_route,
    stem="conv_bn_act",
    triton=False,
)


def _fake_pack(weight: Tensor, groups: int, algorithm: int) -> Tensor:
    raise RuntimeError("conv_bn_act_pack: packed weights are made outside of tracing; their size depends on the machine")


def _fake_packed(x: Tensor, weight: Tensor, packed: Tensor, algorithm: int, bias: Tensor | None, *args: Any) -> Tensor:
    return _convolve(x, weight, bias, args[5:9]).to(memory_format=torch.channels_last)


define_op(
    "conv_bn_act_pack",
    "(Tensor weight, int groups, int algorithm) -> Tensor",
    fake=_fake_pack,
    stem="conv_bn_act",
    triton=False,
)
define_op(
    "conv_bn_act_packed",
    "(Tensor x, Tensor weight, Tensor packed, int algorithm, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, float eps, "
    "bool eps_std, int activation, float negative_slope) -> Tensor",
    fake=_fake_packed,
    stem="conv_bn_act",
    triton=False,
)


def _fake_bn_act_conv_packed(xs: list[Tensor], weight: Tensor, *args: Any) -> Tensor:
    n, _, height, width = xs[0].shape
    pool = args[8]
    return xs[0].new_empty((n, weight.shape[0], height // pool, width // pool)).to(memory_format=torch.channels_last)


define_op(
    "bn_act_conv_packed",
    "(Tensor[] xs, Tensor weight, Tensor packed, Tensor? in_mean, Tensor? in_var, Tensor? in_weight, Tensor? in_bias, "
    "float in_eps, bool in_eps_std, int in_activation, int pool, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, float eps, bool eps_std, int activation, float negative_slope) -> Tensor",
    fake=_fake_bn_act_conv_packed,
    stem="conv_bn_act",
    triton=False,
)


def _fake_chain(inputs: list[Tensor], tensors: list[Tensor], code: list[int], numbers: list[float]) -> Tensor:
    raise RuntimeError("conv_chain: made for eager inference; under tracing the steps run one by one")


# Several steps of conv_bn_act in one call: dl4ds_kernels/modules/_chain.py.
define_op(
    "conv_chain",
    "(Tensor[] inputs, Tensor[] tensors, int[] code, float[] numbers) -> Tensor",
    fake=_fake_chain,
    stem="conv_bn_act",
    triton=False,
)
