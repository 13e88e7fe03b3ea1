"""``LocallyConnected2d``: a convolution whose kernel is another one at every place (darknet's ``[local]`` layer)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LocallyConnected2d(nn.Module):
    """Unshared convolution on maps of a fixed size.

    Parameters are laid out as darknet stores them: ``weight`` (L, C_out, C_in * k * k) with one matrix for each of the
    L = H_out * W_out places in row-major order, ``bias`` (C_out, H_out, W_out).

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as ``nn.Conv2d``, square.
        input_size: (H, W) of the input.

    Shape: x (N, C_in, H, W) -> (N, C_out, H_out, W_out). Differentiable (plain torch: unfold and one batched product).
    Raises: RuntimeError for an input of another size; ValueError for a kernel larger than the padded input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        input_size: tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.input_size, self.stride, self.padding = tuple(input_size), stride, padding
        self.output_size = tuple((s + 2 * padding - kernel_size) // stride + 1 for s in input_size)
        if min(self.output_size) < 1:
            raise ValueError(
                f"LocallyConnected2d: kernel_size: expected at most the padded input {input_size} + 2 * {padding}, "
                f"got {kernel_size}"
            )
        places, fan_in = math.prod(self.output_size), in_channels * kernel_size * kernel_size
        self.weight = nn.Parameter(torch.empty(places, out_channels, fan_in, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, *self.output_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within ``1 / sqrt(fan-in)``, as ``nn.Conv2d`` starts."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        expected = (self.in_channels, *self.input_size)
        if tuple(x.shape[1:]) != expected:
            raise RuntimeError(
                f"LocallyConnected2d: x: expected shape (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
            )
        patches = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)  # (N, C k k, L)
        out = torch.bmm(self.weight, patches.permute(2, 1, 0))  # (L, C_out, N)
        # Contiguous, so that what follows (dropout draws in memory order) does as behind a convolution.
        return out.permute(2, 1, 0).contiguous().view(x.shape[0], self.out_channels, *self.output_size) + self.bias

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, input_size={self.input_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )
