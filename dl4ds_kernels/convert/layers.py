"""Poolings in a traced forward: their kernel gives stock's very result, and they are not in the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import fx, nn

from ..modules._pool import is_pool, run_pool


def find_layers(graph: fx.Graph, container: nn.Module) -> list[fx.Node]:
    """Calls of a layer that a kernel serves, with the map as the only argument."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_module"
        and len(node.all_input_nodes) == len(node.args) + len(node.kwargs) == 1
        and is_pool(container.get_submodule(node.target))
    ]


def rewrite_layers(
    graph: fx.Graph, layers: list[fx.Node], container: nn.Module, skip: Collection[str], keywords: Mapping[str, Any]
) -> int:
    """Call the run-time helper instead, except for paths in ``skip``; how many were replaced."""
    taken = [node for node in layers if node.target not in skip]
    for node in taken:
        with graph.inserting_before(node):
            module = graph.create_node("get_attr", node.target)
            fused = graph.create_node("call_function", run_pool, (node.all_input_nodes[0], module), dict(keywords))
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
    return len(taken)
