"""Other libraries' layers that compute what the stock layer does: how they are recognised, and how a chain of them runs.

Two kinds are known. A subclass of ``nn.Conv2d`` or of a BatchNorm that adds a constructor and nothing that a forward could see
*is* the stock layer (``inherits``). timm's ``BatchNormAct2d`` is a BatchNorm with an activation in the same module.

The kernels' run time asks for exact stock types. ``_facet`` gives it one: an object of the stock class that shares the foreign
module's ``__dict__``, so parameters, buffers, mode, hooks and packed weights are the module's own, read when they are used.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..modules._run import NO_ACT, ActSpec, _apply, act_spec, add, is_plain, run_bn_act, run_conv_act, run_conv_bn_act

CONVOLUTIONS = (nn.Conv2d,)
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm3d)
_NORM_ACT = ("timm.layers.norm_act", "BatchNormAct2d")
# What a subclass may define itself: none of it takes part in a forward.
_HARMLESS = frozenset(
    (
        "__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__annotate__", "__annotate_func__",
        "__annotations_cache__", "__parameters__", "__orig_bases__", "__firstlineno__", "__static_attributes__",
        "__constants__", "__dict__", "__weakref__", "__repr__", "extra_repr", "reset_parameters", "reset_running_stats",
        "_version", "__jit_unused_properties__",
    )
)  # fmt: skip


@functools.lru_cache(maxsize=1024)
def inherits(kind: type, base: type) -> bool:
    """Whether instances of ``kind``, a subclass of ``base`` (or ``base``), certainly compute what ``base`` computes."""
    if not issubclass(kind, base):
        return False
    own = [cls for cls in kind.__mro__ if cls not in base.__mro__]
    return type(kind) is type(base) and all(set(vars(cls)) <= _HARMLESS for cls in own)


def stock_type(module: nn.Module, bases: tuple[type, ...]) -> type | None:
    """The stock class that ``module`` is an instance of in all but name."""
    return next((base for base in bases if inherits(type(module), base)), None)


def is_norm_act(module: nn.Module) -> bool:
    """Whether this is timm's BatchNorm with an activation."""
    return (type(module).__module__, type(module).__qualname__) == _NORM_ACT


def has_activation(norm: nn.Module) -> bool:
    """Whether a :func:`is_norm_act` module does more than normalise."""
    return type(norm.act) is not nn.Identity


def norm_act_problem(norm: nn.Module) -> tuple[str, str] | None:
    """(reason code, detail) if the parts of a :func:`is_norm_act` module are not what its fused form assumes."""
    for name in ("drop", "act"):
        if not is_plain(getattr(norm, name)):
            return "HOOKS", f"on {name} of {type(norm).__name__}"
    if type(norm.drop) is not nn.Identity:
        return "SUBCLASS", f"{type(norm).__name__} with a {type(norm.drop).__name__} before its activation"
    return None


def is_foreign(module: nn.Module) -> bool:
    """Whether a replaceable layer needs the run time of this file."""
    return is_norm_act(module) or (isinstance(module, (*CONVOLUTIONS, *NORMS)) and _exact_or_ours(module) is False)


def _exact_or_ours(module: nn.Module) -> bool:
    kind = type(module)
    return kind in CONVOLUTIONS or kind in NORMS or kind.__module__.startswith("dl4ds_kernels.")


def _facet(module: nn.Module, kind: type) -> Any:
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", module.__dict__)
    return made


def _stock_conv(conv: nn.Module) -> nn.Module:
    """``conv`` as its stock class where it is that in all but name and nobody listens; else ``conv``."""
    if type(conv) in CONVOLUTIONS:
        return conv
    kind = stock_type(conv, CONVOLUTIONS)
    return conv if kind is None or not is_plain(conv) else _facet(conv, kind)


def _stock_norm(norm: nn.Module) -> tuple[nn.Module, nn.Module | None] | None:
    """(``norm`` as its stock class, its activation module); None if only calling the module itself is right."""
    if _exact_or_ours(norm):
        return norm, None
    if not is_plain(norm):
        return None
    if is_norm_act(norm):
        act = norm.act if has_activation(norm) else None
        return None if norm_act_problem(norm) else (_facet(norm, nn.BatchNorm2d), act)
    kind = stock_type(norm, NORMS)
    return None if kind is None else (_facet(norm, kind), None)


def _spec(act: nn.Module) -> tuple[ActSpec, nn.Module | None]:
    """(what the kernel applies, what has to be called behind it)."""
    known = act_spec(act)
    return (NO_ACT, act) if known is None else (known, None)


def _stock_only(x: Any) -> bool:
    """Where facets cannot be made or would not be found: a compiler's graph, or a symbolic trace."""
    return torch.compiler.is_compiling() or not isinstance(x, Tensor)


def run_foreign(
    x: Tensor,
    conv: nn.Module | None,
    norm: nn.Module | None,
    act: ActSpec = NO_ACT,
    residual: Tensor | None = None,
    in_place: str = "",
    *,
    memory_format: str = "auto",
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``act(norm(conv(x)) [+ residual])`` of modules that may be foreign, fused where they are the stock layers in effect.

    ``conv`` or ``norm`` may be None. A norm with an activation of its own stands at the end: no residual, no ``act``.
    """
    options = {"memory_format": memory_format, "exact": exact, "backend": backend}
    parts = None if norm is None or _stock_only(x) else _stock_norm(norm)
    at_the_end = act is NO_ACT or act.name == "none"
    if norm is not None and (parts is None or (parts[1] is not None and not (at_the_end and residual is None))):
        z = norm(x if conv is None else conv(x))
        return _apply(act, add(z, residual, in_place))
    if _stock_only(x):
        return _apply(act, conv(x))
    stock = None if conv is None else _stock_conv(conv)
    if parts is None:
        return run_conv_act(x, stock, act, **options)
    bn, own = parts
    behind = None
    if own is not None:
        act, behind = _spec(own)
    if stock is None:
        z = run_bn_act(x, bn, act, residual, in_place, backend=backend)
    else:
        z = run_conv_bn_act(x, stock, bn, act, residual, in_place, **options)
    return z if behind is None else behind(z)
