"""Joins fused calls that feed one another into one ``run_chain``: a residual block then costs one op call in inference."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..modules._chain import Step, run_chain
from ..modules._run import ActSpec, run_conv_act, run_conv_bn_act

_CONVOLUTIONS = (run_conv_bn_act, run_conv_act)
# A chain runs where its last call stood, after what stood between its calls: that must not write to what the chain reads.
_READERS = (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d, nn.Identity)


def merge_chains(graph: fx.Graph, container: nn.Module) -> None:
    """Rewrite ``graph``, whose fused pieces are calls of the functions of ``modules/_run.py``."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    for last in reversed(list(graph.nodes)):
        chain = [] if last._erased else _chain_before(last)
        if len(chain) < 2:
            continue
        between = [n for n in place if place[chain[0]] < place[n] < place[last] and n not in chain and not n._erased]
        if all(_only_reads(node, container) for node in between):
            _join(graph, chain)


def _chain_before(last: fx.Node) -> list[fx.Node]:
    """The fused convolutions that end in ``last``, each the only reader of the one before it."""
    chain = [last] if last.op == "call_function" and last.target in _CONVOLUTIONS else []
    while chain:
        source = chain[0].args[0]
        if not (
            isinstance(source, fx.Node)
            and source.op == "call_function"
            and source.target in _CONVOLUTIONS
            and len(source.users) == 1
            and source not in chain[0].args[1:]
            and source.kwargs == last.kwargs
        ):
            break
        chain.insert(0, source)
    return chain


def _only_reads(node: fx.Node, container: nn.Module) -> bool:
    if node.op == "call_module":
        return all(type(m) in _READERS for m in container.get_submodule(node.target).modules())
    return node.op == "get_attr" or (node.op == "call_function" and node.target in (*_CONVOLUTIONS, run_chain, ActSpec, Step))


def _join(graph: fx.Graph, chain: list[fx.Node]) -> None:
    inputs: list[Any] = [chain[0].args[0]]
    calls = []
    for node in chain:
        residual = node.args[4] if node.target is run_conv_bn_act and len(node.args) > 4 else None
        if residual is not None and residual not in inputs:
            inputs.append(residual)
        conv = node.args[1]
        bn, act = node.args[2:4] if node.target is run_conv_bn_act else (None, node.args[2])
        in_place = node.args[5] if residual is not None else ""
        calls.append((conv, bn, act, residual, in_place))
    with graph.inserting_before(chain[-1]):
        steps = []
        for index, (conv, bn, act, residual, in_place) in enumerate(calls):
            source = 0 if index == 0 else len(inputs) + index - 1
            arguments = (conv, bn, act, (source,), -1 if residual is None else inputs.index(residual))
            keywords = {"in_place": in_place} if in_place else {}
            steps.append(graph.create_node("call_function", Step, arguments, keywords))
        joined = graph.create_node("call_function", run_chain, (tuple(inputs), tuple(steps)), dict(chain[-1].kwargs))
    chain[-1].replace_all_uses_with(joined)
    for node in reversed(chain):
        graph.erase_node(node)
