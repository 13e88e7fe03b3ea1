"""The backward pass of ``dense_block`` (dense_block.py), and what its forward pass shares with it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dense, _dense_layer
from ._block_code import Block, Conv, Norm, decode
from ._block_gradient import Gradient
from ._conv2d import convolve_back

Tensors = list[Tensor]


class Layer(NamedTuple):
    """One layer: channels that it reads, that it makes, and its convolutions, each with the BatchNorm before it."""

    channels: int
    new: int
    convs: tuple[Conv, ...]


def layers_of(x: Tensor, convs: Tensors, block: Block, per_layer: int) -> tuple[list[Layer], int]:
    """The layers and the channels of the output."""
    channels, found = x.shape[1], []
    for start in range(0, len(block.convs), per_layer):
        own = block.convs[start : start + per_layer]
        found.append(Layer(channels, convs[own[-1].weight].shape[0], own))
        channels += found[-1].new
    return found, channels


class _Pass(Gradient):
    """The backward pass over the buffers. ``total``: the gradient, of all that layers have added so far."""

    def __init__(self, dout: Tensor, out: Tensor, statistics: Tensors, *args: Any) -> None:
        super().__init__(*args)
        self.out, self.total = out, dout  # dout is somebody else's: the first layer's sum goes to a buffer of our own
        self.mean, self.var = statistics[:2]
        self.linear = tuple(torch.zeros(out.shape[1], dtype=torch.float64, device=out.device) for _ in range(2))
        self.buffer: Tensor | None = None

    def vectors_of(self, norm: Norm, channels: int) -> tuple[Any, ...]:
        return (*self.vectors(norm), self.mean[:channels], self.var[:channels])

    def scalars(self, norm: Norm) -> tuple[Any, ...]:
        return norm.eps, norm.eps_std, self.block.activation, self.block.negative_slope

    def input_of(self, layer: Layer) -> Tensor:
        """``act(bn(features))``, computed again."""
        norm = layer.convs[0].norm
        features = self.out[:, : layer.channels]
        return _dense.normalise(self.namespace, features, *self.vectors_of(norm, layer.channels), *self.scalars(norm))

    def gradient_of(self, start: int, stop: int) -> Tensor:
        """The gradient of these channels, dense; no layer adds to it any more."""
        if self.buffer is None:
            return self.total[:, start:stop].contiguous(memory_format=torch.channels_last)
        factor, offset = (v[start:stop] for v in self.linear)
        return _dense.take(
            self.namespace, self.total[:, start:stop], self.out[:, start:stop], self.mean[start:stop], (factor, offset)
        )  # fmt: skip

    def add(self, dz: Tensor, layer: Layer, activate: bool) -> None:
        """Through the layer's first BatchNorm; ``activate``: dz becomes the convolution's input."""
        channels, norm = layer.channels, layer.convs[0].norm
        buffer = self.own_buffer(channels)
        grads = _dense.back(
            self.namespace, dz, self.out[:, :channels], *self.vectors_of(norm, channels), self.total[:, :channels],
            buffer[:, :channels], tuple(v[:channels] for v in self.linear), *self.scalars(norm), activate,
        )  # fmt: skip
        self.total = buffer
        self._note(norm, *grads)

    def own_buffer(self, channels: int) -> Tensor:
        """Where the sum goes: the first layer, whose channels are the most, makes it."""
        if self.buffer is None:
            self.buffer = _dense.empty(self.namespace, self.out, channels)
        return self.buffer

    def needed(self, layers: list[Layer]) -> Iterator[tuple[bool, bool]]:
        """For each layer: whether anything before it needs a gradient, whether anything in it does."""
        before = self.needs[0]
        for layer in layers:
            places = [1 + p for conv in layer.convs for p in (conv.weight, conv.bias) if p >= 0]
            places += [p for conv in layer.convs for p in self._places(conv.norm) if p >= 0]
            own = any(self.needs[p] for p in places)
            yield before, own
            before = before or own

    def norm_needs(self, norm: Norm) -> bool:
        return any(place >= 0 and self.needs[place] for place in self._places(norm))

    def conv_needs(self, conv: Conv) -> bool:
        return self.needs[1 + conv.weight] or (conv.bias >= 0 and self.needs[1 + conv.bias])

    def whole(self, layer: Layer, before: bool, keep: int) -> _dense_layer.LayerCall | None:
        """The layer's part in a call of whole_layers_back; None if it goes step by step."""
        if keep != 1 or len(layer.convs) != 2:
            return None
        first, last = layer.convs
        wanted = self.conv_needs(first) and self.conv_needs(last) and self.norm_needs(last.norm)
        if not (wanted and (before or self.norm_needs(first.norm))):
            return None
        return _dense_layer.prepare(self, layer.channels, layer.new, layer.convs, self.out)

    def whole_layers_back(
        self, layers: list[Layer], calls: list[_dense_layer.LayerCall], ys: Tensors, inner: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Layers in a row, the last one first, in one call."""
        buffer = self.own_buffer(layers[0].channels)
        found = _dense_layer.backward(
            self.namespace, calls, self.total, buffer, self.linear, self.out, self.mean, self.var, ys, inner
        )
        for layer, grads in zip(layers, found, strict=True):
            for conv, (dweight, dbias, dconv) in zip(layer.convs, (grads[:3], grads[3:]), strict=True):
                self._note(conv.norm, dweight, dbias)
                self.grads[1 + conv.weight] = dconv
        self.total = buffer

    def layer_back(self, layer: Layer, held: Tensors, mean: Tensor | None, rstd: Tensor | None, before: bool) -> None:
        """One layer: from the gradient of its slice to what it adds to that of all before."""
        first, norm = layer.convs[0], layer.convs[0].norm
        need_features = before or self.norm_needs(norm)
        dy = self.gradient_of(layer.channels, layer.channels + layer.new)
        z = None  # the first convolution's input
        if len(layer.convs) == 2:
            last = layer.convs[1]
            self.statistics[last.norm.index] = (mean, rstd)
            if held:
                y = held[0]
            else:
                z = self.input_of(layer)
                y = self.convolve(z, first)
            need_y = need_features or self.conv_needs(first)
            need_inner = need_y or self.norm_needs(last.norm)
            inner = held[1] if len(held) == 2 else self.again(y, last.norm, self.block.activation)
            dy = self.convolve_back(dy, inner, last, need_inner)
            del inner
            if need_inner:
                dy, _ = self.normalise(dy, y, last.norm, self.block.activation, None, None, need_y, False)
            if not need_y:
                return
            held.clear()
            del y
        need_weight = self.conv_needs(first)
        weight = self._convs[first.weight]
        # The gradient of a 1x1 convolution's input does not read that input, which can so be made on the way.
        later = (
            z is None
            and need_features
            and need_weight
            and _is_pointwise(weight, first)
            and _dense.has_steps(self.namespace, dy)
        )
        if later:
            sizes = (dy.shape[0], layer.channels, *dy.shape[2:])
            unread = torch.empty(sizes, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
            dz = convolve_back(dy, unread, weight, first.bias >= 0, first.geometry, (True, False, False))[0]
            del unread
            self.add(dz, layer, True)
            self.convolve_back(dy, dz, first, False)
            return
        if z is None:
            z = self.input_of(layer)
        dz = self.convolve_back(dy, z, first, need_features)
        del z
        if need_features:
            self.add(dz, layer, False)


def _is_pointwise(weight: Tensor, conv: Conv) -> bool:
    return tuple(weight.shape[2:]) == (1, 1) and conv.groups == 1


def gradients(
    namespace: str,
    dout: Tensor,
    out: Tensor,
    convs: Tensors,
    norms: Tensors,
    kept: Tensors,
    statistics: Tensors,
    code: list[int],
    numbers: list[float],
    per_layer: int,
    keep: int,
    channels: int,
    needs: list[bool],
) -> Tensors:
    """The gradients that are needed of x, convs and norms, in this order. ``channels``: of x."""
    block = decode(code, numbers)
    x = out[:, :channels]
    layers, _ = layers_of(x, convs, block, per_layer)
    dout = dout.contiguous(memory_format=torch.channels_last)
    g = _Pass(dout, out, statistics, needs, [], namespace, x, convs, norms, [], block, True)
    outputs = [kept[i * keep : (i + 1) * keep] if per_layer == 2 else [] for i in range(len(layers))]
    inner = list(zip(statistics[2::2], statistics[3::2], strict=True))
    wanted = list(g.needed(layers))
    calls = [g.whole(layer, before, keep) for layer, (before, _) in zip(layers, wanted, strict=True)]
    for is_whole, group in groupby(reversed(range(len(layers))), key=lambda place: calls[place] is not None):
        places = list(group)
        if is_whole:
            ys = [outputs[p][0] for p in places]
            g.whole_layers_back([layers[p] for p in places], [calls[p] for p in places], ys, [inner[p] for p in places])
            continue
        for p in places:
            if any(wanted[p]):
                g.layer_back(layers[p], outputs[p], *(inner[p] if inner else (None, None)), wanted[p][0])
    if needs[0]:
        g.grads[0] = g.gradient_of(0, channels)
    for place, weight in enumerate(convs, 1):
        if needs[place]:
            g.grads[place] = _laid_out_like(g.grads[place], weight)
    return [g.grads[place] for place, need in enumerate(needs) if need]


def _laid_out_like(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient with the weight's strides, which autograd would copy it to anyway; the library has its own."""
    pairs = zip(weight.shape, grad.stride(), weight.stride(), strict=True)
    return grad if all(n == 1 or a == b for n, a, b in pairs) else torch.empty_like(weight).copy_(grad)
