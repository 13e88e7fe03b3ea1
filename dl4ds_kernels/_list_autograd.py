"""The Autograd kernel of an op that takes or gives lists of tensors.

``torch.library.register_autograd`` serves such an op too, but runs every argument, result and gradient of every call through
pytree: for a residual block's twenty tensors that was a quarter of a millisecond each way, with other people's kernels waiting.
Here the structure is one number an argument. The formula sees what it would see there: nested ``inputs``, ``output`` and
``needs_input_grad``, and returns gradients nested like the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKeySet

_PLAIN, _TENSOR = -2, -1  # of an argument; else a list of so many tensors


def has_tensor_lists(overload: Any) -> bool:
    """Whether an argument or a return of the op is a list of tensors."""
    schema = overload._schema
    return any("Tensor" in str(a.type) and "List" in str(a.type) for a in (*schema.arguments, *schema.returns))


class _Call:
    """What ``apply`` is given beside the tensors."""

    __slots__ = ("args", "keyset", "results", "structure")

    def __init__(self, keyset: DispatchKeySet, args: tuple[Any, ...]) -> None:
        self.keyset = keyset
        self.args: Any = args
        self.structure = [_kind(arg) for arg in args]
        self.results: list[int] = []


def _kind(value: Any) -> int:
    if isinstance(value, Tensor):
        return _TENSOR
    if type(value) is list and all(isinstance(item, Tensor) for item in value):
        return len(value)
    return _PLAIN


def _flat(values: Iterable[Any], structure: list[int]) -> list[Any]:
    """The tensors in order, those of lists among them."""
    found: list[Any] = []
    for value, kind in zip(values, structure, strict=True):
        if kind == _TENSOR:
            found.append(value)
        elif kind >= 0:
            found.extend(value)
    return found


def _nested(flat: Iterable[Any], structure: list[int], plain: Any) -> list[Any]:
    """The reverse; ``plain`` stands where there is no tensor."""
    values, found = iter(flat), []
    for kind in structure:
        if kind == _PLAIN:
            found.append(plain)
        else:
            found.append(next(values) if kind == _TENSOR else [next(values) for _ in range(kind)])
    return found


def autograd_kernel(overload: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel(keyset, *args)`` for the Autograd key. ``setup_context``, ``backward``: as torch.library.register_autograd's."""

    def below(keyset: DispatchKeySet, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
            result = below(call.keyset, call.args)
            results = result if isinstance(result, tuple) else (result,)
            setup_context(ctx=ctx, inputs=call.args, output=result)
            call.args = None  # the node keeps what the formula saves
            call.results = [_kind(value) for value in results]
            ctx.call = call
            return tuple(_flat(results, call.results))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            call, needs = ctx.call, ctx.needs_input_grad
            try:
                ctx.needs_input_grad = tuple(_nested(needs[1:], call.structure, False))
                found = backward(ctx, *_nested(grads, call.results, None))
            finally:
                ctx.needs_input_grad = needs
            return (None, *_flat(found, call.structure))

    Formula.__name__ = Formula.__qualname__ = f"{overload._schema.name.split('::')[1]}_formula"

    def kernel(keyset: DispatchKeySet, *args: Any) -> Any:
        if not (torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, args)
        call = _Call(keyset, args)
        values = Formula.apply(call, *_flat(args, call.structure))
        results = _nested(values, call.results, None)
        return results[0] if len(results) == 1 else tuple(results)

    return kernel
