"""A DenseNet block of stock modules as one autograd op; the training path of ``models.densenet`` and of ``dk.optimize``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._backend import STOCK, select
from ..functional.dense_block import run_dense_layers
from ._block import _fits, _is_recorded, _params, _uses_batch
from ._run import ActSpec, _act_fusable, _autocast_differs, _no_global_hooks, _slope

DenseParts = Sequence[tuple[nn.Module, ActSpec, nn.Module]]  # BatchNorm, activation, convolution: once or twice


def run_dense_training(
    x: Tensor,
    layers: Sequence[DenseParts],
    *,
    memory_efficient: bool = False,
    keep_activations: bool = False,
    backend: str | None = None,
) -> Tensor | None:
    """The block of these stock modules with gradients; None where its layers must go one by one.

    That is inference, frozen BatchNorms, NCHW, small maps, hooks, other types; and CUDA, where single layers have kernels
    (statistics and gradients fused into the convolutions) that the block's schedule does not use.
    """
    if not (
        isinstance(x, Tensor)
        and x.dim() == 4
        and layers
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and _no_global_hooks()
        and not _is_recorded()
        and not _autocast_differs(x)
    ):
        return None
    first = layers[0][0][1]
    per_layer = len(layers[0])
    trained = x.requires_grad
    for layer in layers:
        if len(layer) != per_layer:
            return None
        for bn, act, conv in layer:
            alike = _act_fusable(act) and act.name == first.name and _slope(act) == _slope(first)
            if not (alike and _fits(conv, bn) and _uses_batch(bn) and _keeps_size(conv)):
                return None
            trained = trained or any(p is not None and p.requires_grad for m in (bn, conv) for p in m._parameters.values())
    if not trained or x.numel() == x.shape[1] or select("dense_block", x, backend) == STOCK:
        return None
    return run_dense_layers(
        x, [[_params(conv, bn) for bn, _, conv in layer] for layer in layers], training=True, activation=first.name,
        negative_slope=_slope(first), memory_efficient=memory_efficient, keep_activations=keep_activations, backend=backend,
    )  # fmt: skip


def _keeps_size(conv: nn.Module) -> bool:
    same = all(2 * p == d * (k - 1) for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True))
    return same and tuple(conv.stride) == (1, 1)
