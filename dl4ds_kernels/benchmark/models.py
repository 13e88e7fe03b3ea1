"""Whole models as benchmark cases: any model by name or factory, ours against stock torch and runtimes, inference."""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..convert import optimize
from . import peers
from ._case import OURS, Case, Problem, Run, Unavailable, compiled, generator, place, randn
from ._stock import plain_torch, stock_twin

COMPARE = ("eager", "channels_last", "compile", "folded", *peers.RUNTIMES)
# Without exact=True a faster algorithm may be chosen up to this error; runtimes choose theirs without asking.
_FAST_LIMIT, _EXACT_LIMIT = 1e-4, 8 * torch.finfo(torch.float32).eps
_SOURCES = ("torchvision", "timm")


class ModelError(ValueError):
    """The model cannot be built; the message says why."""


@dataclass(frozen=True)
class Size:
    """An input (C, H, W) or (C, D, H, W) of the model ``name``."""

    name: str
    shape: tuple[int, ...]

    def describe(self, batch: int) -> str:
        return "N" + "x".join(map(str, (batch, *self.shape)))


def load(spec: str) -> tuple[nn.Module, tuple[int, ...], bool]:
    """(model in eval, its usual input size, whether it is one of this package's) of ``spec``.

    ``torchvision:resnet50``, ``timm:resnet50``, a name of ``dl4ds_kernels.models``, or ``package.module:factory``, whose
    ``factory()`` returns a module. Weights are random with seed 2015, BatchNorm statistics differ from the identity; nothing is
    downloaded. ModelError with what is known for anything that cannot be built.
    """
    source, _, name = spec.rpartition(":")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2015)
            if source == "torchvision":
                model, size = _torchvision(name)
            elif source == "timm":
                model, size = _timm(name)
            elif source:
                model, size = _factory(source, name), (3, 224, 224)
            else:
                from .. import models

                model, size = models.create(name), models.model_info(name).input_size
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model: cannot build {spec!r}: {(str(error).strip().splitlines() or [repr(error)])[0]}") from error
    return _settled(model), tuple(size), not source


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"model: {name} is not installed ({error}): pip install {name}") from None


