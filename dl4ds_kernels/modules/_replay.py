"""Forwards without gradients on the CPU that are recorded once and then repeated, op by op, without asking every layer anew.

Between two convolutions the caches are full of maps, and the few hundred Python calls that decide how the next one runs take as
long as a small layer: a tenth of ResNet-18's or DenseNet-121's pass at batch 1. So the second call of a size is recorded: the
ops that it came to, and for each of their tensors whose it is: an input, a parameter, a packed weight, an earlier op's output.
Later calls of that size compare the tree of modules with the recorded one (``module_unchanged`` in the compiled part: types,
modes, hooks, geometry, parameters, submodules) and what is not theirs (grad mode, autocast, threads, backend, …). If all of it
is as it was, the same ops are called with the tensors that the modules hold now; anything else runs the forward again.

A forward is recorded only if nothing else can have a say: no module is in training mode, hooked or patched, and each is
torch's, ours, or one whose forward ``dk.optimize`` could follow (control flow on data and side effects cannot be followed).
"""

from __future__ import annotations

import functools
import threading
from array import array
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _is_torch_function_mode_enabled
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from .. import _extension, _packing
from .._backend import current
from ..functional._common import call
from ._run import _no_global_hooks, has_hooks, is_plain

_SLOT = "_dl4ds_replay"
_OURS = "dl4ds_kernels."
_MAX_SIZES = 32  # recorded of one module
_MAX_CALLS = 4096  # of a recording
_DTYPE = attrgetter("dtype")
# What is made of a weight once, and must not be made again at every call.
_PREPARES = (
    "dl4ds_kernels::conv_bn_act_pack",
    "dl4ds_kernels::conv_transpose_bn_act_pack",
    "mkldnn::_reorder_convolution_weight",
)


class _Tape(NamedTuple):
    """A recording: what the generated ``run`` is called with after the inputs."""

    run: Callable[..., Any]
    tensors: tuple[tuple[dict[str, Any], str], ...]  # where parameters and buffers lie
    dtypes: list[torch.dtype]
    packs: tuple[tuple[nn.Module, int], ...]  # (convolution, algorithm)
    lines: bytes  # addresses of the cache lines that looking at all of these reads


class _Recordings:
    """What is known of one module; copies and pickles as an empty one."""

    __slots__ = ("keep", "lines", "seen", "snapshot", "tapes")

    def __init__(self) -> None:
        self.snapshot, self.lines, self.keep = b"", b"", []
        self.tapes: dict[Any, _Tape] = {}
        self.seen: dict[Any, int] = {}  # calls without a tape

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Recordings, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recordings:
        return _Recordings()


class _Busy(threading.local):
    """Whether this thread is recording: what runs inside is part of that recording."""

    recording = False


_busy = _Busy()


def drop(module: nn.Module) -> None:
    """Forget what was recorded of a module."""
    module.__dict__.pop(_SLOT, None)


def replayed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward of one tensor that is recorded and repeated."""

    @functools.wraps(forward)
    def run(self: nn.Module, x: Tensor) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or not x.is_cpu:
            return forward(self, x)
        if not type(self).__module__.startswith(_OURS):  # somebody's subclass may do more
            return forward(self, x)
        return run_replayed(self, (x,), lambda: forward(self, x), is_known)

    return run


def is_known(module: nn.Module) -> bool:
    """Whether a module is torch's or ours, so that its forward depends on what it holds and reads alone."""
    return type(module).__module__.startswith(("torch.nn.modules.", _OURS)) and is_plain(module)


def run_replayed(
    module: nn.Module,
    xs: tuple[Tensor, ...],
    forward: Callable[[], Any],
    is_pure: Callable[[nn.Module], bool],
    backend: str | None = None,
) -> Any:
    """``forward()``, which runs ``module`` on ``xs`` without gradients, or what was recorded of it.

    ``is_pure`` says of a module below this one whether nothing but what it holds and reads has a say in its forward.
    """
    if _busy.recording or not _is_ordinary(xs, backend):
        return forward()
    key = (*[(x.shape, x.stride()) for x in xs], torch.get_num_threads(), torch.is_inference_mode_enabled())
    known = module.__dict__.get(_SLOT)
    if known is None:
        known = module.__dict__[_SLOT] = _Recordings()
    tape = known.tapes.get(key)
    if tape is not None:
        more = _tensors_of(module, known, tape)
        if more is not None:
            return tape.run(*xs, *more)
    seen = known.seen[key] = known.seen.get(key, 0) + 1
    if seen < 2 or seen & (seen - 1):  # the first packs weights; what was in the way of the second may go later
        if len(known.seen) > 4 * _MAX_SIZES:
            known.seen.clear()
        return forward()
    return _record(module, xs, forward, is_pure, known, key)


