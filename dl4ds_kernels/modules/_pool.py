"""Stock pooling modules through the inference kernels; the run time of ``dk.optimize`` for pools."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import avg_pool2d, global_avg_pool2d, max_pool2d
from ._run import _no_global_hooks, is_plain

_ONE = (1, (1, 1), [1, 1])


def is_pool(module: nn.Module) -> bool:
    """Whether this is exactly one of torch's poolings that a kernel serves, without hooks or a patched forward."""
    kind = type(module)
    known = (
        (kind is nn.MaxPool2d and not module.return_indices)
        or kind is nn.AvgPool2d
        or (kind is nn.AdaptiveAvgPool2d and module.output_size in _ONE)
    )
    return known and is_plain(module)


def run_pool(x: Tensor, pool: nn.Module, *, backend: str | None = None) -> Tensor:
    """``pool(x)``; a kernel of our own for fp32 channels_last maps on the CPU where no gradient is asked for."""
    if not (isinstance(x, Tensor) and is_pool(pool) and _no_global_hooks()):
        return pool(x)
    if type(pool) is nn.MaxPool2d:
        return max_pool2d(
            x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, backend=backend
        )  # fmt: skip
    if type(pool) is nn.AvgPool2d:
        return avg_pool2d(
            x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad, pool.divisor_override,
            backend=backend,
        )  # fmt: skip
    return global_avg_pool2d(x, backend=backend)
