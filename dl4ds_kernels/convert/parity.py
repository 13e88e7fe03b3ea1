"""Compare a model's outputs before and after ``optimize``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Relative to the largest value of an output: fused arithmetic rounds in another order.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def reference_outputs(model: nn.Module, example_inputs: Any, restore: Callable[[nn.Module], nn.Module]) -> Any:
    """Outputs of the stock model; an already optimized one is restored in a copy first."""
    if "dl4ds_report" in model.__dict__:
        model = restore(copy.deepcopy(model))
    return _run(model, example_inputs)


def check_parity(model: nn.Module, example_inputs: Any, expected: Any) -> None:
    """RuntimeError naming the first output that differs from ``expected`` by more than rounding."""
    outputs = dict(_tensors(_run(model, example_inputs)))
    for name, want in _tensors(expected):
        got = outputs.get(name)
        if got is None or got.shape != want.shape or got.dtype != want.dtype:
            found = "nothing" if got is None else f"{tuple(got.shape)} {got.dtype}"
            raise RuntimeError(f"optimize: parity: {name}: expected {tuple(want.shape)} {want.dtype}, got {found}")
        if not want.is_floating_point() or want.numel() == 0:
            continue
        scale = want.double().abs().nan_to_num(0, 0, 0).max().item() or 1.0
        difference = (got.double() - want.double()).abs().nan_to_num(0, 0, 0).max().item() / scale
        same_nan = bool((got.isnan() == want.isnan()).all())
        if difference > _TOLERANCE[want.dtype] or not same_nan:
            raise RuntimeError(
                f"optimize: parity: {name}: the optimized model differs from the stock one by {difference:.1e} of the output's "
                f"largest value (allowed {_TOLERANCE[want.dtype]:.0e}); the model was left unchanged"
            )


def _run(model: nn.Module, example_inputs: Any) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(example_inputs, Mapping):
                return model(**example_inputs)
            if isinstance(example_inputs, (tuple, list)):
                return model(*example_inputs)
            return model(example_inputs)
    finally:
        for module, training in modes:
            module.training = training


def _tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")
