"""``FusedSequential``: an ``nn.Sequential`` whose conv, BatchNorm and activation neighbours run fused."""

from __future__ import annotations

from torch import Tensor, nn

from ._block import run_conv_bn_act_pool, run_norm_act_conv
from ._run import NO_ACT, ActSpec, act_spec, run_bn_act, run_conv_act, run_conv_bn_act
from ._transposed import run_conv_transpose_bn_act

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.BatchNorm1d)


class FusedSequential(nn.Sequential):
    """Runs its children one after the other as ``nn.Sequential`` does, with the same state_dict keys.

    A convolution (also transposed or 3-D) followed by a BatchNorm and perhaps an activation is one fused step, a BatchNorm or
    a 2-D convolution followed by an activation too; everything else is called as it is. With gradients, BatchNorm - activation
    - convolution and convolution - BatchNorm - activation - max-pooling are one autograd node each, which keeps no activations.
    Children may be exchanged, hooked or frozen at any time: a hooked child is called by itself. Indexing with a slice returns
    a FusedSequential.

    Shape: as the children say.
    """

    in_order = True  # the forward is the children's, one after the other

    def forward(self, x: Tensor) -> Tensor:
        return run_sequence(list(self._modules.values()), x)


def run_sequence(children: list[nn.Module], x: Tensor) -> Tensor:
    """Run modules one after the other, neighbours fused as :class:`FusedSequential` says."""
    i, n = 0, len(children)
    while i < n:
        module = children[i]
        kind, after = type(module), children[i + 1] if i + 1 < n else None
        if kind in _CONVOLUTIONS and type(after) in _NORMS:
            act = _act(children, i + 2)
            i += 2 if act is NO_ACT else 3
            if i < n and type(children[i]) is nn.MaxPool2d:
                x = run_conv_bn_act_pool(x, module, after, act, children[i])
                i += 1
            else:
                x = run_conv_bn_act(x, module, after, act)
        elif kind is nn.ConvTranspose2d and type(after) in _NORMS:
            act = _act(children, i + 2)
            x = run_conv_transpose_bn_act(x, module, after, act)
            i += 2 if act is NO_ACT else 3
        elif kind is nn.Conv2d:
            act = _act(children, i + 1)
            x = run_conv_act(x, module, act)
            i += 1 if act is NO_ACT else 2
        elif kind in _NORMS:
            act = _act(children, i + 1)
            i += 1 if act is NO_ACT else 2
            if act is not NO_ACT and i < n and type(children[i]) is nn.Conv2d and _stands_alone(children, i):
                x = run_norm_act_conv(x, module, act, children[i])
                i += 1
            else:
                x = run_bn_act(x, module, act)
        else:
            x = module(x)
            i += 1
    return x


def _stands_alone(children: list[nn.Module], i: int) -> bool:
    """Whether nothing behind the convolution at place ``i`` is fused with it."""
    return _act(children, i + 1) is NO_ACT and not (i + 1 < len(children) and type(children[i + 1]) in _NORMS)


def _act(children: list[nn.Module], i: int) -> ActSpec:
    """The activation at place ``i``, NO_ACT if there is none."""
    return (act_spec(children[i]) if i < len(children) else None) or NO_ACT
