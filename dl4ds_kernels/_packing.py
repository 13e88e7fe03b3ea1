"""Prepacked convolution weights: made once and kept beside (never inside) module state.

A pack is the weight in the form that one algorithm reads: oneDNN's blocked layout, the panels of our direct convolution, or
Winograd's transformed filters. ``_C.conv_choose`` picks the algorithm from the sizes of a call (with ``DL4DS_AUTOTUNE=1``
timing does, see _autotune.py), so a module that sees maps of different sizes may hold more than one. Only the weight is packed.
BatchNorm stays a per-channel scale and shift that the
epilogue derives from the live BN vectors at every call, so a changed statistic or affine parameter can never be stale. A pack
is keyed on the weight's identity, storage, address and ``_version``: in-place writes, ``load_state_dict``, optimizer steps and
``.to()`` are seen at the next call; a write through ``.data`` or numpy is not (``dk.refresh(model)`` drops the packs). The
storage is known by a weak reference, since an allocator hands the same address out again.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import _autotune, _extension
from ._define import op

# Multiply-adds of a call from which the packed path wins over the stock modules, host time included: with our engine, and with
# oneDNN's primitive, whose call costs about 30 us more than aten's convolution.
MIN_MACS = 200_000
MIN_LIBRARY_MACS = 8_000_000

LIBRARY = 0  # oneDNN; the other algorithm codes are those of conv_bn_act_packed (csrc/ops/conv_bn_act/conv_engine_cpu.h)
DIRECT = 1
TRANSPOSED = 5  # conv_transpose_bn_act_packed
_TURNED = 18  # the weight of a transposed convolution with stride 1 as that of a convolution
ALGORITHMS = {
    LIBRARY: "oneDNN", DIRECT: "direct", 2: "Winograd F(2x2, 3x3)", 3: "depthwise", 4: "Winograd F(4x4, 3x3)",
    TRANSPOSED: "transposed 2x2", 6: "Winograd F(6x6, 3x3)", 7: "Strassen",
    8: "dot products",
}  # fmt: skip
# Those whose error may exceed twice stock torch's own (``exact=True`` leaves them out), and those that a variable switches off.
INEXACT = frozenset({4, 6, 7})
SWITCHES = {"DL4DS_WINOGRAD": frozenset({2, 4, 6}), "DL4DS_STRASSEN": frozenset({7})}

SLOT = "_dl4ds_packed"
_EXACT = "_dl4ds_exact"  # set on convolutions of a model that was optimized with exact=True


class PackedWeight:
    """Holder of one module's packed weights; copies and pickles as an empty holder."""

    __slots__ = ("weight", "storage", "pointer", "version", "packs", "choices", "programs", "__weakref__")

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Free the packed tensors; the next call packs again."""
        self.weight: weakref.ref[Tensor] | None = None
        self.storage: StorageWeakRef | None = None
        self.pointer = self.version = -1
        self.packs: dict[int, Tensor] = {}  # by algorithm
        self.choices: dict[tuple[Any, ...], int] = {}  # sizes of a call -> algorithm
        self.programs: dict[tuple[Any, ...], Any] = {}  # of chains that begin here: modules/_chain.py

    def __reduce__(self) -> tuple[Any, ...]:
        return (PackedWeight, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return PackedWeight()


def supported(weight: Tensor) -> bool:
    """Whether a convolution's weight can be packed: fp32 on the CPU, and one whose writes torch counts."""
    return (
        weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and not weight.is_inference()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def _sizes(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> tuple[Any, ...]:
    return (
        *x.shape, weight.shape[0], tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation), groups
    )  # fmt: skip


def choose(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, exact: bool) -> int:
    """The algorithm that the cost model takes for these sizes (and this machine, and torch's number of threads)."""
    sizes = _sizes(x, weight, stride, padding, dilation, groups)
    return _extension.host().conv_choose(*sizes, torch.get_num_threads(), exact)


def candidates(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, exact: bool) -> list[int]:
    """Every algorithm that can run these sizes and that ``exact`` and the environment allow."""
    sizes = _sizes(x, weight, stride, padding, dilation, groups)
    off = {TRANSPOSED}  # another operation
    off.update(*(codes for variable, codes in SWITCHES.items() if os.environ.get(variable) == "0"))
    if exact:
        off |= INEXACT
    supports = _extension.host().conv_supports
    return [code for code in ALGORITHMS if code not in off and (code == LIBRARY or supports(code, *sizes))]


def pack(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, algorithm: int) -> Tensor:
    """``weight`` in the form that ``algorithm`` reads for inputs like ``x``."""
    with torch.no_grad():
        if algorithm == LIBRARY:
            return torch.ops.mkldnn._reorder_convolution_weight(
                weight.detach(), padding, stride, dilation, groups, list(x.shape)
            )
        return op("conv_bn_act_pack")(weight.detach(), groups, algorithm)


def convolve(x: Tensor, weight: Tensor, packed: Tensor, algorithm: int, geometry: tuple[Any, ...], bn: Any) -> Tensor:
    """``relu(bn(conv(x)))`` by one algorithm: what is timed. ``bn``: running mean and variance, weight and bias."""
    rest = (*bn, None, *geometry, 1e-5, False, 1, 0.0)
    if algorithm == LIBRARY:
        return op("conv_bn_act")(x, packed, None, *rest)
    return op("conv_bn_act_packed")(x, weight, packed, algorithm, None, *rest)


def _measured(x: Tensor, weight: Tensor, geometry: tuple[Any, ...], exact: bool, default: int) -> tuple[int, Tensor | None]:
    """(the fastest algorithm by timing on this very weight and input, its pack if one was made); see _autotune.py."""
    codes = candidates(x, weight, *geometry, exact)
    if default not in codes or len(codes) == 1:
        return default, None
    packs: dict[int, Tensor] = {}
    still = x.contiguous(memory_format=torch.channels_last)  # as an input inside a network lies
    ones, zeros = x.new_ones(weight.shape[0]), x.new_zeros(weight.shape[0])

    def prepare(code: int) -> Any:
        packs[code] = pack(x, weight, *geometry, code)
        return lambda: convolve(still, weight, packs[code], code, geometry, (zeros, ones, ones, zeros))

    n, channels, height, width, outputs, *rest = _sizes(x, weight, *geometry)
    kernel, stride, padding, dilation = ("x".join(map(str, pair)) for pair in rest[:4])
    key = f"N{n} C{channels} H{height} W{width} C_out{outputs} k{kernel} s{stride} p{padding} d{dilation} g{geometry[3]}"
    best = _autotune.choose(key, default, {code: lambda code=code: prepare(code) for code in codes})
    return best, packs.get(best)


def _holder(module: torch.nn.Module, weight: Tensor) -> PackedWeight:
    """The module's holder, emptied if the weight is not the one that its packs were made of."""
    holder = module.__dict__.get(SLOT)
    if holder is None:
        holder = module.__dict__[SLOT] = PackedWeight()
    if (
        holder.version != weight._version
        or holder.weight is None
        or holder.weight() is not weight
        or holder.pointer != weight.data_ptr()  # another view of the same storage
        or holder.storage.cdata != weight.untyped_storage()._cdata  # another storage at the same address
    ):
        holder.drop()
        holder.weight, holder.pointer, holder.version = weakref.ref(weight), weight.data_ptr(), weight._version
        holder.storage = StorageWeakRef(weight.untyped_storage())
    return holder


def packed_weight(
    module: torch.nn.Module, weight: Tensor, x: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, exact: bool
) -> tuple[int, Tensor]:
    """(algorithm, packed form of ``weight`` (C_out, C_in/groups, kH, kW)) for inputs like ``x`` (N, C_in, H, W)."""
    exact = exact or _EXACT in module.__dict__
    holder = _holder(module, weight)
    key = (x.shape, stride, padding, dilation, groups, exact, torch.get_num_threads())
    algorithm = holder.choices.get(key)
    if algorithm is None:
        if len(holder.choices) >= 256:  # inputs of ever new sizes
            holder.choices.clear()
        algorithm = choose(x, weight, stride, padding, dilation, groups, exact)
        settled = True
        if _autotune.wanted():
            settled = _autotune.possible()
            if settled:
                algorithm, made = _measured(x, weight, (stride, padding, dilation, groups), exact, algorithm)
                if made is not None:
                    holder.packs.setdefault(algorithm, made)
        if settled:
            holder.choices[key] = algorithm
    packed = holder.packs.get(algorithm)
    if packed is None:
        packed = holder.packs[algorithm] = pack(x, weight, stride, padding, dilation, groups, algorithm)
    return algorithm, packed


def chosen(
    module: torch.nn.Module, weight: Tensor, shape: Any, stride: Any, padding: Any, dilation: Any, groups: int, exact: bool
) -> int | None:
    """The algorithm that a call of ``packed_weight`` with an input of ``shape`` took; None if there was none yet."""
    exact = exact or _EXACT in module.__dict__
    key = (torch.Size(shape), stride, padding, dilation, groups, exact, torch.get_num_threads())
    return _holder(module, weight).choices.get(key)


def programs(module: torch.nn.Module, weight: Tensor) -> dict[tuple[Any, ...], Any]:
    """Where ``modules/_chain.py`` keeps what it made for the chains that begin with this convolution."""
    return _holder(module, weight).programs


def kept(module: torch.nn.Module, weight: Tensor, algorithm: int) -> Tensor | None:
    """The packed form of ``weight`` for an algorithm, None if there is none of this weight."""
    return _holder(module, weight).packs.get(algorithm)


def packs(module: torch.nn.Module) -> dict[int, Tensor]:
    """What is packed of the module's weight now, by algorithm."""
    holder = module.__dict__.get(SLOT)
    return {} if holder is None else holder.packs


def direct_weight(module: torch.nn.Module, weight: Tensor) -> Tensor | None:
    """``weight`` (C_out, C_in, 1, 1) packed for the direct algorithm; None on a machine where that is not used."""
    holder = _holder(module, weight)
    packed = holder.packs.get(DIRECT)
    if packed is None and _extension.host().cpu_features()["isa"] in ("avx512", "avx2"):
        with torch.no_grad():
            packed = holder.packs[DIRECT] = op("conv_bn_act_pack")(weight.detach(), 1, DIRECT)
    return packed


def transposed_weight(module: torch.nn.Module, weight: Tensor) -> Tensor | None:
    """``weight`` (C, C_out, 2, 2) of a transposed convolution, packed; None on a machine where that is not used."""
    holder = _holder(module, weight)
    packed = holder.packs.get(TRANSPOSED)
    if packed is None and _extension.host().cpu_features()["isa"] in ("avx512", "avx2"):
        with torch.no_grad():
            packed = holder.packs[TRANSPOSED] = op("conv_transpose_bn_act_pack")(weight.detach())
    return packed


def turned_weight(
    module: torch.nn.Module, weight: Tensor, x: Tensor, padding: tuple[int, int], exact: bool
) -> tuple[int, Tensor, Tensor] | None:
    """``weight`` (C_in, C_out, kH, kW) of a transposed convolution with stride 1 as a convolution with ``padding`` reads it.

    (algorithm, the weight (C_out, C_in, kH, kW) with turned filters, its pack); None where the library is the better choice.
    """
    exact = exact or _EXACT in module.__dict__
    holder = _holder(module, weight)
    key = (x.shape, padding, exact, torch.get_num_threads())
    algorithm = holder.choices.get(key)
    if algorithm is None:
        if len(holder.choices) >= 256:  # inputs of ever new sizes
            holder.choices.clear()
        algorithm = holder.choices[key] = choose(x, weight.transpose(0, 1), (1, 1), padding, (1, 1), 1, exact)
    if algorithm == LIBRARY:
        return None
    with torch.no_grad():
        turned = holder.packs.get(_TURNED)
        if turned is None:
            turned = holder.packs[_TURNED] = weight.detach().transpose(0, 1).flip(2, 3).contiguous()
        packed = holder.packs.get(algorithm)
        if packed is None:
            packed = holder.packs[algorithm] = op("conv_bn_act_pack")(turned, 1, algorithm)
    return algorithm, turned, packed


def algorithms(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the algorithms that this module holds a pack for."""
    holder = module.__dict__.get(SLOT)
    return () if holder is None else tuple(ALGORITHMS[code] for code in sorted(holder.packs) if code in ALGORITHMS)


def drop(module: torch.nn.Module) -> None:
    """Free the packed weight of one module, if it has one."""
    holder = module.__dict__.get(SLOT)
    if holder is not None:
        holder.drop()


def forget(module: torch.nn.Module) -> None:
    """Remove the holder itself and the mark of :func:`keep_exact` (``dk.restore``)."""
    module.__dict__.pop(SLOT, None)
    module.__dict__.pop(_EXACT, None)


def keep_exact(module: torch.nn.Module) -> None:
    """From now on this convolution takes no inexact algorithm, whoever calls it; copies and pickles keep the mark."""
    module.__dict__[_EXACT] = True
