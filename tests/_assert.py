"""The error rule of the project: not more than twice stock eager's own error against fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor | None]


def run(
    function: Callable[[dict[str, Any]], Tensor], tensors: dict[str, Any], dout: Tensor | None, wrt: tuple[str, ...]
) -> Results:
    """Call ``function`` on fresh leaves of ``tensors``; results "out", "d<name>" for ``wrt``, and the running statistics.

    Views keep their strides. Running statistics are copies, so that in-place updates do not reach the caller's tensors.
    """
    leaves = {name: t.detach() if isinstance(t, Tensor) else t for name, t in tensors.items()}
    for name in ("running_mean", "running_var"):
        if leaves.get(name) is not None:
            leaves[name] = leaves[name].clone()
    wrt = tuple(name for name in wrt if leaves.get(name) is not None)
    if dout is not None:
        for name in wrt:
            leaves[name].requires_grad_()
    out = function(leaves)
    results: Results = {"out": out.detach()}
    if dout is not None:
        grads = torch.autograd.grad(out, [leaves[name] for name in wrt], dout)
        results |= {f"d{name}": grad for name, grad in zip(wrt, grads, strict=True)}
    results |= {name: leaves[name] for name in ("running_mean", "running_var") if leaves.get(name) is not None}
    return results


def widen(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors in fp64 on the CPU."""
    return {name: t.detach().double().cpu() if isinstance(t, Tensor) else t for name, t in tensors.items()}


def no_worse_than_torch(
    ours: Tensor, stock: Tensor, truth: Tensor, name: str = "out", factor: float = 2.0, size: float = 0.0
) -> None:
    """``ours`` has the shape, dtype and NaN/Inf of ``stock`` and at most ``factor`` its error against ``truth`` (fp64).

    Two errors are bounded: the largest, and the mean without the largest percent. Stock may be exact by luck, so one ulp (of
    the largest, and of the mean absolute value) is always allowed; 4 for a handful of values, 256 in fp64, where stock is the
    truth. ``size``: of what the results are differences of, if that is larger (its ulp is allowed then).
    """
    assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype), (
        f"{name}: {tuple(ours.shape)} {ours.dtype}, stock has {tuple(stock.shape)} {stock.dtype}"
    )
    same_non_finite(ours, stock, name)
    ulp = torch.finfo(stock.dtype).eps * (256 if stock.dtype == torch.float64 else 4 if stock.numel() < 16 else 1)
    ours, stock, truth = (t.detach().double().cpu().flatten() for t in (ours, stock, truth))
    finite = stock.isfinite() & truth.isfinite()
    ours, stock, truth = ours[finite], stock[finite], truth[finite]
    if not truth.numel():
        return
    error, stock_error, scale = (ours - truth).abs(), (stock - truth).abs(), truth.abs()
    worst, allowed = error.max(), factor * stock_error.max() + ulp * max(float(scale.max()), size)
    assert worst <= allowed, f"{name}: largest error {worst:.3g}, allowed {allowed:.3g} at {_where(error, ours, truth)}"
    mean, allowed = _robust_mean(error), factor * _robust_mean(stock_error) + ulp * max(float(scale.mean()), size)
    assert mean <= allowed, f"{name}: mean error {mean:.3g}, allowed {allowed:.3g}"


def same_non_finite(ours: Tensor, stock: Tensor, name: str = "out") -> None:
    """NaN and Inf (with its sign) in the same places."""
    ours, stock = ours.detach().double().cpu(), stock.detach().double().cpu()
    for what, test in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        differ = test(ours) != test(stock)
        assert not differ.any(), f"{name}: {what} differs from stock in {int(differ.sum())} of {differ.numel()} elements"


def compare(ours: Results, stock: Results, truth: Results, backend: str, sizes: Mapping[str, float] | None = None) -> None:
    """The error rule for every result that stock has; ``reference`` is written to be obvious and may err twice as much.

    ``sizes``: for results in which larger values cancel, how large those are, by name.
    """
    factor = 4.0 if backend == "reference" else 2.0
    assert ours.keys() == stock.keys() == truth.keys()
    for name in stock:
        no_worse_than_torch(ours[name], stock[name], truth[name], name, factor, (sizes or {}).get(name, 0.0))


def same_bits(a: Results, b: Results) -> None:
    """Equal bit for bit, NaN included."""
    assert a.keys() == b.keys()
    for name in a:
        first, second = (t.contiguous().view(torch.uint8) for t in (a[name], b[name]))
        assert torch.equal(first, second), f"{name}: {int((a[name] != b[name]).sum())} elements differ"


def _robust_mean(error: Tensor) -> Tensor:
    kept = max(1, error.numel() - error.numel() // 100)
    return error.sort().values[:kept].mean()


def _where(error: Tensor, ours: Tensor, truth: Tensor) -> str:
    i = int(error.argmax())
    return f"flat index {i} of {error.numel()}: {ours[i]:.9g}, fp64 says {truth[i]:.9g}"


class compile_counter:
    """A torch.compile backend that counts the graphs it gets: ``compiled(f)`` then calls, then ``graphs``."""

    def __init__(self, backend: str) -> None:
        self.graphs, self._compile = 0, torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return self._compile(graph, inputs)


def copies_made(function: Callable[[], Any]) -> list[str]:
    """Names of the copying torch ops that ran inside ``function``, those called from C++ included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    copying = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy")
    return [event.name for event in profile.events() if event.name in copying]
