"""Refuse to trace a forward whose effect is more than the tensor operations it calls.

A symbolic trace keeps what happens to proxies and silently drops or freezes everything else: ``with torch.no_grad()``, a
coin flip, a printed line, a list outside the module. While a forward is traced, ``audited`` watches each Python frame and C
function that the user's code enters, and each torch call on plain tensors, and raises :class:`Untraceable` for those.
"""

from __future__ import annotations

import dis
import functools
import gc
import sys
from types import CodeType, FrameType
from typing import Any

from torch.overrides import TorchFunctionMode


class Untraceable(Exception):
    """The forward cannot be represented by a graph; the message says why."""


# Frames of these modules, and all they call, are the tracer's own machinery.
_MACHINERY = ("torch.fx", "torch.overrides", "torch.utils._pytree", "dl4ds_kernels.convert")
# torch code without state that a forward may pass through; other torch and standard-library code is refused.
_STATELESS = (
    "torch.nn.functional", "torch.nn.modules", "torch.functional", "torch._jit_internal", "torch.utils.data",
    "collections", "functools", "typing", "abc", "enum", "operator", "dataclasses", "_collections_abc",
)  # fmt: skip
_C_MODULES = frozenset(("_operator", "math", "itertools", "_functools", "_collections", "_abc"))
_IMPURE_BUILTINS = frozenset(
    ("print", "open", "input", "exec", "eval", "compile", "setattr", "delattr", "globals", "vars", "locals", "id", "__import__")
)
_STATE_PREFIXES = ("is_", "_is_", "get_", "_get", "set_", "_set", "manual_seed", "seed", "initial_seed")
_IMPURE_OPCODES = frozenset(("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR"))
_WITH_OPCODES = frozenset(("BEFORE_WITH", "BEFORE_ASYNC_WITH", "SETUP_WITH"))


class audited:
    """Watch the code run in the block, in this thread; ``proxy`` is the class that stands for traced tensors."""

    def __init__(self, proxy: type) -> None:
        self._watcher, self._constants = _Watcher(), _NoConstants(proxy)

    def __enter__(self) -> None:
        self._constants.__enter__()
        # A collection now would run finalisers of unrelated objects, which the watcher would take for the forward's own calls.
        self._collecting = gc.isenabled()
        gc.disable()
        self._previous = sys.getprofile()
        sys.setprofile(self._watcher)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        sys.setprofile(self._previous)
        if self._collecting:
            gc.enable()
        self._constants.__exit__(kind, value, trace)
        if self._watcher.found:
            raise Untraceable(self._watcher.found)


class _NoConstants(TorchFunctionMode):
    """Torch calls without a proxy among their arguments make constants or change state: both would be frozen."""

    def __init__(self, proxy: type) -> None:
        super().__init__()
        self.proxy = proxy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _mentions((args, kwargs), self.proxy):
            raise Untraceable(f"calls {getattr(func, '__name__', func)} on something that is not an input")
        return func(*args, **kwargs)


def _mentions(value: Any, proxy: type) -> bool:
    kind = type(value)
    if kind is tuple or kind is list:
        return any(_mentions(item, proxy) for item in value)
    if kind is dict:
        return any(_mentions(item, proxy) for item in value.values())
    return issubclass(kind, proxy) or kind.__name__ == "Attribute"


class _Watcher:
    """A profile function that stops at the first impure thing, before it happens.

    ``found`` keeps the reason, for forwards that catch every exception.
    """

    def __init__(self) -> None:
        self.found = ""
        self._machinery: FrameType | None = None  # the outermost machinery frame that is active

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if self._machinery is not None:
            if event == "return" and frame is self._machinery:
                self._machinery = None
            return
        module = frame.f_globals.get("__name__", "")
        if _within(module, _MACHINERY):
            if event == "call":
                self._machinery = frame
            return
        if self.found:
            return
        if event == "call":
            self.found = _judge_frame(frame.f_code, module)
        elif event == "c_call" and not _within(module, ("torch",)):
            self.found = _judge_builtin(arg, frame)
        if self.found:
            raise Untraceable(self.found)


def _within(module: str, roots: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)


def _judge_frame(code: CodeType, module: str) -> str:
    if _within(module, _STATELESS):
        return ""
    top = module.partition(".")[0]
    if top in ("torch", "numpy") or top in sys.stdlib_module_names:
        return f"calls {module}.{code.co_name}"
    return _impure_code(code)


@functools.lru_cache(maxsize=4096)
def _impure_code(code: CodeType) -> str:
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in _WITH_OPCODES or (name == "LOAD_SPECIAL" and "enter" in str(instruction.argrepr)):
            return f"{code.co_name} has a with statement"
        outer = name == "STORE_DEREF" and instruction.argval in code.co_freevars
        if outer or name in _IMPURE_OPCODES:
            return f"{code.co_name} assigns {instruction.argval}, which is not its own"
    return ""


def _judge_builtin(function: Any, frame: FrameType) -> str:
    name, module = getattr(function, "__name__", ""), getattr(function, "__module__", None)
    owner = getattr(function, "__self__", None)
    if module == "builtins":
        return f"calls {name}()" if name in _IMPURE_BUILTINS else ""
    if type(owner) in (list, dict, set) or type(owner).__name__ == "OrderedDict":
        outside = any(owner is value for value in frame.f_globals.values())
        return f"calls .{name}() of a global {type(owner).__name__}" if outside else ""
    if (module or getattr(owner, "__module__", None) or getattr(owner, "__name__", "")).startswith("torch"):
        return f"calls torch's {name}()" if name.startswith(_STATE_PREFIXES) else ""
    if module in _C_MODULES or (module is None and type(owner).__module__ in ("builtins", "collections")):
        return ""  # arithmetic, or a method of a string, iterator, view, …
    return f"calls {module or type(owner).__name__}.{name}()"
