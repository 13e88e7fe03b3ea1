"""What the operations of a traced forward do to memory: whose output is new, who may write to what it reads.

Unknown modules are followed into their own forwards: a squeeze-and-excitation block returns a product, which is new memory; a
timm ``ConvNormAct`` starts with a convolution, which only reads. What such an answer depends on becomes a guard of the plan.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..modules._run import ActSpec, act_spec
from .audit import Untraceable
from .passing import module_source, passes, runs_its_class
from .trace import TENSOR, stock_signature, trace_forward

FUNCTION_ACTS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu", F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish",
}  # fmt: skip
# Exact types whose output is new memory and whose input is only read.
_ALWAYS_NEW = frozenset(
    (
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.AvgPool2d, nn.Sigmoid, nn.Tanh,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    )
)  # fmt: skip
_NEW_FUNCTIONS = frozenset(
    (
        operator.add, operator.mul, operator.sub, operator.truediv, torch.add, torch.mul, torch.sub, torch.div, torch.cat,
        torch.relu, torch.sigmoid, torch.mean, torch.sum, torch.amax,
        "add", "mul", "sub", "div", "relu", "sigmoid", "mean", "sum", "amax",
    )
)  # fmt: skip
_DEEPEST = 4  # modules inside modules that are followed


class Facts(NamedTuple):
    """What one call of a module with one tensor does to memory, and the test that says whether it still does."""

    new: bool
    reads_only: bool
    hold: Callable[[nn.Module], bool] | None  # None: nothing is known


_UNKNOWN = Facts(False, False, None)


class Effects:
    """Answers for one container's graph. ``relied``: the facts, by submodule, that an answer was built on."""

    def __init__(self, container: nn.Module, depth: int = 0) -> None:
        self._container, self._depth = container, depth
        self._facts: dict[str, Facts] = {}
        self.relied: dict[str, Callable[[nn.Module], bool]] = {}

    def is_new(self, node: fx.Node) -> bool:
        """Whether the node's output is certainly new memory."""
        if node.op == "call_module":
            module = self._container.get_submodule(node.target)
            if type(module) in _ALWAYS_NEW:
                return True
            if act_spec(module) is not None:
                return not module.inplace or self.is_new(first_argument(node))
            if _takes_one(node) and passes(module):
                return self.is_new(first_argument(node))
            return _takes_one(node) and self._rely_on(node.target, "new")
        if node.op in ("call_function", "call_method") and node.target in _NEW_FUNCTIONS:
            return "out" not in node.kwargs
        act = function_act(node)
        if act is not None or (node.op == "call_function" and node.target is operator.iadd):
            return (act is not None and not writes(node)) or self.is_new(first_argument(node))
        return False

    def may_write_input(self, node: fx.Node) -> bool:
        """Whether a module's call may write to the memory of its argument."""
        module = self._container.get_submodule(node.target)
        if not self._may_write(module):
            return False
        return not (_takes_one(node) and self._rely_on(node.target, "reads_only"))

    def _may_write(self, module: nn.Module) -> bool:
        if type(module) is nn.Sequential:
            for child in module:
                if self._may_write(child):
                    return True
                if type(child) in _ALWAYS_NEW:
                    return False
            return False
        if type(module) in _ALWAYS_NEW or type(module) in (nn.Identity, nn.MaxPool2d):
            return False
        return bool(getattr(module, "inplace", True))

    def _rely_on(self, path: str, fact: str) -> bool:
        if path not in self._facts:
            self._facts[path] = _facts(self._container.get_submodule(path), self._depth + 1)
        found = self._facts[path]
        if found.hold is not None and getattr(found, fact):
            self.relied[path] = found.hold
            return True
        return False


def _facts(module: nn.Module, depth: int) -> Facts:
    """Follow the module's own forward, called with one tensor and every other argument at its default."""
    if depth > _DEEPEST or not runs_its_class(module):
        return _UNKNOWN
    try:
        first, *others = stock_signature(module).parameters.values()
        if any(p.default is p.empty for p in others):
            return _UNKNOWN
        traced = trace_forward(module, {first.name: TENSOR} | {p.name: p.default for p in others})
    except (Untraceable, ValueError):  # ValueError: a forward without arguments
        return _UNKNOWN
    inner = Effects(module, depth)
    result = next(iter(n for n in traced.graph.nodes if n.op == "output")).args[0]
    new = isinstance(result, fx.Node) and inner.is_new(result)
    reads_only = not any(_writes_an_argument(node, inner) for node in traced.graph.nodes)
    names = ", ".join(("self", first.name, *(p.name for p in others)))
    condition = eval(f"lambda {names}: {' and '.join(traced.guards) or 'True'}", dict(traced.constants))
    probe = (torch.empty(0), *(p.default for p in others))
    relied = dict(inner.relied)

    def hold(module: nn.Module) -> bool:
        if not (runs_its_class(module) and condition(module, *probe)):
            return False
        return all(test(module.get_submodule(path)) for path, test in relied.items())

    return Facts(new, reads_only, hold)


def _writes_an_argument(node: fx.Node, effects: Effects) -> bool:
    """Whether a node may write to memory that came from outside: the arguments, parameters and buffers."""
    if node.op == "call_module":
        return not all(map(effects.is_new, node.all_input_nodes)) and effects.may_write_input(node)
    return writes(node) and not all(map(effects.is_new, node.all_input_nodes))


def _takes_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def guards(effects: Effects, constants: dict[str, Any]) -> Iterator[str]:
    """Conditions over ``self`` that say that what was relied on still holds; their names go into ``constants``."""
    for path, hold in effects.relied.items():
        name = f"_dl4ds_constant_{len(constants)}"
        constants[name] = hold
        yield f"{name}({module_source(path)})"


def first_argument(node: fx.Node) -> fx.Node | None:
    """The first operand, however it is passed."""
    if node.args:
        return node.args[0]
    return node.kwargs.get("input")


def writes(node: fx.Node) -> bool:
    """Whether a function or method call writes to one of its inputs."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    in_place_operator = getattr(node.target, "__module__", "") == "_operator" and name.startswith("i") and name != "index"
    in_place_operator &= name not in ("inv", "invert", "is_", "is_not", "indexOf", "itemgetter")
    flagged = node.kwargs.get("inplace", False) is not False or "out" in node.kwargs
    positional_flag = node.target in FUNCTION_ACTS and any(a is True for a in node.args[1:])
    return in_place_operator or flagged or positional_flag or (name.endswith("_") and not name.endswith("__"))


def function_act(node: fx.Node) -> ActSpec | None:
    """The activation that a function or method call computes, None for another call."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = FUNCTION_ACTS.get(node.target)
    if name is None or not isinstance(first_argument(node), fx.Node):
        return None
    slope = 0.0
    if name == "leaky_relu":
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    return ActSpec(name, float(slope)) if isinstance(slope, (int, float)) else None
