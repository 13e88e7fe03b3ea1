"""Find conv -> bn -> add -> act chains in a traced forward, by dataflow.

A *candidate* is a maximal line of such operations, each fed by the one before. Links that cannot be fused (the value is used
elsewhere, something between might change it) cut a candidate into pieces; the pieces that are still a known pattern are what
``plan`` replaces.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules._run import NO_ACT, ActSpec, act_spec
from .effects import Effects, first_argument, function_act, writes
from .foreign import has_activation, is_norm_act

# NORM_ACT: a BatchNorm whose module applies an activation too (timm's); it ends a chain.
CONV, CONV_T, BN, ADD, ACT, NORM_ACT, LRN = "conv", "conv_transpose", "bn", "add", "act", "norm_act", "lrn"
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE_ADDS = (operator.iadd, "add_")
# The known patterns, longest first; a piece of a candidate is fused if it is one of them.
PATTERNS = {
    (CONV, BN, ADD, ACT): "conv_bn_add_act",
    (CONV, BN, ACT): "conv_bn_act",
    (CONV, BN, ADD): "conv_bn_add",
    (CONV, BN): "conv_bn",
    (CONV, ACT): "conv_act",
    (CONV,): "conv",
    (CONV_T, BN, ACT): "conv_transpose_bn_act",
    (CONV_T, BN): "conv_transpose_bn",
    (CONV_T, ACT): "conv_transpose_act",
    (BN, ADD, ACT): "bn_add_act",
    (BN, ACT): "bn_act",
    (BN, ADD): "bn_add",
    (ADD, ACT): "add_act",
    (CONV, NORM_ACT): "conv_bn_act",
    (NORM_ACT,): "bn_act",
    (CONV_T,): "conv_transpose",
    (LRN,): "local_response_norm",
}


@dataclass
class Element:
    """One operation of a chain. ``path``: of its module inside the container, empty for a function."""

    kind: str
    node: fx.Node
    path: str = ""
    module: nn.Module | None = None
    act: ActSpec = NO_ACT
    problem: tuple[str, str] | None = None  # (reason code, detail): this operation stays stock

    def label(self) -> str:
        """Its module's path, or the function's name with ``()``."""
        return self.path or str(getattr(self.node.target, "__name__", self.node.target)) + "()"


@dataclass
class Candidate:
    """Elements in dataflow order; ``cuts[i]`` says why element i cannot be fused with element i + 1."""

    elements: list[Element]
    cuts: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def pattern(self) -> str:
        return PATTERNS[tuple(e.kind for e in self.elements)]

    def problems(self) -> list[tuple[str, str]]:
        return [e.problem for e in self.elements if e.problem] + list(self.cuts.values())

    def pieces(self) -> Iterator[list[Element]]:
        """The parts between problems that are a pattern of their own."""
        run: list[Element] = []
        for i, element in enumerate(self.elements):
            if not element.problem:
                run.append(element)
            if element.problem or i in self.cuts or i == len(self.elements) - 1:
                # A convolution left over from a broken chain gains nothing by itself; one that stands alone does.
                alone = len(run) == 1 and len(self.elements) > 1 and run[0].kind == CONV
                if tuple(e.kind for e in run) in PATTERNS and not alone:
                    yield run
                run = []


def find_candidates(graph: fx.Graph, container: nn.Module, effects: Effects) -> list[Candidate]:
    """Every candidate of the graph, in the order of its last operation; no operation is in two of them."""
    matcher = _Matcher(graph, container, effects)
    claimed: set[fx.Node] = set()
    found = []
    for node in reversed(graph.nodes):
        if node in claimed:
            continue
        elements = matcher.line_ending_at(node, claimed)
        if tuple(e.kind for e in elements) in PATTERNS:
            claimed.update(e.node for e in elements)
            found.append(Candidate(elements, matcher.cuts(elements)))
    return found[::-1]


class _Matcher:
    def __init__(self, graph: fx.Graph, container: nn.Module, effects: Effects) -> None:
        self.container, self.effects = container, effects
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.nodes = list(graph.nodes)

    def line_ending_at(self, node: fx.Node, claimed: set[fx.Node]) -> list[Element]:
        line: list[Element] = []
        allowed: tuple[str, ...] = (NORM_ACT, ACT, ADD, BN, CONV, CONV_T, LRN)
        while isinstance(node, fx.Node) and node not in claimed:
            element = self.element(node)
            if element is None or element.kind not in allowed:
                break
            if element.kind == CONV_T and any(e.kind == ADD for e in line):
                break  # its kernels take no residual
            line.insert(0, element)
            node = self._chain_operand(element, claimed) if element.kind == ADD else first_argument(node)
            allowed = {
                ACT: (ADD, BN, CONV, CONV_T), ADD: (BN,), BN: (CONV, CONV_T), NORM_ACT: (CONV,),
            }.get(element.kind, ())  # fmt: skip
        return line

    def _chain_operand(self, add: Element, claimed: set[fx.Node]) -> fx.Node | None:
        """The operand that continues the chain: a BatchNorm's output, of two the one computed last."""
        a, b = add.node.args
        if a is b:
            return None
        from_bn = [n for n in (a, b) if n not in claimed and (e := self.element(n)) is not None and e.kind == BN]
        return max(from_bn, key=lambda n: (len(n.users) == 1, self.order[n]), default=None)

    def element(self, node: fx.Node) -> Element | None:
        if node.op == "call_module":
            module = self.container.get_submodule(node.target)
            if len(node.args) + len(node.kwargs) != 1 or not isinstance(first_argument(node), fx.Node):
                return None
            if isinstance(module, nn.Conv2d):
                return Element(CONV, node, node.target, module)
            if isinstance(module, nn.ConvTranspose2d):
                return Element(CONV_T, node, node.target, module)
            if type(module) is nn.LocalResponseNorm:
                return Element(LRN, node, node.target, module)
            if is_norm_act(module) and has_activation(module):
                return Element(NORM_ACT, node, node.target, module)
            if is_batch_norm(module):
                return Element(BN, node, node.target, module)
            act = act_spec(module)
            return Element(ACT, node, node.target, module, act) if act is not None else None
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target in _ADDS:
            plain = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
            kwargs_fine = not node.kwargs or (set(node.kwargs) == {"alpha"} and node.kwargs["alpha"] == 1)
            return Element(ADD, node) if plain and kwargs_fine else None
        act = function_act(node)
        return Element(ACT, node, act=act) if act is not None else None

    def cuts(self, elements: list[Element]) -> dict[int, tuple[str, str]]:
        cuts: dict[int, tuple[str, str]] = {}
        for i, (here, following) in enumerate(zip(elements, elements[1:], strict=False)):
            if len(here.node.users) > 1:
                cuts[i] = ("MULTIPLE_USERS", f"the output of {here.label()} is used {len(here.node.users)} times")
            elif blocker := self._blocker(here, following, elements[0]):
                cuts[i] = ("REORDERED", f"{blocker} in between may change an input of {here.label()}")
        for element in elements:
            if element.kind == ADD and in_place(element) and not self._may_overwrite(element, elements):
                element.problem = ("INPLACE", "adds in place into a tensor that is visible elsewhere")
        return cuts

    def _may_overwrite(self, add: Element, elements: list[Element]) -> bool:
        """Whether nobody else can see the tensor that an in-place addition writes."""
        target = add.node.args[0]
        return len(target.users) == 1 and self.effects.is_new(target)

    def _blocker(self, here: Element, following: Element, first: Element) -> str:
        """An operation between two elements that may write to what the earlier ones read (they move behind it)."""
        source = first_argument(first.node) if first.kind != ADD else None
        for node in self.nodes[self.order[here.node] + 1 : self.order[following.node]]:
            if node.op == "call_module":
                touches = source in node.all_input_nodes or not (source is None or self.effects.is_new(source))
                if touches and self.effects.may_write_input(node):
                    return node.target
            elif writes(node):
                return str(node.target)
        return ""


def in_place(add: Element) -> bool:
    """Whether an addition writes its first operand, whose dtype it then keeps."""
    return add.node.target in _IN_PLACE_ADDS


def is_batch_norm(module: nn.Module) -> bool:
    """Any module that normalises like BatchNorm, the foreign ones (frozen, synchronised, subclassed) included."""
    return isinstance(module, _BatchNorm) or "BatchNorm" in type(module).__name__
