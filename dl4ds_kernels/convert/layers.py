"""Single layers in a traced forward: poolings, and 2x2 transposed convolutions that are in no chain. Each keeps its result
(a transposed convolution up to rounding), and is not in the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ..modules._pool import is_pool, run_pool
from ..modules._transposed import is_two_by_two, run_conv_transpose


def find_layers(graph: fx.Graph, container: nn.Module, preserve: bool) -> list[fx.Node]:
    """Calls of a layer that a kernel serves, with the map as the only argument; ``preserve``: its layout must be kept."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_module"
        and len(node.all_input_nodes) == len(node.args) + len(node.kwargs) == 1
        and _is_served(container.get_submodule(node.target), preserve)
    ]


def _is_served(module: nn.Module, preserve: bool) -> bool:
    # A pooling's kernel takes channels_last maps only and keeps the layout; a transposed convolution's takes all.
    return is_pool(module) or (not preserve and is_two_by_two(module) and not is_parametrized(module))


def rewrite_layers(
    graph: fx.Graph, layers: list[fx.Node], container: nn.Module, skip: Collection[str], keywords: Mapping[str, Any]
) -> int:
    """Call the run-time helper instead, except for paths in ``skip``; how many were replaced."""
    taken = [node for node in layers if node.target not in skip]
    for node in taken:
        helper = run_pool if is_pool(container.get_submodule(node.target)) else run_conv_transpose
        with graph.inserting_before(node):
            module = graph.create_node("get_attr", node.target)
            fused = graph.create_node("call_function", helper, (node.all_input_nodes[0], module), dict(keywords))
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
    return len(taken)
