"""The one-kernel inference path on CUDA of a bottleneck block's end: convolution, BatchNorm, activation, twice."""

from __future__ import annotations

from torch import Tensor, nn

from .._activation import ACTIVATION_CODES
from ..functional._tail import conv_tail, tail_fits
from ._run import ActSpec, _act_fusable, _autocast_differs, _bn_fusable, _conv_fusable, _eps_mode, _no_global_hooks, _slope


def _plain(conv: nn.Module, bn: nn.Module | None, act: ActSpec) -> bool:
    """Stock modules in inference."""
    return (
        bn is not None
        and _conv_fusable(conv)
        and conv.groups == 1
        and _bn_fusable(bn)
        and not bn.training
        and bn._buffers["running_mean"] is not None
        and _act_fusable(act)
    )


def run_tail(
    x: Tensor, layers: tuple[tuple[nn.Module, nn.Module | None, ActSpec], ...], residual: Tensor | None, in_place: str,
    backend: str | None,
) -> Tensor | None:  # fmt: skip
    """``act2(bn2(conv2(act(bn(conv(x))))) [+ residual])``; None where the path does not apply: the layers then go one by one.

    ``in_place`` as in ``_run.add``.
    """
    (conv, bn, act), (conv2, bn2, act2) = layers
    if not (
        isinstance(x, Tensor)
        and x.is_cuda
        and _no_global_hooks()
        and _plain(conv, bn, act)
        and _plain(conv2, bn2, act2)
        and not isinstance(conv.padding, str)
        and conv2.stride == (1, 1)
        and conv2.padding == (0, 0)
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        and not (in_place and residual is not None and _autocast_differs(residual))
    ):
        return None
    slopes = {_slope(spec) for spec in (act, act2) if spec.name == "leaky_relu"}
    weights = [c._parameters["weight"] for c in (conv, conv2)]
    biases = [c._parameters["bias"] for c in (conv, conv2)]
    vectors = [bn_._parameters[name] for bn_ in (bn, bn2) for name in ("weight", "bias")]
    if len(slopes) > 1 or not tail_fits(x, *weights, backend, *biases, *vectors, residual):
        return None
    norms = [
        (b._buffers["running_mean"], b._buffers["running_var"], b._parameters["weight"], b._parameters["bias"], b.eps,
         _eps_mode(b) == "std", ACTIVATION_CODES[spec.name]) for b, spec in ((bn, act), (bn2, act2))
    ]  # fmt: skip
    geometry = (conv.stride, conv.padding, conv.dilation)
    return conv_tail(
        x, weights[0], biases[0], norms[0], geometry, weights[1], biases[1], norms[1], slopes.pop() if slopes else 0.0, residual
    )  # fmt: skip
