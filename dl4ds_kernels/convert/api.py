"""``optimize``, ``analyze``, ``restore`` and ``refresh``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from .. import _backend, _packing
from ..modules import _replay
from .audit import Untraceable
from .blocks import block_plan
from .forward import FusedForward
from .parity import check_parity, reference_outputs
from .patterns import is_batch_norm
from .plan import Chain, Options, Plan, default_arguments, make_plan
from .report import KEPT, REPLACED, Report, Row

M = TypeVar("M", bound=nn.Module)
Selector = str | type | Iterable[str | type] | None
_MEMORY_FORMATS = ("auto", "preserve", torch.channels_last)


class StrictError(RuntimeError):
    """``optimize(strict=True)`` met a chain that it had to keep; ``report`` has the rows."""

    def __init__(self, report: Report) -> None:
        kept = [f"{row.fqn or '(model)'} ({row.pattern}): {row.reason}" for row in report.kept if row.reason != "EXCLUDED"]
        super().__init__(f"optimize(strict=True): not everything could be replaced: {'; '.join(kept)}")
        self.report = report


def optimize(
    model: M,
    example_inputs: Any = None,
    *,
    include: Selector = None,
    exclude: Selector = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    backend: str = "auto",
    memory_format: Any = "auto",
    strict: bool = False,
    inplace: bool = False,
    exact: bool = False,
    memory_efficient: bool = False,
) -> M:
    """Replace conv-bn-act, bn-act and add-act chains by fused kernels; same type, same state_dict, same signature.

    Modules whose own forward contains such chains get an instance attribute ``forward`` that runs them fused, in train and
    eval. Layers count as stock if they are, if their subclass adds only a constructor, or if they are timm's BatchNormAct2d.
    Everything else, and what cannot be followed, stays as it is; ``model.dl4ds_report`` lists every chain with the reason.
    ``nn.MaxPool2d``, ``nn.AvgPool2d`` and ``nn.AdaptiveAvgPool2d(1)`` take an inference kernel where it applies; they are not
    listed. Modules of this package are fused as built; the report counts them and of the options only ``exact`` reaches them.
    A hook or submodule changed later switches the chain back to the stock modules. The model can be compiled, exported,
    traced, copied and pickled; for ``torch.jit.script``, which reads source code, ``restore`` it first.

    Args:
        model: any ``nn.Module``, on any device.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments. When given, the outputs before and
            after are compared in eval without gradients.
        include, exclude: fully qualified names (``"layer4"``, shell patterns such as ``"layer?.0"``) or module types, one or
            several; a name or type stands for everything below it.
        filter_fn: ``filter_fn(module, fqn) -> bool`` for each container; False leaves its own chains alone.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        memory_format: "auto" (channels_last inside, on CPU in eval), "preserve" or ``torch.channels_last``.
        strict: raise if a chain is kept for another reason than include, exclude or filter_fn.
        inplace: change ``model`` itself; by default a deep copy. Parameters keep their identity with ``inplace=True``.
        exact: keep to algorithms within twice stock torch's own rounding error, in modules of this package too.
        memory_efficient: recompute instead of keeping intermediates in training, where a kernel offers the choice.

    Raises:
        TypeError: ``model`` is not a module. ValueError: unknown backend or memory format.
        StrictError: see ``strict``; the model is unchanged. RuntimeError: the outputs on ``example_inputs`` differ.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model: expected a torch.nn.Module, got {type(model).__name__}")
    if backend not in _backend.BACKENDS:
        raise ValueError(f"optimize: backend: expected one of {', '.join(_backend.BACKENDS)}, got {backend!r}")
    if memory_format not in _MEMORY_FORMATS:
        raise ValueError(f"optimize: memory_format: expected 'auto', 'preserve' or torch.channels_last, got {memory_format!r}")
    if not inplace:
        model = copy.deepcopy(model)
    options = Options(backend, memory_format, exact, memory_efficient)
    selection = _Selection(include, exclude, filter_fn)
    planned, report = _plan_model(model, options, selection)
    if strict and any(row.reason != "EXCLUDED" for row in report.kept):
        raise StrictError(report)
    expected = None if example_inputs is None else reference_outputs(model, example_inputs, restore)
    restore(model)
    for module, plan, skip in planned:
        FusedForward(module, options, skip, plan).install()
    for module in model.modules() if exact else ():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            _packing.keep_exact(module)
    model.dl4ds_report = report
    if expected is not None:
        try:
            check_parity(model, example_inputs, expected)
        except Exception:
            restore(model)
            raise
    # Single layers are not in the report.
    if not (report.replaced or report.own) and (report.rows or not planned):
        warnings.warn(f"dl4ds_kernels.optimize changed nothing: {report.summary()}", stacklevel=2)
    return model


