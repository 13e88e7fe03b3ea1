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

from .. import _backend, _extension, _packing
from .._activation import ACTIVATION_CODES, apply_activation
from .._define import CPP, op
from ..functional import add_act, bn_act, conv_bn_act
from ..functional._common import call
from ..functional.conv_bn_act import out_shape
from .bn_act import BNAct2d, batch_statistics_choice

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


def is_plain(module: nn.Module) -> bool:
    """No hooks, no patched forward: calling it runs its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _bn_fusable(bn: nn.Module) -> bool:
    kind = type(bn)
    known = kind is nn.BatchNorm2d or kind in (nn.BatchNorm1d, nn.BatchNorm3d)
    return (known or (kind is BNAct2d and bn.activation == "none")) and is_plain(bn)


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
    return bn.eps_mode if type(bn) is BNAct2d else "var"


def _slope(act: ActSpec) -> float:
    return act.module.negative_slope if act.name == "leaky_relu" and act.module is not None else act.negative_slope


def run_bn_act(
    x: Tensor,
    bn: nn.Module,
    act: ActSpec = NO_ACT,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``act(bn(x) [+ residual])`` of stock modules, fused where they allow it."""
    if not (isinstance(x, Tensor) and _bn_fusable(bn) and _act_fusable(act) and _no_global_hooks()):
        z = bn(x)  # also under fx.symbolic_trace, where x is a Proxy: the traced graph shows the stock modules
        return _apply(act, z if residual is None else z + residual)
    bn._check_input_dim(x)
    training, momentum, running_mean, running_var = batch_statistics_choice(bn)
    return bn_act(
        x, running_mean, running_var, bn._parameters["weight"], bn._parameters["bias"], residual=residual, training=training,
        momentum=momentum, eps=bn.eps,
        eps_mode=_eps_mode(bn), activation=act.name, negative_slope=_slope(act), backend=backend,
    )  # fmt: skip


def run_add_act(x: Tensor, residual: Tensor, act: ActSpec, *, backend: str | None = None) -> Tensor:
    """``act(x + residual)``."""
    if not (isinstance(x, Tensor) and _act_fusable(act) and _no_global_hooks()):
        return _apply(act, x + residual)
    return add_act(x, residual, activation=act.name, negative_slope=_slope(act), backend=backend)


def run_conv_bn_act(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    act: ActSpec = NO_ACT,
    residual: Tensor | None = None,
    *,
    memory_format: str = "auto",
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``act(bn(conv(x)) [+ residual])`` of stock modules, fused where they allow it.

    ``memory_format="auto"``: on the CPU in eval the prepacked path returns channels_last whatever comes in; "preserve" keeps
    the layout of ``x``.
    """
    if not (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and is_plain(conv)
        and _bn_fusable(bn)
        and _act_fusable(act)
        and _no_global_hooks()
        and isinstance(x, Tensor)
        and x.dim() == 4
    ):
        return run_bn_act(conv(x), bn, act, residual, backend=backend)
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    if bn.training:
        _packing.drop(conv)
    elif (
        not torch.is_grad_enabled()
        and memory_format != "preserve"
        # Outputs of the convolution times what each of them costs, in multiply-adds.
        and x.numel() // conv.in_channels // (conv.stride[0] * conv.stride[1]) * weight.numel() >= _packing.MIN_MACS
        and bn.running_mean is not None
        and not torch.compiler.is_compiling()
    ):
        out = _run_packed(x, conv, bn, act, residual, exact, backend)
        if out is not None:
            return out
    training, momentum, running_mean, running_var = batch_statistics_choice(bn)
    return conv_bn_act(
        x, weight, bias, running_mean=running_mean, running_var=running_var, bn_weight=bn._parameters["weight"],
        bn_bias=bn._parameters["bias"],
        residual=residual, stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
        training=training, momentum=momentum, eps=bn.eps, eps_mode=_eps_mode(bn), activation=act.name,
        negative_slope=_slope(act), exact=exact, backend=backend,
    )  # fmt: skip


def _run_packed(
    x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: ActSpec, residual: Tensor | None, exact: bool, backend: str | None
) -> Tensor | None:
    """The inference path with a packed weight; None where it does not apply and the functional decides."""
    weight, bias, padding = conv._parameters["weight"], conv._parameters["bias"], conv.padding
    asked = backend or _backend.current()
    if (
        asked not in ("auto", "cpu")
        or type(padding) is str
        or type(x) is not Tensor
        or x.dtype is not torch.float32
        or not x.is_cpu
        or not _packing.supported(weight)
        or x.shape[1] != conv.in_channels
        or x.numel() == 0
        or not _extension.status()["_C"].loaded
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
    ):
        return None
    vectors = (bn._buffers["running_mean"], bn._buffers["running_var"], bn._parameters["weight"], bn._parameters["bias"])
    for v in vectors:
        if v is not None and v.dtype is not torch.float32:
            return None
    geometry = (conv.stride, padding, conv.dilation, conv.groups)
    if residual is not None and not (
        residual.dtype is x.dtype
        and residual.device == x.device
        and tuple(residual.shape) == out_shape(x, weight, *geometry[:3])
    ):
        return None
    algorithm, packed = _packing.packed_weight(conv, weight, x, *geometry, exact)
    rest = (bias, *vectors, residual, *geometry, bn.eps, _eps_mode(bn) == "std", ACTIVATION_CODES[act.name], _slope(act))
    if algorithm == _packing.LIBRARY:
        return call(op("conv_bn_act", CPP), False, x, packed, *rest)
    return call(op("conv_bn_act_packed", CPP), False, x, weight, packed, algorithm, *rest)