def _torchvision(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    library = _library("torchvision").models
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    extra = {"weights_backbone": None} if name.startswith(("fcn", "deeplab", "lraspp")) else {}
    model = library.get_model(name, weights=None, **quick, **extra)
    return model, (3, 299, 299) if name == "inception_v3" else (3, 224, 224)


def _timm(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    model = _library("timm").create_model(name, pretrained=False)
    return model, getattr(model, "default_cfg", {}).get("input_size") or (3, 224, 224)


def _factory(module: str, name: str) -> nn.Module:
    factory = getattr(importlib.import_module(module), name)
    model = factory()
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: expected {module}:{name}() to return an nn.Module, got {type(model).__name__}")
    return model


def _settled(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(2015)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.copy_(0.1 * torch.randn(m.running_mean.shape, generator=g))
            m.running_var.copy_(0.5 + torch.rand(m.running_var.shape, generator=g))
    return model.eval()


def first(output: Any) -> Tensor:
    """The tensor that is compared: of a dict the first, of several outputs the last."""
    if isinstance(output, dict):
        output = next(iter(output.values()))
    while isinstance(output, (list, tuple)):
        output = output[-1]
    return torch.as_tensor(output)


class ModelBench:
    """One model as an op of the engine: ``select``, ``problem``, ``setup`` and an error floor of its own.

    Args:
        spec: as :func:`load` takes it. exact: ours leaves out Winograd F(4x4), F(6x6) and Strassen.
    """

    STOCK, DEFAULT, differentiable = ("eager", "channels_last", "compile"), "", False
    SETTLE_S = 0.02  # between two candidates: the idle threads of a runtime spin for a while

    def __init__(self, spec: str, exact: bool = False) -> None:
        self.spec, self.exact = spec, exact
        self.model, self.size, own = load(spec)
        # This package's own models already run our ops: their baseline is the same modules in plain torch.
        self._stock = stock_twin(self.model) if own else self.model
        self._plain: Callable[[], Any] = plain_torch if own else contextlib.nullcontext
        self._made: dict[tuple[Case, str], Run] = {}
        self._costs: dict[Case, tuple[int, int]] = {}
        self.problem = lru_cache(maxsize=1)(self._problem)

    def select(self, selection: str) -> list[Size]:
        """Inputs ``CxHxW`` of a comma-separated selection; the model's usual one for none."""
        sizes = []
        for item in filter(None, (part.strip() for part in selection.split(","))):
            if not re.fullmatch(r"\d+(x\d+){2,3}", item) or not all(map(int, item.split("x"))):
                raise ValueError(f"shapes: expected CxHxW such as {'x'.join(map(str, self.size))}, got {item!r}")
            sizes.append(Size(self.spec, tuple(map(int, item.split("x")))))
        return sizes or [Size(self.spec, self.size)]

    def floor(self, case: Case, provider: str) -> float:
        """Error that is allowed however small stock torch's own is."""
        if case.dtype != "fp32":
            return 0.0
        return _EXACT_LIMIT if self.exact and provider in OURS else _FAST_LIMIT

    def _problem(self, case: Case) -> Problem:
        if case.backward:
            raise Unavailable("models are measured in inference: use --pass fwd")
        self._made.clear()
        x = randn(case, generator(case), (case.batch, *case.layer.shape))
        with self._plain():
            truth = first(copy.deepcopy(self._stock).double()(x.double()))
        return Problem({"x": x}, {"out": truth.detach()})

    def setup(self, case: Case, provider: str) -> Run:
        """The call of one provider; exported and compiled once for gate and timing."""
        if (case, provider) not in self._made:
            self._made[case, provider] = self._setup(case, provider)
        return self._made[case, provider]

    def _setup(self, case: Case, provider: str) -> Run:
        x = place(case, self.problem(case).inputs["x"], "eager_cl" if provider == "channels_last" else "")
        call = self._call(case, provider, x)
        return Run(call, lambda: {"out": first(call())}, *self._cost(case))

    def _cost(self, case: Case) -> tuple[int, int]:
        """Least bytes (input, output, every parameter once) and floating-point operations of direct algorithms."""
        if case not in self._costs:
            made = self.problem(case)
            with self._plain(), FlopCounterMode(display=False) as counter:
                self._copy(case)(place(case, made.inputs["x"]))
            tensors = [made.inputs["x"], made.truth["out"], *self._stock.state_dict().values()]
            item = made.inputs["x"].element_size()
            self._costs[case] = sum(t.numel() for t in tensors) * item, counter.get_total_flops()
        return self._costs[case]

    def _copy(self, case: Case) -> nn.Module:
        return copy.deepcopy(self._stock).to(case.device, case.torch_dtype)

    def _call(self, case: Case, provider: str, x: Tensor) -> Callable[[], Any]:
        if provider in OURS:
            model = copy.deepcopy(self.model).to(case.device, case.torch_dtype)
            ours = optimize(model, backend=provider, exact=self.exact, inplace=True)
            return lambda: ours(x)
        stock = self._copy(case)
        if provider in ("channels_last", "compile"):
            stock = stock.to(memory_format=torch.channels_last)
        if provider in peers.RUNTIMES or provider == "folded":
            if case.dtype != "fp32" or case.device != "cpu":
                raise Unavailable(f"{provider} is compared in fp32 on the CPU only")
            makers = {**peers.RUNTIMES, "folded": peers.folded}
            with self._plain():
                found, missing = peers.build({provider: makers[provider]}, stock, x, torch.get_num_threads())
            if provider in missing:
                raise Unavailable(missing[provider])
            return found[provider]
        fn = compiled(stock) if provider == "compile" else stock
        if provider not in COMPARE:
            raise ValueError(f"provider: expected one of {', '.join((*COMPARE, *OURS))}, got {provider!r}")

        def plain() -> Any:
            with self._plain():
                return fn(x)

        return plain
