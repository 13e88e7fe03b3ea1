"""Reference of ``bn_act_max_pool``: the ``bn_act`` reference, then torch's pooling."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .bn_act import bn_act


def bn_act_max_pool(
    x: Tensor, *args: Any, pool: tuple[Any, Any, Any, Any, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(out, new_running_mean, new_running_var)``; ``args`` as of :func:`~dl4ds_kernels.reference.bn_act.bn_act`."""
    z, new_mean, new_var = bn_act(x, *args)
    kernel, stride, padding, dilation, ceil_mode = pool
    return F.max_pool2d(z, kernel, stride, padding, dilation, ceil_mode), new_mean, new_var