def _is_ordinary(xs: tuple[Tensor, ...], backend: str | None) -> bool:
    """Whether nothing around the call changes how it runs."""
    return (
        (backend or current()) in ("auto", "cpu")
        and all(type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu for x in xs)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not _is_torch_function_mode_enabled()
        and _get_current_dispatch_mode() is None
        and torch.backends.mkldnn.enabled
        and _no_global_hooks()
        and _extension.status()["_C"].loaded
    )


def _tensors_of(module: nn.Module, known: _Recordings, tape: _Tape) -> list[Tensor] | None:
    """Parameters, buffers and packed weights for a recording; None if the module is not what it was."""
    host = _extension.host()
    host.prefetch_lines(known.lines)
    host.prefetch_lines(tape.lines)
    if not host.module_unchanged(module, known.snapshot):
        known.tapes, known.seen = {}, {}
        return None
    tensors = [holder[name] for holder, name in tape.tensors]
    if list(map(_DTYPE, tensors)) != tape.dtypes:
        return None
    for conv, algorithm in tape.packs:
        packed = _packing.kept(conv, conv._parameters["weight"], algorithm)
        if packed is None:  # of a weight that has been written to
            return None
        tensors.append(packed)
    return tensors


def _record(
    module: nn.Module, xs: tuple[Tensor, ...], forward: Callable[[], Any], is_pure: Callable[[nn.Module], bool],
    known: _Recordings, key: Any,
) -> Any:  # fmt: skip
    modules = list(module.modules())
    below = (m for m in modules if m is not module)
    if any(m.training for m in modules) or any(has_hooks(m) or not is_pure(m) for m in below):
        return forward()
    recorder = _Recorder()
    _busy.recording = True
    try:
        with recorder:
            out = forward()
    finally:
        _busy.recording = False
    tape = _Writer(modules, xs).tape(recorder.calls, out)
    if tape is not None:
        host = _extension.host()
        if not host.module_unchanged(module, known.snapshot):
            keep: list[Any] = []
            known.tapes, known.keep = {}, keep
            known.snapshot, known.lines = host.module_snapshot(module, keep)
        if len(known.tapes) >= _MAX_SIZES:
            known.tapes.clear()
        known.tapes[key] = tape
    return out


class _Recorder(TorchDispatchMode):
    """Notes every op with its arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class _Unknown(Exception):
    """Something that a recording cannot say where to find again."""


class _Writer:
    """Turns recorded calls into a function of the same calls: one line each, and the names that nobody reads later freed."""

    def __init__(self, modules: Iterable[nn.Module], xs: tuple[Tensor, ...]) -> None:
        self._held: dict[int, tuple[dict[str, Any], str]] = {}
        self._packed: dict[int, tuple[nn.Module, int]] = {}
        for m in modules:
            for holder in (m._parameters, m._buffers):
                self._held.update((id(t), (holder, name)) for name, t in holder.items() if t is not None)
            self._packed.update((id(t), (m, algorithm)) for algorithm, t in _packing.packs(m).items())
        self._names = {id(x): f"x{i}" for i, x in enumerate(xs)}
        self._inputs = list(self._names.values())
        self._tensors: dict[str, tuple[dict[str, Any], str]] = {}
        self._packs: dict[str, tuple[nn.Module, int]] = {}
        self._constants: dict[str, Any] = {"call": call}

    def tape(self, calls: list[Any], out: Any) -> _Tape | None:
        """None for calls that cannot be repeated: a result that is no tensor, a tensor of unknown origin."""
        try:
            lines = [self._line(*one) for one in calls[: _MAX_CALLS + 1]]
            result = self._text(out)
        except _Unknown:
            return None
        if len(calls) > _MAX_CALLS or not lines:
            return None
        parameters = ", ".join([*self._inputs, *self._tensors, *self._packs])
        body = "\n".join(f"    {line}" for line in _with_frees(lines, result))
        namespace = dict(self._constants)
        exec(compile(f"def run({parameters}):\n{body}\n    return {result}", "<dl4ds_kernels replay>", "exec"), namespace)
        rows = tuple(self._tensors.values())
        packs = tuple(self._packs.values())
        tensors = [holder[name] for holder, name in rows]
        return _Tape(namespace["run"], rows, list(map(_DTYPE, tensors)), packs, _lines_of(tensors, packs))

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
        name = self._names.get(id(out))  # what an op in place returns has its name already
        if name is None:
            name = self._names[id(out)] = f"t{len(self._names)}"
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
        name = self._names.get(id(t))
        if name is None:
            if id(t) in self._held:
                name = f"p{len(self._tensors)}"
                self._tensors[name] = self._held[id(t)]
            elif id(t) in self._packed:
                name = f"w{len(self._packs)}"
                self._packs[name] = self._packed[id(t)]
            else:
                raise _Unknown
            self._names[id(t)] = name
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
