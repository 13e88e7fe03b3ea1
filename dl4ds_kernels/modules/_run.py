"""Run a chain of stock modules through the fused functionals; the run time behind ``dk.optimize`` and ``dk.modules``.

Every call checks, cheaply, that the modules are still what was planned for: exact stock types, no hooks, no patched forward.
Otherwise they are simply called one after the other, as the stock forward does, so that a hook added or a submodule exchanged
later works and only costs the fusion.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module

from .. import _packing
from .._activation import ACTIVATION_CODES, apply_activation
from ..functional import add_act, bn_act, conv_bn_act
from ._packed import Epilogue, run_bn_act_conv_packed, run_packed
from ._prologue import run_prologue_conv
from .bn_act import BNAct2d, batch_statistics_choice
from .sync_bn import SyncBNAct

_ACTIVATION_TYPES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


class ActSpec(NamedTuple):
    """An activation of a chain: its name, slope, and the module that computes it in the stock model (None for a function)."""

    name: str = "none"
    negative_slope: float = 0.0
    module: nn.Module | None = None


NO_ACT = ActSpec()


def act_spec(module: nn.Module) -> ActSpec | None:
    """The spec of an activation module, None if it is not one that the kernels know (exact types only)."""
    name = _ACTIVATION_TYPES.get(type(module))
    if name is None:
        return None
    return ActSpec(name, module.negative_slope if name == "leaky_relu" else 0.0, module)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to calls of this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_plain(module: nn.Module) -> bool:
    """No hooks, no patched forward: calling it runs its class's forward and nothing else."""
    return not (has_hooks(module) or "forward" in module.__dict__)


def _bn_fusable(bn: nn.Module) -> bool:
    kind = type(bn)
    known = kind is nn.BatchNorm2d or kind in (nn.BatchNorm1d, nn.BatchNorm3d)
    ours = kind is BNAct2d or (kind is SyncBNAct and not bn.syncs())
    return (known or (ours and bn.activation == "none")) and is_plain(bn)


def _no_global_hooks() -> bool:
    return not (
        _nn_module._global_forward_hooks
        or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks
        or _nn_module._global_backward_pre_hooks
    )


def _act_fusable(act: ActSpec) -> bool:
    module = act.module
    return module is None or (_ACTIVATION_TYPES.get(type(module)) == act.name and is_plain(module))


def _apply(act: ActSpec, z: Tensor) -> Tensor:
    if act.module is not None:
        return act.module(z)
    return apply_activation(z, ACTIVATION_CODES[act.name], act.negative_slope)


def _eps_mode(bn: nn.Module) -> str:
    return bn.eps_mode if isinstance(bn, BNAct2d) else "var"


def _slope(act: ActSpec) -> float:
    return act.module.negative_slope if act.name == "leaky_relu" and act.module is not None else act.negative_slope


def add(z: Tensor, residual: Tensor | None, in_place: str = "") -> Tensor:
    """``z + residual`` (``residual`` may be None); ``in_place`` says whose dtype the sum has, as after ``z += residual``.

    "z": that of ``z``; "residual": that of ``residual``; "": the promoted one, as of an addition that is not in place. They
    differ under autocast, where a convolution's output may be bfloat16 beside a float32 shortcut.
    """
    if residual is None:
        return z
    out = z + residual
    return out if not in_place else out.to(z.dtype if in_place == "z" else residual.dtype)


def _in_place_promotes(in_place: str, dtype: torch.dtype, residual: Tensor | None) -> bool:
    """Whether an addition in place has to be done by itself to end in the dtype that stock's has."""
    return bool(in_place) and residual is not None and residual.dtype is not dtype


def _autocast_differs(residual: Tensor) -> bool:
    """Whether a convolution's output has another dtype than ``residual`` because of autocast."""
    device = residual.device.type
    return device != "meta" and torch.is_autocast_enabled(device) and residual.dtype is not torch.get_autocast_dtype(device)