def analyze(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: Selector = None,
    exclude: Selector = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    backend: str = "auto",
) -> Report:
    """The report that ``optimize`` would give, changing nothing. ``example_inputs`` is accepted for symmetry and not run."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"analyze: model: expected a torch.nn.Module, got {type(model).__name__}")
    return _plan_model(model, Options(backend), _Selection(include, exclude, filter_fn))[1]


def restore(model: M) -> M:
    """Undo ``optimize`` in place: stock forwards, no report, no prepacked weights. Returns ``model``."""
    for module in model.modules():
        fused = module.__dict__.get("forward")
        if isinstance(fused, FusedForward):
            fused.uninstall()
        _packing.forget(module)
        _replay.drop(module)
    model.__dict__.pop("dl4ds_report", None)
    return model


def refresh(model: M) -> M:
    """Drop prepacked weights; needed after writes that torch does not count (through ``.data`` or numpy). Returns ``model``."""
    for module in model.modules():
        _packing.drop(module)
    return model


def algorithms(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Which algorithms the convolutions of an optimized model took on the CPU so far: fully qualified name -> their names.

    The choice is made from the sizes of a call, so a convolution that has not run yet is not listed. Those with ``"Strassen"``,
    ``"Winograd F(4x4, 3x3)"`` or ``"Winograd F(6x6, 3x3)"`` may have a rounding error above twice stock torch's;
    ``exact=True`` leaves these out.
    """
    found = {fqn: _packing.algorithms(module) for fqn, module in model.named_modules()}
    return {fqn: names for fqn, names in found.items() if names}


_Planned = tuple[nn.Module, Plan, set[str]]


def _plan_model(model: nn.Module, options: Options, selection: _Selection) -> tuple[list[_Planned], Report]:
    """Plans for every container that has something to fuse, and the report on all of them."""
    shared = _shared_modules(model)
    planned, rows, covered, own = [], [], set(), []
    where = _backend_name(model, options.backend)
    for fqn, module in model.named_modules():
        if _is_ours(module) and not fqn.startswith(tuple(f"{outer}." if outer else "" for outer in own)):
            own.append(fqn)
        if not _is_container(module):
            continue
        plan = _plan_container(module, options, (), shared)
        skip = {chain.key for chain in (*plan.chains, *plan.layers) if not selection.takes(model, fqn, chain)}
        if skip and plan.run is not None:
            plan = _plan_container(module, options, skip, shared)
        covered |= {f"{fqn}.{path}".lstrip(".") for path in plan.inlined}
        for chain in plan.chains if fqn not in covered else ():  # else they are in the rows of the container around it
            rows += _rows(fqn, chain, chain.key in skip, where)
        if plan.run is not None:
            # Reasons known only here (shared across containers) hold for later specialisations too.
            skip |= {chain.key for chain in plan.chains if chain.problem and not chain.parts}
            planned.append((module, plan, skip))
    return planned, Report(rows, own)


def _plan_container(module: nn.Module, options: Options, skip: Collection[str], shared: Collection[int]) -> Plan:
    """The plan for calls with tensors; where there is none, the BatchNorms among the children stand for what it would offer."""
    try:
        if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], FusedForward):
            raise Untraceable(f"forward of this {type(module).__name__} is patched onto the instance")
        known = block_plan(module, options, skip, shared)
        return known or make_plan(module, default_arguments(module), options, skip, shared)
    except Untraceable as error:
        names = [name for name, child in module.named_children() if is_batch_norm(child)]
        return Plan(None, [Chain(name, "bn", (name,), ("UNTRACEABLE", str(error))) for name in names], "")


