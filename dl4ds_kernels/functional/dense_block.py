"""``dense_block``: a whole DenseNet block, forward and backward, in one buffer of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import reference
from .._activation import ACTIVATION_CODES, activation_code
from .._backend import REFERENCE, STOCK, select
from .._define import op
from ..ops._block_code import NO_SHORTCUT, Block, Conv, Norm, encode
from ._common import call, check_floating, eps_mode_flag, fail, needs_grad
from .residual_block import ConvParams, _explain_conv, _explain_norm, _pair, run_block


def dense_block(
    x: Tensor,
    layers: Sequence[Sequence[ConvParams]],
    *,
    training: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.1,
    memory_efficient: bool = False,
    keep_activations: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``x`` and, behind it along the channels, what every layer makes of all features before it: a DenseNet block.

    A layer is ``conv2(act(bn2(conv1(act(bn1(features))))))``, or with one convolution ``conv(act(bn(features)))``. In training
    on ``x`` in channels_last the block is one autograd node over one buffer: nothing is concatenated, batch statistics are
    taken once a channel, and backward adds every layer's gradient in place. It keeps its output and the bottlenecks' first
    convolutions' outputs. Everywhere else (eval, NCHW) layer by layer, each a node as in :func:`preact_bottleneck`.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16.
        layers: of each layer its one or two :class:`ConvParams`, the same number in all, each with the BatchNorm **in front
            of** the convolution. Layer i takes C plus the outputs of all layers before it; H and W must not change.
        training: batch statistics and an update of the running ones, once for a call (not when backward computes again).
        activation, negative_slope: as in :func:`bn_act`, behind every BatchNorm.
        memory_efficient: backward computes the first convolutions again too; only the output is kept.
        keep_activations: keeps the activations between the convolutions, instead of computing them again (not with
            ``memory_efficient``).
        backend: overrides ``dk.backend`` for this call.

    Returns:
        (N, C + the layers' outputs, H, W), channels_last if x is. Differentiable once in x, weights and biases; a second
        backward raises RuntimeError. Backward reads the output: changing it in place is an error there, as after stock relu.

    Raises:
        TypeError: a tensor argument is not a tensor. ValueError: number of convolutions, a missing BatchNorm, one value per
        channel in training, unknown activation or mode. RuntimeError: dtype, device, rank, shape or geometry do not fit.

    Reference: Huang et al., Densely Connected Convolutional Networks, 2017; Pleiss et al., Memory-Efficient Implementation of
    DenseNets, 2017 (the shared buffers).
    """
    options: dict[str, Any] = {
        "training": training, "activation": activation, "negative_slope": negative_slope,
        "memory_efficient": memory_efficient, "keep_activations": keep_activations, "backend": backend,
    }  # fmt: skip
    try:
        if has_torch_function_variadic(x):
            return handle_torch_function(dense_block, (x,), x, layers, **options)
        alike = all(len(layer) in (1, 2) and len(layer) == len(layers[0]) for layer in layers)
        if not alike or any(conv.norm is None for layer in layers for conv in layer):
            raise ValueError("dense_block")  # in words below
        return run_dense_layers(x, layers, **options)
    except Exception:
        _explain(x, layers, activation)
        raise


