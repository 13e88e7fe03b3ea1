"""What :func:`dl4ds_kernels.explain` tells of a CUDA convolution layer: which kernels run it, and why.

The choice is made in C++, at each call (csrc/ops/conv_bn_act/conv_route_cuda.cpp): from the arguments, from
``DL4DS_CUDA_CONV`` (``auto``, ``fused``, ``library``) and from a model of both ways, or with ``DL4DS_AUTOTUNE=1`` from times
(_cuda_autotune.py). docs/gpu-conv.md has the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autotune, _cuda_autotune
from ._cuda_candidates import DGRAD, LAYER, TAIL, Kind
from ._define import op

TILES = ("128x128", "128x64", "64x64")  # output pixels x channels of a thread block: ConvTile in conv_bn_act.h
# ConvRefusal in conv_bn_act.h, ConvReason in conv_bn_act_cuda.h, ConvTailReason in conv_bn_act_tail.h.
REASONS = {
    1: "the CUDA part was built without CUTLASS' headers (python -m dl4ds_kernels info says how to get them)",
    2: "expected fp16, bf16 or fp32 operands of one dtype",
    3: "nothing to compute, or sizes that do not fit each other",
    4: "more elements than 32 bits can count",
    5: "input channels that do not fill vectors of 16 bytes",
    6: "x, or a stride of it, lies off 16-byte boundaries",
    7: "a filter of more than 32 rows or columns",
    8: "an activation other than none, relu, leaky_relu and relu6",
    9: "output channels or slices that the tile does not serve (the route takes one that does)",
    10: "the input's BatchNorm fits on the way into 1x1 convolutions without padding only",
    11: "in front of the convolution an activation other than relu",
    12: "BatchNorm of more than 4096 input channels",
    13: "a gradient: a stride other than 1, or more padding than the filter reaches",
    14: "a gradient: sums behind an activation whose argument they need",
    15: "a gradient: something of fewer pixels to add, with a mask",
    16: "asked for: DL4DS_CUDA_CONV=library",
    17: "the GPU's compute capability is below 8.0",
    18: "not a convolution of two spatial dimensions",
    19: "groups",
    20: "x is not in channels_last",
    21: "fp32, and torch.backends.cudnn.conv.fp32_precision does not allow TF32",
    22: "modelled (not measured) to be no faster fused",
    28: "asked for: DL4DS_CUDA_TAIL=0",
    29: "other than 64 channels between the two convolutions",
    30: "behind the first convolution something else than a 1x1 convolution of its channels",
    31: "output channels that do not fill vectors of 16 bytes, or more than 2048",
}
_MODEL = 22
# Why the table of the model decides although DL4DS_AUTOTUNE=1 asks for times.
TABLE = {
    "capture": "table: a graph is being captured, nothing is timed now",
    "deterministic": "table: deterministic algorithms take no choice that was timed",
    "not measured yet": "table: not measured yet; the first call will be, unless it runs while a graph is captured",
    "tracing": "table: nothing is timed while tracing",
    "no memory": "table: no memory for operands to time",
    "synchronizations are reported": "table: timing synchronizes, and torch.cuda.set_sync_debug_mode reports that",
}


def _facts(tile: int, fused_ns: int, library_ns: int, **more: int) -> dict[str, Any]:
    """What the model said, where it was asked."""
    return {"tile": TILES[tile], **more, "fused_us": fused_ns / 1e3, "library_us": library_ns / 1e3} if fused_ns > 0 else {}


def _ask(kind: Kind, question: Callable[..., list[int]], *args: Any) -> tuple[list[int], bool, dict[str, Any]]:
    """The route's answer, whether times decided, and what there is to say of that."""
    with _cuda_autotune.asking() as answer:
        found = question(*args)
        why, times = answer.why, dict(answer.times)
    told: dict[str, Any] = {}
    if _autotune.wanted() and why:
        told["chosen_by"] = TABLE.get(why, why)
        if times:
            told["measured_us"] = {kind.words(code): us for code, us in times.items()}
    return found, why == "measured", told


def _reason(reason: int, measured: bool, faster: str, slower: str) -> str:
    """In words; ``faster``, ``slower``: than what."""
    how = "measured" if measured else "modelled (not measured)"
    if reason == 0:
        return f"{how} to be faster {faster}"
    return f"measured to be no faster {slower}" if reason == _MODEL and measured else REASONS[reason]


