"""What a forward comes to, written down while it runs: the same op calls, on registers (for ``_replay.py``)."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _packing
from ..functional._common import call

_MAX_CALLS = 4096  # of a recording
_DTYPE = attrgetter("dtype")
_IMMUTABLE = (bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)
# What is made of a weight once, and must not be made again at every call.
_PREPARES = (
    "dl4ds_kernels::conv_bn_act_pack",
    "dl4ds_kernels::conv_transpose_bn_act_pack",
    "mkldnn::_reorder_convolution_weight",
)


class _Call(NamedTuple):
    """One op call. Arguments that are tensors stand in registers: ``places`` says which argument is read from where."""

    function: Any
    is_ours: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: tuple[tuple[int, Any], ...]  # (position, a register, or a list or tuple of registers and _Constants)
    outs: Any  # a register, or a tuple of registers
    frees: tuple[int, ...]  # nobody reads these registers later


class _Constant(NamedTuple):
    """A value among registers."""

    value: Any


class Tape(NamedTuple):
    """A recorded forward: ``tape.run((*inputs, *tape.tensors()))``."""

    calls: tuple[_Call, ...]
    registers: int
    result: Any  # as an argument in _Call.places
    rows: tuple[tuple[dict[str, Any], str], ...]  # where parameters and buffers lie
    dtypes: list[torch.dtype]
    packs: tuple[tuple[nn.Module, int], ...]  # (convolution, algorithm)
    lines: bytes  # addresses of the cache lines that looking at all of these reads

    def tensors(self) -> list[Tensor] | None:
        """Parameters, buffers and packed weights as they are now; None where another dtype or weight took the place of one."""
        found = [holder[name] for holder, name in self.rows]
        if list(map(_DTYPE, found)) != self.dtypes:
            return None
        for conv, algorithm in self.packs:
            packed = _packing.kept(conv, conv._parameters["weight"], algorithm)
            if packed is None:  # of a weight that has been written to
                return None
            found.append(packed)
        return found

    def run(self, tensors: tuple[Tensor, ...]) -> Any:
        """The calls on these tensors; a map is freed when it has been read for the last time."""
        registers: list[Any] = [*tensors, *[None] * (self.registers - len(tensors))]
        for function, is_ours, constants, kwargs, places, outs, frees in self.calls:
            args = list(constants)
            for position, place in places:
                args[position] = _read(registers, place)
            out = call(function, False, *args) if is_ours else function(*args, **kwargs)
            del args  # holds maps
            if type(outs) is int:
                registers[outs] = out
            else:
                for register, one in zip(outs, out, strict=True):
                    registers[register] = one
            del out
            for register in frees:
                registers[register] = None
        return _read(registers, self.result)


def _read(registers: list[Any], place: Any) -> Any:
    if type(place) is int:
        return registers[place]
    if type(place) is _Constant:
        return place.value
    if type(place) is dict:
        return {key: _read(registers, one) for key, one in place.items()}
    return type(place)([registers[one] if type(one) is int else _read(registers, one) for one in place])


def record(modules: Iterable[nn.Module], xs: tuple[Tensor, ...], forward: Callable[[], Any]) -> tuple[Any, Tape | None]:
    """(what ``forward()`` returns, its tape); ``modules`` are all that hold its parameters, ``xs`` its inputs.

    None in place of a tape that could not be repeated: an op whose result is no tensor, or a tensor of unknown origin.
    """
    writer = _Writer(modules, xs)
    with _Recorder(writer):
        out = forward()
    return out, writer.tape(out)


class _Recorder(TorchDispatchMode):
    """Hands every op with its arguments and result to a writer."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self._writer = writer


