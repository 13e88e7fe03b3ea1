"""Contract of ``bn_act``: ``act(batch_norm(x) [+ residual])``.

Forward keeps ``x`` and per-channel vectors for backward, never the normalised or the activated tensor: backward recomputes
the pre-activation value from ``x``. With a residual, piecewise-linear activations save one bit an element instead of the
residual (``save_mask``); the others save the residual itself, which a residual network keeps alive anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._activation import MASK_CODES
from .._define import define_op, op
from ._layout import accumulate_dtype, mask_bytes, suggested_format


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
    save_mask: bool,
) -> tuple[Tensor, ...]:
    channels = x.shape[1] if training else 0
    statistics = [x.new_empty(channels, dtype=accumulate_dtype(x)) for _ in range(2)]
    masked = save_mask and residual is not None and activation in MASK_CODES
    mask = x.new_empty(mask_bytes(x) if masked else 0, dtype=torch.uint8)
    running = [
        x.new_empty(x.shape[1] if training and old is not None else 0, dtype=accumulate_dtype(x) if old is None else old.dtype)
        for old in (running_mean, running_var)
    ]
    return (torch.empty_like(x, memory_format=suggested_format(x)), *statistics, mask, *running)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, running_mean, running_var, residual, training = inputs[:7]
    eps, eps_std, activation, negative_slope = inputs[8:12]
    _, mean, rstd, mask, _, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    saved_residual = None if activation == 0 or mask.numel() else residual
    # In eval the statistics are the caller's tensors: saving them lets autograd notice a change in between.
    first, second = (mean, rstd) if training else (running_mean, running_var)
    ctx.save_for_backward(x, weight, bias, first, second, saved_residual, mask if mask.numel() else None)
    ctx.has_residual = residual is not None
    ctx.scalars = (training, eps, eps_std, activation, negative_slope)


def _backward(namespace: str, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    none = (None,) * 13
    if dout is None:
        return none
    x, weight, bias, mean, rstd, residual, mask = ctx.saved_tensors
    training, eps, eps_std, activation, negative_slope = ctx.scalars
    if not training:
        mean, rstd = eval_statistics(x, mean, rstd, eps, eps_std)
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_residual = ctx.has_residual and ctx.needs_input_grad[5]
    plain_residual = need_residual and activation == 0
    dx, dweight, dbias, dresidual = op("bn_act_bwd", namespace)(
        dout, x, weight, bias, mean, rstd, residual, mask, training, eps, eps_std, activation, negative_slope,
        need_x, need_weight or need_bias, need_residual and not plain_residual,
    )  # fmt: skip
    grads: list[Any] = list(none)
    if need_x:
        grads[0] = dx
    if need_weight:
        grads[1] = dweight.to(weight.dtype)
    if need_bias:
        grads[2] = dbias.to(bias.dtype)
    if need_residual:
        grads[5] = dout if plain_residual else dresidual
    return tuple(grads)


def eval_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, eps_std: bool) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of running statistics in the accumulation dtype of ``x``."""
    mean, var = running_mean.to(accumulate_dtype(x)), running_var.to(accumulate_dtype(x))
    return mean, (var.sqrt() + eps).reciprocal() if eps_std else (var + eps).rsqrt()


def normalise_again(
    namespace: str,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    training: bool,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
) -> Tensor:
    """``act(bn(y))`` with the bits of an earlier call; running statistics are not touched.

    ``first, second``: that call's batch mean and rstd if it was in training, else the running mean and variance. In training
    an eval call with weight * rstd as the weight, running variance 1 and eps 0: the kernels then multiply with the same
    rounded product as before.
    """
    if training:
        weight = second if weight is None else weight.to(second.dtype) * second
        second, eps, eps_std = torch.ones_like(second), 0.0, False
    return op("bn_act", namespace)(
        y, weight, bias, first, second, None, False, 0.0, eps, eps_std, activation, negative_slope, False
    )[0]


def _fake_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    training: bool,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
    need_dx: bool,
    need_dparams: bool,
    need_dresidual: bool,
) -> tuple[Tensor, ...]:
    def like_x(needed: bool) -> Tensor:
        return torch.empty_like(x, memory_format=suggested_format(x)) if needed else x.new_empty(0)

    parameters = [x.new_empty(x.shape[1] if need_dparams else 0, dtype=accumulate_dtype(x)) for _ in range(2)]
    return like_x(need_dx), *parameters, like_x(need_dresidual)


define_op(
    "bn_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? residual, bool training, "
    "float momentum, float eps, bool eps_std, int activation, float negative_slope, bool save_mask) "
    "-> (Tensor out, Tensor mean, Tensor rstd, Tensor mask, Tensor new_running_mean, Tensor new_running_var)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define_op(
    "bn_act_bwd",
    "(Tensor dout, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor? residual, Tensor? mask, "
    "bool training, float eps, bool eps_std, int activation, float negative_slope, bool need_dx, bool need_dparams, "
    "bool need_dresidual) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    fake=_fake_bwd,
)


def _fake_into(x: Tensor, *args: Any) -> None:
    return None


# Inference only; like the steps of _dense.py it writes to an argument: a slice of channels of a concatenation's buffer cannot
# be a result.
# A building block. DenseNet's blocks do not use it on the CPU: act(bn(part)) of 4 to 24 parts into one buffer took 1.5 to 4
# times as long as torch.cat and one bn_act (56x56 to 7x7 maps, fp32 and bf16), for the call of each part and the short rows.
define_op(
    "bn_act_into",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, Tensor(a!) out, float eps, "
    "bool eps_std, int activation, float negative_slope) -> ()",
    fake=_fake_into,
    stem="bn_act",
)
