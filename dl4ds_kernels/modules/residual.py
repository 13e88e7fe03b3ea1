"""Post-activation residual blocks: torchvision's attribute names and state_dict keys, fused forward and backward.

``BasicBlock``: conv3x3 - BN - act - conv3x3 - BN - (+ shortcut) - act. ``Bottleneck``: 1x1, 3x3, 1x1. The last BatchNorm, the
addition and the activation are one pass; with gradients the whole block is one autograd node (functional/residual_block.py),
which keeps convolution outputs and no activations.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..functional import add_act
from ._block import Pair, run_residual_block
from ._chain import Step, residual_steps, run_blocks, run_chain
from ._replay import replayed
from ._run import NO_ACT, ActSpec, _bn_fusable, is_plain
from .sequential import FusedSequential

Norm = Callable[[int], nn.Module]


def conv3x3(channels: int, out: int, stride: int = 1, groups: int = 1, dilation: int = 1, bias: bool = False) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(channels, out, 3, stride, dilation, dilation, groups, bias)


def conv1x1(channels: int, out: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(channels, out, 1, stride, bias=bias)


class _Residual(nn.Module):
    """What both blocks share: the shortcut and the fused end."""

    relu: nn.Module
    downsample: nn.Module | None
    residual_scale: float
    memory_efficient: bool
    keep_activations = False  # True: backward reads the activations inside instead of computing them again

    def pairs(self) -> list[Pair]:
        """The convolutions of the branch with their BatchNorms."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.residual_scale == 1.0:
            out = run_residual_block(
                x, self.pairs(), self._act(), self.downsample, memory_efficient=self.memory_efficient,
                keep_activations=self.keep_activations,
            )  # fmt: skip
            if out is not None:
                return out
        return self._run(x)

    def _act(self) -> ActSpec:
        return ActSpec("relu", 0.0, self.relu)

    def steps(self, source: int, first: int) -> tuple[Step, ...] | None:
        """The block as ``residual_steps``; None if it is more than convolutions with BatchNorm and a sum."""
        shortcut, projection = self.downsample, None
        if self.residual_scale != 1.0:
            return None
        if shortcut is not None:
            parts = tuple(shortcut._modules.values())
            if not (type(shortcut) in (nn.Sequential, FusedSequential) and is_plain(shortcut) and len(parts) == 2):
                return None
            if type(parts[0]) is not nn.Conv2d or not _bn_fusable(parts[1]):
                return None
            projection = parts
        return residual_steps(self.pairs(), self._act(), projection, source, first)

    def _run(self, x: Tensor) -> Tensor:
        """``relu(scale * (branch(x) + shortcut(x)))``; in inference on the CPU one op call, the shortcut included."""
        steps = self.steps(0, 1) if x.is_cpu else None  # elsewhere the last two convolutions may be one kernel, see _tail.py
        if steps is not None:
            return run_chain((x,), steps)
        act, scaled = self._act(), self.residual_scale != 1.0
        shortcut = x if self.downsample is None else self.downsample(x)
        inputs = (x,) if scaled or shortcut is x else (x, shortcut)
        n = len(inputs)
        steps = [Step(conv, bn, act, (0 if i == 0 else n + i - 1,)) for i, (conv, bn) in enumerate(self.pairs())]
        if scaled:
            steps[-1] = steps[-1]._replace(act=NO_ACT)
            return add_act(run_chain(inputs, tuple(steps)), shortcut, alpha=self.residual_scale, activation="relu")
        steps[-1] = steps[-1]._replace(residual=n - 1, in_place="z")  # stock adds in place
        return run_chain(inputs, tuple(steps))


class ResidualStage(nn.Sequential):
    """Residual blocks in a row; in inference on the CPU one op call, in which a block adds to its input in place.

    Args: as ``nn.Sequential``; children of other types are fine and then run one by one.
    Shape: of the blocks.
    """

    @replayed
    def forward(self, input: Tensor) -> Tensor:
        out = run_blocks(input, self._modules.values(), _steps_of)
        return super().forward(input) if out is None else out


def _steps_of(block: nn.Module, source: int, first: int) -> tuple[Step, ...] | None:
    return block.steps(source, first) if type(block) in (BasicBlock, Bottleneck) and is_plain(block) else None


class BasicBlock(_Residual):
    """Two 3x3 convolutions; a drop-in for ``torchvision.models.resnet.BasicBlock``.

    Args:
        inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer: as torchvision's.
        residual_scale: factor after the addition (``1 / sqrt(2)`` keeps the variance constant).
        memory_efficient: in training, compute the last convolution again in backward instead of keeping its output.

    Shape: x (N, inplanes, H, W) -> (N, planes, ceil(H / stride), ceil(W / stride)).
    Raises: ValueError for groups, base_width or dilation that torchvision's block refuses too.
    Reference: He et al., Deep Residual Learning for Image Recognition, 2015.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
        *,
        residual_scale: float = 1.0,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64 or dilation != 1:
            raise ValueError(
                "BasicBlock: groups, base_width, dilation: expected 1, 64 and 1 (use Bottleneck for others), "
                f"got {groups}, {base_width} and {dilation}"
            )
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride, self.residual_scale, self.memory_efficient = stride, residual_scale, memory_efficient

    def pairs(self) -> list[Pair]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class Bottleneck(_Residual):
    """1x1 (reduce), 3x3, 1x1 (expand by 4); a drop-in for ``torchvision.models.resnet.Bottleneck``.

    Args:
        inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer: as torchvision's; ``planes * 4``
            channels leave the block.
        stride_in_1x1: the stride is on the first 1x1 convolution (the 2015 paper) instead of the 3x3 (torchvision).
        residual_scale: factor after the addition.
        memory_efficient: as in :class:`BasicBlock`.

    Shape: x (N, inplanes, H, W) -> (N, 4 * planes, ceil(H / stride), ceil(W / stride)).
    Reference: He et al., Deep Residual Learning for Image Recognition, 2015.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
        *,
        stride_in_1x1: bool = False,
        residual_scale: float = 1.0,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(inplanes, width, first)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, second, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride, self.residual_scale, self.memory_efficient = stride, residual_scale, memory_efficient

    def pairs(self) -> list[Pair]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
