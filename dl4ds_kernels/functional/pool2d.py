"""Pooling of (N, C, H, W) for inference on the CPU: one pass over channels_last maps, without indices."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import reference
from .._backend import REFERENCE, STOCK, current, select
from .._define import op
from ._common import call, check_tensor, needs_grad

_CL = torch.channels_last
# Measured on 2 cores of a Zen 4, our host time (10 us against torch's 3 us) included: values compared or added in a call
# from which we are faster. torch's averages have no indices to write, so only large outputs (fresh pages) gain.
_LEAST_COMPARED = 300_000
_LEAST_ADDED = 2_000_000
_LARGEST_GLOBAL = 256  # pixels of a map: with more, 256 channels a thread are slower than torch's reduction


def _path(name: str, x: Any, backend: str | None, fits: bool) -> str:
    """``fits``: a geometry that the kernels know; stock torch has the error messages for the others, and the gradients."""
    asked = backend or current()
    if asked == "reference":
        return select(name, x, backend)
    kernel = (
        fits
        and asked in ("auto", "cpu")
        and type(x) is Tensor
        and x.dtype is torch.float32
        and x.is_cpu
        # torch's rule for the output's layout; ambiguous ones (one channel, one pixel) stay with stock torch
        and x.is_contiguous(memory_format=_CL)
        and not x.is_contiguous()
        and x.numel() > 0
        and not needs_grad(x)
    )
    return select(name, x, backend) if kernel else STOCK


def _pair(value: Any) -> list[int] | None:
    """[height, width] of an int or a pair, None for anything else."""
    if type(value) is int:
        return [value, value]
    if type(value) is tuple and len(value) in (1, 2) and all(type(v) is int for v in value):
        return [value[0], value[-1]]
    return None


class _Geometry(NamedTuple):
    """``pairs``: kernel, stride, padding, dilation; the least height and width of a map that they fit on."""

    pairs: tuple[list[int], ...]
    height: int
    width: int

    def fits(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or x.dim() != 4:
            return False
        shape = x.shape
        return shape[2] >= self.height and shape[3] >= self.width


@lru_cache(maxsize=1024)
def _parse(kernel: Any, stride: Any, padding: Any, dilation: Any) -> _Geometry | None:
    pairs = (_pair(kernel), _pair(kernel if stride is None else stride), _pair(padding), _pair(dilation))
    if any(pair is None for pair in pairs):
        return None
    least = []
    for k, s, p, gap in zip(*pairs, strict=True):
        reach = gap * (k - 1) + 1
        if k < 1 or s < 1 or gap < 1 or p < 0 or 2 * p > k:
            return None
        least.append(reach - 2 * p)
    return _Geometry(pairs, *least)


def _geometry(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> tuple[list[int], ...] | None:
    """The four pairs, None where stock torch would raise (or where its rules are not ours)."""
    try:
        geometry = _parse(kernel, stride, padding, dilation)
    except TypeError:  # a list, or something else that cannot be remembered
        return None
    return geometry.pairs if geometry is not None and geometry.fits(x) else None


def _enough(x: Tensor, pairs: tuple[list[int], ...] | None, backend: str | None, least: int) -> bool:
    """Whether the call is one for the kernels: a known geometry, and large enough unless a backend was asked for."""
    if pairs is None or torch.compiler.is_compiling():  # before the size: a comparison would tie compiled code to it
        return False
    (kh, kw), (sh, sw) = pairs[0], pairs[1]
    return (backend or current()) != "auto" or x.numel() * kh * kw >= least * sh * sw


def _numbers(pairs: tuple[list[int], ...]) -> list[int]:
    return [number for pair in pairs for number in pair]


def max_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, *,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.max_pool2d`` with the same results to the last bit, NaN included.

    fp32 channels_last maps on the CPU take a kernel of our own where no gradient is asked for; everything else, every error
    and training is stock torch.

    Args:
        x: (N, C, H, W). kernel_size, stride, padding, dilation: pixels, one number or (height, width). ceil_mode: round the
            output's size up.
        backend: overrides ``dk.backend`` for this call ("cpu" or "reference").

    Returns:
        (N, C, H_out, W_out), laid out as torch does. Differentiable in ``x`` (by stock torch).
    """
    if has_torch_function_variadic(x):
        return handle_torch_function(
            max_pool2d, (x,), x, kernel_size, stride, padding, dilation, ceil_mode, backend=backend
        )  # fmt: skip
    pairs = _geometry(x, kernel_size, stride, padding, dilation)
    path = _path("max_pool2d", x, backend, _enough(x, pairs, backend, _LEAST_COMPARED))
    if path == STOCK or pairs is None:
        return TF.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    if path == REFERENCE:
        return reference.max_pool2d(x, *pairs, ceil_mode)
    return call(op("max_pool2d", path), False, x, *_numbers(pairs), ceil_mode)


def avg_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None, *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.avg_pool2d`` with the same results to the last bit; see :func:`max_pool2d`.

    Args:
        count_include_pad: whether zeros of the padding count in a window's size. divisor_override: divides by this instead.
    """
    if has_torch_function_variadic(x):
        return handle_torch_function(
            avg_pool2d, (x,), x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, backend=backend
        )  # fmt: skip
    pairs = _geometry(x, kernel_size, stride, padding)
    fits = _enough(x, pairs, backend, _LEAST_ADDED) and (divisor_override is None or divisor_override > 0)
    path = _path("avg_pool2d", x, backend, fits)
    if path == STOCK or pairs is None or not fits:
        return TF.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if path == REFERENCE:
        return reference.avg_pool2d(x, *pairs[:3], ceil_mode, count_include_pad, divisor_override or 0)
    return call(op("avg_pool2d", path), False, x, *_numbers(pairs[:3]), ceil_mode, count_include_pad, divisor_override or 0)


def global_avg_pool2d(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool2d(x, 1)``: (N, C, H, W) -> (N, C, 1, 1); see :func:`max_pool2d`.

    Sums in fp32 in another order than torch: equal up to rounding.
    """
    if has_torch_function_variadic(x):
        return handle_torch_function(global_avg_pool2d, (x,), x, backend=backend)
    compiling = torch.compiler.is_compiling()  # before the size, as in _enough
    fits = not compiling and isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] * x.shape[3] <= _LARGEST_GLOBAL
    path = _path("global_avg_pool2d", x, backend, fits)
    if path == STOCK:
        check_tensor("global_avg_pool2d", "x", x)  # stock torch says AttributeError
        return TF.adaptive_avg_pool2d(x, 1)
    return reference.global_avg_pool2d(x) if path == REFERENCE else call(op("global_avg_pool2d", path), False, x)
