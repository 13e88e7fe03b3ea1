"""``add_bn_act``: the addition that ends a pre-activation block and the BatchNorm + activation that starts the next one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._activation import activation_code
from ._common import check_floating, check_tensor, check_vector, eps_mode_flag, fail
from .add_act import add_act
from .bn_act import bn_act


def add_bn_act(
    x: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    eps_mode: str = "var",
    activation: str = "relu",
    negative_slope: float = 0.1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = alpha * (x + residual)`` and ``activation(batch_norm(s))``, both returned.

    ``s`` is the skip connection of the next block, the second result the input of its branch. Two ops today: :func:`add_act`
    without activation and :func:`bn_act`, forward and backward.

    Args:
        x, residual: (N, C, …) of one shape, dtype and device.
        alpha: scale after the addition (scaled residual learning uses ``1 / sqrt(2)``).
        running_mean, running_var, weight, bias, training, momentum, eps, eps_mode, activation, negative_slope, backend: as in
            :func:`bn_act`.

    Returns:
        Two tensors of ``x``'s shape; neither aliases an input. Differentiable once in x, residual, weight and bias.

    Raises:
        TypeError: a tensor argument is not a tensor. RuntimeError: dtype, device, rank or shape do not fit.
        ValueError: one value per channel in training, unknown activation or mode.

    Reference: He et al., Identity Mappings in Deep Residual Networks, 2016.
    """
    try:
        if has_torch_function_variadic(x, residual):
            return handle_torch_function(
                add_bn_act, (x, residual), x, residual, running_mean, running_var, weight, bias, alpha=alpha,
                training=training, momentum=momentum, eps=eps, eps_mode=eps_mode, activation=activation,
                negative_slope=negative_slope, backend=backend,
            )  # fmt: skip
        if residual.shape != x.shape:
            fail("add_bn_act", "residual", f"shape {tuple(x.shape)} like x", tuple(residual.shape))
        total = add_act(x, residual, alpha=alpha, activation="none", backend=backend)
        out = bn_act(
            total, running_mean, running_var, weight, bias, training=training, momentum=momentum, eps=eps, eps_mode=eps_mode,
            activation=activation, negative_slope=negative_slope, backend=backend,
        )  # fmt: skip
        return total, out
    except Exception:
        _explain(x, residual, activation, eps_mode, running_mean, running_var, weight, bias)
        raise


def _explain(x: Any, residual: Any, activation: Any, eps_mode: Any, *vectors: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    activation_code("add_bn_act", activation)
    eps_mode_flag("add_bn_act", eps_mode)
    check_floating("add_bn_act", "x", x)
    check_tensor("add_bn_act", "residual", residual)
    if residual.device != x.device:
        fail("add_bn_act", "residual", f"a tensor on {x.device} like x", residual.device)
    if residual.shape != x.shape:
        fail("add_bn_act", "residual", f"shape {tuple(x.shape)} like x", tuple(residual.shape))
    if not 2 <= x.dim() <= 5:
        fail("add_bn_act", "x", "2 to 5 dimensions (N, C, …)", f"{x.dim()} (shape {tuple(x.shape)})")
    for name, vector in zip(("running_mean", "running_var", "weight", "bias"), vectors, strict=True):
        check_vector("add_bn_act", name, vector, x, x.shape[1])
