"""``DL4DS_AUTOTUNE=1`` on CUDA: which kernels a convolution layer takes, by timing instead of by the model.

csrc/ops/conv_bn_act/conv_route_cuda.cpp asks :func:`choose` at each call that the fused kernel could serve. The answer is one
of the candidates: the library's convolution (cuDNN) with BatchNorm and activation behind it, always, and the fused kernel with
each tile and number of slices that applies. It comes from this process, from the file of _autotune.py, or from timing now: on
tensors of the call's sizes, with CUDA events, after a warm-up, candidates in turn, L2 emptied before each sample, medians
compared. The fused kernel is taken where it needs less than 97 % of the library's time.

Nothing is timed while a graph is captured, under deterministic algorithms, while tracing, or while torch reports
synchronizations: then the static table of the model (conv_bn_act_plan.h) decides, and deterministic algorithms never use times.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import _autotune
from ._define import op
from ._version import __version__

UNDECIDED, LIBRARY = -1, 0
TILES = ((128, 128), (128, 64), (64, 64))  # output pixels x channels: ConvTile of conv_bn_act.h
SMALLEST = 2  # the tile that serves any number of channels, and slices
_DTYPES = {0: torch.float32, 2: torch.float16, 3: torch.bfloat16}  # DType of common/dispatch.h
_WARM_UP, _ROUNDS = 3, 11
_HOPELESS = 2.0  # times the fastest of the warm-up: not timed any further

FIELDS = (
    "architecture", "dtype", "stats", "residual", "activation", "n", "c", "h", "w", "k", "r", "s", "stride_h", "stride_w",
    "pad_h", "pad_w", "dilation_h", "dilation_w", "slices",
)  # fmt: skip
Call = dict[str, int]  # FIELDS -> value


def code_of(tile: int, slices: int = 1) -> int:
    """The candidate's number, as conv_route_cuda.cpp reads it: 1 + tile + 4 * (slices - 1); 0 is the library."""
    return 1 + tile + 4 * (slices - 1)


def words(code: int) -> str:
    """For people."""
    if code == LIBRARY:
        return "cuDNN"
    (pixels, channels), slices = TILES[(code - 1) % 4], 1 + (code - 1) // 4
    return f"fused {pixels}x{channels}" + (f" in {slices} slices" if slices > 1 else "")


class Cuda:
    """The current device: its name, what forbids timing, operands and samples."""

    def machine(self) -> str:
        """What times are comparable within: GPU, architecture, and versions of the code that ran."""
        return _machine(torch.cuda.current_device())

    def forbids(self) -> str | None:
        """Why nothing can be timed now, or None."""
        if torch.cuda.is_current_stream_capturing():
            return "capture"
        return "synchronizations are reported" if torch.cuda.get_sync_debug_mode() else None

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Normal numbers in channels_last, from a generator of their own."""
        generator = torch.Generator("cuda").manual_seed(0)
        t = torch.empty(*shape, device="cuda", dtype=dtype)
        t = t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        return t.normal_(generator=generator)

    def sample(self, call: Callable[[], Any]) -> float:
        """Microseconds of one call on the current stream, with an L2 cache that holds other things."""
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        torch.empty(2 * max(size, 1 << 22), dtype=torch.uint8, device="cuda").zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)


@cache
def _machine(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    versions = f"dl4ds_kernels {__version__}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {versions}"


device: Any = Cuda()  # tests put another clock here


class _State(threading.local):
    forced: int | None = None  # what is being timed
    asking: bool = False  # dk.explain: never times
    why: str = ""  # of the last answer on this thread
    times: Mapping[int, float] = {}


_state = _State()
_failed: set[tuple[str, str]] = set()  # (machine, key) whose operands did not fit beside the model, in this process


@contextmanager
def asking() -> Iterator[_State]:
    """Inside, nothing is timed; ``why`` and ``times`` of the state tell of the last question."""
    before = _state.asking, _state.why, _state.times
    _state.asking, _state.why, _state.times = True, "", {}
    try:
        yield _state
    finally:
        _state.asking, _state.why, _state.times = before


@contextmanager
def _force(code: int) -> Iterator[None]:
    before, _state.forced = _state.forced, code
    try:
        yield
    finally:
        _state.forced = before


def candidates(call: Call) -> list[int]:
    """The library, and the fused kernel's tiles and slices that serve the sizes."""
    found = [LIBRARY, code_of(SMALLEST)]
    if call["k"] * _DTYPES[call["dtype"]].itemsize % 16 == 0:
        found += [code_of(0), code_of(1)]
    if call["slices"] > 1 and not call["stats"]:
        found.append(code_of(SMALLEST, call["slices"]))
    return found


