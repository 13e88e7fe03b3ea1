"""What each op reads and writes of its maps, in passes over a tensor: the declaration that budgets and roofline start from.

One row an op. ``PASSES[op](a)`` gives {tensor: (reads, writes)} for a call whose schema arguments and results are the
attributes of ``a``; per-channel vectors, workspaces and weights are left out (under 1 % of a ResNet's traffic). A pass is one
read or write of every element from or to memory: what a cache saves is not counted off. A tensor that is computed in place is
read and written. Bit masks are tensors of numel / 8 bytes. Checked against the simulator's distinct bytes by
tests/test_byte_budgets.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Passes = dict[str, tuple[int, int]]


def _bn_act(a: Any) -> Passes:
    """Batch statistics are a pass of their own."""
    return {"x": (2 if a.training else 1, 0), "residual": (1, 0), "out": (0, 1), "mask": (0, 1)}


def _bn_act_bwd(a: Any) -> Passes:
    """Two sums over everything, then dx; z is recomputed from x (and the residual) where there is no mask."""
    sums, apply = int(a.need_dparams or (a.training and a.need_dx)), int(a.need_dx or a.need_dresidual)
    remade = a.activation != 0 and a.mask is None
    x = sums + (apply if (a.training and a.need_dx) or remade else 0)
    z = sums + apply if remade else 0
    return {"dout": (sums + apply, 0), "x": (x, 0), "residual": (z, 0), "mask": (sums + apply, 0)} | {
        "dx": (0, 1), "dresidual": (0, 1),
    }  # fmt: skip


def _add_act(a: Any) -> Passes:
    return {"x": (1, 0), "residual": (1, 0), "out": (0, 1), "mask": (0, 1)}


def _add_act_bwd(a: Any) -> Passes:
    remade = int(a.activation != 0 and a.mask is None)
    mask = int(a.activation != 0 and a.mask is not None)
    return {"dout": (1, 0), "x": (remade, 0), "residual": (remade, 0), "mask": (mask, 0), "result": (0, 1)}


def _conv_bn_act(a: Any) -> Passes:
    """The library's convolution, then one pass in place (``FUSED``: the epilogue is part of the convolution)."""
    return {"x": (1, 0), "residual": (1, 0), "result": (1, 2)}


def _conv_bn_act_train(a: Any) -> Passes:
    """The convolution's output is written, read for the batch statistics, and read to be normalised."""
    return {"x": (1, 0), "residual": (1, 0), "y": (2, 1), "out": (0, 1), "mask": (0, 1)}


def _conv_bn_act_train_fused(a: Any) -> Passes:
    """Statistics from the convolution's epilogue, where that kernel can serve the layer (not the stem, not groups)."""
    fused = a.groups == 1 and a.x.dim() == 4 and a.x.shape[1] * a.x.element_size() % 16 == 0
    return {**_conv_bn_act_train(a), "y": (1 if fused else 2, 1)}


def _dgrad(a: Any) -> Passes:
    """dout is read and dx written; what is added, and what BatchNorms in front normalised, are read once, with their bits."""
    maps = ("dout", "added", "added_mask", "y", "mask", "other_y")
    return {**dict.fromkeys(maps, (1, 0)), "dx": (0, 1)}


def _bn_act_apply_bwd(a: Any) -> Passes:
    """The elementwise pass of ``bn_act_bwd`` alone."""
    return {"dout": (1, 0), "x": (1, 0), "mask": (int(a.activation != 0), 0), "dx": (0, 1), "dresidual": (0, 1)}


def _bn_act_pair_bwd(a: Any) -> Passes:
    """Both gradients in one pass; before it one for the sums that are not known: it does not read x where those of x are."""
    x, both = 1 + int(a.dweight is None), 1 + int(a.residual_dweight is None)
    return {"dout": (both, 0), "mask": (both, 0), "x": (x, 0), "residual": (both, 0), "dx": (0, 1), "dresidual": (0, 1)}


