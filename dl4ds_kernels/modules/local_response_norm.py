"""``LocalResponseNorm``: torch's layer on the fused kernel."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import local_response_norm
from ._run import _no_global_hooks, is_plain


class LocalResponseNorm(nn.LocalResponseNorm):
    """A drop-in for ``nn.LocalResponseNorm`` (same arguments, no parameters).

    Args:
        size: channels of the window. alpha, beta, k: ``x / (k + alpha / size * sum(x^2))^beta``.

    Shape: x (N, C, *spatial) -> the same. Raises what :func:`dl4ds_kernels.functional.local_response_norm` raises.
    """

    def forward(self, x: Tensor) -> Tensor:
        return local_response_norm(x, self.size, self.alpha, self.beta, self.k)


def run_local_response_norm(x: Tensor, norm: nn.Module, *, backend: str | None = None) -> Tensor:
    """``norm(x)`` on the fused kernel, where the module is still the stock one that was planned for."""
    if type(norm) is nn.LocalResponseNorm and is_plain(norm) and _no_global_hooks() and isinstance(x, Tensor):
        return local_response_norm(x, norm.size, norm.alpha, norm.beta, norm.k, backend=backend)
    return norm(x)