def run_bn_act(
    x: Tensor,
    bn: nn.Module,
    act: ActSpec = NO_ACT,
    residual: Tensor | None = None,
    in_place: str = "",
    *,
    backend: str | None = None,
) -> Tensor:
    """``act(bn(x) [+ residual])`` of stock modules, fused where they allow it; ``in_place`` as in :func:`add`."""
    if not (isinstance(x, Tensor) and _bn_fusable(bn) and _act_fusable(act) and _no_global_hooks()):
        if type(bn) is SyncBNAct and bn.activation == "none" and is_plain(bn) and _act_fusable(act) and _no_global_hooks():
            return bn.run(x, residual, act.name, _slope(act))
        # Also under fx.symbolic_trace, where x is a Proxy: the traced graph shows the stock modules.
        return _apply(act, add(bn(x), residual, in_place))
    if _in_place_promotes(in_place, x.dtype, residual):
        return _apply(act, add(run_bn_act(x, bn, backend=backend), residual, in_place))
    bn._check_input_dim(x)
    training, momentum, running_mean, running_var = batch_statistics_choice(bn)
    return bn_act(
        x, running_mean, running_var, bn._parameters["weight"], bn._parameters["bias"], residual=residual, training=training,
        momentum=momentum, eps=bn.eps,
        eps_mode=_eps_mode(bn), activation=act.name, negative_slope=_slope(act), backend=backend,
    )  # fmt: skip


def run_add_act(x: Tensor, residual: Tensor, act: ActSpec, in_place: str = "", *, backend: str | None = None) -> Tensor:
    """``act(x + residual)``; ``in_place`` as in :func:`add`."""
    if not (isinstance(x, Tensor) and _act_fusable(act) and _no_global_hooks()) or _in_place_promotes(
        in_place, x.dtype, residual
    ):
        return _apply(act, add(x, residual, in_place))
    return add_act(x, residual, activation=act.name, negative_slope=_slope(act), backend=backend)


def _conv_fusable(conv: nn.Module) -> bool:
    return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and is_plain(conv)


def _worth_packing(pixels: int, conv: nn.Conv2d, memory_format: object) -> bool:
    """Whether an inference call with this many output pixels is large enough, and its result's layout is ours to choose."""
    return (
        not torch.compiler.is_compiling()  # before the size: a comparison would tie compiled code to one batch size
        and pixels * conv._parameters["weight"].numel() >= _packing.MIN_MACS
        and not torch.is_grad_enabled()
        and memory_format != "preserve"
        and not torch._C._are_functorch_transforms_active()
    )


def _pixels(x: Tensor, conv: nn.Conv2d) -> int:
    """About how many output pixels the convolution of ``x`` (N, C, H, W) has, all images together."""
    return x.numel() // conv.in_channels // (conv.stride[0] * conv.stride[1])


def _epilogue(bn: nn.Module | None, act: ActSpec) -> Epilogue:
    code, slope = ACTIVATION_CODES[act.name], _slope(act)
    if bn is None:
        return Epilogue(None, None, None, None, 0.0, False, code, slope)
    buffers, parameters = bn._buffers, bn._parameters
    return Epilogue(
        buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"], bn.eps,
        _eps_mode(bn) == "std", code, slope,
    )  # fmt: skip


