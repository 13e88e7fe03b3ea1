"""Bad input: the exception type of the stock callable, a message with op, argument, expected and got, and no crash."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor

import dl4ds_kernels as dk
from dl4ds_kernels import functional as F

X = torch.randn(2, 8, 5, 4)
ONE, ZERO = torch.ones(8), torch.zeros(8)
W = torch.randn(6, 8, 3, 3)
VECTORS = {"running_mean": torch.zeros(6), "running_var": torch.ones(6)}


def bn(
    x: Any, mean: Any = ZERO, var: Any = ONE, weight: Any = None, bias: Any = None, residual: Any = None, **options: Any
) -> Tensor:
    return F.bn_act(x, mean, var, weight, bias, residual=residual, **options)


def stock_bn(
    x: Any, mean: Any = ZERO, var: Any = ONE, weight: Any = None, bias: Any = None, residual: Any = None, **options: Any
) -> Tensor:
    z = TF.batch_norm(x, mean, var, weight, bias, **{k: v for k, v in options.items() if k in ("training", "eps")})
    return torch.relu(z if residual is None else torch.add(z, residual))


def conv(
    x: Any, w: Any = W, b: Any = None, residual: Any = None, mean: Any = VECTORS["running_mean"], **options: Any
) -> Tensor:
    return F.conv_bn_act(x, w, b, running_mean=mean, running_var=VECTORS["running_var"], residual=residual, **options)


def stock_conv(
    x: Any, w: Any = W, b: Any = None, residual: Any = None, mean: Any = VECTORS["running_mean"], **options: Any
) -> Tensor:
    return stock_bn(TF.conv2d(x, w, b, **options), mean, VECTORS["running_var"], residual=residual)


def add(x: Any, residual: Any) -> Tensor:
    return F.add_act(x, residual)


def stock_add(x: Any, residual: Any) -> Tensor:
    return torch.relu(torch.add(x, residual))


# id: (ours, stock, arguments, keyword arguments, words of the message)
TABLE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...], dict[str, Any], list[str]]] = {
    "bn-int-x": (bn, stock_bn, (X.int(),), {}, ["bn_act: x:", "expected", "float32", "got torch.int32"]),
    "bn-complex-x": (bn, stock_bn, (X.to(torch.complex64),), {}, ["bn_act: x:", "got torch.complex64"]),
    "bn-list-x": (bn, stock_bn, ([[1.0, 2.0]],), {}, ["bn_act: x:", "expected a Tensor", "got list"]),
    "bn-ndarray-x": (bn, stock_bn, (np.ones((2, 8, 5, 4), "float32"),), {}, ["bn_act: x:", "got ndarray"]),
    "bn-none-x": (bn, stock_bn, (None,), {}, ["bn_act: x:", "got NoneType"]),
    "bn-rank-1": (bn, stock_bn, (X[0, 0, 0],), {}, ["bn_act: x:", "dimensions", "got 1"]),
    "bn-mean-length": (bn, stock_bn, (X, ZERO[:7]), {}, ["bn_act: running_mean:", "(8,)", "got (7,)"]),
    "bn-var-length": (bn, stock_bn, (X, ZERO, ONE[:7]), {}, ["bn_act: running_var:", "(8,)", "got (7,)"]),
    "bn-weight-length": (bn, stock_bn, (X, ZERO, ONE, ONE[:5]), {}, ["bn_act: weight:", "(8,)", "got (5,)"]),
    "bn-bias-length": (bn, stock_bn, (X, ZERO, ONE, ONE, torch.ones(9)), {}, ["bn_act: bias:", "(8,)", "got (9,)"]),
    "bn-weight-fp64": (
        bn,
        stock_bn,
        (X, ZERO, ONE, ONE.double(), ZERO.double()),
        {},
        ["bn_act: weight:", "float32", "float64"],
    ),
    "bn-x-fp64": (bn, stock_bn, (X.double(), ZERO, ONE, ONE, ZERO), {}, ["bn_act:", "float64", "float32"]),
    "bn-weight-list": (bn, stock_bn, (X, ZERO, ONE, [1.0] * 8), {}, ["bn_act: weight:", "Tensor", "got list"]),
    "bn-one-value": (
        bn,
        stock_bn,
        (X[:1, :, :1, :1],),
        {"training": True},
        ["bn_act: x:", "more than 1 value", "(1, 8, 1, 1)"],
    ),
    "bn-no-statistics": (bn, stock_bn, (X, None, None), {"training": False}, ["bn_act: running_mean", "expected both", "None"]),
    "bn-eps-zero": (bn, stock_bn, (X,), {"training": True, "eps": 0.0}, ["bn_act: eps:", "positive", "got 0.0"]),
    "bn-eps-negative": (bn, stock_bn, (X,), {"eps": -1e-3}, ["bn_act: eps:", "got -0.001"]),
    "bn-residual-shape": (bn, stock_bn, (X,), {"residual": X[:, :7]}, ["bn_act: residual:", "broadcast", "(2, 7, 5, 4)"]),
    "bn-residual-list": (bn, stock_bn, (X,), {"residual": [1.0]}, ["bn_act: residual:", "Tensor", "got list"]),
    "add-list": (add, stock_add, (X, [1.0]), {}, ["add_act: residual:", "Tensor", "got list"]),
    "add-ndarray-x": (add, stock_add, (np.ones(3, "float32"), X), {}, ["add_act: x:", "got ndarray"]),
    "add-shape": (add, stock_add, (X, X[:, :7]), {}, ["add_act: residual:", "(2, 8, 5, 4)", "got (2, 7, 5, 4)"]),
    "conv-channels": (conv, stock_conv, (X[:, :7],), {}, ["conv_bn_act: x:", "expected 8 channels", "got 7"]),
    "conv-groups": (conv, stock_conv, (X,), {"groups": 3}, ["conv_bn_act:", "groups=3"]),
    "conv-int": (conv, stock_conv, (X.int(),), {}, ["conv_bn_act: x:", "got torch.int32"]),
    "conv-fp64-x": (conv, stock_conv, (X.double(),), {}, ["conv_bn_act: weight:", "float64", "got torch.float32"]),
    "conv-fp16-x": (conv, stock_conv, (X.half(),), {}, ["conv_bn_act: weight:", "float16", "got torch.float32"]),
    "conv-rank-5": (conv, stock_conv, (X[None],), {}, ["conv_bn_act: x:", "(N, C, H, W)", "(1, 2, 8, 5, 4)"]),
    "conv-rank-2": (conv, stock_conv, (X[0, 0],), {}, ["conv_bn_act: x:", "(N, C, H, W)", "(5, 4)"]),
    "conv-weight-rank": (conv, stock_conv, (X, W[0]), {}, ["conv_bn_act: weight:", "kH, kW", "(8, 3, 3)"]),
    "conv-list": (conv, stock_conv, ([1.0],), {}, ["conv_bn_act: x:", "got list"]),
    "conv-weight-list": (conv, stock_conv, (X, [1.0]), {}, ["conv_bn_act: weight:", "got list"]),
    "conv-bias-length": (conv, stock_conv, (X, W, torch.ones(5)), {}, ["conv_bn_act: bias:", "(6,)", "got (5,)"]),
    "conv-mean-length": (conv, stock_conv, (X,), {"mean": torch.ones(5)}, ["conv_bn_act: running_mean:", "(6,)", "got (5,)"]),
    "conv-residual-shape": (conv, stock_conv, (X,), {"residual": X}, ["conv_bn_act: residual:", "broadcast", "(2, 8, 5, 4)"]),
    "conv-too-small": (conv, stock_conv, (X[:, :, :2],), {}, ["ernel"]),
    "conv-stride-0": (conv, stock_conv, (X,), {"stride": 0}, ["stride"]),
    "conv-padding-negative": (conv, stock_conv, (X,), {"padding": -1}, ["padding"]),
}
BACKENDS = (None, "cpu")


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b or "auto")
@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_bad_input(row: Any, backend: str | None) -> None:
    ours, stock, arguments, options, words = row
    if backend:
        dk.backend(backend)
    with pytest.raises(Exception) as expected:
        stock(*arguments, **options)
    with torch.no_grad(), pytest.raises(expected.type) as got:
        ours(*arguments, **options)
    for word in words:
        assert word in str(got.value), f"{word!r} is not in {got.value}"


META_ROWS = {
    "bn-weight": (bn, (X, ZERO, ONE, ONE.to("meta")), "bn_act: weight:"),
    "bn-mean": (bn, (X, ZERO.to("meta"), ONE), "bn_act: running_mean:"),
    "bn-residual": (bn, (X, ZERO, ONE, None, None, X.to("meta")), "bn_act: residual:"),
    "add-residual": (add, (X, X.to("meta")), "add_act: residual:"),
    "conv-mean": (conv, (X, W, None, None, VECTORS["running_mean"].to("meta")), "conv_bn_act: running_mean:"),
}


@pytest.mark.parametrize("backend", [None, "cpu"], ids=lambda b: b or "auto")
@pytest.mark.parametrize("row", META_ROWS.values(), ids=META_ROWS.keys())
def test_other_device(row: Any, backend: str | None) -> None:
    """A tensor on another device (meta stands for any) raises and names both devices."""
    ours, arguments, words = row
    if backend:
        dk.backend(backend)
    with pytest.raises(RuntimeError, match="meta") as got:
        ours(*arguments)
    assert words in str(got.value) and "cpu" in str(got.value)


def raw_bn(x: Tensor = X, weight: Any = None, mean: Any = ZERO, var: Any = ONE, residual: Any = None, training: bool = False,
           code: int = 1) -> Any:  # fmt: skip
    """The dispatcher's op, past the functional's checks."""
    return torch.ops.dl4ds_kernels.bn_act(x, weight, None, mean, var, residual, training, 0.1, 1e-5, False, code, 0.1, False)


RAW_ROWS: dict[str, Callable[[], Any]] = {
    "bn-short-mean": lambda: raw_bn(mean=ZERO[:3]),
    "bn-short-weight": lambda: raw_bn(weight=ONE[:3], training=True),
    "bn-no-statistics": lambda: raw_bn(mean=None, var=None),
    "bn-residual": lambda: raw_bn(residual=X[:1]),
    "bn-residual-dtype": lambda: raw_bn(residual=X.half()),
    "bn-int": lambda: raw_bn(X.int()),
    "bn-activation": lambda: raw_bn(code=17),
    "bn-rank": lambda: raw_bn(X[0, 0, 0], mean=None, var=None, training=True),
    "bwd-mean": lambda: torch.ops.dl4ds_kernels.bn_act_bwd(
        X, X, ONE, ZERO, ZERO[:2], ONE, None, None, True, 1e-5, False, 1, 0.1, True, True, False
    ),
    "bwd-dout": lambda: torch.ops.dl4ds_kernels.bn_act_bwd(
        X[:1], X, ONE, ZERO, ZERO, ONE, None, None, True, 1e-5, False, 1, 0.1, True, True, False
    ),
    "bwd-mask": lambda: torch.ops.dl4ds_kernels.bn_act_bwd(
        X, X, ONE, ZERO, ZERO, ONE, None, torch.zeros(1, dtype=torch.uint8), True, 1e-5, False, 1, 0.1, True, True, True
    ),
    "add-shape": lambda: torch.ops.dl4ds_kernels.add_act(X, X[:1], 1.0, 1, 0.1, True),
    "add-dtype": lambda: torch.ops.dl4ds_kernels.add_act(X, X.double(), 1.0, 1, 0.1, False),
    "add-bwd-mask": lambda: torch.ops.dl4ds_kernels.add_act_bwd(X, torch.zeros(2, dtype=torch.uint8), None, None, 1.0, 1, 0.1),
    "add-bwd-nothing": lambda: torch.ops.dl4ds_kernels.add_act_bwd(X, None, None, None, 1.0, 1, 0.1),
    "conv-statistics": lambda: torch.ops.dl4ds_kernels.conv_bn_act(
        X, W, None, ZERO[:2], ONE[:2], None, None, None, [1, 1], [0, 0], [1, 1], 1, 1e-5, False, 1, 0.1
    ),
    "conv-residual": lambda: torch.ops.dl4ds_kernels.conv_bn_act(
        X, W, None, ZERO[:6], ONE[:6], None, None, X, [1, 1], [0, 0], [1, 1], 1, 1e-5, False, 1, 0.1
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", RAW_ROWS.values(), ids=RAW_ROWS.keys())
def test_raw_ops_protect_memory(call: Callable[[], Any]) -> None:
    """The C++ host functions check what their kernels would read beyond: an error, never a wild read."""
    with torch.no_grad(), pytest.raises(RuntimeError, match="bn_act|add_act"):
        call()


def test_eight_threads() -> None:
    """Every op, forward and backward, from eight threads at once: results as from one thread."""
    x = torch.randn(2, 16, 33, 31)
    weight = torch.randn(16, 16, 3, 3)
    mean, var = torch.zeros(16), torch.ones(16)

    def work(backend: str) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        a = F.bn_act(leaf, None, None, training=True, backend=backend)
        b = F.add_act(a, leaf, backend=backend)
        (dx,) = torch.autograd.grad(b.square().sum(), leaf)
        with torch.no_grad():
            c = F.conv_bn_act(x, weight, running_mean=mean, running_var=var, padding=1, backend=backend)
        return [b.detach(), dx, c]

    expected = work("cpu")
    failures: list[str] = []

    def loop() -> None:
        try:
            for _ in range(10):
                if not all(torch.equal(a, b) for a, b in zip(work("cpu"), expected, strict=True)):
                    failures.append("different bits")
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=loop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
