"""Run stock transposed convolutions fused: BatchNorm and activation behind them, or a concatenation around them.

In inference on the CPU a 2x2 transposed convolution with stride 2 is a matrix product, BatchNorm and activation in its epilogue
(``conv_transpose_bn_act_packed``). Into a slice of a wider buffer it goes as a 1x1 convolution with 4 C_out columns and a copy
that puts the four taps side by side: a U-Net's concatenation then costs the copy of the skip connection alone.

With stride 1 a transposed convolution is the convolution with turned filters and exchanged channels, on the engine of ordinary
ones (DeconvNet's decoder: Winograd takes half the library's time or less). Of a single pixel it is a matrix product with the
weight as it lies, which the library copies at every call (DeconvNet's 7x7: 411 MB).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _packing
from .._backend import current
from .._define import CPP, op
from ..functional import conv_transpose_bn_act
from ..functional._common import call
from ._packed import Epilogue, applies
from ._run import (
    NO_ACT,
    ActSpec,
    _act_fusable,
    _apply,
    _bn_fusable,
    _epilogue,
    _eps_mode,
    _no_global_hooks,
    _slope,
    _worth_packing,
    is_plain,
    run_bn_act,
)  # fmt: skip
from .bn_act import batch_statistics_choice

# Multiply-adds of a call from which the kernel wins over stock torch, alone and with a BatchNorm or activation to save.
_LEAST_ALONE = 40_000_000
_LEAST_FUSED = 2_000_000
# Values of a weight from which the matrix product of a single pixel is taken; channels that are summed up in one piece, since
# the product of a vector adds in one long chain (2.8 times the library's error for 4096 channels, 0.5 times in pieces of 256);
# bytes that the sums of the pieces may take.
_LEAST_WEIGHT = 262_144
_PIECE = 256
_MOST_SUMS = 64 << 20


def is_two_by_two(conv: nn.Module) -> bool:
    """Whether this is exactly ``nn.ConvTranspose2d(C, C_out, 2, stride=2)``, without hooks or a patched forward."""
    return (
        type(conv) is nn.ConvTranspose2d
        and conv.kernel_size == (2, 2)
        and conv.stride == (2, 2)
        and conv.padding == (0, 0)
        and conv.output_padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and is_plain(conv)
    )


def _is_simple(conv: nn.Module) -> bool:
    """An ``nn.ConvTranspose2d`` without hooks, output padding, dilation and groups."""
    return (
        type(conv) is nn.ConvTranspose2d
        and conv.output_padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and is_plain(conv)
    )


def is_convolution(conv: nn.Module) -> bool:
    """Whether this is an ordinary convolution with turned filters that multiplies few zeros: stride 1, no larger output."""
    pairs = zip(getattr(conv, "kernel_size", ()), getattr(conv, "padding", ()), strict=False)
    return _is_simple(conv) and conv.stride == (1, 1) and all((k - 1) / 2 <= p <= k - 1 for k, p in pairs)


def run_turned(
    x: Tensor,
    conv: nn.Module,
    epilogue: Epilogue,
    *,
    memory_format: str = "auto",
    exact: bool = False,
    backend: str | None = None,
) -> Tensor | None:
    """``act(bn(conv(x)))`` of a transposed convolution with stride 1; None where the path does not apply."""
    if not (
        is_convolution(conv)
        and x.shape[1] == conv.in_channels
        and _worth_packing(x.numel() // conv.in_channels, conv, memory_format)
        and applies(x, conv, backend)
        and epilogue.is_float32()
    ):
        return None
    padding = tuple(k - 1 - p for k, p in zip(conv.kernel_size, conv.padding, strict=True))
    found = _packing.turned_weight(conv, conv._parameters["weight"], x, padding, exact)
    if found is None:
        return None
    algorithm, weight, packed = found
    return call(
        op("conv_bn_act_packed", CPP), False, x, weight, packed, algorithm, conv._parameters["bias"], *epilogue[:4], None,
        (1, 1), padding, (1, 1), 1, *epilogue[4:],
    )  # fmt: skip


def one_pixel(x: Tensor, conv: nn.Module) -> Tensor | None:
    """``conv(x)`` of maps of a single pixel, x (N, C, 1, 1) -> (N, C_out, kH, kW); None where the path does not apply."""
    if not (
        tuple(x.shape[2:]) == (1, 1)
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and _is_simple(conv)
        and conv.padding == (0, 0)
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not torch.is_autocast_enabled("cpu")
    ):
        return None
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    channels, *rest = weight.shape
    rows, columns = x.shape[0], weight.numel() // channels
    pieces, left = divmod(channels, _PIECE)
    if (
        x.shape[1] != channels
        or weight.numel() < _LEAST_WEIGHT
        or weight.dtype is not x.dtype
        or not weight.is_contiguous()
        or rows * columns * (pieces + 1) * x.element_size() > _MOST_SUMS
    ):
        return None
    pixels, filters, whole = x.reshape(rows, channels), weight.view(channels, columns), channels - left
    by_piece = pixels[:, :whole].reshape(rows, pieces, _PIECE).transpose(0, 1)
    sums = torch.bmm(by_piece, filters[:whole].view(pieces, _PIECE, columns)).sum(0)
    if left:
        sums = sums.addmm_(pixels[:, whole:], filters[whole:])
    out = sums.view(rows, *rest)
    return out if bias is None else out.add_(bias.view(-1, 1, 1))


def run_conv_transpose_act(
    x: Tensor, conv: nn.ConvTranspose2d, epilogue: Epilogue, *, backend: str | None = None
) -> Tensor | None:
    """``act(bn(conv(x)))``, x (N, C, H, W) -> (N, C_out, 2 H, 2 W) in channels_last; None where the path does not apply."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_two_by_two(conv):
        return None
    if conv.training:
        _packing.drop(conv)
        return None
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    least = _LEAST_ALONE if epilogue.running_mean is None and epilogue.activation == 0 else _LEAST_FUSED
    if (
        not applies(x, conv, backend)
        or x.dim() != 4
        or x.shape[1] != conv.in_channels
        or x.numel() // conv.in_channels * weight.numel() < least
        or not epilogue.is_float32()
        or (bias is not None and bias.dtype is not torch.float32)
        or any(v is not None and not v.is_contiguous() for v in (*epilogue[:4], bias))
    ):
        return None
    packed = _packing.transposed_weight(conv, weight)
    if packed is None:
        return None
    return call(op("conv_transpose_bn_act_packed"), False, x, weight, packed, bias, *epilogue)


