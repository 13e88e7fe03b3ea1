"""Turn one container's forward into a fused one: which chains are replaced, which kept, and the generated code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.nn.utils.parametrize import is_parametrized

from ..modules._run import ActSpec, has_hooks, run_add_act, run_bn_act, run_conv_act, run_conv_bn_act
from ..modules._transposed import is_convolution, is_two_by_two, run_conv_transpose_bn_act
from ..modules.bn_act import BNAct2d
from ..modules.local_response_norm import run_local_response_norm
from .concat import rewrite_concats
from .effects import Effects
from .effects import guards as effect_guards
from .foreign import CONVOLUTIONS, NORMS, is_foreign, is_norm_act, norm_act_problem, run_foreign, stock_type
from .layers import find_layers, layer_members, rewrite_layers, rewrite_pools
from .merge import merge_chains
from .passing import skip_passing
from .patterns import ACT, ADD, BN, CONV, CONV_T, LRN, NORM_ACT, PATTERNS, Candidate, Element, find_candidates, in_place
from .trace import TENSOR, Tensors, Traced, stock_signature, trace_forward

MISS = object()  # what a generated forward returns when its conditions do not hold

_STOCK = {CONV: CONVOLUTIONS, CONV_T: (nn.ConvTranspose2d,), BN: (*NORMS, BNAct2d), NORM_ACT: ()}
_TENSOR_LISTS = ("list[tensor]", "list[torch.tensor]")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """What the user asked of the run time; stored with every fused forward."""

    backend: str = "auto"
    memory_format: Any = "auto"
    exact: bool = False
    memory_efficient: bool = False


@dataclass
class Chain:
    """A candidate of the report. ``key`` names it inside its container, the same in every specialisation."""

    key: str
    pattern: str
    members: tuple[str, ...]  # paths inside the container, or names of functions with ()
    problem: tuple[str, str] | None
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()  # what is fused nevertheless: (pattern, members)


class Plan(NamedTuple):
    """A fused forward ``run(module, *args, **kwargs)``, None if nothing is replaced, and its chains."""

    run: Callable[..., Any] | None
    chains: list[Chain]
    source: str
    inlined: tuple[str, ...] = ()  # containers below this one whose chains are among these
    layers: tuple[Chain, ...] = ()  # single layers; they take part in include and exclude, but are not in the report
    from_instances: bool = True  # as of Traced


def default_arguments(module: nn.Module) -> dict[str, Any]:
    """What a plan made ahead of any call assumes: parameters without a default are tensors, the others keep it.

    One annotated as a list of tensors is a list of two; a call with more makes another plan.
    """

    def assumed(p: inspect.Parameter) -> Any:
        if p.default is not p.empty:
            return p.default
        return Tensors(list, 2) if str(p.annotation).lower().replace("typing.", "") in _TENSOR_LISTS else TENSOR

    return {p.name: assumed(p) for p in stock_signature(module).parameters.values()}


def make_plan(
    module: nn.Module, arguments: Mapping[str, Any], options: Options, skip: Collection[str], shared: Collection[int] = ()
) -> Plan:
    """Trace, match and generate. ``skip``: keys of chains to keep; ``shared``: ids of modules registered twice in the model.

    Raises:
        Untraceable: the forward cannot be represented by a graph.
    """
    traced = skip_passing(trace_forward(module, arguments), module)
    effects = Effects(module)
    candidates = find_candidates(traced.graph, module, effects)
    traced = traced._replace(guards=(*traced.guards, *effect_guards(effects, traced.constants)))
    _note_problems(traced.graph, candidates, module, shared)
    # A convolution that stands alone and cannot be replaced is no missed fusion.
    candidates = [c for c in candidates if len(c.elements) > 1 or not (c.problems() or _is_idle(c.elements[0]))]
    chains, pieces = [], []
    adds = 0
    for candidate in candidates:
        first = candidate.elements[0]
        key = first.path or f"{candidate.pattern}[{adds}]"
        adds += not first.path
        own = list(candidate.pieces())
        chains.append(_chain(key, candidate, own))
        if key not in skip:
            pieces += own
    for piece in pieces:
        _rewrite(traced.graph, piece, options)
    merge_chains(traced.graph, module)
    found = find_layers(traced.graph, module)
    members = {node.target: layer_members(node, module) for node in found}
    layers = tuple(Chain(path, "layer", paths, None) for path, paths in members.items())
    keywords = run_keywords(options, convolution=False)
    rewritten = rewrite_layers(traced.graph, found, module, skip, keywords) + len(pieces)
    rewritten += rewrite_pools(traced.graph, keywords) + rewrite_concats(traced.graph, module, run_keywords(options))
    if rewritten == 0:
        return Plan(None, chains, "", traced.inlined, layers)
    run, source = _generate(traced)
    return Plan(run, chains, source, traced.inlined, layers, traced.from_instances)


def _is_idle(element: Element) -> bool:
    """A lone operation that no kernel serves: a transposed convolution other than 2x2 with stride 2 and those with stride 1."""
    return element.kind == CONV_T and not (is_two_by_two(element.module) or is_convolution(element.module))


def _chain(key: str, candidate: Candidate, pieces: list[list[Element]]) -> Chain:
    problems = candidate.problems()
    whole = len(pieces) == 1 and len(pieces[0]) == len(candidate.elements)
    parts = () if whole else tuple((PATTERNS[tuple(e.kind for e in piece)], _labels(piece)) for piece in pieces)
    return Chain(key, candidate.pattern, _labels(candidate.elements), problems[0] if problems else None, parts)


def _labels(elements: list[Element]) -> tuple[str, ...]:
    return tuple(e.label() for e in elements)


def _note_problems(graph: fx.Graph, candidates: list[Candidate], container: nn.Module, shared: Collection[int]) -> None:
    calls: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            called = id(container.get_submodule(node.target))
            calls[called] = calls.get(called, 0) + 1
    for candidate in candidates:
        for element in candidate.elements:
            module = element.module
            if module is None or element.problem:
                continue
            element.problem = module_problem(module, element.kind)
            if element.problem is None and element.kind not in (ACT, LRN) and (calls[id(module)] > 1 or id(module) in shared):
                element.problem = ("SHARED_MODULE", f"{element.path} is used in more than one place")


def module_problem(module: nn.Module, kind: str) -> tuple[str, str] | None:
    """(reason code, detail) if this module of a chain cannot be replaced."""
    name = type(module).__name__
    if is_parametrized(module):
        return "PARAMETRIZED", f"{', '.join(module.parametrizations)} of {name}"
    if has_hooks(module):
        return "HOOKS", f"on {name}"
    if "forward" in module.__dict__:
        return "OVERRIDDEN", f"forward of this {name}"
    if kind in (ACT, LRN):  # nothing of theirs is folded or kept
        return None
    if kind in (BN, NORM_ACT) and is_norm_act(module):
        problem = norm_act_problem(module)
        if problem is not None:
            return problem
    elif stock_type(module, _STOCK[kind]) is None or getattr(module, "activation", "none") != "none":
        return "SUBCLASS", f"{type(module).__module__}.{name}"
    if kind in (BN, NORM_ACT) and module.running_mean is None:
        return "NO_RUNNING_STATS", ""
    tensor = module.weight if kind in (CONV, CONV_T) else module.running_mean
    if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
        return "DTYPE", str(tensor.dtype)
    if kind in (CONV, CONV_T) and module.padding_mode != "zeros":
        return "PADDING_MODE", module.padding_mode
    return None


def _rewrite(graph: fx.Graph, piece: list[Element], options: Options) -> None:
    """Replace the nodes of ``piece`` by one call of a run-time helper, at the place of the last one."""
    last = piece[-1].node
    by_kind = {e.kind: e for e in piece}
    with graph.inserting_before(last):
        if NORM_ACT in by_kind:
            by_kind[BN] = by_kind.pop(NORM_ACT)
        modules = [graph.create_node("get_attr", by_kind[kind].path) for kind in (CONV, CONV_T, BN) if kind in by_kind]
        act = _act_node(graph, by_kind.get(ACT))
        foreign = any(is_foreign(by_kind[kind].module) for kind in (CONV, BN) if kind in by_kind)
        if ADD in by_kind and BN not in by_kind:
            function, arguments = run_add_act, (*by_kind[ADD].node.args, act, "z" if in_place(by_kind[ADD]) else "")
        elif LRN in by_kind:
            norm = graph.create_node("get_attr", by_kind[LRN].path)
            function, arguments = run_local_response_norm, (source_of(piece[0]), norm)
        else:
            arguments = (source_of(piece[0]), *modules, act)
            if CONV_T in by_kind:
                function = run_conv_transpose_bn_act
                arguments = (source_of(piece[0]), modules[0], modules[1] if BN in by_kind else None, act)
            elif foreign:
                function = run_foreign
                conv, norm = (modules.pop(0) if kind in by_kind else None for kind in (CONV, BN))
                arguments = (source_of(piece[0]), conv, norm, act, *_residual(by_kind))
            elif BN in by_kind:
                function = run_conv_bn_act if CONV in by_kind else run_bn_act
                arguments += _residual(by_kind)
            else:
                function = run_conv_act
        fused = graph.create_node(
            "call_function", function, arguments, run_keywords(options, CONV in by_kind or CONV_T in by_kind)
        )
    last.replace_all_uses_with(fused)
    for element in reversed(piece):
        graph.erase_node(element.node)


def source_of(element: Element) -> fx.Node:
    """The node that an element's operation reads."""
    return element.node.args[0] if element.node.args else element.node.kwargs["input"]