def key_of(call: Call) -> str:
    """The sizes in words, the same in every process."""
    name = "conv_bn_act_train" if call["stats"] else "conv_bn_act"
    flags = f"act{call['activation']}" + (" residual" if call["residual"] else "")
    pairs = " ".join(
        f"{short}{call[f'{long}_h']}x{call[f'{long}_w']}"
        for short, long in zip("spd", ("stride", "pad", "dilation"), strict=True)
    )
    sizes = f"N{call['n']} C{call['c']} H{call['h']} W{call['w']} K{call['k']} k{call['r']}x{call['s']}"
    return f"{name} sm_{call['architecture']} {str(_DTYPES[call['dtype']])[6:]} {sizes} {pairs} {flags}"


def choose(values: Sequence[int]) -> int:
    """A candidate's number for a call, or UNDECIDED: the model's. ``values``: of FIELDS. The op ``conv_bn_act_measured``."""
    if _state.forced is not None:
        return _state.forced
    call = dict(zip(FIELDS, values, strict=True))
    _state.times = {}
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        _state.why = "deterministic"
        return UNDECIDED
    machine, key, codes = device.machine(), key_of(call), candidates(call)
    with _autotune.lock:
        times = _autotune.known(machine, key)
        if not times.keys() >= set(codes):
            _state.why = _why_not(machine, key)
            if _state.why:
                return UNDECIDED
            try:
                times = times | time_candidates(call, codes)
            except torch.OutOfMemoryError:
                _failed.add((machine, key))
                _state.why = "no memory"
                return UNDECIDED
            _autotune.keep(machine, key, times)
    _state.why, _state.times = "measured", {code: times[code] for code in codes}
    return _autotune.best_of(times, codes, LIBRARY)


def _why_not(machine: str, key: str) -> str:
    if _state.asking:
        return device.forbids() or "not measured yet"
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return "tracing"
    return device.forbids() or ("no memory" if (machine, key) in _failed else "")


def time_candidates(call: Call, codes: Sequence[int]) -> _autotune.Times:
    """Median microseconds of every candidate: a warm-up, then samples in turn; hopeless ones keep the time of their warm-up."""
    run = _runner(call)

    def calls(code: int) -> Callable[[], Any]:
        def once() -> None:
            with _force(code):
                run()

        return once

    # Neither the user's modes and autograd nor autocast see these calls.
    with torch.no_grad(), _disable_current_modes(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        warm = {code: min(device.sample(calls(code)) for _ in range(_WARM_UP)) for code in codes}
        limit = _HOPELESS * min(warm.values())
        hopeful = [code for code in codes if warm[code] <= limit]
        samples: dict[int, list[float]] = {code: [] for code in hopeful}
        for index in range(_ROUNDS):
            for code in hopeful if index % 2 else reversed(hopeful):
                samples[code].append(device.sample(calls(code)))
    return {code: statistics.median(samples[code]) if code in samples else warm[code] for code in codes}


def _runner(call: Call) -> Callable[[], Any]:
    """The op on tensors of the call's sizes."""
    dtype, n, k = _DTYPES[call["dtype"]], call["n"], call["k"]
    x = device.tensor((n, call["c"], call["h"], call["w"]), dtype)
    weight = device.tensor((k, call["c"], call["r"], call["s"]), dtype)
    zeros, ones = x.new_zeros(k, dtype=torch.float32), x.new_ones(k, dtype=torch.float32)
    pairs = [[call[f"{name}_h"], call[f"{name}_w"]] for name in ("stride", "pad", "dilation")]
    spans = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip((call["h"], call["w"]), (call["r"], call["s"]), *pairs, strict=True)
    ]
    residual = device.tensor((n, k, *spans), dtype) if call["residual"] else None
    if call["stats"]:
        train = op("conv_bn_act_train")
        return lambda: train(x, weight, None, None, None, ones, zeros, None, *pairs, 1, 0.1, 1e-5, False, 1, 0.0, False)
    infer = op("conv_bn_act")
    return lambda: infer(
        x, weight, None, zeros, ones, ones, zeros, residual, *pairs, 1, 1e-5, False, call["activation"], 0.1
    )  # fmt: skip
