"""What a forward comes to, written down while it runs: a function of the same op calls (for ``_replay.py``)."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _packing
from ..functional._common import call

_MAX_CALLS = 4096  # of a recording
_DTYPE = attrgetter("dtype")
# What is made of a weight once, and must not be made again at every call.
_PREPARES = (
    "dl4ds_kernels::conv_bn_act_pack",
    "dl4ds_kernels::conv_transpose_bn_act_pack",
    "mkldnn::_reorder_convolution_weight",
)


class Tape(NamedTuple):
    """A recorded forward: ``run(*inputs, *tape.tensors())``."""

    run: Callable[..., Any]
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._writer.add(func, args, kwargs or {}, out)
        return out


class _Unknown(Exception):
    """Something that a recording cannot say where to find again."""


class _Writer:
    """Turns calls into a function of the same calls: one line each, and the names that nobody reads later freed.

    No map is held on to: what a name stands for is known by a weak reference.
    """

    def __init__(self, modules: Iterable[nn.Module], xs: tuple[Tensor, ...]) -> None:
        self._held: dict[int, tuple[dict[str, Any], str]] = {}
        self._packed: dict[int, tuple[nn.Module, int]] = {}
        for m in modules:
            for holder in (m._parameters, m._buffers):
                self._held.update((id(t), (holder, name)) for name, t in holder.items() if t is not None)
            self._packed.update((id(t), (m, algorithm)) for algorithm, t in _packing.packs(m).items())
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._inputs = [self._give_name(x, f"x{i}") for i, x in enumerate(xs)]
        self._tensors: dict[str, tuple[dict[str, Any], str]] = {}
        self._packs: dict[str, tuple[nn.Module, int]] = {}
        self._constants: dict[str, Any] = {"call": call}
        self._lines: list[str] | None = []  # None: a call cannot be repeated
        self._made = 0

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Write a call down. One whose result is no tensor, or with a tensor of unknown origin, cannot be repeated."""
        if self._lines is None:
            return
        try:
            self._lines.append(self._line(func, args, kwargs, out))
        except _Unknown:
            self._lines = None
        else:
            if len(self._lines) > _MAX_CALLS:
                self._lines = None

    def tape(self, out: Any) -> Tape | None:
        """The recording of a forward that returned ``out``; None if there is none."""
        if not self._lines:
            return None
        try:
            result = self._text(out)
        except _Unknown:
            return None
        parameters = ", ".join([*self._inputs, *self._tensors, *self._packs])
        body = "\n".join(f"    {line}" for line in _with_frees(self._lines, result))
        namespace = dict(self._constants)
        exec(compile(f"def run({parameters}):\n{body}\n    return {result}", "<dl4ds_kernels replay>", "exec"), namespace)
        rows, packs = tuple(self._tensors.values()), tuple(self._packs.values())
        tensors = [holder[name] for holder, name in rows]
        return Tape(namespace["run"], rows, list(map(_DTYPE, tensors)), packs, _lines_of(tensors, packs))

    def _line(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> str:
        name = func._schema.name
        if name in _PREPARES:
            raise _Unknown
        arguments = [self._text(a) for a in args] + [f"{k}={self._text(v)}" for k, v in kwargs.items()]
        function = self._constant(func)
        if name.startswith("dl4ds_kernels::"):
            made = f"call({function}, False, {', '.join(arguments)})"
        else:
            made = f"{function}({', '.join(arguments)})"
        return f"{self._target(out)} = {made}"

    def _target(self, out: Any) -> str:
        if isinstance(out, (tuple, list)):
            return "(" + "".join(f"{self._target(o)}, " for o in out) + ")"
        if type(out) is not Tensor:
            raise _Unknown
        name = self._name(out)  # what an op in place returns has one already
        if name is None:
            name = self._give_name(out, f"t{self._made}")
            self._made += 1
        return name

    def _name(self, t: Tensor) -> str | None:
        found = self._names.get(id(t))
        return found[1] if found is not None and found[0]() is t else None

    def _give_name(self, t: Tensor, name: str) -> str:
        self._names[id(t)] = weakref.ref(t), name
        return name

    def _text(self, value: Any) -> str:
        """An expression for an argument or a result."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (list, tuple, torch.Size):
            inner = "".join(f"{self._text(v)}, " for v in value)
            return f"[{inner}]" if type(value) is list else f"({inner})"
        if type(value) is dict and all(type(k) is str for k in value):
            return "{" + "".join(f"{k!r}: {self._text(v)}, " for k, v in value.items()) + "}"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) in (float, torch.dtype, torch.device, torch.layout, torch.memory_format):
            return self._constant(value)
        raise _Unknown

    def _tensor(self, t: Tensor) -> str:
        name = self._name(t)
        if name is None:
            if id(t) in self._held:
                name = f"p{len(self._tensors)}"
                self._tensors[name] = self._held[id(t)]
            elif id(t) in self._packed:
                name = f"w{len(self._packs)}"
                self._packs[name] = self._packed[id(t)]
            else:
                raise _Unknown
            self._give_name(t, name)
        return name

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name


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


def _with_frees(lines: list[str], result: str) -> list[str]:
    """The lines, and after the last that reads a made tensor its name set free: the memory goes to the next op."""
    last: dict[str, int] = {}
    for i, line in enumerate(lines):
        last.update((word, i) for word in _words(line) if word[0] == "t")
    for word in _words(result):
        last.pop(word, None)
    dying: dict[int, list[str]] = {}
    for word, i in last.items():
        dying.setdefault(i, []).append(word)
    return [text for i, line in enumerate(lines) for text in (line, *([f"del {', '.join(dying[i])}"] if i in dying else []))]


def _words(line: str) -> list[str]:
    return [w for w in "".join(c if c.isalnum() else " " for c in line).split() if w[1:].isdigit()]