def run_dense_layers(
    x: Tensor,
    layers: Sequence[Sequence[ConvParams]],
    *,
    training: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.1,
    memory_efficient: bool = False,
    keep_activations: bool = False,
    backend: str | None = None,
) -> Tensor:
    """What modules call. No checks of its own."""
    path = select("dense_block", x, backend)
    if not layers or path is STOCK or not _fits(x, layers, training):
        return _step_by_step(x, layers, training, activation, negative_slope, memory_efficient, backend)
    convs: list[Tensor] = []
    norms: list[Tensor] = []
    running: list[Tensor] = []
    coded: list[Conv] = []

    def place(t: Tensor | None, tensors: list[Tensor]) -> int:
        if t is None:
            return -1
        tensors.append(t)
        return len(tensors) - 1

    for layer in layers:
        for conv in layer:
            bn = conv.norm
            mean = place(bn.running_mean, running)
            place(bn.running_var, running)
            std = bn.eps_mode != "var" and eps_mode_flag("dense_block", bn.eps_mode)
            norm = Norm(
                len(coded), place(bn.weight, norms), place(bn.bias, norms), mean, std, float(bn.momentum), float(bn.eps)
            )  # fmt: skip
            coded.append(
                Conv(
                    place(conv.weight, convs), place(conv.bias, convs), _pair(conv.stride), _pair(conv.padding),
                    _pair(conv.dilation), conv.groups, norm,
                )
            )  # fmt: skip
    block = Block(True, NO_SHORTCUT, ACTIVATION_CODES[activation], False, negative_slope, 1.0, tuple(coded), None)
    per_layer = len(layers[0])
    if path is REFERENCE:
        out, new_running = reference.dense_block(x, convs, norms, running, block, per_layer, training)
    else:
        if x.numel() == x.shape[1]:
            fail("dense_block", "x", "more than 1 value per channel when training", f"a map of {tuple(x.shape)}", ValueError)
        grad = needs_grad(x, *convs, *norms)
        keep = 0 if memory_efficient else 2 if keep_activations else 1
        out, _, _, new_running = call(
            op("dense_block", path), grad, x, convs, norms, running, *encode(block), per_layer, keep, grad
        )  # fmt: skip
    if training and running:
        with torch.no_grad():
            torch._foreach_copy_(running, list(new_running))
    return out


def _fits(x: Tensor, layers: Sequence[Sequence[ConvParams]], training: bool) -> bool:
    """Whether the buffers serve: training, channels_last, and layers that keep height and width."""
    if not training or x.dim() != 4 or x.numel() == 0:
        return False
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    device = x.device.type  # under autocast stock's concatenation promotes, a buffer would not
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.get_autocast_dtype(device):
        return False
    return all(_keeps_size(conv) for layer in layers for conv in layer)


def _keeps_size(conv: ConvParams) -> bool:
    stride, padding, dilation = _pair(conv.stride), _pair(conv.padding), _pair(conv.dilation)
    return stride == (1, 1) and all(
        2 * p == d * (k - 1) for p, d, k in zip(padding, dilation, conv.weight.shape[2:], strict=True)
    )


def _step_by_step(
    x: Tensor, layers: Sequence[Sequence[ConvParams]], training: bool, activation: str, negative_slope: float,
    memory_efficient: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    """The same block, each layer by itself on a concatenation."""
    features = [x]
    for layer in layers:
        joined = features[0] if len(features) == 1 else torch.cat(features, 1)
        features.append(
            run_block(
                joined, layer, None, preact=True, shortcut=NO_SHORTCUT, training=training, activation=activation,
                negative_slope=negative_slope, memory_efficient=memory_efficient, backend=backend,
            )
        )  # fmt: skip
    return torch.cat(features, 1)


def _explain(x: Any, layers: Any, activation: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    name = "dense_block"
    activation_code(name, activation)
    check_floating(name, "x", x)
    if x.dim() != 4:
        fail(name, "x", "(N, C, H, W)", tuple(x.shape))
    listed = isinstance(layers, (list, tuple)) and all(isinstance(layer, (list, tuple)) for layer in layers)
    if not listed or not all(isinstance(conv, ConvParams) for layer in layers for conv in layer):
        fail(name, "layers", "lists of ConvParams", type(layers).__name__, TypeError)
    channels = x.shape[1]
    for i, layer in enumerate(layers):
        if len(layer) not in (1, 2) or len(layer) != len(layers[0]):
            fail(name, f"layers[{i}]", "1 or 2 convolutions, as many in every layer", len(layer), ValueError)
        wide = channels
        for j, conv in enumerate(layer):
            what = f"layers[{i}][{j}]"
            _explain_conv(name, what, conv, x, wide)
            if conv.norm is None:
                fail(name, f"{what}.norm", "BNParams", "None", ValueError)
            _explain_norm(name, what, conv.norm, x, wide)
            if not _keeps_size(conv):
                fail(name, what, "a convolution that keeps height and width", f"stride {conv.stride}, padding {conv.padding}")
            wide = conv.weight.shape[0]
        channels += wide
