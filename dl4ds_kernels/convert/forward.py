"""The callable that ``optimize`` puts into ``module.forward``."""

from __future__ import annotations

import types
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..modules._replay import run_replayed
from .audit import Untraceable
from .blocks import block_plan
from .passing import FusedMarker
from .plan import MISS, Options, Plan, make_plan
from .purity import is_pure
from .trace import TENSOR, Tensors, argument_kind, stock_signature

_MAX_SPECIALISATIONS = 8


class FusedForward(FusedMarker):
    """A module's forward with its chains fused; set as an instance attribute, so the class and the state_dict stay untouched.

    Holds plans for the argument kinds and attribute values seen so far (train and eval may differ); a call that no plan fits
    makes one, or runs the stock forward. Copies and pickles carry the options only and plan again at their first call. Like a
    bound method it keeps its module alive, so the two form a cycle, which Python's garbage collector frees.
    """

    def __init__(self, module: nn.Module, options: Options, skip: Collection[str] = (), plan: Plan | None = None) -> None:
        self.__doc__ = type(module).forward.__doc__
        self.module = module
        self.options = options
        self.skip = frozenset(skip)
        self._runs = [] if plan is None else [plan.run]
        self.is_pure = plan is None or plan.from_instances
        self._planned = len(self._runs)

    @property
    def plan(self) -> Any:
        """The latest plan's ``run``, None before the first call of a copy."""
        return self._runs[0] if self._runs else None

    def install(self) -> None:
        """Make this the forward of its module."""
        self.module.forward = self
        self.module._replicate_for_data_parallel = self.replicate

    def uninstall(self) -> None:
        """Give the module its stock forward back."""
        for name in ("forward", "_replicate_for_data_parallel"):
            self.module.__dict__.pop(name, None)

    def replicate(self) -> nn.Module:
        """``nn.DataParallel`` copies the attributes of a module; the copy needs a forward that works on the copy."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        fused = FusedForward(replica, self.options, self.skip)
        fused._runs, fused._planned, fused.is_pure = self._runs, self._planned, self.is_pure
        replica.__dict__.pop("_replicate_for_data_parallel", None)
        replica.forward = fused
        return replica

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not self.is_pure:
            return self._run(args, kwargs)
        backend = None if self.options.backend == "auto" else self.options.backend
        return run_replayed(self.module, args, lambda: self._run(args, kwargs), is_pure, backend)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for run in self._runs:
            out = run(self.module, *args, **kwargs)
            if out is not MISS:
                return out
        return self._other(args, kwargs)

    def _other(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that no plan fits yet."""
        module = self.module
        if self._planned < _MAX_SPECIALISATIONS and not torch.compiler.is_compiling():
            bound = stock_signature(module).bind(*args, **kwargs)  # TypeError for wrong arguments, as from the stock forward
            bound.apply_defaults()
            kinds = {name: argument_kind(value) for name, value in bound.arguments.items()}
            self._planned += 1
            run = self._plan(kinds)
            if run is not None:
                self._runs = [run, *self._runs]
                out = run(module, *args, **kwargs)
                if out is not MISS:
                    return out
        self.is_pure = False  # it did not come to a plan: somebody else may have a say
        return type(module).forward(module, *args, **kwargs)

    def _plan(self, arguments: dict[str, Any]) -> Any:
        try:
            # Blocks are called with tensors; under fx.symbolic_trace with proxies, which no plan fits.
            tensors = all(kind is TENSOR or type(kind) is Tensors for kind in arguments.values())
            plan = block_plan(self.module, self.options, self.skip) if tensors else None
            plan = plan or make_plan(self.module, arguments, self.options, self.skip)
            self.is_pure &= plan.from_instances
            return plan.run
        except Untraceable:
            return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (FusedForward, (self.module, self.options, self.skip))

    def __getattr__(self, name: str) -> Any:
        """Signature, name, code, … of the stock method, for those who introspect ``model.forward``."""
        if name in ("module", "options", "skip", "is_pure", "_runs", "_planned"):  # not there yet while being unpickled
            raise AttributeError(name)
        stock = types.MethodType(type(self.module).forward, self.module)
        return stock if name == "__wrapped__" else getattr(stock, name)

    def __repr__(self) -> str:
        return f"<fused forward of {type(self.module).__name__}>"
