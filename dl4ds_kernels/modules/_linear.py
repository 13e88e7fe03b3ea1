"""Stock ``nn.Linear`` and its activation through ``linear_act``; the run time of ``dk.optimize`` for such layers."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import linear_act
from ._run import NO_ACT, ActSpec, _act_fusable, _apply, _no_global_hooks, _slope, is_plain


def is_linear(module: nn.Module) -> bool:
    """Whether this is exactly torch's fully connected layer, without hooks or a patched forward."""
    return type(module) is nn.Linear and is_plain(module)


def run_linear_act(x: Tensor, linear: nn.Module, act: ActSpec = NO_ACT, *, backend: str | None = None) -> Tensor:
    """``act(linear(x))``; a kernel of our own for few rows of fp32 on the CPU where no gradient is asked for."""
    if not (isinstance(x, Tensor) and is_linear(linear) and _act_fusable(act) and _no_global_hooks()):
        return _apply(act, linear(x))
    parameters = linear._parameters
    return linear_act(
        x, parameters["weight"], parameters["bias"], activation=act.name, negative_slope=_slope(act), backend=backend
    )  # fmt: skip