def _conv_fusable(conv: nn.Module) -> bool:
    return type(conv) is nn.ConvTranspose2d and conv.padding_mode == "zeros" and is_plain(conv)


def run_conv_transpose_bn_act(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module | None,
    act: ActSpec = NO_ACT,
    *,
    memory_format: str = "auto",
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``act(bn(conv(x)))`` of stock modules with a transposed convolution, fused where they allow it; ``bn`` may be None.

    ``memory_format`` and ``exact`` as in :func:`run_conv_bn_act`; with another stride than 1 all of this is exact.
    """
    fusable = _conv_fusable(conv) and (bn is None or _bn_fusable(bn)) and _act_fusable(act) and _no_global_hooks()
    if not (fusable and isinstance(x, Tensor) and x.dim() == 4):
        y = conv(x)
        return _apply(act, y) if bn is None else run_bn_act(y, bn, act, backend=backend)
    if conv.training or (bn is not None and bn.training):
        _packing.drop(conv)
    elif memory_format != "preserve" and (bn is None or bn._buffers["running_mean"] is not None):
        epilogue = _epilogue(bn, act)
        out = run_conv_transpose_act(x, conv, epilogue, backend=backend)
        if out is None:
            out = run_turned(x, conv, epilogue, memory_format=memory_format, exact=exact, backend=backend)
        if out is not None:
            return out
    y = one_pixel(x, conv) if (backend or current()) in ("auto", "cpu") else None
    if y is not None:
        return _apply(act, y) if bn is None else run_bn_act(y, bn, act, backend=backend)
    if bn is None and act.name == "none":
        return conv(x)  # nothing to fuse
    geometry = {name: getattr(conv, name) for name in ("stride", "padding", "output_padding", "dilation", "groups")}
    vectors: dict[str, Tensor | None] = {}
    options = {"batch_norm": bn is not None, "training": False}
    if bn is not None:
        training, momentum, vectors["running_mean"], vectors["running_var"] = batch_statistics_choice(bn)
        vectors |= {"bn_weight": bn._parameters["weight"], "bn_bias": bn._parameters["bias"]}
        options |= {"training": training, "momentum": momentum, "eps": bn.eps, "eps_mode": _eps_mode(bn)}
    return conv_transpose_bn_act(
        x, conv._parameters["weight"], conv._parameters["bias"], **vectors, **geometry, **options, activation=act.name,
        negative_slope=_slope(act), backend=backend,
    )  # fmt: skip
