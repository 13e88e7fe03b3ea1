"""Pre-activation residual blocks: BN - act - conv, added without an activation after the sum.

Each convolution but the last runs fused with the BatchNorm and activation behind it; the leading BatchNorm is a pass of its own
because the shortcut uses the same input. With gradients the whole block is one autograd node that keeps no activations
(functional/residual_block.py).
"""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import add_act
from ._block import Pair, run_norm_act_conv, run_residual_block
from ._chain import Step, run_chain
from ._run import NO_ACT, ActSpec, run_bn_act, run_conv_act
from .residual import conv1x1, conv3x3


class BNActConv2d(nn.Module):
    """``conv(act(bn(x)))``, attribute names ``bn`` and ``conv``: the layer of pre-activation nets and DenseNets.

    Args: as ``nn.Conv2d`` (bias off); eps, momentum of the BatchNorm over ``in_channels``.
    Shape: x (N, in_channels, H, W) -> (N, out_channels, H_out, W_out).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels, eps, momentum)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)

    def forward(self, x: Tensor) -> Tensor:
        return run_norm_act_conv(x, self.bn, ActSpec("relu", 0.0, self.relu), self.conv)


class _PreActivation(nn.Module):
    """The common frame: leading BN + act (optional), branch, shortcut, addition.

    ``downsample`` sees the activated input, so that one BatchNorm serves branch and shortcut; an identity shortcut is the raw
    input.
    """

    bn1: nn.Module | None
    relu: nn.Module
    downsample: nn.Module | None
    residual_scale: float
    prologue = False  # whether the first convolution can do the leading BatchNorm and activation on its way in

    def _act(self) -> ActSpec:
        return ActSpec("relu", 0.0, self.relu)

    def pairs(self) -> list[Pair]:
        """The convolutions of the branch, each with the BatchNorm in front of it."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = run_residual_block(x, self.pairs(), self._act(), self.downsample, preact=True, alpha=self.residual_scale)
        if out is not None:
            return out
        act, norm = self._act(), self.bn1
        if norm is not None and self.downsample is None and self.prologue:
            branch = run_chain((x,), self._steps(act, (norm, act)))
            return add_act(branch, x, alpha=self.residual_scale, activation="none")
        z = x if norm is None else run_bn_act(x, norm, act)
        shortcut = x if self.downsample is None else run_conv_act(z, self.downsample)
        return add_act(run_chain((z,), self._steps(act)), shortcut, alpha=self.residual_scale, activation="none")

    def _steps(self, act: ActSpec, before: tuple[nn.Module, ActSpec] | None = None) -> tuple[Step, ...]:
        """The convolutions of the branch; ``before``: the leading BatchNorm and activation."""
        convs, norms = zip(*self.pairs(), strict=True)
        behind = [(norm, act) for norm in norms[1:]] + [(None, NO_ACT)]
        return tuple(
            Step(conv, norm, then, (i,), before=before if i == 0 else None)
            for i, (conv, (norm, then)) in enumerate(zip(convs, behind, strict=True))
        )


class PreActBasicBlock(_PreActivation):
    """BN - ReLU - conv3x3 - BN - ReLU - conv3x3 - (+): the lecture's ResNet block.

    Args:
        inplanes, planes, stride: channels in and out, stride of the first convolution.
        downsample: a 1x1 convolution without BatchNorm where the shape changes, else None.
        leading: False leaves the first BN + ReLU out (first block behind a stem that has them).
        residual_scale: factor after the addition.

    Shape: x (N, inplanes, H, W) -> (N, planes, ceil(H / stride), ceil(W / stride)).
    Reference: He et al., Identity Mappings in Deep Residual Networks, 2016.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        leading: bool = True,
        stride_in_1x1: bool = False,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if stride_in_1x1:
            raise ValueError("PreActBasicBlock: stride_in_1x1: expected False (the block has no 1x1 convolution), got True")
        self.bn1 = nn.BatchNorm2d(inplanes) if leading else None
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample, self.residual_scale = downsample, residual_scale

    def pairs(self) -> list[Pair]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class PreActBottleneck(_PreActivation):
    """BN - ReLU - conv1x1 - BN - ReLU - conv3x3 - BN - ReLU - conv1x1 - (+): the lecture's bottleneck block.

    Args:
        inplanes, planes: channels in, and of the bottleneck; ``4 * planes`` leave the block.
        stride, downsample, leading, residual_scale: as in :class:`PreActBasicBlock`.
        stride_in_1x1: the stride is on the first 1x1 convolution instead of the 3x3.

    Shape: x (N, inplanes, H, W) -> (N, 4 * planes, ceil(H / stride), ceil(W / stride)).
    Reference: He et al., Identity Mappings in Deep Residual Networks, 2016.
    """

    expansion = 4
    prologue = True

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        leading: bool = True,
        stride_in_1x1: bool = False,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.bn1 = nn.BatchNorm2d(inplanes) if leading else None
        self.conv1 = conv1x1(inplanes, planes, first)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, second)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample, self.residual_scale = downsample, residual_scale

    def pairs(self) -> list[Pair]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