def _rows(fqn: str, chain: Chain, excluded: bool, where: str) -> Iterator[Row]:
    if excluded:
        yield _row(fqn, chain.pattern, chain.members, KEPT, "EXCLUDED")
    elif chain.problem is None:
        yield _row(fqn, chain.pattern, chain.members, REPLACED, backend=where)
    else:
        yield _row(fqn, chain.pattern, chain.members, KEPT, *chain.problem)
        for pattern, members in chain.parts:
            yield _row(fqn, pattern, members, REPLACED, backend=where)


def _row(fqn: str, pattern: str, members: tuple[str, ...], *status: str, **more: str) -> Row:
    members = tuple(name if name.endswith("()") or not fqn else f"{fqn}.{name}" for name in members)
    return Row(fqn if members[0].endswith("()") else members[0], pattern, members, *status, **more)


def _prefixes(fqn: str) -> list[str]:
    parts = fqn.split(".") if fqn else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _is_container(module: nn.Module) -> bool:
    """Whether the forward is worth a trace: user code and Sequential; torch's own layers are leaves."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    cls = type(module)
    if cls.forward in (nn.Sequential.forward, nn.Module.forward):
        return cls.forward is nn.Sequential.forward
    return not (cls.__module__.startswith(("torch.nn.", "torch.ao.", "torch._dynamo")) or _is_ours(module))


def _is_ours(module: nn.Module) -> bool:
    """Whether the module is of this package: its forward runs fused as it is."""
    return type(module).__module__.startswith(("dl4ds_kernels.modules", "dl4ds_kernels.models"))


def _shared_modules(model: nn.Module) -> set[int]:
    """Ids of modules that are registered as a child in more than one place."""
    seen: set[int] = set()
    shared: set[int] = set()
    for parent in model.modules():
        for child in parent._modules.values():
            if child is not None:
                (shared if id(child) in seen else seen).add(id(child))
    return shared


def _backend_name(model: nn.Module, backend: str) -> str:
    """Where a large enough call of this model's chains would run."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None or backend != "auto":
        return backend
    like = torch.empty(1, dtype=parameter.dtype, device=parameter.device).expand(1 << 20)
    chosen = _backend.select("conv_bn_act", like)
    return {"dl4ds_kernels": parameter.device.type, "dl4ds_kernels_triton": "triton"}.get(chosen, chosen)


class _Selection:
    """``include``, ``exclude`` and ``filter_fn``."""

    def __init__(self, include: Selector, exclude: Selector, filter_fn: Callable[[nn.Module, str], bool] | None) -> None:
        self.include, self.exclude, self.filter_fn = _as_list(include), _as_list(exclude), filter_fn

    def takes(self, model: nn.Module, fqn: str, chain: Chain) -> bool:
        """Whether the user wants this chain of the container ``fqn`` replaced."""
        if self.filter_fn is not None and not self.filter_fn(model.get_submodule(fqn), fqn):
            return False
        paths = [f"{fqn}.{path}" if fqn else path for path in chain.members if not path.endswith("()")]
        names = {name for path in [fqn, *paths] for name in _prefixes(path)}
        modules = [model.get_submodule(name) for name in names]

        def matches(selector: str | type) -> bool:
            if isinstance(selector, str):
                return any(fnmatchcase(name, selector) for name in names if name)
            return any(isinstance(module, selector) for module in modules)

        if self.include is not None and not any(map(matches, self.include)):
            return False
        return not any(map(matches, self.exclude or ()))


def _as_list(selector: Selector) -> list[str | type] | None:
    if selector is None:
        return None
    chosen = [selector] if isinstance(selector, (str, type)) else list(selector)
    for item in chosen:
        if not isinstance(item, (str, type)):
            raise TypeError(f"optimize: include, exclude: expected names or module types, got {item!r}")
    return chosen
