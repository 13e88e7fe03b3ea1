"""Record one module's own forward as a ``torch.fx`` graph in which every submodule is a single node.

(A Sequential of nothing but BatchNorm, activation and dropout is no node: its children are, since they may continue a chain.)

The forward runs with a stand-in for ``self``: submodules read from it become callable leaves, tensors become proxies, and
every other attribute that is read becomes a guard, so that a plan made from the trace is used only while the attributes still
have the values it saw. Nothing is patched globally, so other threads may run models meanwhile. What a trace cannot show
faithfully (control flow on data, side effects, reads of global state) raises :class:`Untraceable`.
"""

from __future__ import annotations

import copy
import enum
import inspect
import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .audit import Untraceable, audited
from .passing import is_tail, module_source

TENSOR = object()  # an argument that is a tensor; any other argument value is a constant of the trace


class Tensors(NamedTuple):
    """An argument that is a list or tuple of ``count`` tensors."""

    kind: type
    count: int

    def matches(self, value: Any) -> bool:
        """Whether ``value`` is one."""
        return type(value) is self.kind and len(value) == self.count and all(isinstance(item, Tensor) for item in value)


def argument_kind(value: Any) -> Any:
    """What of a call's argument a trace depends on: :data:`TENSOR`, :class:`Tensors`, or the value itself."""
    if isinstance(value, Tensor):
        return TENSOR
    if type(value) in (list, tuple) and value and all(isinstance(item, Tensor) for item in value):
        return Tensors(type(value), len(value))
    return value


class Traced(NamedTuple):
    """A recorded forward: the graph, and the conditions (source text over ``self`` and ``constants``) under which it holds."""

    owner: str  # type name of the module
    graph: fx.Graph
    signature: inspect.Signature  # without self
    guards: tuple[str, ...]
    constants: dict[str, Any]
    inlined: tuple[str, ...] = ()  # paths of the submodules that are no node of their own
    from_instances: bool = True  # the conditions are about what instances hold themselves, in attributes that cannot be mutated


