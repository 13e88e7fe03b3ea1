"""Modules that hand their input on, and Sequentials that only continue a chain: timm's and monai's blocks are full of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..modules._run import _no_global_hooks, act_spec, has_hooks, is_plain

if TYPE_CHECKING:
    from .trace import Traced


class FusedMarker:
    """Base of the forwards that ``optimize`` installs: a module with one of them still computes what its class does."""

    options: Any
    skip: frozenset[str]  # keys of the chains that are kept
    is_pure: bool  # nothing but what the module holds and reads had a say so far


_NO_FORWARD = FusedMarker()
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_OTHER_ACTIVATIONS = (nn.PReLU, nn.ELU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardsigmoid)


def passes(module: nn.Module) -> bool:
    """Whether calling this module returns its argument and does nothing else, in the mode that it is in."""
    kind = type(module)
    if not (is_plain(module) and _no_global_hooks()):
        return False
    return kind is nn.Identity or (kind in _DROPOUTS and (module.p == 0 or not module.training))


def runs_its_class(module: nn.Module) -> bool:
    """No hooks, and no forward of its own but one that ``optimize`` installed, which computes the same."""
    forward = module.__dict__.get("forward", _NO_FORWARD)
    return isinstance(forward, FusedMarker) and not has_hooks(module) and _no_global_hooks()


def module_source(path: str) -> str:
    """The expression over ``self`` of a submodule."""
    return "self" + "".join(f"._modules[{part!r}]" for part in path.split(".") if part)


def whole_forward(module: Any) -> Any:
    """The fused forward of a module that ``optimize`` took without exclusions, None for any other."""
    fused = module.__dict__.get("forward") if isinstance(module, nn.Module) else None
    return fused if isinstance(fused, FusedMarker) and not fused.skip else None


def is_tail(module: nn.Module) -> bool:
    """Whether this is a Sequential of BatchNorm, activation, dropout and Identity alone, to be seen as its children.

    monai puts what follows a convolution into such a container of its own.
    """
    if type(module).forward is not nn.Sequential.forward or not module._modules:
        return False
    if not runs_its_class(module):
        return False
    return all(
        isinstance(child, (_BatchNorm, nn.Identity, *_DROPOUTS, *_OTHER_ACTIVATIONS)) or act_spec(child) is not None
        for child in module._modules.values()
    )


def skip_passing(traced: Traced, container: nn.Module) -> Traced:
    """Take passing modules between the operations of a chain out of the graph; guards say that they still pass."""
    guards = list(traced.guards)
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            continue
        module = container.get_submodule(node.target)
        if not isinstance(module, (nn.Identity, *_DROPOUTS)) or not _in_a_chain(node.args[0], container):
            continue
        name = f"_dl4ds_constant_{len(traced.constants)}"
        traced.constants[name] = passes
        source = module_source(node.target)
        if passes(module):
            guards.append(f"{name}({source})")
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif type(module) in _DROPOUTS:  # in eval another plan is better
            guards.append(f"not {name}({source})")
    return traced._replace(guards=tuple(guards))


def _in_a_chain(node: fx.Node, container: nn.Module) -> bool:
    """Whether ``node`` is a convolution, a BatchNorm or an addition."""
    if node.op == "call_module":
        module = container.get_submodule(node.target)
        return isinstance(module, (_ConvNd, _BatchNorm))
    return node.op == "call_function" and getattr(node.target, "__name__", "") in ("add", "iadd")
