"""The call below autograd, and the checks that turn a failed call into a clear error.

The functionals do the work first and explain afterwards: a good call pays for no checks of its own (stock torch and the C++
host functions make theirs), and a bad one gets a message with op, argument, what was expected and what came, in the exception
type of the stock callable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._backend import FLOATING

_below_autograd = torch._C._AutoDispatchBelowAutograd


def call(overload: Any, differentiable: bool, *args: Any) -> Any:
    """Call an op; without gradients the Python autograd kernel (tens of microseconds) is stepped over.

    The kernels have no forward-mode derivative, and torch would silently take it as zero: a dual tensor is refused.
    """
    if forward_ad._current_level >= 0:
        _refuse_dual(overload, args)
    if differentiable or torch.compiler.is_compiling():
        return overload(*args)
    with _below_autograd():
        return overload(*args)


def _refuse_dual(overload: Any, args: Sequence[Any]) -> None:
    for value in args:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            name = overload._schema.name.split("::")[1]
            raise NotImplementedError(
                f"{name}: forward-mode AD: expected plain tensors, got a dual tensor (backend='auto' takes stock torch there)"
            )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def fail(op: str, argument: str, expected: str, got: object, kind: type[Exception] = RuntimeError) -> NoReturn:
    """Raise ``kind`` with the package's standard message."""
    raise kind(f"{op}: {argument}: expected {expected}, got {got}") from None


def check_tensor(op: str, name: str, value: Any) -> None:
    """TypeError for anything but a tensor, as torch's argument parser raises."""
    if not isinstance(value, Tensor):
        fail(op, name, "a Tensor", type(value).__name__, TypeError)


def check_floating(op: str, name: str, x: Any) -> None:
    """A strided floating-point tensor; NotImplementedError (a RuntimeError) for a dtype without kernels, as torch raises."""
    check_tensor(op, name, x)
    if x.dtype not in FLOATING:
        fail(op, name, "a float32, float64, float16 or bfloat16 tensor", x.dtype, NotImplementedError)
    if x.layout != torch.strided:
        fail(op, name, "a dense (strided) tensor", x.layout)


def check_vector(op: str, name: str, vector: Any, x: Tensor, channels: int) -> None:
    """A per-channel vector: shape (channels,), on ``x``'s device, of ``x``'s dtype or float32 beside half precision."""
    if vector is None:
        return
    check_tensor(op, name, vector)
    if tuple(vector.shape) != (channels,):
        fail(op, name, f"shape (C,) = ({channels},)", tuple(vector.shape))
    if vector.device != x.device:
        fail(op, name, f"a tensor on {x.device} like x", vector.device)
    half = x.dtype in (torch.float16, torch.bfloat16)
    if vector.dtype != x.dtype and not (half and vector.dtype == torch.float32):
        fail(op, name, f"dtype {x.dtype} like x" + (" or torch.float32" if half else ""), vector.dtype)


def broadcasts(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes broadcast (torch.broadcast_shapes imports sympy to say no: seconds, when memory may be short)."""
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False))


def check_residual(op: str, residual: Any, shape: Sequence[int], device: torch.device) -> None:
    """A residual operand that stock addition can broadcast to ``shape`` on ``device``."""
    check_tensor(op, "residual", residual)
    if residual.device != device:
        fail(op, "residual", f"a tensor on {device} like x", residual.device)
    if not broadcasts(shape, residual.shape):
        fail(op, "residual", f"a shape that broadcasts with {tuple(shape)}", tuple(residual.shape))


def eps_mode_flag(op: str, eps_mode: str) -> bool:
    """True for the lecture's (and darknet's) ``sqrt(var) + eps``, False for PyTorch's ``sqrt(var + eps)``."""
    if eps_mode == "var":
        return False
    if eps_mode != "std":
        fail(op, "eps_mode", "'var' or 'std'", repr(eps_mode), ValueError)
    return True