def _residual(by_kind: dict[str, Element]) -> tuple[fx.Node | None, str]:
    """(the operand of the addition that is not the BatchNorm's output, whose dtype an addition in place keeps)."""
    if ADD not in by_kind:
        return None, ""
    a, b = by_kind[ADD].node.args
    first = a is by_kind[BN].node
    return b if first else a, ("z" if first else "residual") if in_place(by_kind[ADD]) else ""


def run_keywords(options: Options, convolution: bool = True) -> dict[str, Any]:
    """The options as the run-time helpers take them."""
    keywords: dict[str, Any] = {} if options.backend == "auto" else {"backend": options.backend}
    if convolution:
        keywords |= {"memory_format": options.memory_format, "exact": options.exact}
    return keywords


def _act_node(graph: fx.Graph, element: Element | None) -> Any:
    if element is None:
        return ActSpec()
    if element.module is None:
        return element.act
    module = graph.create_node("get_attr", element.path)
    return graph.create_node("call_function", ActSpec, (element.act.name, element.act.negative_slope, module))


class _GuardedForward(CodeGen):
    """Gives the generated function the stock signature, and the trace's conditions as its first statement."""

    def __init__(self, traced: Traced) -> None:
        super().__init__()
        self._traced = traced
        self.constants = dict(traced.constants, _dl4ds_miss=MISS)

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str) -> str:
        parameters = []
        for parameter in self._traced.signature.parameters.values():
            if parameter.default is not parameter.empty:
                name = f"_dl4ds_default_{parameter.name}"
                self.constants[name] = parameter.default
                parameter = parameter.replace(default=_Verbatim(name))
            parameters.append(parameter.replace(annotation=inspect.Parameter.empty))
        self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        if not any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            self_parameter = self_parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        conditions = " and ".join(self._traced.guards) or "True"
        return (
            f"def forward{inspect.Signature([self_parameter, *parameters])}:\n"
            f"    if not ({conditions}):\n        return _dl4ds_miss"
        )


class _Verbatim:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _generate(traced: Traced) -> tuple[Callable[..., Any], str]:
    code = _GuardedForward(traced)
    traced.graph.set_codegen(code)
    generated = traced.graph.python_code("self")
    namespace = {**generated.globals, **code.constants}
    exec(compile(generated.src, f"<dl4ds_kernels forward of {traced.owner}>", "exec"), namespace)
    return namespace["forward"], generated.src