def run_conv_bn_act(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    act: ActSpec = NO_ACT,
    residual: Tensor | None = None,
    in_place: str = "",
    *,
    memory_format: str = "auto",
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``act(bn(conv(x)) [+ residual])`` of stock modules, fused where they allow it; ``in_place`` as in :func:`add`.

    ``memory_format="auto"``: on the CPU in eval the packed path returns channels_last whatever comes in; "preserve" keeps
    the layout of ``x``.
    """
    if (in_place and residual is not None and _autocast_differs(residual)) or not (
        _conv_fusable(conv)
        and _bn_fusable(bn)
        and _act_fusable(act)
        and _no_global_hooks()
        and isinstance(x, Tensor)
        and x.dim() == 4
    ):
        return run_bn_act(conv(x), bn, act, residual, in_place, backend=backend)
    if bn.training:
        _packing.drop(conv)
    elif bn._buffers["running_mean"] is not None and _worth_packing(_pixels(x, conv), conv, memory_format):
        out = run_packed(x, conv, _epilogue(bn, act), residual, exact, backend)
        if out is not None:
            return out
    training, momentum, running_mean, running_var = batch_statistics_choice(bn)
    return conv_bn_act(
        x, conv._parameters["weight"], conv._parameters["bias"], running_mean=running_mean, running_var=running_var,
        bn_weight=bn._parameters["weight"], bn_bias=bn._parameters["bias"],
        residual=residual, stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
        training=training, momentum=momentum, eps=bn.eps, eps_mode=_eps_mode(bn), activation=act.name,
        negative_slope=_slope(act), exact=exact, backend=backend,
    )  # fmt: skip


def run_conv_act(
    x: Tensor,
    conv: nn.Module,
    act: ActSpec = NO_ACT,
    *,
    memory_format: str = "auto",
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``act(conv(x))`` of stock modules: fused in inference on the CPU, the stock modules otherwise."""
    if _conv_fusable(conv) and _act_fusable(act) and _no_global_hooks() and isinstance(x, Tensor) and x.dim() == 4:
        if conv.training:
            _packing.drop(conv)
        elif _worth_packing(_pixels(x, conv), conv, memory_format):
            out = run_packed(x, conv, _epilogue(None, act), None, exact, backend)
            if out is not None:
                return out
    return _apply(act, conv(x))


def run_norm_act_conv_norm_act(
    x: Tensor, bn1: nn.Module, act1: ActSpec, conv: nn.Module, bn2: nn.Module | None, act2: ActSpec, backend: str | None
) -> Tensor | None:
    """``act2(bn2(conv(act1(bn1(x)))))`` (bn2 None: without) in one kernel, None where there is none: inference on CUDA."""
    if (
        x.is_cuda
        and _conv_fusable(conv)
        and all(bn is None or (_bn_fusable(bn) and not bn.training) for bn in (bn1, bn2))
        and _act_fusable(act1)
        and _act_fusable(act2)
        and _no_global_hooks()
    ):
        return run_prologue_conv(x, _epilogue(bn1, act1), conv, None if bn2 is None else _epilogue(bn2, act2), backend)
    return None


def run_dense_conv(
    features: list[Tensor],
    bn1: nn.Module,
    act1: ActSpec,
    conv: nn.Module,
    bn2: nn.Module,
    act2: ActSpec,
    *,
    memory_format: str = "auto",
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``act2(bn2(conv(act1(bn1(cat(features))))))``, DenseNet's bottleneck; without the concatenation where grad is off."""
    if (
        _conv_fusable(conv)
        and _bn_fusable(bn1)
        and _bn_fusable(bn2)
        and _act_fusable(act1)
        and _act_fusable(act2)
        and _no_global_hooks()
        and not (bn1.training or bn2.training)
        and bn1._buffers["running_mean"] is not None
        and bn2._buffers["running_mean"] is not None
        and conv.groups == 1
        and features[0].dim() == 4
        and _worth_packing(features[0].numel() // features[0].shape[1], conv, memory_format)
    ):
        out = run_bn_act_conv_packed(features, _epilogue(bn1, act1), conv, _epilogue(bn2, act2), backend)
        if out is not None:
            return out
    x = features[0] if len(features) == 1 else torch.cat(features, 1)
    out = run_norm_act_conv_norm_act(x, bn1, act1, conv, bn2, act2, backend)
    if out is not None:
        return out
    x = run_bn_act(x, bn1, act1, backend=backend)
    return run_conv_bn_act(x, conv, bn2, act2, memory_format=memory_format, exact=exact, backend=backend)
