"""Bytes and launches of a whole model, from the declarations of ops/_traffic.py; nothing is computed (fake tensors)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .._define import composition
from ..ops._traffic import PASSES, moved


class Recorder(TorchDispatchMode):
    """Sums what the ops under it declare. An op that schedules others is counted as these.

    ``bytes``, ``launches``: by op name (the C++ and the Triton namespace alike).
    """

    def __init__(self, table: dict[str, Callable[[Any], Any]] = PASSES) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._table = table

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        compose = composition(name.split("::")[1]) if name.startswith("dl4ds_kernels::") else None
        if compose is not None:
            with self:
                return compose("dl4ds_kernels", *args)
        results = func(*args, **(kwargs or {}))
        declared = moved(func, args, results, self._table)
        if declared is not None:
            self.launches[name] += 1
            self.bytes[name] += sum(read + written for read, written in declared.values())
        return results


def model_bytes(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    *,
    training: bool,
    dtype: torch.dtype = torch.float16,
    table: dict[str, Callable[[Any], Any]] = PASSES,
) -> Recorder:
    """One training step, or one inference call, of the model on a batch of ``shape`` (N, C, H, W).

    The schedule is the one of the op kernels (as on a GPU); the CPU's prepacked convolutions are not part of it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake modules cannot change theirs
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = make().train(training)
            x = torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
            with Recorder(table) as recorder, torch.set_grad_enabled(training):
                out = model(x)
                if training:
                    sum(o.sum() for o in (out if isinstance(out, (tuple, list)) else [out])).backward()
    finally:
        torch.set_default_dtype(before)
    return recorder
