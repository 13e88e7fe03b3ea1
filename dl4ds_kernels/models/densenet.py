"""DenseNet-121/161/169/201 with torchvision's state_dict keys, and the CIFAR nets with and without bottlenecks.

Reference: Huang et al., Densely Connected Convolutional Networks, 2017; Pleiss et al., Memory-Efficient Implementation of
DenseNets, 2017.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..functional import global_avg_pool2d
from ..modules import FusedSequential
from ..modules._block import run_residual_block
from ..modules._chain import DenseLayerParts, Step, run_chain, run_dense_block
from ..modules._dense import DenseParts, run_dense_training
from ..modules._linear import run_linear_act
from ..modules._packed import applies
from ..modules._replay import replayed
from ..modules._run import (
    NO_ACT,
    ActSpec,
    is_plain,
    run_bn_act,
    run_conv_act,
    run_conv_bn_act,
    run_norm_act_conv_norm_act,
)
from ..modules.sequential import run_sequence
from ._init import he_fan_in
from ._registry import register

# depth: (growth, layers in each block, channels of the stem, parameters)
_NETS = {
    121: (32, (6, 12, 24, 16), 64, 7_978_856),
    161: (48, (6, 12, 36, 24), 96, 28_681_000),
    169: (32, (6, 12, 32, 32), 64, 14_149_480),
    201: (32, (6, 12, 48, 32), 64, 20_013_928),
}


class DenseLayer(nn.Module):
    """BN - ReLU - conv1x1 (bn_size * growth) - BN - ReLU - conv3x3 (growth); without the bottleneck BN - ReLU - conv3x3.

    Shape: x (N, C, H, W), the concatenation of all features so far -> (N, growth, H, W), the new ones.
    """

    def __init__(
        self, channels: int, growth: int, bn_size: int | None = 4, drop_rate: float = 0.0, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        width = channels if bn_size is None else bn_size * growth
        if bn_size is None:
            self.conv1 = nn.Conv2d(channels, growth, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)
        self.bottleneck = bn_size is not None
        self.drop_rate, self.memory_efficient = float(drop_rate), memory_efficient

    def parts(self) -> DenseLayerParts:
        """The modules of a layer with a bottleneck."""
        relu1, relu2 = ActSpec("relu", 0.0, self.relu1), ActSpec("relu", 0.0, self.relu2)
        return DenseLayerParts(self.norm1, relu1, self.conv1, self.norm2, relu2, self.conv2)

    def steps(self) -> DenseParts:
        """The layer's BatchNorms, activations and convolutions in order."""
        first = (self.norm1, ActSpec("relu", 0.0, self.relu1), self.conv1)
        return [first, (self.norm2, ActSpec("relu", 0.0, self.relu2), self.conv2)] if self.bottleneck else [first]

    def forward(self, x: Tensor) -> Tensor:
        pairs = [(self.conv1, self.norm1), (self.conv2, self.norm2)] if self.bottleneck else [(self.conv1, self.norm1)]
        z = None
        if not self.bottleneck or is_plain(self.relu2):
            z = run_residual_block(x, pairs, ActSpec("relu", 0.0, self.relu1), None, preact=True, add=False)
        if z is None:
            z = self._layers(x)
        return F.dropout(z, self.drop_rate, self.training) if self.drop_rate else z

    def _layers(self, x: Tensor) -> Tensor:
        if self.bottleneck:
            z = run_norm_act_conv_norm_act(x, *self.parts()[:5], None)
            if z is not None:
                return run_conv_act(z, self.conv2)
        z = run_bn_act(x, self.norm1, ActSpec("relu", 0.0, self.relu1))
        if self.bottleneck:
            return run_conv_act(run_conv_bn_act(z, self.conv1, self.norm2, ActSpec("relu", 0.0, self.relu2)), self.conv2)
        return run_conv_act(z, self.conv1)


