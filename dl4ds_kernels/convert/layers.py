"""Poolings in a traced forward: their kernel gives stock's very result, and they are not in the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import fx, nn

from ..modules._block import run_conv_bn_act_pool
from ..modules._pool import is_pool, run_pool
from ..modules._run import ActSpec, run_conv_bn_act


def find_layers(graph: fx.Graph, container: nn.Module) -> list[fx.Node]:
    """Calls of a layer that a kernel serves, with the map as the only argument."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_module"
        and len(node.all_input_nodes) == len(node.args) + len(node.kwargs) == 1
        and is_pool(container.get_submodule(node.target))
    ]


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
        if _end_of_a_stem(node, container):
            _join_stem(graph, node)
            continue
        with graph.inserting_before(node):
            module = graph.create_node("get_attr", node.target)
            fused = graph.create_node("call_function", run_pool, (node.all_input_nodes[0], module), dict(keywords))
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
    return len(taken)