def explain(
    x: Tensor, weight: Tensor, residual: bool, stride: list[int], padding: list[int], dilation: list[int], groups: int,
    activation: int, training: bool = False, question: Callable[..., list[int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """kernels, reason, tile, slices, and the modelled microseconds of both ways, of one call of ``conv_bn_act`` on CUDA.

    In training both ways end in one pass that normalises; the times are those of all that comes before.
    """
    (reason, tile, slices, fused_ns, library_ns), measured, told = _ask(
        LAYER, question or op("conv_bn_act_route"), x, weight, residual, stride, padding, dilation, groups, activation, training
    )
    if reason == 0:
        kernels = "one fused kernel (CUTLASS main loop)"
        if training:
            kernels = "a convolution that leaves its batch statistics (CUTLASS main loop), then BatchNorm and activation"
    else:
        kernels = (
            f"cuDNN, then {'batch statistics, BatchNorm and activation' if training else 'BatchNorm and activation in place'}"
        )
    why = _reason(reason, measured, "fused", "fused")
    return {"kernels": kernels, "reason": why, **_facts(tile, fused_ns, library_ns, slices=slices), **told}


def explain_dgrad(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int, activation: int,
    added: int = 0, masked: bool = False, sums: int = 1, question: Callable[..., list[int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same of the gradient of x in the backward pass of a convolution, ``x = act(bn(...))`` in training.

    sums: of how many BatchNorms in front the sums are taken on the way. 1: the one that made x is known, and nothing else reads
    x; 2: a block made x that ends in two (its shortcut has one). added: another gradient is added: 0: none, else the step of
    its rows and columns. The times are those of all that comes before the elementwise pass of those BatchNorms.
    """
    (reason, tile, _, fused_ns, library_ns), measured, told = _ask(
        DGRAD, question or op("conv_bn_act_dgrad_route"), x, weight, stride, padding, dilation, groups, added, masked, sums,
        activation,
    )  # fmt: skip
    front = ["", "the sums of the BatchNorm in front", "the sums of the two BatchNorms in front"][sums]
    around = [*(["what is added"] if added else []), *([front] if sums else [])]
    kernels = "cuDNN" + (f", then {' and '.join(around)}" if around else "")
    if reason == 0:
        kernels = "one fused kernel (CUTLASS main loop)" + (f" with {' and '.join(around)}" if around else "")
    why = _reason(reason, measured, "fused", "fused")
    return {"kernels": kernels, "reason": why, **_facts(tile, fused_ns, library_ns), **told}


def explain_prologue(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int, activation: int,
    epilogue: bool = False, residual: bool = False, question: Callable[..., list[int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same of one call of ``bn_act_conv`` in inference; ``activation``: the one in front of the convolution.

    epilogue: a BatchNorm (and relu) behind the convolution too, as in DenseNet's bottlenecks.
    """
    ask = question or op("bn_act_conv_route")
    answer = ask(x, weight, activation, epilogue, residual, stride, padding, dilation, groups, int(epilogue))
    reason, tile, _, fused_ns, library_ns = answer
    facts = _facts(tile, fused_ns, library_ns)
    if reason == 0:
        kernels = "one fused kernel: BatchNorm and relu on the way into a CUTLASS main loop"
        return {"kernels": kernels, "reason": "modelled (not measured) to be faster fused", **facts}
    behind = "conv_bn_act" if epilogue else "cuDNN"
    return {"kernels": f"BatchNorm and activation, then {behind}", "reason": REASONS[reason], **facts}


def explain_tail(
    x: Tensor, weight: Tensor, weight2: Tensor, residual: bool, stride: list[int], padding: list[int], dilation: list[int],
    activation: int, question: Callable[..., list[int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same of a convolution and the 1x1 one behind it, each with BatchNorm and activation: a bottleneck block's end.

    ``parts``: blocks of threads that share a tile of 64 pixels.
    """
    (reason, parts, fused_ns, apart_ns), measured, told = _ask(
        TAIL, question or op("conv_bn_act_tail_route"), x, weight, weight2, residual, stride, padding, dilation, activation,
        activation,
    )  # fmt: skip
    facts = {"parts": parts, "fused_us": fused_ns / 1e3, "apart_us": apart_ns / 1e3} if fused_ns > 0 else {}
    kernels = "two layers: conv_bn_act, then conv_bn_act"
    if reason == 0:
        kernels = "one fused kernel: the convolution and the 1x1 one behind it"
    why = _reason(reason, measured, "than two layers", "than two layers")
    if reason == 0 and os.environ.get("DL4DS_CUDA_TAIL") == "1":
        why = "asked for: DL4DS_CUDA_TAIL=1"
    return {"kernels": kernels, "reason": why, **facts, **told}


def explain_block(
    x: Tensor, convs: Sequence[Any], shortcut: bool, activation: int, training: bool = False,
    question: Callable[[str], Callable[..., list[int]]] = op,
) -> dict[str, Any]:  # fmt: skip
    """The layers of a residual block's branch (``ConvParams``, BatchNorm behind each convolution), in order.

    In inference "tail" tells whether the last two are one kernel; then one entry of "layers" stands for both. In training each
    layer has its "input_gradient"; to the first layer's the shortcut's gradient is added.
    """
    layers: list[dict[str, Any]] = []
    report: dict[str, Any] = {"layers": layers}
    skip = False
    for i, conv in enumerate(convs):
        k, c, r, s = conv.weight.shape
        pairs = [[v, v] if isinstance(v, int) else list(v) for v in (conv.stride, conv.padding, conv.dilation)]
        last = i == len(convs) - 1
        if not skip:
            entry: dict[str, Any] = {"layer": f"{r}x{s}, {c} to {k} channels at {x.shape[2]}x{x.shape[3]}"}
            behind = convs[i + 1] if i == len(convs) - 2 and not training else None
            if behind is not None and conv.groups == 1 and behind.groups == 1 and _pointwise(behind):
                ask = question("conv_bn_act_tail_route")
                report["tail"] = explain_tail(x, conv.weight, behind.weight, shortcut, *pairs, activation, ask)
                skip = report["tail"]["kernels"].startswith("one")
            if skip:
                entry |= {"layer": f"{entry['layer']}, and the 1x1 one behind it", **report["tail"]}
            else:
                added = shortcut and last and not training  # in training the passes behind the convolution add
                ask = question("conv_bn_act_route")
                entry |= explain(x, conv.weight, added, *pairs, conv.groups, activation, training, ask)
            if training:
                first = shortcut and i == 0
                entry["input_gradient"] = explain_dgrad(
                    x, conv.weight, *pairs, conv.groups, activation, int(first), first and activation != 0,
                    question=question("conv_bn_act_dgrad_route"),
                )  # fmt: skip
            layers.append(entry)
        size = [
            (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, pad, dilation in zip(x.shape[2:], (r, s), *pairs, strict=True)
        ]
        x = torch.empty(x.shape[0], k, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return report


def _pointwise(conv: Any) -> bool:
    """Stride 1 and no padding, as the tail's second convolution must have."""
    return conv.stride in (1, (1, 1)) and conv.padding in (0, (0, 0))