class DenseBlock(nn.ModuleDict):
    """Layers that each see every feature before them.

    In inference nothing is concatenated layer by layer: on the CPU every bottleneck reads its inputs where they lie and the
    block is one op call; elsewhere all features lie in one buffer, of which a layer's BatchNorm reads the first channels and
    behind which its output is written. In training on the CPU in channels_last the block is one autograd node over such a
    buffer (``functional.dense_block``): it keeps the buffer and the first convolutions' outputs; ``memory_efficient`` then
    keeps the buffer alone. Elsewhere (NCHW, CUDA, dropout, hooks) every layer concatenates and keeps the concatenation and
    its first convolution's output; ``memory_efficient`` then keeps only the layers' outputs and computes each layer again in
    backward. Running statistics see a batch once (torchvision's see it twice in its ``memory_efficient``).

    Shape: x (N, C, H, W) -> (N, C + layers * growth, H, W).
    """

    def __init__(
        self, layers: int, channels: int, growth: int, bn_size: int | None, drop_rate: float, memory_efficient: bool
    ) -> None:
        super().__init__()
        for i in range(layers):
            self[f"denselayer{i + 1}"] = DenseLayer(channels + i * growth, growth, bn_size, drop_rate, memory_efficient)
        self.growth, self.memory_efficient = growth, memory_efficient

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._in_inference(x)
        layers = list(self.values())
        if torch.is_grad_enabled() and all(is_plain(layer) and not (layer.drop_rate and layer.training) for layer in layers):
            out = run_dense_training(x, [layer.steps() for layer in layers], memory_efficient=self.memory_efficient)
            if out is not None:
                return out
        features = [x]
        for layer in self.values():
            if self.memory_efficient and torch.is_grad_enabled() and any(f.requires_grad for f in features):
                new = checkpoint(
                    _concatenate_and_run, layer, *features, use_reentrant=False,
                    context_fn=lambda layer=layer: (nullcontext(), _without_tracking(layer)),
                )  # fmt: skip
            else:
                new = layer(torch.cat(features, 1))
            features.append(new)
        return torch.cat(features, 1)

    @replayed
    def _in_inference(self, x: Tensor) -> Tensor:
        layers = list(self.values())
        whole = x.shape[1] % 16 == 0 and self.growth % 16 == 0  # the kernel reads 16 channels of one input at a time
        one_call = whole and not self.training and all(layer.bottleneck and is_plain(layer) for layer in layers)
        if one_call and applies(x, layers[0].conv1, None):
            return run_dense_block(x, [layer.parts() for layer in layers])
        return self._into_buffer(x)

    def _into_buffer(self, x: Tensor) -> Tensor:
        n, channels, *size = x.shape
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        buffer = torch.empty(
            (n, channels + self.growth * len(self), *size), dtype=x.dtype, device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )  # fmt: skip
        buffer[:, :channels] = x
        for layer in self.values():
            new = layer(buffer[:, :channels])
            if new.dtype != buffer.dtype:  # under autocast; torch.cat promotes too
                buffer = buffer.to(torch.promote_types(buffer.dtype, new.dtype))
            buffer[:, channels : channels + self.growth] = new
            channels += self.growth
        return buffer


