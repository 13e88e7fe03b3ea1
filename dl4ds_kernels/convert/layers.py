"""Poolings and fully connected layers in a traced forward: nothing of theirs is folded, and they are not in the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..functional import avg_pool2d, global_avg_pool2d, max_pool2d
from ..modules._block import run_conv_bn_act_pool
from ..modules._linear import is_linear, run_linear_act
from ..modules._pool import is_pool, run_pool
from ..modules._run import ActSpec, act_spec, is_plain, run_conv_bn_act
from .effects import function_act


def find_layers(graph: fx.Graph, container: nn.Module) -> list[fx.Node]:
    """Calls of a layer that a kernel serves, with the map as the only argument."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_module"
        and len(node.all_input_nodes) == len(node.args) + len(node.kwargs) == 1
        and any(fits(container.get_submodule(node.target)) for fits in (is_pool, is_linear))
    ]


def layer_members(node: fx.Node, container: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that the helper for this layer would call: its own, and that of an activation behind it."""
    act = _activation_behind(node, container)
    return (node.target, act.target) if act is not None and act.op == "call_module" else (node.target,)


def _activation_behind(node: fx.Node, container: nn.Module) -> fx.Node | None:
    """The activation that alone reads a fully connected layer, None if there is none (or the layer is another)."""
    if len(node.users) != 1 or not is_linear(container.get_submodule(node.target)):
        return None
    (user,) = node.users
    if len(user.all_input_nodes) != 1:
        return None
    if user.op == "call_module":
        module = container.get_submodule(user.target)
        return user if len(user.args) == 1 and act_spec(module) is not None and is_plain(module) else None
    return user if function_act(user) is not None else None


def _join_linear(graph: fx.Graph, node: fx.Node, container: nn.Module, keywords: Mapping[str, Any]) -> None:
    """One call in place of the layer; its activation may move there, since nothing else sees what it reads."""
    act = _activation_behind(node, container)
    with graph.inserting_before(node):
        linear = graph.create_node("get_attr", node.target)
        spec: Any = ActSpec()
        if act is not None and act.op == "call_module":
            module = container.get_submodule(act.target)
            name, slope, _ = act_spec(module) or spec
            stored = graph.create_node("get_attr", act.target)
            spec = graph.create_node("call_function", ActSpec, (name, slope, stored))
        elif act is not None:
            spec = function_act(act)
        fused = graph.create_node("call_function", run_linear_act, (node.all_input_nodes[0], linear, spec), dict(keywords))
    for old in (node,) if act is None else (act, node):
        old.replace_all_uses_with(fused)
        graph.erase_node(old)


def _end_of_a_stem(node: fx.Node, container: nn.Module) -> bool:
    """Whether a fused convolution is read by this max-pooling alone, with nothing but reads of attributes between them."""
    source = node.all_input_nodes[0]
    if type(container.get_submodule(node.target)) is not nn.MaxPool2d or source.target is not run_conv_bn_act:
        return False
    if len(source.users) > 1 or source.args[4] is not None:
        return False
    between = source.next
    while between is not node and (between.op == "get_attr" or between.target is ActSpec):
        between = between.next
    return between is node


def _join_stem(graph: fx.Graph, node: fx.Node) -> None:
    source = node.all_input_nodes[0]
    with graph.inserting_before(node):
        pool = graph.create_node("get_attr", node.target)
        joined = graph.create_node("call_function", run_conv_bn_act_pool, (*source.args[:4], pool), dict(source.kwargs))
    node.replace_all_uses_with(joined)
    graph.erase_node(node)
    graph.erase_node(source)


def rewrite_layers(
    graph: fx.Graph, layers: list[fx.Node], container: nn.Module, skip: Collection[str], keywords: Mapping[str, Any]
) -> int:
    """Call the run-time helper instead, except for paths in ``skip``; how many were replaced."""
    taken = [node for node in layers if node.target not in skip]
    for node in taken:
        if is_linear(container.get_submodule(node.target)):
            _join_linear(graph, node, container, keywords)
            continue
        if _end_of_a_stem(node, container):
            _join_stem(graph, node)
            continue
        with graph.inserting_before(node):
            module = graph.create_node("get_attr", node.target)
            fused = graph.create_node("call_function", run_pool, (node.all_input_nodes[0], module), dict(keywords))
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
    return len(taken)


def rewrite_pools(graph: fx.Graph, keywords: Mapping[str, Any]) -> int:
    """Poolings that a forward calls as functions, through ours of the same signature; how many were replaced."""
    replaced = 0
    for node in list(graph.nodes):
        found = _pool_function(node)
        if found is None:
            continue
        function, arguments, options = found
        with graph.inserting_before(node):
            pooled = graph.create_node("call_function", function, arguments, options | dict(keywords))
        node.replace_all_uses_with(pooled)
        graph.erase_node(node)
        replaced += 1
    return replaced


def _pool_function(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """(our function, its arguments) for torch's pooling of a map, None for another call."""
    options = dict(node.kwargs)
    if node.op != "call_function" or len(node.args) < 2 or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is torch.max_pool2d or (node.target is F.max_pool2d and options.pop("return_indices", None) is False):
        return max_pool2d, node.args, options
    if node.target is F.avg_pool2d:
        return avg_pool2d, node.args, options
    if node.target is F.adaptive_avg_pool2d and node.args[1] in (1, (1, 1), [1, 1]) and not options:
        return global_avg_pool2d, node.args[:1], {}
    return None
