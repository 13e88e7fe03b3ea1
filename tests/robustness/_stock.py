"""Stock formulations of the public functions, and the rule of the fault suite: what torch does is what ours must do.

``same`` calls both: where stock raises, ours must raise that type (or a subclass) and name the op; where it returns, ours must
return the same shapes, dtypes, strides, NaN and Inf, and values within the error rule of ``_assert``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import no_worse_than_torch
from torch import Tensor

from dl4ds_kernels import functional as F

ACTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda z, slope: z,
    "relu": lambda z, slope: torch.relu(z),
    "leaky_relu": lambda z, slope: TF.leaky_relu(z, slope),
    "relu6": lambda z, slope: TF.relu6(z),
    "silu": lambda z, slope: TF.silu(z),
    "hardswish": lambda z, slope: TF.hardswish(z),
}


def add_act(x: Any, residual: Any, *, alpha: float = 1.0, activation: str = "relu", negative_slope: float = 0.1) -> Tensor:
    z = torch.add(x, residual)
    return ACTS[activation](z if alpha == 1.0 else alpha * z, negative_slope)


def bn_act(
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, *, residual: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, activation: str = "relu", negative_slope: float = 0.1,
) -> Tensor:  # fmt: skip
    z = TF.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return ACTS[activation](z if residual is None else torch.add(z, residual), negative_slope)


def conv_bn_act(
    x: Any, weight: Any, bias: Any = None, *, running_mean: Any, running_var: Any, bn_weight: Any = None, bn_bias: Any = None,
    residual: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, **options: Any,
) -> Tensor:  # fmt: skip
    y = TF.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if y.dim() == 3:  # BatchNorm has no unbatched form: a batch of one
        residual = None if residual is None else residual.unsqueeze(0)
        z = bn_act(y.unsqueeze(0), running_mean, running_var, bn_weight, bn_bias, residual=residual, **options)
        return z.squeeze(0)
    return bn_act(y, running_mean, running_var, bn_weight, bn_bias, residual=residual, **options)


def add_bn_act(
    x: Any, residual: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, *, alpha: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    total = add_act(x, residual, alpha=alpha, activation="none")
    return total, bn_act(total, mean, var, weight, bias, **options)


def bn_act_conv(
    x: Any, mean: Any, var: Any, bn_weight: Any, bn_bias: Any, weight: Any, bias: Any = None, *, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1, **options: Any,
) -> Tensor:  # fmt: skip
    return TF.conv2d(bn_act(x, mean, var, bn_weight, bn_bias, **options), weight, bias, stride, padding, dilation, groups)


def max_pool_indices(x: Any) -> tuple[Tensor, Tensor]:
    out, index = TF.max_pool2d(x, 2, 2, return_indices=True)
    return out, (index // x.shape[3] % 2 * 2 + index % x.shape[3] % 2).to(torch.uint8)


def max_unpool(y: Tensor, where: Tensor) -> Tensor:
    n, c, h, w = y.shape
    rows = torch.arange(h).view(h, 1) * 2 + where // 2
    columns = torch.arange(w) * 2 + where % 2
    return TF.max_unpool2d(y, rows.long() * (2 * w) + columns.long(), 2, 2)


def upsample_add(low: Any, skip: Any) -> Tensor:
    return torch.add(skip, TF.interpolate(low, scale_factor=2.0, mode="nearest"))


STOCK: dict[str, Callable[..., Any]] = {
    "add_act": add_act,
    "bn_act": bn_act,
    "conv_bn_act": conv_bn_act,
    "add_bn_act": add_bn_act,
    "bn_act_conv": bn_act_conv,
    "max_pool_indices": max_pool_indices,
    "max_unpool": max_unpool,
    "upsample_add": upsample_add,
}


def fresh(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A detached value: running statistics are cloned by the caller; floating tensors are widened where asked."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def same(
    name: str, *args: Any, strides: bool = True, factor: float = 2.0, size: float = 0.0, backend: str | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """Ours and stock on the same arguments (see the module); returns our result, or the exception that ours raised.

    Running statistics that a training call updates are compared too; the caller's tensors stay as they are.
    """
    function, stock = getattr(F, name), STOCK[name]

    def arguments(dtype: torch.dtype | None = None) -> tuple[list[Any], dict[str, Any]]:
        copies = [fresh(a, dtype) for a in args], {key: fresh(value, dtype) for key, value in options.items()}
        if options.get("training"):  # one-dimensional tensors may be running statistics
            copies = [_own(a) for a in copies[0]], {key: _own(value) for key, value in copies[1].items()}
        return copies

    stock_args, stock_options = arguments()
    our_args, our_options = arguments()
    try:
        with torch.no_grad():
            expected = stock(*stock_args, **stock_options)
    except Exception as error:
        with torch.no_grad(), pytest.raises(type(error)) as caught:
            function(*our_args, **our_options, backend=backend)
        assert type(caught.value) in type(error).__mro__ or isinstance(caught.value, type(error))
        return caught.value
    with torch.no_grad():
        ours = function(*our_args, **our_options, backend=backend)
        try:
            wide_args, wide_options = arguments(torch.float64)
            truth = stock(*wide_args, **wide_options)
        except (RuntimeError, NotImplementedError):  # a stock op without float64
            truth = expected
    for i, (a, b, c) in enumerate(zip(_flat(ours), _flat(expected), _flat(truth), strict=True)):
        assert a.device == b.device and a.layout == b.layout
        if strides:
            kept = significant if "conv" in name else Tensor.stride  # conv: laid out as conv2d lays out, before BatchNorm
            assert kept(a) == kept(b) or b.numel() < 2, (
                f"{name}: strides {a.stride()}, stock's {b.stride()} of {tuple(b.shape)}"
            )
        _compare(a, b, c, f"{name}[{i}]", factor, args[0].dtype, size)
    if options.get("training"):
        calls = ((our_args, our_options), (stock_args, stock_options), (wide_args, wide_options))
        all_arguments = ((*positional, *named.values()) for positional, named in calls)
        for a, b, c in zip(*all_arguments, strict=True):
            if isinstance(a, Tensor) and a.dim() == 1:
                # The new mean may be what is left of a difference of the old one and the batch's.
                largest = float(args[0].detach().abs().nan_to_num().max()) if args[0].numel() else 0.0
                _compare(a, b, c, "running statistics", factor, a.dtype, largest)
    return ours


def significant(t: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one element: the others address nothing."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def _compare(
    ours: Tensor, stock: Tensor, truth: Tensor, name: str, factor: float, computed: torch.dtype, size: float = 0
) -> None:
    """``computed``: dtype of the first operand; a promoted result has its rounding, not that of the dtype it is stored in."""
    assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype), f"{name}: {ours.shape} {ours.dtype}, not {stock.dtype}"
    if not stock.is_floating_point():
        assert torch.equal(ours, stock), f"{name}: integers differ"
        return
    if computed.is_floating_point and torch.finfo(computed).eps > torch.finfo(stock.dtype).eps:
        ours, stock = ours.to(computed), stock.to(computed)
    # Stock multiplies in steps, of which one may overflow though the result does not: ours need not follow there.
    in_range = truth.isfinite() & (truth.abs() < torch.finfo(stock.dtype).max) & ours.isfinite()
    stock = torch.where(stock.isinf() & in_range, truth.to(stock.dtype), stock)
    no_worse_than_torch(ours, stock, truth, name, factor, size)


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.dim() == 1 else value


def _flat(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def bn_vectors(channels: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """running_mean, running_var, weight, bias: (channels,)."""
    g = torch.Generator().manual_seed(seed)
    mean, var, weight, bias = (torch.rand(channels, generator=g, dtype=torch.float64) for _ in range(4))
    return [t.to(dtype) for t in (mean - 0.5, var + 0.2, weight * 2 - 0.7, bias - 0.5)]
