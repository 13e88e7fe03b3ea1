"""Hand-written forwards for block types that a trace cannot follow faithfully."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules._block import run_residual_block
from ..modules._chain import DenseLayerParts, Step, residual_steps, run_blocks, run_chain, run_dense_block
from ..modules._dense import run_dense_training
from ..modules._run import NO_ACT, ActSpec, has_hooks, is_plain, run_bn_act, run_conv_act, run_conv_bn_act, run_dense_conv
from .passing import whole_forward
from .plan import MISS, Chain, Options, Plan, default_arguments, make_plan, module_problem, run_keywords

_DENSE_LAYER = ("torchvision.models.densenet", "_DenseLayer")
_DENSE_BLOCK = ("torchvision.models.densenet", "_DenseBlock")
_TRANSITION = ("torchvision.models.densenet", "_Transition")
_RESIDUAL = {("torchvision.models.resnet", "BasicBlock"): 2, ("torchvision.models.resnet", "Bottleneck"): 3}  # convolutions
_DENSE_CHAINS = (
    ("bn_act", ("norm1", "relu1"), ("bn", "act")),
    ("conv_bn_act", ("conv1", "norm2", "relu2"), ("conv", "bn", "act")),
    ("conv", ("conv2",), ("conv",)),
)
_TRANSITION_CHAINS = (("bn_act", ("norm", "relu"), ("bn", "act")), ("conv", ("conv",), ("conv",)))


def block_plan(module: nn.Module, options: Options, skip: Collection[str], shared: Collection[int] = ()) -> Plan | None:
    """The plan of a known block type, None for any other module."""
    if type(module) is nn.Sequential and len(module) > 1 and all(_kind(child) in _RESIDUAL for child in module):
        return _stage(options)
    if _kind(module) == _DENSE_LAYER:
        return _dense_layer(module, options, skip, shared)
    if _kind(module) == _DENSE_BLOCK:
        return _dense_block(options)
    if _kind(module) == _TRANSITION:
        return _transition(module, options, skip, shared)
    convolutions = _RESIDUAL.get(_kind(module))
    if convolutions is not None:
        return _residual(module, convolutions, options, skip, shared)
    return None


def _kind(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


def _residual(module: nn.Module, convolutions: int, options: Options, skip: Collection[str], shared: Collection[int]) -> Plan:
    """torchvision's residual blocks: the plan of their trace; where all of it is fused, one autograd node with gradients, and
    without, on the CPU, one call that takes the projection in."""
    plan = make_plan(module, default_arguments(module), options, skip, shared)
    layer_by_layer = plan.run
    if layer_by_layer is None or any(chain.problem is not None or chain.key in skip for chain in plan.chains):
        return plan
    keywords = run_keywords(options, convolution=False) | {"memory_efficient": options.memory_efficient}
    chain_keywords = run_keywords(options)
    names = [(f"conv{i}", f"bn{i}") for i in range(1, convolutions + 1)]

    def forward(self: Any, x: Tensor) -> Any:
        if not isinstance(x, Tensor):  # fx.symbolic_trace: no plan fits, and a new one would be this one
            return type(self).forward(self, x)
        shortcut = self.downsample
        if torch.is_grad_enabled() and (shortcut is None or whole_forward(shortcut)):  # else it is excluded
            m = self._modules
            pairs = [(m[conv], m[bn]) for conv, bn in names]
            out = run_residual_block(x, pairs, ActSpec("relu", 0.0, m["relu"]), shortcut, **keywords)
            if out is not None:
                return out
        elif shortcut is not None and x.is_cpu:
            steps = _steps(self, names, 0, 1)
            if steps is not None:
                return run_chain((x,), steps, **chain_keywords)
        return layer_by_layer(self, x)

    forward.steps = lambda block, source, first: _steps(block, names, source, first)
    return plan._replace(run=forward)


def _steps(block: Any, names: list[tuple[str, str]], source: int, first: int) -> tuple[Step, ...] | None:
    """The steps of a block (see ``residual_steps``); None: not all of it is fused."""
    m, shortcut, projection = block._modules, block.downsample, None
    if shortcut is not None:
        if not whole_forward(shortcut) or has_hooks(shortcut) or len(shortcut) != 2:
            return None
        projection = tuple(shortcut._modules.values())
    return residual_steps([(m[c], m[b]) for c, b in names], ActSpec("relu", 0.0, m["relu"]), projection, source, first)


def _stage(options: Options) -> Plan:
    """torchvision's residual blocks in a row, one call where ``optimize`` took them whole."""
    keywords = run_keywords(options)

    def steps_of(block: Any, source: int, first: int) -> tuple[Step, ...] | None:
        fused = whole_forward(block)
        if fused is None or fused.options != options or has_hooks(block):
            return None
        found = getattr(fused.plan, "steps", None)
        return None if found is None else found(block, source, first)

    def forward(self: Any, input: Tensor) -> Any:
        out = run_blocks(input, self._modules.values(), steps_of, **keywords)
        return nn.Sequential.forward(self, input) if out is None else out

    return Plan(forward, [], "")