def _conv_bn_stats(a: Any) -> Passes:
    return {"x": (1, 0), "y": (1, 1)}


def _conv_bn_stats_fused(a: Any) -> Passes:
    """As _conv_bn_act_train_fused, without the elementwise pass."""
    reads, writes = _conv_bn_act_train_fused(a)["y"]
    return {"x": (1, 0), "y": (reads - 1, writes)}


def _bn_act_conv(a: Any) -> Passes:
    """``bn_act`` over x, then the library's convolution, and with a BatchNorm behind it one more pass in place.

    The map between them is x's size: what it is written and read is counted as x's.
    """
    behind = 1 if a.running_mean is not None else 0
    return {"x": (2, 1), "residual": (1, 0), "result": (behind, 1 + behind)}


def _bn_act_conv_fused(a: Any) -> Passes:
    """All in one kernel, where that can serve the layer."""
    one = tuple(a.weight.shape[2:]) == (1, 1) and a.groups == 1 and a.in_activation == 1 and not any(a.padding)
    if one and a.x.shape[1] * a.x.element_size() % 16 == 0:
        return {"x": (1, 0), "residual": (1, 0), "result": (0, 1)}
    return _bn_act_conv(a)


def _conv_bn_act_tail(a: Any) -> Passes:
    """``conv_bn_act`` twice. The map between them has 64 channels, in ResNet as many as x: it is counted as x's."""
    return {"x": (3, 2), "residual": (1, 0), "result": (1, 2)}


def _conv_bn_act_tail_fused(a: Any) -> Passes:
    """All in one kernel: 64 channels in between, whole vectors of input and output channels."""
    vector = 16 // a.x.element_size()
    if a.weight.shape[0] == 64 and a.x.shape[1] % vector == 0 and a.weight2.shape[0] % vector == 0:
        return {"x": (1, 0), "residual": (1, 0), "result": (0, 1)}
    return {"x": (2, 1), "residual": (1, 0), "result": (0, 1)}


def _convolution(a: Any) -> Passes:
    return {"input": (1, 0), "result": (0, 1)}


def _convolution_backward(a: Any) -> Passes:
    """dgrad reads the gradient and writes another, wgrad reads gradient and input."""
    dgrad, wgrad = int(a.output_mask[0]), int(a.output_mask[1])
    return {"grad_output": (dgrad + wgrad, 0), "input": (wgrad, 0), "result0": (0, dgrad)}


