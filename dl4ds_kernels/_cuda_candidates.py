"""What ``DL4DS_AUTOTUNE=1`` times on CUDA (_cuda_autotune.py): three questions of the C++ part, their candidates and calls.

- ``LAYER``: a convolution with BatchNorm, forward; asked by csrc/ops/conv_bn_act/conv_route_cuda.cpp.
- ``DGRAD``: the input's gradient of a convolution with what a backward pass does to it; conv_dgrad_cuda.cpp.
- ``TAIL``: the end of a bottleneck block in inference; conv_bn_act_tail_cuda.cpp.

In each, 0 is what our kernel replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ._define import op

LIBRARY = 0
TILES = ((128, 128), (128, 64), (64, 64))  # output pixels x channels: ConvTile of conv_bn_act.h
SMALLEST = 2  # the tile that serves any number of channels, and slices
_DTYPES = {0: torch.float32, 2: torch.float16, 3: torch.bfloat16}  # DType of common/dispatch.h
Call = dict[str, int]  # fields of a kind -> value


class Kind(NamedTuple):
    """A question. runner(device, call) makes operands and gives ``run(code)``; what a candidate is may also follow from the
    code that is forced (_cuda_autotune.py) where the op asks the question itself.
    """

    name: str
    fields: tuple[str, ...]
    key: Callable[[Call], str]
    candidates: Callable[[Call], list[int]]
    words: Callable[[int], str]
    runner: Callable[[Any, Call], Callable[[int], Any]]


def _pairs(call: Call, *names: str) -> list[list[int]]:
    return [[call[f"{name}_h"], call[f"{name}_w"]] for name in names]


def _spans(call: Call, stride: Sequence[int], pad: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Height and width of a convolution's output."""
    along = zip((call["h"], call["w"]), (call["r"], call["s"]), stride, pad, dilation, strict=True)
    return [(size + 2 * p - d * (kernel - 1) - 1) // step + 1 for size, kernel, step, p, d in along]


def _sizes(call: Call, *names: str) -> str:
    """The sizes in words, the same in every process; ``names``: of pairs."""
    pairs = " ".join(f"{name[0]}{call[f'{name}_h']}x{call[f'{name}_w']}" for name in names)
    kernel = f"N{call['n']} C{call['c']} H{call['h']} W{call['w']} K{call['k']} k{call['r']}x{call['s']}"
    return f"sm_{call['architecture']} {str(_DTYPES[call['dtype']])[6:]} {kernel} {pairs}"


def _vectors(like: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros and ones, as BatchNorm's vectors."""
    return like.new_zeros(channels, dtype=torch.float32), like.new_ones(channels, dtype=torch.float32)


# ---- A layer, forward.


def code_of(tile: int, slices: int = 1) -> int:
    """The fused candidate's number, as C++ reads it: 1 + tile + 4 * (slices - 1)."""
    return 1 + tile + 4 * (slices - 1)


def _layer_candidates(call: Call) -> list[int]:
    """The library, and the fused kernel's tiles and slices that serve the sizes."""
    found = [LIBRARY, code_of(SMALLEST)]
    if call["k"] * _DTYPES[call["dtype"]].itemsize % 16 == 0:
        found += [code_of(0), code_of(1)]
    if call["slices"] > 1 and not call["stats"]:
        found.append(code_of(SMALLEST, call["slices"]))
    return found


def _layer_key(call: Call) -> str:
    name = "conv_bn_act_train" if call["stats"] else "conv_bn_act"
    flags = f"act{call['activation']}" + (" residual" if call["residual"] else "")
    return f"{name} {_sizes(call, 'stride', 'pad', 'dilation')} {flags}"


def _layer_words(code: int) -> str:
    if code == LIBRARY:
        return "cuDNN"
    (pixels, channels), slices = TILES[(code - 1) % 4], 1 + (code - 1) // 4
    return f"fused {pixels}x{channels}" + (f" in {slices} slices" if slices > 1 else "")


def _layer_runner(device: Any, call: Call) -> Callable[[int], Any]:
    """The op: it asks, and finds the forced candidate."""
    dtype, n, k = _DTYPES[call["dtype"]], call["n"], call["k"]
    x = device.tensor((n, call["c"], call["h"], call["w"]), dtype)
    weight = device.tensor((k, call["c"], call["r"], call["s"]), dtype)
    zeros, ones = _vectors(x, k)
    pairs = _pairs(call, "stride", "pad", "dilation")
    residual = device.tensor((n, k, *_spans(call, *pairs)), dtype) if call["residual"] else None
    if call["stats"]:
        train = op("conv_bn_act_train")
        return lambda _: train(x, weight, None, None, None, ones, zeros, None, *pairs, 1, 0.1, 1e-5, False, 1, 0.0, False)
    infer = op("conv_bn_act")
    return lambda _: infer(
        x, weight, None, zeros, ones, ones, zeros, residual, *pairs, 1, 1e-5, False, call["activation"], 0.1
    )  # fmt: skip


LAYER = Kind(
    "conv_bn_act_measured",
    (
        "architecture", "dtype", "stats", "residual", "activation", "n", "c", "h", "w", "k", "r", "s", "stride_h", "stride_w",
        "pad_h", "pad_w", "dilation_h", "dilation_w", "slices",
    ), _layer_key, _layer_candidates, _layer_words, _layer_runner,
)  # fmt: skip

# ---- The input's gradient. n, c, h, w are those of x, k the channels of dout.


def _dgrad_key(call: Call) -> str:
    step = f" step{call['added']}" if call["added"] > 1 else ""
    flags = (f" added{step}" if call["added"] else "") + (" by bits" if call["masked"] else "")
    sums = ["", " sums", " two sums"][call["sums"]] + (f" act{call['activation']}" if call["sums"] else "")
    return f"conv_bn_act_dgrad {_sizes(call, 'pad', 'dilation')}{flags}{sums}"


def _dgrad_words(code: int) -> str:
    if code == LIBRARY:
        return "cuDNN and the passes behind it"
    pixels, channels = TILES[code - 1]
    return f"fused {pixels}x{channels}"


def _dgrad_runner(device: Any, call: Call) -> Callable[[int], Any]:
    """All that comes before the elementwise pass of the BatchNorm in front, which both ways end in. Of two BatchNorms in front
    that pass too: the sums alone are no op.
    """
    dtype, n, c, size = _DTYPES[call["dtype"]], call["n"], call["c"], [call["h"], call["w"]]
    pad, dilation = _pairs(call, "pad", "dilation")
    dout = device.tensor((n, call["k"], *_spans(call, (1, 1), pad, dilation)), dtype)
    weight = device.tensor((call["k"], c, call["r"], call["s"]), dtype)
    y = device.tensor((n, c, *size), dtype)
    zeros, ones = _vectors(y, c)
    step, masked, activation = call["added"], bool(call["masked"]), call["activation"]
    some = device.tensor((n, c, *(-(-s // step) for s in size)), dtype) if step else None
    bits = torch.full(((y.numel() + 7) // 8,), 0b01010101, dtype=torch.uint8, device=y.device) if masked else None
    whole, written = _spread(some, y, step, masked) if step else None, torch.empty_like(y)
    fused, sums = op("conv_bn_act_dgrad_bwd"), op("bn_act_bwd")
    added = (some, bits, int(masked), 0.1, step or 1)
    site = (y, ones, zeros, zeros, ones) if call["sums"] else (None,) * 5
    both, front, other = call["sums"] == 2, None, (None,) * 3
    if both:
        other = device.tensor((n, c, *size), dtype), zeros, ones
        front = torch.full(((y.numel() + 7) // 8,), 0b00110011, dtype=torch.uint8, device=y.device) if activation else None

    def pair(dz: torch.Tensor, *known: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        maps = [(t, ones, zeros, ones, 1e-5, False) for t in (y, other[0])]
        dx, dresidual, *taken = op("bn_act_pair_bwd")(dz, front, activation, 0.1, *maps[0], *maps[1], *known)
        return dz, dx, dresidual, *(a if b is None else b for a, b in zip(taken, known, strict=True))

    def library() -> tuple[torch.Tensor, ...]:
        dz = torch.ops.aten.convolution_backward(
            dout, y, weight, None, [1, 1], pad, dilation, False, [0, 0], 1, [True, False, False]
        )[0]
        if step:
            if masked or step > 1:
                written.zero_()  # for the pass that writes `whole`: through the activation, or zeros between pixels
            dz.add_(whole)
        if not call["sums"]:
            return (dz,)
        if both:
            return pair(dz, None, None, None)
        return dz, *sums(dz, *site, None, None, True, 1e-5, False, activation, 0.1, False, True, False)[1:3]

    def run(code: int) -> tuple[torch.Tensor, ...]:
        """The gradient, and with sums those of the BatchNorm's weight and bias (of two: what they end in, and all sums)."""
        if code == LIBRARY:
            return library()
        dz, _, *rest = fused(dout, weight, size, pad, dilation, *added, *site, front, 1e-5, False, activation, 0.1, *other)
        return pair(dz, *rest) if both else (dz, *(rest[:2] if call["sums"] else ()))

    return run


def _spread(some: torch.Tensor, like: torch.Tensor, step: int, masked: bool) -> torch.Tensor:
    """What is added, as the passes of the library's way write it: every second value in memory, or zeros between pixels."""
    whole = torch.zeros_like(like)
    whole[:, :, ::step, ::step] = some
    if masked:
        whole.permute(0, 2, 3, 1).reshape(-1)[1::2] = 0
    return whole


DGRAD = Kind(
    "conv_bn_act_dgrad_measured",
    (
        "architecture", "dtype", "added", "masked", "sums", "activation", "n", "c", "h", "w", "k", "r", "s", "pad_h", "pad_w",
        "dilation_h", "dilation_w", "tile",
    ), _dgrad_key, lambda call: [LIBRARY, code_of(call["tile"])], _dgrad_words, _dgrad_runner,
)  # fmt: skip

# ---- The end of a bottleneck block. k: output channels of the 1x1 convolution; r, s: filter of the one before it.


def _tail_key(call: Call) -> str:
    flags = f"act{call['activation']} act{call['activation2']}" + (" residual" if call["residual"] else "")
    return f"conv_bn_act_tail {_sizes(call, 'stride', 'pad', 'dilation')} {flags}"


def _tail_candidates(call: Call) -> list[int]:
    """Two layers, and one kernel: with one block for a tile of pixels, and with as many as the model wants."""
    return [LIBRARY, *sorted({1, call["parts"]})]


def _tail_words(code: int) -> str:
    return "two layers" if code == LIBRARY else f"one kernel in {code} parts" if code > 1 else "one kernel"


def _tail_runner(device: Any, call: Call) -> Callable[[int], Any]:
    """The op: it asks, and finds the forced candidate; two layers take the best way of each, which may be timed first."""
    dtype, n, k, middle = _DTYPES[call["dtype"]], call["n"], call["k"], 64
    x = device.tensor((n, call["c"], call["h"], call["w"]), dtype)
    weight = device.tensor((middle, call["c"], call["r"], call["s"]), dtype)
    weight2 = device.tensor((k, middle, 1, 1), dtype)
    pairs = _pairs(call, "stride", "pad", "dilation")
    residual = device.tensor((n, k, *_spans(call, *pairs)), dtype) if call["residual"] else None
    (zeros, ones), (zeros2, ones2) = _vectors(x, middle), _vectors(x, k)
    tail = op("conv_bn_act_tail")
    first = (None, zeros, ones, ones, zeros, 1e-5, False, call["activation"])
    second = (None, zeros2, ones2, ones2, zeros2, 1e-5, False, call["activation2"])
    return lambda _: tail(x, weight, *first, *pairs, weight2, *second, 0.1, residual)


TAIL = Kind(
    "conv_bn_act_tail_measured",
    (
        "architecture", "dtype", "residual", "activation", "activation2", "n", "c", "h", "w", "k", "r", "s", "stride_h",
        "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "parts",
    ), _tail_key, _tail_candidates, _tail_words, _tail_runner,
)  # fmt: skip