def _chains(
    module: nn.Module, table: tuple[Any, ...], skip: Collection[str], shared: Collection[int]
) -> tuple[list[Chain], list[bool]]:
    """(the chains of the report, which of them are fused) of (pattern, members, kinds) rows."""
    chains, fused = [], []
    for pattern, members, kinds in table:
        problem = None
        for path, kind in zip(members, kinds, strict=True):
            problem = problem or module_problem(getattr(module, path), kind)
            if problem is None and id(getattr(module, path)) in shared:
                problem = ("SHARED_MODULE", f"{path} is used in more than one place")
        chains.append(Chain(members[0], pattern, members, problem))
        fused.append(problem is None and members[0] not in skip)
    return chains, fused


def _transition(module: nn.Module, options: Options, skip: Collection[str], shared: Collection[int]) -> Plan | None:
    """torchvision's DenseNet transition. In inference the pooling is done on the way into the 1x1 convolution.

    The mean over 2x2 pixels and the convolution, both linear, change places: a quarter of its multiplications.
    """
    if [*module._modules] != ["norm", "relu", "conv", "pool"]:
        return None
    chains, fused = _chains(module, _TRANSITION_CHAINS, skip, shared)
    if not all(fused):
        return None
    keywords = run_keywords(options)

    def forward(self: Any, input: Tensor) -> Any:
        relu = ActSpec("relu", 0.0, self.relu)
        return run_chain((input,), (Step(self.conv, None, NO_ACT, (0,), before=(self.norm, relu), pool=self.pool),), **keywords)

    return Plan(forward, chains, "")


def _dense_block(options: Options) -> Plan:
    """torchvision's DenseNet block: in inference its layers read their inputs where they lie, in training they are one op.

    The chains of the report are the layers' own. Only layers that ``optimize`` took whole take part: their forward is the fused
    one, without hooks or exclusions.
    """
    keywords, training_keywords = run_keywords(options), run_keywords(options, convolution=False)

    def parts(layer: Any) -> DenseLayerParts | None:
        if not whole_forward(layer) or has_hooks(layer) or (layer.drop_rate > 0 and layer.training):
            return None
        m = layer._modules  # nn.Module's attribute lookup is slow, and there are 58 layers
        relu1, relu2 = ActSpec("relu", 0.0, m["relu1"]), ActSpec("relu", 0.0, m["relu2"])
        return DenseLayerParts(m["norm1"], relu1, m["conv1"], m["norm2"], relu2, m["conv2"])

    def forward(self: Any, init_features: Tensor) -> Any:
        if not isinstance(init_features, Tensor) or (self.training and not torch.is_grad_enabled()):
            return MISS
        modules = list(self._modules.values())
        layers = [parts(layer) for layer in modules]
        if any(layer is None for layer in layers):
            return MISS
        if torch.is_grad_enabled():
            if any(layer.memory_efficient for layer in modules):  # checkpoints itself, and counts a batch twice
                return MISS
            steps = [(layer[:3], layer[3:]) for layer in layers]
            out = run_dense_training(init_features, steps, memory_efficient=options.memory_efficient, **training_keywords)
            return MISS if out is None else out
        return run_dense_block(init_features, layers, **keywords)

    return Plan(forward, [], "")


def _dense_layer(layer: nn.Module, options: Options, skip: Collection[str], shared: Collection[int]) -> Plan:
    """torchvision's DenseNet layer: takes a tensor or a list of tensors, and may checkpoint itself (then it stays stock)."""
    chains, fused = _chains(layer, _DENSE_CHAINS, skip, shared)
    first, second, third = fused
    if not any(fused):
        return Plan(None, chains, "")
    keywords, bn_keywords = run_keywords(options), run_keywords(options, convolution=False)

    def forward(self: Any, input: Tensor | list[Tensor]) -> Any:
        features = [input] if isinstance(input, Tensor) else input
        if not isinstance(features, list) or not all(isinstance(f, Tensor) for f in features):
            return MISS
        if self.memory_efficient and self.any_requires_grad(features):
            return MISS
        relu1, relu2 = ActSpec("relu", 0.0, self.relu1), ActSpec("relu", 0.0, self.relu2)
        if all(fused) and torch.is_grad_enabled() and type(self.relu2) is nn.ReLU and is_plain(self.relu2):
            pairs = [(self.conv1, self.norm1), (self.conv2, self.norm2)]
            x = run_residual_block(torch.cat(features, 1), pairs, relu1, None, preact=True, add=False, **bn_keywords)
            if x is not None:
                return F.dropout(x, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else x
        if first and second:
            x = run_dense_conv(features, self.norm1, relu1, self.conv1, self.norm2, relu2, **keywords)
        else:
            x = torch.cat(features, 1)
            x = run_bn_act(x, self.norm1, relu1, **bn_keywords) if first else self.relu1(self.norm1(x))
            if second:
                x = run_conv_bn_act(x, self.conv1, self.norm2, relu2, **keywords)
            else:
                x = self.relu2(self.norm2(self.conv1(x)))
        x = run_conv_act(x, self.conv2, **keywords) if third else self.conv2(x)
        return F.dropout(x, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else x

    return Plan(forward, chains, "")