PASSES: dict[str, Callable[[Any], Passes]] = {
    "dl4ds_kernels::bn_act": _bn_act,
    "dl4ds_kernels::bn_act_bwd": _bn_act_bwd,
    "dl4ds_kernels::bn_act_apply_bwd": _bn_act_apply_bwd,
    "dl4ds_kernels::bn_act_pair": lambda a: {"x": (1, 0), "residual": (1, 0), "out": (0, 1), "mask": (0, 1)},
    "dl4ds_kernels::bn_act_pair_bwd": _bn_act_pair_bwd,
    "dl4ds_kernels::bn_stats": lambda a: {"x": (1, 0)},
    "dl4ds_kernels::conv_bn_act_dgrad_bwd": _dgrad,
    "dl4ds_kernels::add_act": _add_act,
    "dl4ds_kernels::add_act_bwd": _add_act_bwd,
    "dl4ds_kernels::bn_act_conv": _bn_act_conv,
    "dl4ds_kernels::conv_bn_act": _conv_bn_act,
    "dl4ds_kernels::conv_bn_act_tail": _conv_bn_act_tail,
    "dl4ds_kernels::conv_bn_act_train": _conv_bn_act_train,
    "dl4ds_kernels::conv_bn_stats": _conv_bn_stats,
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    # Stock torch, for the comparison: three passes of a training BatchNorm, five of its gradient.
    "aten::native_batch_norm": lambda a: {"input": (2 if a.training else 1, 0), "result0": (0, 1)},
    "aten::native_batch_norm_backward": lambda a: {"grad_out": (2, 0), "input": (2, 0), "result0": (0, 1)},
    "aten::relu": lambda a: {"self": (1, 0), "result": (0, 1)},
    "aten::relu_": lambda a: {"self": (1, 1)},
    "aten::leaky_relu": lambda a: {"self": (1, 0), "result": (0, 1)},
    "aten::leaky_relu_": lambda a: {"self": (1, 1)},
    "aten::threshold_backward": lambda a: {"grad_output": (1, 0), "self": (1, 0), "result": (0, 1)},
    "aten::leaky_relu_backward": lambda a: {"grad_output": (1, 0), "self": (1, 0), "result": (0, 1)},
    "aten::add": lambda a: {"self": (1, 0), "other": (1, 0), "result": (0, 1)},
    "aten::add_": lambda a: {"self": (1, 1), "other": (1, 0)},
    "aten::cat": lambda a: {"tensors": (1, 0), "result": (0, 1)},
}
# With the epilogue in the convolution (our CPU kernels, Triton for 1x1 and 3x3): scale, shift and activation cost nothing.
FUSED: dict[str, Callable[[Any], Passes]] = {
    "dl4ds_kernels::conv_bn_act": lambda a: {"x": (1, 0), "residual": (1, 0), "result": (0, 1)},
    "dl4ds_kernels::conv_bn_act_train": _conv_bn_act_train_fused,
    "dl4ds_kernels::conv_bn_stats": _conv_bn_stats_fused,
    "dl4ds_kernels::bn_act_conv": _bn_act_conv_fused,
    "dl4ds_kernels::conv_bn_act_tail": _conv_bn_act_tail_fused,
}
# Names of what an op returns, where its row speaks of more than one of them.
_RESULTS = {
    "bn_act": ("out", "mean", "rstd", "mask"),
    "bn_act_bwd": ("dx", "dweight", "dbias", "dresidual"),
    "bn_act_apply_bwd": ("dx", "dresidual"),
    "bn_act_pair": ("out", "mask"),
    "bn_act_pair_bwd": ("dx", "dresidual", "dweight_", "dbias_", "residual_dweight_"),
    "conv_bn_act_dgrad_bwd": ("dx", "table", "dweight", "dbias", "other_dweight"),
    "add_act": ("out", "mask"),
    "conv_bn_act_train": ("out", "y", "mean", "rstd", "mask"),
    "conv_bn_stats": ("y", "mean", "rstd"),
}


def moved(
    overload: Any, args: tuple[Any, ...], results: Any, table: dict[str, Callable[[Any], Passes]] = PASSES
) -> dict[str, tuple[int, int]] | None:
    """{tensor: (bytes read, bytes written)} that a call declares; None for an op that is not in the table.

    Only tensors with two dimensions or more and bit masks count: the rest is vectors.
    """
    schema = overload._schema
    row = table.get(schema.name)
    if row is None:
        return None
    names = [argument.name for argument in schema.arguments]
    call: dict[str, Any] = {argument.name: argument.default_value for argument in schema.arguments}
    call |= dict(zip(names, args, strict=False))
    values = results if isinstance(results, tuple) else (results,)
    numbered = ("result",) if len(values) == 1 else tuple(f"result{i}" for i in range(len(values)))
    returned = _RESULTS.get(schema.name.split("::")[1], numbered)
    for name, value in zip(returned, values, strict=False):
        call[name if call.get(name) is None else name + "_"] = value
    found = {}
    for name, (reads, writes) in row(SimpleNamespace(**call)).items():
        size = _bytes(call.get(name))
        if size and reads + writes:
            found[name] = (reads * size, writes * size)
    return found


def _bytes(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    if not isinstance(value, Tensor) or (value.dim() < 2 and value.dtype is not torch.uint8):
        return 0
    return value.numel() * value.element_size()
