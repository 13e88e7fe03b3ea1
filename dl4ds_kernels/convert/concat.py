"""A concatenation that only a block of convolutions reads: the block gets the parts, and the concatenation is never written.

The block is a Sequential, or a module that does nothing but call one (the ``DoubleConv`` of many U-Nets).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..modules.sequential import FusedSequential, begins_with_convolutions, replay_on_parts, run_concat
from .audit import Untraceable
from .passing import runs_its_class, whole_forward

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


def rewrite_concats(graph: fx.Graph, container: nn.Module, keywords: dict[str, Any]) -> int:
    """Join ``block(torch.cat(parts, 1))`` into one call of :func:`run_block_on_parts`; how many were joined."""
    joined = 0
    for node in list(graph.nodes):
        parts = _parts(node)
        block = None if parts is None else _only_reader(node)
        path = None if block is None else _path_to_sequence(container, block.target)
        if path is None:
            continue
        with graph.inserting_before(block):
            modules = tuple(graph.create_node("get_attr", name) for name in path)
            fused = graph.create_node("call_function", run_block_on_parts, (tuple(parts), modules), keywords)
        block.replace_all_uses_with(fused)
        graph.erase_node(block)
        graph.erase_node(node)
        joined += 1
    return joined


def run_block_on_parts(xs: tuple[Tensor, ...], modules: tuple[nn.Module, ...], **keywords: Any) -> Tensor:
    """``modules[0](torch.cat(xs, 1))``; every module calls the next one alone, the last is a Sequential."""
    *wrappers, block = modules
    if not torch.is_grad_enabled() and all(runs_its_class(wrapper) for wrapper in wrappers):
        if not wrappers and type(block) is FusedSequential:
            return run_concat(xs, block)
        fused = whole_forward(block)
        if fused is not None and runs_its_class(block) and begins_with_convolutions(block) == len(block._modules):
            from .purity import is_pure  # needs plan.py, which needs this file

            return replay_on_parts(xs, block, is_pure, **keywords)
    return modules[0](torch.cat(xs, 1))


def _parts(node: fx.Node) -> list[fx.Node] | None:
    """What a concatenation along the channels joins, None for any other node."""
    if node.op != "call_function" or node.target not in _CONCATENATIONS or len(node.args) not in (1, 2):
        return None
    parts, dim = node.args[0], node.args[1] if len(node.args) == 2 else node.kwargs.get("dim", node.kwargs.get("axis"))
    if dim != 1 or len(node.kwargs) > 1 or len(node.args) + len(node.kwargs) != 2:
        return None
    is_list = isinstance(parts, (list, tuple)) and len(parts) > 1 and all(isinstance(part, fx.Node) for part in parts)
    return list(parts) if is_list else None


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The module call behind ``node`` that alone reads it; between them nothing may write to the parts."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    between = node.next
    while between is not user and between.op == "get_attr":
        between = between.next
    return user if between is user and user.op == "call_module" and user.args == (node,) and not user.kwargs else None


def _path_to_sequence(container: nn.Module, target: str) -> list[str] | None:
    """Paths of the called module, and of those that it does nothing but call, down to a Sequential; None if there is none."""
    path = [target]
    for _ in range(4):
        module = container.get_submodule(path[-1])
        if type(module).forward in (nn.Sequential.forward, FusedSequential.forward):
            return path if begins_with_convolutions(module) else None
        child = _delegate(module)
        if child is None:
            return None
        path.append(f"{path[-1]}.{child}")
    return None


def _delegate(module: nn.Module) -> str | None:
    """The submodule whose output is the module's, called with the module's only argument."""
    from .plan import default_arguments
    from .trace import TENSOR, trace_forward

    if not runs_its_class(module):
        return None
    try:
        arguments = default_arguments(module)
        traced = trace_forward(module, arguments) if list(arguments.values()) == [TENSOR] else None
    except Untraceable:
        return None
    nodes = [] if traced is None else list(traced.graph.nodes)
    if [node.op for node in nodes] != ["placeholder", "call_module", "output"]:
        return None
    x, call, output = nodes
    # Conditions on anything but the argument and the submodule (a mode, a flag) are not looked at again later.
    plain = all(guard.startswith("isinstance(") or "._modules.get(" in guard for guard in traced.guards)
    return call.target if plain and call.args == (x,) and not call.kwargs and output.args == (call,) else None
