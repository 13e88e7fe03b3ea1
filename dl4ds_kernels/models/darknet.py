"""Networks from darknet's ``.cfg`` descriptions, as far as YOLOv1 and darknet's classifiers of its time need them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..detection.cfg import CfgError, Section, parse_cfg, read_cfg
from ..detection.weights import WeightsHeader, WeightSlot, load_weights, save_weights
from ..detection.yolo import YoloLayout
from ..functional import max_pool2d
from ..modules import BNAct2d, ConvBNAct2d, FusedSequential, LocallyConnected2d
from ..modules._replay import replayed
from ..modules.darknet_norm import DarknetBatchNorm2d, DarknetConvBNAct2d

# How darknet's two implementations and OpenCV's importer keep the standard deviation from zero.
BN_CONVENTIONS = {"cpu": ("std", 1e-6), "gpu": ("var", 1e-5), "opencv": ("var", 1e-6)}
_ACTIVATIONS = {"leaky": "leaky_relu", "relu": "relu", "linear": "none"}
_SLOPE = 0.1
_MOMENTUM = 0.01


class DarknetMaxPool(nn.Module):
    """Darknet's pooling: ``padding`` pixels in all (default ``size - 1``), half of them, rounded down, on the left and above.

    Shape: x (N, C, H, W) -> (N, C, (H + padding - size) // stride + 1, likewise).
    """

    def __init__(self, size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.size, self.stride, self.padding = size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        before = self.padding // 2
        if before or any((s + self.padding - self.size) // self.stride * self.stride + self.size > s for s in x.shape[2:]):
            after = self.padding - before
            x = F.pad(x, (before, after, before, after), value=-math.inf)
        return max_pool2d(x, self.size, self.stride)

    def extra_repr(self) -> str:
        return f"{self.size}, stride={self.stride}, padding={self.padding}"


class DarknetCrop(nn.Module):
    """The centre (H, W) of the input, scaled from [0, 1] to [-1, 1] unless ``noadjust``; darknet's training crops are random.

    Shape: x (N, C, H0, W0) -> (N, C, H, W).
    """

    def __init__(self, height: int, width: int, noadjust: bool) -> None:
        super().__init__()
        self.height, self.width, self.noadjust = height, width, noadjust

    def forward(self, x: Tensor) -> Tensor:
        top, left = (x.shape[2] - self.height) // 2, (x.shape[3] - self.width) // 2
        x = x[:, :, top : top + self.height, left : left + self.width]
        return x if self.noadjust else x * 2 - 1


class DarknetNet(nn.Module):
    """A network built from the sections of a ``.cfg``.

    Args:
        sections: from :func:`dl4ds_kernels.detection.parse_cfg`.
        bn: whose BatchNorm: "cpu" divides by ``sqrt(var) + 1e-6``, "gpu" by ``sqrt(var + 1e-5)``, "opencv" by
            ``sqrt(var + 1e-6)``. They differ visibly where a channel's variance is tiny. In training "cpu" and "gpu"
            normalise by the unbiased variance of the batch, as darknet does, "opencv" (which never trains) by the biased one.

    Attributes: ``input_size`` (C, H, W); ``layout``, the :class:`~dl4ds_kernels.detection.YoloLayout` of a ``[detection]``
    section, else None.
    Shape: x (N, C, H, W), RGB in [0, 1], squashed to H x W -> what the last layer gives; (N, outputs) for a connected layer.
    Raises: CfgError for a layer, option or size that it cannot build; RuntimeError for an input of another shape.
    """

    def __init__(self, sections: Sequence[Section], *, bn: str = "cpu") -> None:
        super().__init__()
        if bn not in BN_CONVENTIONS:
            raise ValueError(f"DarknetNet: bn: expected one of {', '.join(BN_CONVENTIONS)}, got {bn!r}")
        net, *rest = sections
        self.input_size = tuple(net.integer(key) for key in ("channels", "height", "width"))
        self.bn_convention = bn
        self.layers, self.kinds = nn.ModuleList(), []
        self.layout: YoloLayout | None = None
        shape: tuple[int, ...] = self.input_size
        for section in rest:
            if section.type == "detection":
                self.layout = _layout(section, shape)
                continue
            if self.layout is not None:
                raise CfgError(f"cfg: [{section.type}] of line {section.line}: expected nothing behind [detection]")
            layer = getattr(self, f"_{section.type}", None)
            if layer is None:
                raise CfgError(f"cfg: [{section.type}] of line {section.line}: expected a layer, got a second [net]")
            if len(shape) != 3 and section.type not in ("connected", "dropout", "softmax"):
                raise CfgError(f"cfg: [{section.type}] of line {section.line}: expected maps (C, H, W) as input, got {shape}")
            module, shape = layer(section, shape)
            if min(shape) < 1:
                raise CfgError(
                    f"cfg: [{section.type}] of line {section.line}: expected an output of at least 1 x 1, got {shape}"
                )
            self.layers.append(module)
            self.kinds.append(section.type)
        self.output_shape = shape

    @classmethod
    def from_text(cls, text: str, *, bn: str = "cpu") -> DarknetNet:
        """From the text of a description."""
        return cls(parse_cfg(text), bn=bn)

    @classmethod
    def from_file(cls, path: str | Path, *, bn: str = "cpu") -> DarknetNet:
        """From a ``.cfg`` file."""
        return cls(read_cfg(path), bn=bn)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.input_size:
            raise RuntimeError(
                f"DarknetNet: x: expected shape (N, {', '.join(map(str, self.input_size))}), got {tuple(x.shape)}"
            )
        for layer in self.layers:
            x = layer(x)
        return x

    def _bn_options(self) -> dict[str, object]:
        mode, eps = BN_CONVENTIONS[self.bn_convention]
        return {"eps": eps, "eps_mode": mode, "momentum": _MOMENTUM}

    def _convolutional(self, s: Section, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        filters, size, stride = s.integer("filters", 1), s.integer("size", 1), s.integer("stride", 1)
        padding = size // 2 if s.integer("pad", 0) else s.integer("padding", 0)
        groups, activation = s.integer("groups", 1), _activation(s, "logistic")
        _positive(s, filters=filters, size=size, stride=stride, groups=groups)
        if shape[0] % groups or filters % groups:
            raise CfgError(
                f"cfg: [convolutional] of line {s.line}: groups: expected a divisor of {shape[0]} and {filters}, got {groups}"
            )
        geometry = (shape[0], filters, size, stride, padding, 1, groups)
        if s.integer("batch_normalize", 0):
            kind = ConvBNAct2d if self.bn_convention == "opencv" else DarknetConvBNAct2d
            layer: nn.Module = kind(*geometry, activation=activation, negative_slope=_SLOPE, **self._bn_options())
        else:
            layer = FusedSequential(nn.Conv2d(*geometry), *_act(activation))
        return layer, (filters, *((d + 2 * padding - size) // stride + 1 for d in shape[1:]))

    def _local(self, s: Section, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        filters, size, stride = s.integer("filters", 1), s.integer("size", 1), s.integer("stride", 1)
        padding = size // 2 if s.integer("pad", 0) else 0
        _positive(s, filters=filters, size=size, stride=stride)
        local = LocallyConnected2d(shape[0], filters, size, shape[1:], stride, padding)
        return nn.Sequential(local, *_act(_activation(s, "logistic"))), (filters, *local.output_size)

    def _connected(self, s: Section, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        outputs = s.integer("output", 1)
        _positive(s, output=outputs)
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(math.prod(shape), outputs)]
        if s.integer("batch_normalize", 0):
            raise CfgError(f"cfg: [connected] of line {s.line}: batch_normalize: expected 0 (not supported here), got 1")
        return FusedSequential(*layers, *_act(_activation(s, "logistic"))), (outputs,)

    def _maxpool(self, s: Section, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        stride = s.integer("stride", 1)
        size = s.integer("size", stride)
        padding = s.integer("padding", size - 1)
        _positive(s, size=size, stride=stride)
        return DarknetMaxPool(size, stride, padding), (shape[0], *((d + padding - size) // stride + 1 for d in shape[1:]))

    def _avgpool(self, s: Section, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        return FusedSequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (shape[0],)

    def _dropout(self, s: Section, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        return nn.Dropout(s.number("probability", 0.2)), shape

    def _batchnorm(self, s: Section, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        if self.bn_convention == "opencv":
            return BNAct2d(shape[0], activation="none", **self._bn_options()), shape
        return DarknetBatchNorm2d(shape[0], **self._bn_options()), shape

    def _crop(self, s: Section, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        height, width = s.integer("crop_height", 1), s.integer("crop_width", 1)
        if not (0 < height <= shape[1] and 0 < width <= shape[2]):
            raise CfgError(f"cfg: [crop] of line {s.line}: expected a size within {shape[1:]}, got {(height, width)}")
        return DarknetCrop(height, width, bool(s.integer("noadjust", 0))), (shape[0], height, width)

    def _softmax(self, s: Section, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
        if s.integer("groups", 1) != 1:
            raise CfgError(f"cfg: [softmax] of line {s.line}: groups: expected 1, got {s.integer('groups', 1)}")
        return nn.Sequential(nn.Flatten(), nn.Softmax(1)), (math.prod(shape),)

    def weight_slots(self) -> list[WeightSlot]:
        """The values of a ``.weights`` file in their order, as views of this network's tensors."""
        slots: list[WeightSlot] = []
        for i, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            name = f"layer {i} [{kind}]"
            if kind == "connected":
                linear = layer[1]
                slots += [WeightSlot(f"{name} biases", linear.bias), WeightSlot(f"{name} weights", linear.weight, True)]
            elif kind == "local":
                slots += [WeightSlot(f"{name} biases", layer[0].bias), WeightSlot(f"{name} weights", layer[0].weight)]
            elif kind == "batchnorm":
                slots += _bn_slots(name, layer)
            elif kind == "convolutional" and isinstance(layer, ConvBNAct2d):
                slots.append(WeightSlot(f"{name} biases", layer.bn.bias))
                slots += _bn_slots(name, layer.bn)
                slots.append(WeightSlot(f"{name} weights", layer.conv.weight))
            elif kind == "convolutional":
                slots += [WeightSlot(f"{name} biases", layer[0].bias), WeightSlot(f"{name} weights", layer[0].weight)]
        return slots

    def load_weights(self, path: str | Path, *, allow_shorter: bool = False) -> WeightsHeader:
        """Read a ``.weights`` file; see :func:`dl4ds_kernels.detection.load_weights`."""
        return load_weights(path, self.weight_slots(), allow_shorter=allow_shorter)

    def save_weights(self, path: str | Path, header: WeightsHeader | None = None) -> None:
        """Write a ``.weights`` file; see :func:`dl4ds_kernels.detection.save_weights`."""
        save_weights(path, self.weight_slots(), header)


def _bn_slots(name: str, bn: nn.Module) -> list[WeightSlot]:
    tensors = (("scales", bn.weight), ("rolling mean", bn.running_mean), ("rolling variance", bn.running_var))
    return [WeightSlot(f"{name} {what}", tensor) for what, tensor in tensors]


def _activation(s: Section, default: str) -> str:
    name = s.text("activation", default)
    if name not in _ACTIVATIONS:
        raise CfgError(f"cfg: [{s.type}] of line {s.line}: activation: expected {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def _act(name: str) -> list[nn.Module]:
    return {"leaky_relu": [nn.LeakyReLU(_SLOPE, inplace=True)], "relu": [nn.ReLU(inplace=True)], "none": []}[name]


def _positive(s: Section, **values: int) -> None:
    for key, value in values.items():
        if value < 1:
            raise CfgError(f"cfg: [{s.type}] of line {s.line}: {key}: expected 1 or more, got {value}")


def _layout(s: Section, shape: tuple[int, ...]) -> YoloLayout:
    coords, softmax = s.integer("coords", 1), s.integer("softmax", 0)
    if coords != 4 or softmax:
        raise CfgError(f"cfg: [detection] of line {s.line}: expected coords=4 and softmax=0, got {coords} and {softmax}")
    layout = YoloLayout(s.integer("side", 7), s.integer("num", 1), s.integer("classes", 1), bool(s.integer("sqrt", 0)))
    if math.prod(shape) != layout.outputs:
        raise CfgError(
            f"cfg: [detection] of line {s.line}: expected {layout.outputs} inputs for {layout}, got {math.prod(shape)}"
        )
    return layout


def darknet_input(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Squash an image (C, H, W), float in [0, 1], to (1, C, *size) as darknet does (bilinear, corners on corners)."""
    if image.dim() != 3 or not torch.is_floating_point(image):
        raise RuntimeError(f"darknet_input: image: expected a float tensor (C, H, W), got {tuple(image.shape)} {image.dtype}")
    return F.interpolate(image.unsqueeze(0), size=size, mode="bilinear", align_corners=True)
