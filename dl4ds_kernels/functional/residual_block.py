"""``basic_block``, ``bottleneck`` and their pre-activation twins: whole residual blocks, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import reference
from .._activation import ACTIVATION_CODES, activation_code
from .._backend import REFERENCE, STOCK, select
from .._define import op
from ..ops._block_code import IDENTITY, PROJECTION, Block, Conv, Norm, encode
from ._common import call, check_floating, check_tensor, check_vector, eps_mode_flag, fail, needs_grad
from ._conv2d import conv2d
from ._tail import block_tail
from .add_act import add_act
from .bn_act import bn_act
from .conv_bn_act import conv_bn_act, out_shape


class BNParams(NamedTuple):
    """A BatchNorm of a block: (C,) vectors as in ``torch.nn.functional.batch_norm``, momentum and eps."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5
    eps_mode: str = "var"


class ConvParams(NamedTuple):
    """A convolution of a block and its BatchNorm: the one behind it, in pre-activation blocks the one in front of it."""

    weight: Tensor
    norm: BNParams | None
    bias: Tensor | None = None
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1


def basic_block(
    x: Tensor,
    params: Sequence[ConvParams],
    downsample: ConvParams | None = None,
    *,
    training: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.1,
    memory_efficient: bool = False,
    keep_activations: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``act(bn2(conv2(act(bn1(conv1(x))))) + shortcut(x))``: the two-convolution block of ResNet-18 and -34, as one op.

    With gradients or in training, one autograd node: it keeps ``x``, the convolutions' outputs, per-channel statistics and one
    bit an element of the output; the activation inside is computed again in backward. A cheap projection (under 1/16 of the
    branch's multiplications) is computed again too. Without, the fused inference ops one after the other.

    Args:
        x: (N, C, H, W), NCHW or channels_last; float32, float64, float16 or bfloat16.
        params: two :class:`ConvParams`, each with the BatchNorm behind the convolution.
        downsample: convolution and BatchNorm (or None) of the shortcut; None: the shortcut is ``x`` itself.
        training: batch statistics and an update of the running ones, once for a call (not when backward computes again).
        activation, negative_slope: as in :func:`bn_act`, behind every BatchNorm but the shortcut's; the last behind the sum.
        memory_efficient: backward also computes the last convolution again.
        keep_activations: keeps the activations inside too, instead of computing them again (not with ``memory_efficient``):
            two passes over memory less for each, for their size in memory.
        backend: overrides ``dk.backend`` for this call.

    Returns:
        (N, C_out, H_out, W_out), laid out as ``conv2d`` lays it out. Differentiable once in x, weights and biases; a second
        backward raises RuntimeError.

    Raises:
        TypeError: a tensor argument is not a tensor. ValueError: number of convolutions, a missing BatchNorm, one value per
        channel in training, unknown activation or mode. RuntimeError: dtype, device, rank, shape or geometry do not fit.

    Reference: He et al., Deep Residual Learning for Image Recognition, 2015.
    """
    return _public(
        basic_block, 2, False, x, params, downsample, training=training, activation=activation,
        negative_slope=negative_slope, memory_efficient=memory_efficient,
        keep_activations=keep_activations, backend=backend,
    )  # fmt: skip


def bottleneck(
    x: Tensor,
    params: Sequence[ConvParams],
    downsample: ConvParams | None = None,
    *,
    training: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.1,
    memory_efficient: bool = False,
    keep_activations: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``act(bn3(conv3(act(bn2(conv2(act(bn1(conv1(x)))))))) + shortcut(x))``: the block of ResNet-50 and deeper, as one op.

    ``params`` are three :class:`ConvParams`; everything else as in :func:`basic_block`.
    """
    return _public(
        bottleneck, 3, False, x, params, downsample, training=training, activation=activation,
        negative_slope=negative_slope, memory_efficient=memory_efficient,
        keep_activations=keep_activations, backend=backend,
    )  # fmt: skip


def preact_basic_block(
    x: Tensor,
    params: Sequence[ConvParams],
    downsample: ConvParams | None = None,
    *,
    alpha: float = 1.0,
    training: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.1,
    memory_efficient: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``alpha * (conv2(act(bn2(conv1(act(bn1(x)))))) + shortcut)``: BatchNorm and activation in front of each convolution.

    The shortcut is ``x``, or ``downsample`` (a convolution without BatchNorm) of ``act(bn1(x))``. The first convolution may
    have ``norm=None`` (it then reads ``x``). ``memory_efficient`` changes nothing here: the last convolution's output is not
    kept. Everything else as in :func:`basic_block`.

    Reference: He et al., Identity Mappings in Deep Residual Networks, 2016.
    """
    return _public(
        preact_basic_block, 2, True, x, params, downsample, alpha=alpha, training=training, activation=activation,
        negative_slope=negative_slope, memory_efficient=memory_efficient, backend=backend,
    )  # fmt: skip


def preact_bottleneck(
    x: Tensor,
    params: Sequence[ConvParams],
    downsample: ConvParams | None = None,
    *,
    alpha: float = 1.0,
    training: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.1,
    memory_efficient: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Three convolutions, else as :func:`preact_basic_block`."""
    return _public(
        preact_bottleneck, 3, True, x, params, downsample, alpha=alpha, training=training, activation=activation,
        negative_slope=negative_slope, memory_efficient=memory_efficient, backend=backend,
    )  # fmt: skip


def _public(
    function: Any, count: int, preact: bool, x: Tensor, params: Sequence[ConvParams], downsample: ConvParams | None, *,
    alpha: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    name = function.__name__
    try:
        if has_torch_function_variadic(x):
            scale = {"alpha": alpha} if preact else {}
            return handle_torch_function(function, (x,), x, params, downsample, **scale, **options)
        if len(params) != count or not isinstance(params[0], ConvParams):
            raise ValueError(name)  # in words below
        return run_block(
            x,
            params,
            downsample,
            preact=preact,
            shortcut=IDENTITY if downsample is None else PROJECTION,
            alpha=alpha,
            **options,
        )
    except Exception:
        _explain(name, x, params, count, downsample, preact, options["activation"])
        raise


def run_block(
    x: Tensor,
    params: Sequence[ConvParams],
    projection: ConvParams | None,
    *,
    preact: bool,
    shortcut: int,
    alpha: float = 1.0,
    training: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.1,
    memory_efficient: bool = False,
    keep_activations: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Any number of convolutions, with ``shortcut`` NO_SHORTCUT too: what modules call. No checks of its own."""
    code = ACTIVATION_CODES[activation]
    convs: list[Tensor] = []
    norms: list[Tensor] = []
    running: list[Tensor] = []
    coded: list[Conv] = []
    norm_count = 0

    def place(t: Tensor | None, tensors: list[Tensor]) -> int:
        if t is None:
            return -1
        tensors.append(t)
        return len(tensors) - 1

    for conv in params if projection is None else (*params, projection):
        norm = None
        if conv.norm is not None:
            bn = conv.norm
            mean = place(bn.running_mean, running)
            place(bn.running_var, running)
            std = bn.eps_mode != "var" and eps_mode_flag("residual_block", bn.eps_mode)
            norm = Norm(
                norm_count, place(bn.weight, norms), place(bn.bias, norms), mean, std, float(bn.momentum), float(bn.eps)
            )  # fmt: skip
            norm_count += 1
        coded.append(
            Conv(
                place(conv.weight, convs), place(conv.bias, convs), _pair(conv.stride), _pair(conv.padding),
                _pair(conv.dilation), conv.groups, norm,
            )
        )  # fmt: skip
    keep = projection is None or not _is_cheap(projection, params)
    block = Block(
        preact, shortcut, code, keep, negative_slope, alpha, tuple(coded[: len(params)]),
        coded[-1] if projection is not None else None, keep_activations and not preact and not memory_efficient,
    )  # fmt: skip
    path = select("residual_block", x, backend)
    if path is STOCK or x.numel() == 0 or x.dim() != 4:
        return _step_by_step(x, params, projection, block, training, activation, backend)
    if path is REFERENCE:
        out, new_running = reference.residual_block(x, convs, norms, running, block, training)
    else:
        grad = needs_grad(x, *convs, *norms)
        if not (grad or training):
            return _step_by_step(x, params, projection, block, training, activation, backend)
        if training:
            _check_counts(x, params, projection)
        out, _, _, _, new_running = call(
            op("residual_block", path), grad, x, convs, norms, running, *encode(block), training, grad,
            memory_efficient and not preact,
        )  # fmt: skip
    if training and running:
        with torch.no_grad():
            torch._foreach_copy_(running, list(new_running))
    return out


def _step_by_step(
    x: Tensor, params: Sequence[ConvParams], projection: ConvParams | None, block: Block, training: bool, activation: str,
    backend: str | None,
) -> Tensor:  # fmt: skip
    """The same block through the functionals of its layers: inference, small maps, export, forward-mode derivatives."""
    options: dict[str, Any] = {"training": training, "negative_slope": block.negative_slope, "backend": backend}

    def fused(z: Tensor, conv: ConvParams, act: str, residual: Tensor | None = None) -> Tensor:
        bn = conv.norm
        return conv_bn_act(
            z, conv.weight, conv.bias, running_mean=bn.running_mean, running_var=bn.running_var, bn_weight=bn.weight,
            bn_bias=bn.bias, residual=residual, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
            groups=conv.groups, momentum=bn.momentum, eps=bn.eps, eps_mode=bn.eps_mode, activation=act, **options,
        )  # fmt: skip

    def plain(z: Tensor, conv: ConvParams) -> Tensor:
        return conv2d(z, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, backend)

    def shortcut(source: Tensor) -> Tensor | None:
        if projection is None:
            return x if block.shortcut == IDENTITY else None
        return plain(source, projection) if projection.norm is None else fused(source, projection, "none")

    z = x
    if not block.preact:
        for conv in params[:-2]:
            z = fused(z, conv, activation)
        if len(params) > 1:
            if not training:
                out = block_tail(
                    z, *params[-2:], projection, lambda: shortcut(x), block.activation, block.negative_slope, backend
                )  # fmt: skip
                if out is not None:
                    return out
            z = fused(z, params[-2], activation)
        return fused(z, params[-1], activation, shortcut(x))
    source, conv = x, params[0]
    if conv.norm is not None:
        bn = conv.norm
        source = bn_act(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, momentum=bn.momentum, eps=bn.eps, eps_mode=bn.eps_mode,
            activation=activation, **options,
        )  # fmt: skip
    z = source
    for conv, behind in zip(params, params[1:], strict=False):
        z = fused(z, conv._replace(norm=behind.norm), activation)
    z = plain(z, params[-1])
    added = shortcut(source)
    if added is None:
        return z if block.alpha == 1.0 else z * block.alpha
    return add_act(z, added, alpha=block.alpha, activation="none", backend=backend)


def _is_cheap(projection: ConvParams, params: Sequence[ConvParams]) -> bool:
    """Whether the shortcut's convolution is under 1/16 of the branch's multiplications."""

    def cost(conv: ConvParams, pixels: float) -> float:
        stride = _pair(conv.stride)
        return conv.weight.numel() * pixels / (stride[0] * stride[1])

    pixels, branch = 1.0, 0.0
    for conv in params:
        branch += cost(conv, pixels)
        stride = _pair(conv.stride)
        pixels /= stride[0] * stride[1]
    return 16 * cost(projection, 1.0) < branch


def _check_counts(x: Tensor, params: Sequence[ConvParams], projection: ConvParams | None) -> None:
    """ValueError where a BatchNorm would see one value per channel, as ``F.batch_norm`` raises."""
    if x.shape[0] > 1:
        return
    size = (x.shape[2], x.shape[3])
    for conv in (*params, *(() if projection is None else (projection,))):
        source = (x.shape[2], x.shape[3]) if conv is projection else size
        stride, padding, dilation = _pair(conv.stride), _pair(conv.padding), _pair(conv.dilation)
        new = out_shape((1, 1, *source), conv.weight, stride, padding, dilation)[2:]
        if conv.norm is not None and new[0] * new[1] == 1:
            fail("residual_block", "x", "more than 1 value per channel when training", f"a map of {tuple(x.shape)}", ValueError)
        size = size if conv is projection else new


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _explain(name: str, x: Any, params: Any, count: int, downsample: Any, preact: bool, activation: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    activation_code(name, activation)
    check_floating(name, "x", x)
    if x.dim() != 4:
        fail(name, "x", "(N, C, H, W)", tuple(x.shape))
    if not isinstance(params, (list, tuple)) or not all(isinstance(conv, ConvParams) for conv in params):
        fail(name, "params", "a list of ConvParams", type(params).__name__, TypeError)
    if not (downsample is None or isinstance(downsample, ConvParams)):
        fail(name, "downsample", "ConvParams or None", type(downsample).__name__, TypeError)
    if len(params) != count:
        fail(name, "params", f"{count} convolutions", len(params), ValueError)
    channels = x.shape[1]
    for i, conv in enumerate(params):
        what = f"params[{i}]"
        _explain_conv(name, what, conv, x, channels)
        channels_out = conv.weight.shape[0]
        if conv.norm is None and not (preact and i == 0):
            fail(name, f"{what}.norm", "BNParams", "None", ValueError)
        if conv.norm is not None:
            _explain_norm(name, what, conv.norm, x, channels if preact else channels_out)
        channels = channels_out
    if downsample is None:
        if channels != x.shape[1]:
            fail(name, "downsample", f"a projection from {x.shape[1]} to {channels} channels", "None")
        return
    _explain_conv(name, "downsample", downsample, x, x.shape[1])
    if downsample.weight.shape[0] != channels:
        fail(name, "downsample.weight", f"{channels} channels out like the branch", downsample.weight.shape[0])
    if downsample.norm is not None:
        if preact:
            fail(name, "downsample.norm", "None in a pre-activation block", "BNParams", ValueError)
        _explain_norm(name, "downsample", downsample.norm, x, channels)


def _explain_conv(name: str, what: str, conv: Any, x: Tensor, channels: int) -> None:
    check_tensor(name, f"{what}.weight", getattr(conv, "weight", conv))
    weight = conv.weight
    if weight.dim() != 4:
        fail(name, f"{what}.weight", "(C_out, C / groups, kH, kW)", tuple(weight.shape))
    if weight.shape[1] * conv.groups != channels:
        fail(name, f"{what}.weight", f"{channels} channels in with groups={conv.groups}", weight.shape[1] * conv.groups)
    if weight.device != x.device:
        fail(name, f"{what}.weight", f"a tensor on {x.device} like x", weight.device)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        fail(name, f"{what}.weight", f"dtype {x.dtype} like x", weight.dtype)


def _explain_norm(name: str, what: str, bn: Any, x: Tensor, channels: int) -> None:
    if not isinstance(bn, BNParams):
        fail(name, f"{what}.norm", "BNParams", type(bn).__name__, TypeError)
    eps_mode_flag(name, bn.eps_mode)
    for field in ("running_mean", "running_var", "weight", "bias"):
        check_vector(name, f"{what}.norm.{field}", getattr(bn, field), x, channels)
