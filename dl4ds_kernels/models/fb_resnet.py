"""fb.resnet.torch's networks (``resnet.lua``, ``preresnet.lua``) as state_dicts of ``resnet*`` and ``preact_resnet*``.

    state = fb_state_dict(load_t7("resnet-50.t7"))
    model = models.resnet50(); model.load_state_dict(state)

The Lua network is a Sequential of stem, four stages and a linear layer; a block is a ConcatTable of branch and shortcut and a
CAddTable, with a ReLU behind it in the post-activation nets. Layers are named by their place, so any depth and width works, and
a network of another form is an error rather than a wrong guess.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .torch7 import T7Object

_CONV = ("SpatialConvolution", "SpatialConvolutionMM")
_NORM = ("SpatialBatchNormalization",)


def fb_state_dict(network: T7Object) -> dict[str, Tensor]:
    """Names and tensors (fp32) for this package's model of the same depth.

    Args: network: what :func:`~dl4ds_kernels.models.torch7.load_t7` gives for a checkpoint of a model: an ``nn.Sequential``, or
        ``nn.DataParallelTable`` around one.
    Raises: ValueError for a network of another form, naming the place.
    """
    if isinstance(network, T7Object) and _kind(network) == "DataParallelTable":
        network = _children(network)[0]
    if not isinstance(network, T7Object) or _kind(network) != "Sequential":
        found = getattr(network, "name", type(network).__name__)
        raise ValueError(f"fb_state_dict: network: expected an nn.Sequential, got {found}")
    state: dict[str, Tensor] = {}
    stage, convolutions, blocks_seen = 0, 0, False
    for child in _children(network):
        kind = _kind(child)
        if kind == "Sequential" and any(_kind(m) == "ConcatTable" for m in _walk(child)):
            stage, blocks_seen = stage + 1, True
            for number, block in enumerate(_blocks(child)):
                state |= {f"layer{stage}.{number}.{name}": t for name, t in _block(block, f"layer{stage}.{number}").items()}
        elif kind in _CONV and not blocks_seen:
            convolutions += 1
            state |= _conv(child, "conv1")
        elif kind in _NORM:
            state |= _norm(child, "norm" if blocks_seen else "bn1")
        elif kind == "Linear":
            state |= {"fc.weight": _tensor(child, "weight"), "fc.bias": _tensor(child, "bias")}
        elif list(_parameters(child)):
            raise ValueError(f"fb_state_dict: network: expected stem, stages and a linear layer, got {child.name} at the top")
    if convolutions != 1 or not stage or "fc.weight" not in state:
        raise ValueError(
            f"fb_state_dict: network: expected one stem convolution, stages and a linear layer, got {convolutions} "
            f"convolutions and {stage} stages"
        )
    return state


def _blocks(stage: T7Object) -> list[T7Object]:
    """The blocks of a stage: its Sequential children with a ConcatTable inside."""
    found = [m for m in _children(stage) if _kind(m) == "Sequential" and any(_kind(c) == "ConcatTable" for c in _children(m))]
    return found or [stage]


def _block(block: T7Object, where: str) -> dict[str, Tensor]:
    children = _children(block)
    tables = [m for m in children if _kind(m) == "ConcatTable"]
    if len(tables) != 1 or len(_children(tables[0])) != 2:
        raise ValueError(f"fb_state_dict: {where}: expected one ConcatTable of branch and shortcut, got {len(tables)}")
    place = children.index(tables[0])
    post = any(_kind(m) == "ReLU" for m in children[place:])
    branch, shortcut = _children(tables[0])
    if _kind(branch) != "Sequential":
        branch, shortcut = shortcut, branch
    state: dict[str, Tensor] = {}
    convolutions = 0
    for layer in [*children[:place], *_walk(branch)]:
        if _kind(layer) in _CONV:
            convolutions += 1
            state |= _conv(layer, f"conv{convolutions}")
        elif _kind(layer) in _NORM:  # of the convolution before it, or of the one that follows
            state |= _norm(layer, f"bn{convolutions + (not post)}")
    for layer in _walk(shortcut):
        if _kind(layer) in _CONV:
            state |= _conv(layer, "downsample.0" if post else "downsample")
        elif _kind(layer) in _NORM:
            if not post:
                raise ValueError(f"fb_state_dict: {where}: expected a shortcut without BatchNorm in a pre-activation block")
            state |= _norm(layer, "downsample.1")
    return state


def _kind(module: T7Object) -> str:
    return module.name.rpartition(".")[2]


def _children(module: T7Object) -> list[T7Object]:
    listed = module.get("modules", [])
    return [m for m in (listed if isinstance(listed, list) else listed.values()) if isinstance(m, T7Object)]


def _walk(module: T7Object) -> Iterator[T7Object]:
    """The module and everything below it, in order."""
    yield module
    for child in _children(module):
        yield from _walk(child)


def _parameters(module: T7Object) -> Iterator[Tensor]:
    for part in _walk(module):
        yield from (part.get(name) for name in ("weight", "bias") if isinstance(part.get(name), Tensor))


def _tensor(module: T7Object, name: str) -> Tensor:
    value = module.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"fb_state_dict: {module.name}: {name}: expected a tensor, got {type(value).__name__}")
    return value.to(torch.float32).clone()


def _conv(module: T7Object, name: str) -> dict[str, Tensor]:
    weight = _tensor(module, "weight")
    if weight.dim() != 4:  # SpatialConvolutionMM keeps a matrix
        sizes = [module.get(key) for key in ("nOutputPlane", "nInputPlane", "kH", "kW")]
        if not all(isinstance(s, int) for s in sizes):
            raise ValueError(f"fb_state_dict: {name}: expected nOutputPlane, nInputPlane, kH and kW, got {sizes}")
        weight = weight.reshape(sizes)
    state = {f"{name}.weight": weight}
    if isinstance(module.get("bias"), Tensor) and module.get("bias").numel():
        state[f"{name}.bias"] = _tensor(module, "bias")
    return state


def _norm(module: T7Object, name: str) -> dict[str, Tensor]:
    state = {f"{name}.{key}": _tensor(module, key) for key in ("weight", "bias", "running_mean")}
    if isinstance(module.get("running_var"), Tensor):
        state[f"{name}.running_var"] = _tensor(module, "running_var")
    else:  # files from before 2015 keep 1 / sqrt(var + eps)
        state[f"{name}.running_var"] = _tensor(module, "running_std").pow(-2) - float(module.get("eps", 1e-5))
    state[f"{name}.num_batches_tracked"] = torch.tensor(0)
    return state
