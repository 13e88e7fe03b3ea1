"""``AddAct``: residual addition and activation in one pass."""

from __future__ import annotations

from torch import Tensor, nn

from .._activation import activation_code
from ..functional import add_act


class AddAct(nn.Module):
    """``activation(alpha * (x + residual [+ residual2]))``; no parameters. See :func:`dl4ds_kernels.functional.add_act`."""

    def __init__(self, activation: str = "relu", *, alpha: float = 1.0, negative_slope: float = 0.1) -> None:
        super().__init__()
        activation_code("AddAct", activation)
        self.activation, self.alpha, self.negative_slope = activation, alpha, negative_slope

    def forward(self, x: Tensor, residual: Tensor, residual2: Tensor | None = None) -> Tensor:
        return add_act(x, residual, residual2, alpha=self.alpha, activation=self.activation, negative_slope=self.negative_slope)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, alpha={self.alpha}"