@contextmanager
def _without_tracking(layer: nn.Module) -> Iterator[None]:
    """While a layer is computed for the second time, copies of its running statistics see the batch again, not they."""
    norms = [m for m in layer.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: b.clone() for name, b in norm._buffers.items() if b is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def _concatenate_and_run(layer: nn.Module, *features: Tensor) -> Tensor:
    return layer(torch.cat(features, 1))


class Transition(FusedSequential):
    """BN - ReLU - 1x1 convolution - 2x2 average; in inference on the CPU the average, being linear too, comes first.

    Shape: x (N, C, H, W) -> (N, C_out, H // 2, W // 2).
    """

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        if [*self._modules] != ["norm", "relu", "conv", "pool"] or self.training:
            return super().forward(x)
        before = (self.norm, ActSpec("relu", 0.0, self.relu))
        return run_chain((x,), (Step(self.conv, None, NO_ACT, (0,), before=before, pool=self.pool),))


def _transition(channels: int, out: int) -> Transition:
    return Transition(
        OrderedDict(
            norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(channels, out, 1, bias=False),
            pool=nn.AvgPool2d(2, 2),
        )
    )


class DenseNet(nn.Module):
    """Dense blocks with transitions (1x1 convolution, 2x2 average) between them; attribute names as torchvision's.

    Args:
        growth_rate: channels that each layer adds. block_config: layers in each block. num_init_features: of the stem.
        bn_size: width of the 1x1 bottleneck in growth rates; None: no bottleneck.
        compression: share of the channels that a transition keeps.
        drop_rate: dropout behind each layer. num_classes: logits. memory_efficient: see :class:`DenseBlock`.
        small: the CIFAR stem, one 3x3 convolution without normalisation and pooling.

    Shape: x (N, 3, H, W), in the paper 224 (32 with ``small``) -> logits (N, num_classes).
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        *,
        bn_size: int | None = 4,
        compression: float = 0.5,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        small: bool = False,
    ) -> None:
        super().__init__()
        channels = num_init_features
        stem: list[tuple[str, nn.Module]] = [("conv0", nn.Conv2d(3, channels, 3, padding=1, bias=False))]
        if not small:
            stem = [
                ("conv0", nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)),
                ("norm0", nn.BatchNorm2d(channels)),
                ("relu0", nn.ReLU(inplace=True)),
                ("pool0", nn.MaxPool2d(3, stride=2, padding=1)),
            ]
        self.features = FusedSequential(OrderedDict(stem))
        for i, layers in enumerate(block_config):
            block = DenseBlock(layers, channels, growth_rate, bn_size, drop_rate, memory_efficient)
            self.features.add_module(f"denseblock{i + 1}", block)
            channels += layers * growth_rate
            if i + 1 < len(block_config):
                out = int(channels * compression)
                self.features.add_module(f"transition{i + 1}", _transition(channels, out))
                channels = out
        self.features.add_module(f"norm{len(block_config) + 1}", nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(channels, num_classes)
        he_fan_in(self)
        nn.init.zeros_(self.classifier.bias)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        # The last BatchNorm and its ReLU are one pass, unless somebody looks at what comes between them.
        plain = is_plain(self.features)
        x = run_sequence([*self.features.children(), self.relu], x) if plain else self.relu(self.features(x))
        return run_linear_act(torch.flatten(global_avg_pool2d(x), 1), self.classifier)


def _builder(depth: int) -> Callable[..., DenseNet]:
    growth, layers, stem, parameters = _NETS[depth]

    def build(num_classes: int = 1000, **options: Any) -> DenseNet:
        return DenseNet(growth, layers, stem, num_classes=num_classes, **options)

    name = f"densenet{depth}"
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"DenseNet-{depth}; options as :class:`DenseNet`."
    return register(name, "densenet", parameters, (3, 224, 224), f"torchvision {name}")(build)


def cifar_densenet(depth: int, growth_rate: int, num_classes: int = 10, *, bc: bool = True, **options: Any) -> DenseNet:
    """The paper's CIFAR nets: three blocks, a 3x3 stem; ``bc``: bottlenecks and compression 0.5, stem of 2 growth rates.

    Raises: ValueError unless ``depth - 4`` divides by 6 (``bc``) or 3.
    """
    step = 6 if bc else 3
    if depth <= 4 or (depth - 4) % step:
        raise ValueError(f"cifar_densenet: depth: expected 4 + {step}n, got {depth}")
    layers, stem = ((depth - 4) // step,) * 3, 2 * growth_rate if bc else 16
    return DenseNet(
        growth_rate, layers, stem, bn_size=4 if bc else None, compression=0.5 if bc else 1.0, num_classes=num_classes,
        small=True, **options,
    )  # fmt: skip


def _cifar_builder(depth: int, growth: int, bc: bool, parameters: int) -> Callable[..., DenseNet]:
    def build(num_classes: int = 10, **options: Any) -> DenseNet:
        return cifar_densenet(depth, growth, num_classes, bc=bc, **options)

    name = f"cifar_densenet{depth}_k{growth}" + ("_bc" if bc else "")
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"CIFAR DenseNet{'-BC' if bc else ''} (L={depth}, k={growth}); options as :class:`DenseNet`."
    source = f"pytorchcv {name.removeprefix('cifar_')}_cifar10" if bc else f"paper ({parameters / 1e6:.1f}M)"
    return register(name, "densenet", parameters, (3, 32, 32), source)(build)


densenet121, densenet161, densenet169, densenet201 = (_builder(depth) for depth in _NETS)
cifar_densenet40_k12 = _cifar_builder(40, 12, False, 1_019_722)
cifar_densenet100_k12 = _cifar_builder(100, 12, False, 6_979_642)
cifar_densenet100_k24 = _cifar_builder(100, 24, False, 27_249_082)
cifar_densenet100_k12_bc = _cifar_builder(100, 12, True, 769_162)
cifar_densenet250_k24_bc = _cifar_builder(250, 24, True, 15_324_406)
cifar_densenet190_k40_bc = _cifar_builder(190, 40, True, 25_624_430)
