"""``BNAct2d``: a BatchNorm2d that applies its activation (and a residual) in the same pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._activation import activation_code
from ..functional import bn_act
from ..functional._common import eps_mode_flag


def batch_statistics_choice(bn: nn.Module) -> tuple[bool, float, Tensor | None, Tensor | None]:
    """(training, momentum, running_mean, running_var) for this call, as torch's ``_BatchNorm.forward`` decides them.

    Counts the batch in ``num_batches_tracked`` like it; ``momentum=None`` is the cumulative average.
    """
    # Straight from the dict: nn.Module's attribute lookup costs as much as a small kernel.
    running_mean, running_var = bn._buffers["running_mean"], bn._buffers["running_var"]
    training = bn.training or (running_mean is None and running_var is None)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    track = not bn.training or bn.track_running_stats
    return training, momentum, running_mean if track else None, running_var if track else None


class BNAct2d(nn.BatchNorm2d):
    """``activation(batch_norm(x) [+ residual])``; a drop-in for ``nn.BatchNorm2d`` with the same state_dict keys.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as ``nn.BatchNorm2d``.
        activation: "relu", "leaky_relu", "relu6", "silu", "hardswish" or "none". negative_slope: of leaky_relu.
        eps_mode: "var" (PyTorch) or "std" (darknet, the lecture).

    Shape: x (N, C, H, W), residual like x -> (N, C, H, W). Raises what ``nn.BatchNorm2d`` raises.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str = "relu",
        negative_slope: float = 0.1,
        eps_mode: str = "var",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        activation_code("BNAct2d", activation)
        eps_mode_flag("BNAct2d", eps_mode)
        self.activation, self.negative_slope, self.eps_mode = activation, negative_slope, eps_mode

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(x)
        training, momentum, running_mean, running_var = batch_statistics_choice(self)
        return bn_act(
            x, running_mean, running_var, self.weight, self.bias, residual=residual, training=training, momentum=momentum,
            eps=self.eps, eps_mode=self.eps_mode, activation=self.activation, negative_slope=self.negative_slope,
        )  # fmt: skip

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation}{slope}, eps_mode={self.eps_mode}"