def _dispatch(self: _Recorder, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    out = func(*args, **(kwargs or {}))
    self._writer.add(func, args, kwargs or {}, out)
    return out


# Not in the class body: what is defined there is wrapped for torch.compile, and its first call imports all of that (a second).
_Recorder.__torch_dispatch__ = _dispatch  # type: ignore[method-assign]


class _Unknown(Exception):
    """Something that a recording cannot say where to find again."""


class _Writer:
    """Turns calls into those of a tape. No map is held on to: what a register stands for is known by a weak reference.

    While it is being written, a tape's registers are numbered by kind: inputs, held tensors, packed weights, results.
    """

    def __init__(self, modules: Iterable[nn.Module], xs: tuple[Tensor, ...]) -> None:
        self._held: dict[int, tuple[dict[str, Any], str]] = {}
        self._packed: dict[int, tuple[nn.Module, int]] = {}
        for m in modules:
            for holder in (m._parameters, m._buffers):
                self._held.update((id(t), (holder, name)) for name, t in holder.items() if t is not None)
            self._packed.update((id(t), (m, algorithm)) for algorithm, t in _packing.packs(m).items())
        self._known: dict[int, tuple[weakref.ref[Tensor], _Register]] = {}
        self._inputs = len(xs)
        for i, x in enumerate(xs):
            self._note(x, _Register("input", i))
        self._rows: list[tuple[dict[str, Any], str]] = []
        self._packs: list[tuple[nn.Module, int]] = []
        self._made = 0
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] | None = []  # None: cannot be repeated

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Write a call down. One whose result is no tensor, or with a tensor of unknown origin, cannot be repeated."""
        if self._calls is None:
            return
        try:
            if func._schema.name in _PREPARES or len(self._calls) == _MAX_CALLS:
                raise _Unknown
            found = tuple(self._place(a) for a in args)
            named = {key: self._place(value) for key, value in kwargs.items()}
            if not all(type(place) is _Constant for place in named.values()):
                raise _Unknown
            self._calls.append((func, found, {key: place.value for key, place in named.items()}, self._target(out)))
        except _Unknown:
            self._calls = None

    def tape(self, out: Any) -> Tape | None:
        """The recording of a forward that returned ``out``; None if there is none."""
        if not self._calls:
            return None
        try:
            result = self._place(out)
        except _Unknown:
            return None
        rows, packs = tuple(self._rows), tuple(self._packs)
        tensors = [holder[name] for holder, name in rows]
        first = {"input": 0, "held": self._inputs, "pack": self._inputs + len(rows)}
        first["made"] = first["pack"] + len(packs)
        frees = _last_reads(self._calls, result)
        calls = []
        for i, (func, args, kwargs, outs) in enumerate(self._calls):
            places = tuple((p, _numbered(a, first)) for p, a in enumerate(args) if type(a) is not _Constant)
            constants = tuple(a.value if type(a) is _Constant else None for a in args)
            dying = tuple(_numbered(register, first) for register in frees.get(i, ()))
            ours = func._schema.name.startswith("dl4ds_kernels::")
            calls.append(_Call(func, ours, constants, kwargs, places, _numbered(outs, first), dying))
        return Tape(
            tuple(calls), first["made"] + self._made, _numbered(result, first), rows, list(map(_DTYPE, tensors)), packs,
            _lines_of(tensors, packs),
        )  # fmt: skip

    def _target(self, out: Any) -> Any:
        if isinstance(out, (tuple, list)):
            if not all(type(one) is Tensor for one in out):
                raise _Unknown
            return tuple(self._target(one) for one in out)
        if type(out) is not Tensor:
            raise _Unknown
        register = self._find(out)  # what an op in place returns has one already
        if register is None:
            register = self._note(out, _Register("made", self._made))
            self._made += 1
        return register

    def _place(self, value: Any) -> Any:
        """Where an argument or result comes from: a register, a constant, or a list, tuple or dict of them."""
        if isinstance(value, Tensor):
            return self._find(value) or self._first_use(value)
        if type(value) in (list, tuple, dict):
            inner = list(map(self._place, value.values() if type(value) is dict else value))
            if all(type(one) is _Constant for one in inner):
                return _Constant(value.copy() if type(value) is not tuple else value)
            return dict(zip(value, inner, strict=True)) if type(value) is dict else type(value)(inner)
        if value is None or type(value) in _IMMUTABLE:
            return _Constant(value)
        raise _Unknown

    def _find(self, t: Tensor) -> _Register | None:
        found = self._known.get(id(t))
        return found[1] if found is not None and found[0]() is t else None

    def _note(self, t: Tensor, register: _Register) -> _Register:
        self._known[id(t)] = weakref.ref(t), register
        return register

    def _first_use(self, t: Tensor) -> _Register:
        if id(t) in self._held:
            self._rows.append(self._held[id(t)])
            return self._note(t, _Register("held", len(self._rows) - 1))
        if id(t) in self._packed:
            self._packs.append(self._packed[id(t)])
            return self._note(t, _Register("pack", len(self._packs) - 1))
        raise _Unknown


class _Register(NamedTuple):
    kind: str
    number: int


def _registers(place: Any) -> Iterator[_Register]:
    if type(place) is _Register:
        yield place
    elif type(place) is not _Constant:
        for one in place.values() if type(place) is dict else place:
            yield from _registers(one)


def _numbered(place: Any, first: dict[str, int]) -> Any:
    """The same with registers as numbers."""
    if type(place) is _Register:
        return first[place.kind] + place.number
    if type(place) is _Constant:
        return place
    if type(place) is dict:
        return {key: _numbered(one, first) for key, one in place.items()}
    return type(place)([_numbered(one, first) for one in place])


def _last_reads(calls: list[Any], result: Any) -> dict[int, list[_Register]]:
    """For each call the results that nobody reads behind it."""
    last: dict[_Register, int] = {}
    for i, (_, args, _, outs) in enumerate(calls):
        for place in (*args, outs):
            last.update((register, i) for register in _registers(place) if register.kind == "made")
    for register in _registers(result):
        last.pop(register, None)
    found: dict[int, list[_Register]] = {}
    for register, i in last.items():
        found.setdefault(i, []).append(register)
    return found


def _lines_of(tensors: list[Tensor], packs: tuple[tuple[nn.Module, int], ...]) -> bytes:
    """Addresses of the cache lines that a look at these tensors and at the holders of packed weights reads."""
    lines = array("Q")
    for t in (*tensors, *(_packing.packs(conv)[algorithm] for conv, algorithm in packs)):
        lines.extend((id(t), t._cdata, t._cdata + 64, t._cdata + 128))
    for conv, _ in packs:
        holder = _packing.packs(conv)
        lines.extend((id(conv._parameters), id(holder), id(conv.__dict__[_packing.SLOT])))
        lines.append(conv._parameters["weight"].untyped_storage()._cdata)
    return lines.tobytes()