def trace_forward(module: nn.Module, arguments: Mapping[str, Any]) -> Traced:
    """Trace ``type(module).forward`` with ``arguments`` (by parameter name, ``TENSOR`` or a constant for each)."""
    signature = stock_signature(module)
    tracer = _LeafTracer()
    try:
        stand_in = _stand_in(module, "", tracer)
        positional, keywords = [], {}
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise Untraceable(f"forward takes {parameter}")
            placeholder = tracer.create_proxy("placeholder", name, (), {})
            value = arguments[name]
            tracer.guard_argument(name, value)
            if value is TENSOR:
                placeholder.known_tensor = True
                value = placeholder
            elif isinstance(value, Tensors):
                value = tracer.hand_out_tensors(placeholder, value)
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                positional.append(value)
        with audited(TensorProxy):
            result = type(module).forward(stand_in, *positional, **keywords)
        tracer.create_node("output", "output", (tracer.create_arg(result),), {})
        tracer.check_unchanged()
    except Untraceable:
        raise
    except Exception as error:  # whatever the forward does with a proxy; the reason goes into the report
        raise Untraceable(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    for node in reversed(tracer.graph.nodes):
        if node.op == "get_attr" and not node.users:
            tracer.graph.erase_node(node)
    inlined = tuple(tracer.inlined)
    return Traced(
        type(module).__name__, tracer.graph, signature, tuple(tracer.guards), tracer.constants, inlined, tracer.from_instances
    )  # fmt: skip


def stock_signature(module: nn.Module) -> inspect.Signature:
    """The signature of the class's forward, without ``self``."""
    signature = inspect.signature(type(module).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


class TensorProxy(fx.Proxy):
    """A proxy that keeps in-place operators in place and answers ``isinstance`` only where the answer is known."""

    known_tensor = False

    @property
    def __class__(self) -> type:  # read by isinstance()
        if self.known_tensor:
            return Tensor
        raise Untraceable("isinstance on an intermediate value")


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(TensorProxy, f"__{_name}__", _in_place(_name))


class _LeafTracer(fx.Tracer):
    """Collects nodes and guards."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.guards: dict[str, None] = {}
        self.constants: dict[str, Any] = {}
        self.stand_ins: dict[str, Any] = {}
        self.inlined: dict[str, None] = {}
        self.from_instances = True
        self._handed_out: list[tuple[Any, Any]] = []
        self._lists: list[tuple[Any, list[Any]]] = []

    def proxy(self, node: fx.Node) -> TensorProxy:
        return TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is TensorProxy:
            return a.node
        if isinstance(a, (Tensor, nn.Module)):
            raise Untraceable(f"uses a {type(a).__name__} that is not read from self")
        return fx.proxy.TracerBase.create_arg(self, a)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if kind == "call_method" and not hasattr(Tensor, target):
            raise Untraceable(f"calls .{target}() on an intermediate value")
        if kind == "call_function" and target is getattr and not hasattr(Tensor, args[0][1]):
            raise Untraceable(f"reads .{args[0][1]} of an intermediate value")
        return super().create_node(kind, target, *args, **kwargs)

    def constant(self, value: Any) -> str:
        name = f"_dl4ds_constant_{len(self.constants)}"
        self.constants[name] = value
        return name

    def guard(self, condition: str) -> None:
        self.guards[condition] = None

    def guard_argument(self, name: str, value: Any) -> None:
        if value is TENSOR:
            self.guard(f"isinstance({name}, {self.constant(Tensor)})")
        elif isinstance(value, Tensors):
            self.guard(f"{self.constant(value)}.matches({name})")
        elif value is None or isinstance(value, bool):
            self.guard(f"{name} is {value}")
        elif _is_plain(value) and not isinstance(value, (list, dict)):
            constant = self.constant(value)
            self.guard(f"type({name}) is {self.constant(type(value))} and {name} == {constant}")
        else:
            raise Untraceable(f"argument {name} is a {type(value).__name__}")

    def hand_out_tensors(self, placeholder: fx.Proxy, argument: Tensors) -> Any:
        """The list or tuple of proxies that the traced forward sees for such an argument."""
        items = [self.create_proxy("call_function", operator.getitem, (placeholder, i), {}) for i in range(argument.count)]
        for item in items:
            item.known_tensor = True
        shown = argument.kind(items)
        self._lists.append((shown, items))
        return shown

    def guard_attribute(self, owner: str, name: str, value: Any) -> Any:
        """Guard on a plain attribute; returns what the traced forward may see of it."""
        expression = f"{owner}.{name}"
        if value is None or isinstance(value, bool):
            self.guard(f"{expression} is {value}")
        elif _is_plain(value):
            self.guard(f"{expression} == {self.constant(copy.deepcopy(value))}")
            if isinstance(value, (list, dict, tuple)):  # a tuple may hold a list
                self.from_instances &= _is_immutable(value)
            if isinstance(value, (list, dict)):
                shown = copy.deepcopy(value)
                self._handed_out.append((shown, value))
                return shown
        elif isinstance(value, _BY_IDENTITY):
            self.guard(f"{expression} is {self.constant(value)}")
        else:
            raise Untraceable(f"reads self.{name}, a {type(value).__name__}")
        return value

    def check_unchanged(self) -> None:
        for shown, value in self._handed_out:
            if shown != value:
                raise Untraceable("changes a list or dict of self")
        for shown, items in self._lists:
            if len(shown) != len(items) or any(a is not b for a, b in zip(shown, items, strict=True)):
                raise Untraceable("changes a list that it was given")


_BY_IDENTITY = (
    types.FunctionType, types.BuiltinFunctionType, type, enum.Enum, torch.dtype, torch.device, torch.memory_format,
)  # fmt: skip


def _is_plain(value: Any) -> bool:
    """Numbers, strings, and lists, tuples and dicts of them: values that ``==`` compares completely."""
    kind = type(value)
    if kind in (tuple, list, torch.Size):
        return all(_is_plain(item) for item in value)
    if kind in (dict, OrderedDict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or kind in (bool, int, float, complex, str, bytes, slice)


def _is_immutable(value: Any) -> bool:
    """Whether a plain value stays what it is as long as it is the same object."""
    if isinstance(value, tuple):
        return all(_is_immutable(item) for item in value)
    return not isinstance(value, (list, dict))


class _StandIn:
    """Mixed in before the module's class; ``_dl4ds_origin`` on the made class says whom it stands for."""

    def __getattribute__(self, name: str) -> Any:
        origin = type(self)._dl4ds_origin
        if name == "__class__":
            return type(origin.module)
        return origin.read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"assigns self.{name}")

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"deletes self.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        origin = type(self)._dl4ds_origin
        if not origin.path:
            raise Untraceable("calls itself")
        if len(args) == 1 and not kwargs and is_tail(origin.module):
            return origin.inline(self, args[0])
        return origin.tracer.create_proxy("call_module", origin.path, args, kwargs)


def _stand_in(module: nn.Module, path: str, tracer: _LeafTracer) -> Any:
    made = tracer.stand_ins.get(path)
    if made is None:
        cls = type(module)
        if cls.__getattr__ is not nn.Module.__getattr__ or "__getattribute__" in vars(cls):
            raise Untraceable(f"{cls.__name__} has its own attribute lookup")
        made = object.__new__(type(cls)(cls.__name__, (_StandIn, cls), {"_dl4ds_origin": _Origin(module, path, tracer)}))
        tracer.stand_ins[path] = made
    return made


class _Origin:
    """Answers the attribute reads of one stand-in and records them."""

    def __init__(self, module: nn.Module, path: str, tracer: _LeafTracer) -> None:
        self.module, self.path, self.tracer = module, path, tracer
        self.source = module_source(path)

    def read(self, stand_in: Any, name: str) -> Any:
        module, attributes = self.module, self.module.__dict__
        if name == "_modules":
            self.tracer.guard(f"tuple({self.source}._modules) == {self.tracer.constant(tuple(module._modules))}")
            return OrderedDict((child, self.child(child)) for child in module._modules)
        if name in ("__dict__", "_parameters", "_buffers"):
            raise Untraceable(f"reads self.{name}")
        on_class = inspect.getattr_static(type(module), name, None)
        if isinstance(on_class, property):
            return on_class.__get__(stand_in, type(module))
        if name in attributes:
            return self.tracer.guard_attribute(self.source, name, attributes[name])
        if isinstance(on_class, (types.FunctionType, classmethod, staticmethod)):
            if not name.startswith("__"):
                self.tracer.guard(f"{name!r} not in {self.source}.__dict__")
            return on_class.__get__(stand_in, type(module))
        if name in module._modules:
            return self.child(name)
        for kind in ("_parameters", "_buffers"):
            if name in getattr(module, kind):
                return self.tensor(kind, name)
        if name.startswith("__") or on_class is not None:
            self.tracer.from_instances = False
            return self.tracer.guard_attribute(self.source, name, getattr(type(module), name))
        self.tracer.guard(f"not hasattr({self.source}, {name!r})")
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")

    def inline(self, stand_in: Any, x: Any) -> Any:
        """The forward of a Sequential, its children as nodes."""
        self.tracer.guard(f"{self.tracer.constant(is_tail)}({self.source})")
        self.tracer.inlined[self.path] = None
        for child in stand_in._modules.values():
            x = child(x)
        return x

    def child(self, name: str) -> Any:
        module = self.module._modules[name]
        present = "is" if module is None else "is not"
        self.tracer.guard(f"{self.source}._modules.get({name!r}) {present} None")
        return None if module is None else _stand_in(module, f"{self.path}.{name}".lstrip("."), self.tracer)

    def tensor(self, kind: str, name: str) -> Any:
        missing = getattr(self.module, kind)[name] is None
        self.tracer.guard(f"{self.source}.{kind}.get({name!r}) {'is' if missing else 'is not'} None")
        if missing:
            return None
        return self.tracer.create_proxy("get_attr", f"{self.path}.{name}".lstrip("."), (), {})
