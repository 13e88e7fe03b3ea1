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
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _is_torch_function_mode_enabled
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .. import _extension
from .._backend import current
from ._run import _no_global_hooks, has_hooks, is_plain
from ._tape import Tape, record

_ON = os.environ.get("DL4DS_REPLAY") != "0"
_SLOT = "_dl4ds_replay"
_OURS = "dl4ds_kernels."
_MAX_SIZES = 32  # recorded of one module


class _Recordings:
    """What is known of one module; copies and pickles as an empty one."""

    __slots__ = ("keep", "lines", "seen", "snapshot", "tapes")

    def __init__(self) -> None:
        self.snapshot, self.lines, self.keep = b"", b"", []
        self.tapes: dict[Any, Tape] = {}
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
    """``forward()``, which runs ``module`` on ``xs``; without gradients on the CPU, what was recorded of it.

    ``is_pure`` says of a module below this one whether nothing but what it holds and reads has a say in its forward.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _ON or _busy.recording or not _is_ordinary(xs, backend):
        return forward()
    key = (*[(x.shape, x.stride()) for x in xs], torch.get_num_threads(), torch.is_inference_mode_enabled())
    known = module.__dict__.get(_SLOT)
    if known is None:
        known = module.__dict__[_SLOT] = _Recordings()
    tape = known.tapes.get(key)
    if tape is not None:
        more = _tensors_of(module, known, tape)
        if more is not None:
            return tape.run((*xs, *more))
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


def _tensors_of(module: nn.Module, known: _Recordings, tape: Tape) -> list[Tensor] | None:
    """Parameters, buffers and packed weights for a recording; None if the module is not what it was."""
    host = _extension.host()
    host.prefetch_lines(known.lines)
    host.prefetch_lines(tape.lines)
    if not host.module_unchanged(module, known.snapshot):
        known.tapes, known.seen = {}, {}
        return None
    return tape.tensors()


def _record(
    module: nn.Module, xs: tuple[Tensor, ...], forward: Callable[[], Any], is_pure: Callable[[nn.Module], bool],
    known: _Recordings, key: Any,
) -> Any:  # fmt: skip
    modules = list(module.modules())
    below = (m for m in modules if m is not module)
    if any(m.training for m in modules) or any(has_hooks(m) or not is_pure(m) for m in below):
        return forward()
    _busy.recording = True
    try:
        out, tape = record(modules, xs, forward)
    finally:
        _busy.recording = False
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
