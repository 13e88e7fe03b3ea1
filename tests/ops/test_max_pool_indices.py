"""max_pool_indices and max_unpool: the six standard tests over layouts, sizes around every vector width and dtypes; errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import compile_counter
from _cases import BASE, DTYPES, Case, each, images
from torch import Tensor

from dl4ds_kernels._define import op
from dl4ds_kernels.functional import max_pool_indices, max_unpool

# ``shape`` is the large map's. Everything here is exact: nothing is rounded.
SMALL = replace(BASE, shape=(2, 6, 8, 10))
LAYOUTS = ("nchw", "nhwc", "nhwc_cslice", "nhwc_hwslice", "nchw_hwslice", "nchw_cslice", "nslice", "offset", "transposed")
CASES = (
    [replace(SMALL, layout=layout) for layout in LAYOUTS]
    + [replace(SMALL, dtype=d, layout=n) for d in DTYPES for n in ("nchw", "nhwc")]
    + [replace(SMALL, shape=(2, 3, 4, 2 * w), dtype=d) for d in DTYPES for w in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33)]
    + [replace(SMALL, shape=(2, c, 4, 6), layout="nhwc") for c in (1, 3, 7, 8, 9, 16, 17, 33, 256)]
    + [replace(SMALL, shape=s, layout=n) for s in ((0, 3, 4, 6), (3, 5, 2, 2), (2, 32, 66, 62)) for n in ("nchw", "nhwc")]
)  # fmt: skip


@pytest.fixture(params=["reference", "cpu", None], ids=["reference", "cpu", "auto"])
def backend(request: pytest.FixtureRequest) -> str | None:
    """Those that serve this op on CPU tensors; test_max_pool_indices_triton.py has Triton's."""
    if request.param == "cpu":
        request.getfixturevalue("kernels")
    return request.param


def maps(case: Case) -> Tensor:
    """Few different values, so that equal maxima are common."""
    x = images(case, case.generator(), case.layout)
    return x.copy_((x * 2).round())


def places(index: Tensor, width: int) -> Tensor:
    return (index // width % 2 * 2 + index % width % 2).to(torch.uint8)


@each(CASES)
def test_forward(case: Case, backend: str | None) -> None:
    """Values and places of torch's pooling; torch's unpooling."""
    x = maps(case)
    out, where = max_pool_indices(x, backend=backend)
    expected, index = TF.max_pool2d(x, 2, 2, return_indices=True)
    assert torch.equal(out, expected) and torch.equal(where, places(index, x.shape[3]))
    assert out.dtype == x.dtype and where.dtype == torch.uint8
    back = max_unpool(out, where, backend=backend)
    if x.numel():
        assert torch.equal(back, TF.max_unpool2d(expected, index, 2, 2))
    assert back.shape == x.shape


@each(CASES)
def test_backward(case: Case, backend: str | None) -> None:
    x, stock = maps(case).requires_grad_(), maps(case).requires_grad_()
    out, where = max_pool_indices(x, backend=backend)
    expected, index = TF.max_pool2d(stock, 2, 2, return_indices=True)
    dout = torch.randn(out.shape, generator=case.generator()).to(case.dtype)
    (got,), (want,) = torch.autograd.grad(out, x, dout), torch.autograd.grad(expected, stock, dout)
    assert torch.equal(got, want)
    if not x.numel():
        return
    y, y_stock = dout.clone().requires_grad_(), dout.clone().requires_grad_()
    big = torch.randn(x.shape, generator=case.generator()).to(case.dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        (got,) = torch.autograd.grad(max_unpool(y, where, backend=backend), y, big.contiguous(memory_format=layout))
        (want,) = torch.autograd.grad(TF.max_unpool2d(y_stock, index, 2, 2), y_stock, big)
        assert torch.equal(got, want)


@each([replace(SMALL, shape=(2, 3, 4, 6), dtype=torch.float64, layout=n) for n in ("nchw", "nhwc", "nhwc_cslice")])
def test_gradcheck(case: Case, backend: str | None) -> None:
    x = images(case, case.generator(), case.layout).requires_grad_()
    torch.autograd.gradcheck(lambda v: max_pool_indices(v, backend=backend)[0], x)
    where = max_pool_indices(x.detach())[1]
    y = torch.randn(where.shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: max_unpool(v, where, backend=backend), y)


@each([replace(SMALL, layout=n) for n in ("nchw", "nhwc", "nhwc_cslice", "transposed")])
def test_opcheck(case: Case, kernels: None) -> None:
    x = maps(case)
    out, where = op("max_pool_indices")(x)
    torch.library.opcheck(op("max_pool_indices"), (x.requires_grad_(),))
    torch.library.opcheck(op("max_unpool"), (out.detach().requires_grad_(), where))
    torch.library.opcheck(op("max_pool_indices_bwd"), (out.detach(), where))
    torch.library.opcheck(op("max_unpool_bwd"), (x.detach(), where))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_layout(layout: str, kernels: None) -> None:
    """Strides as torch's pooling gives them; unpooling lies like ``where``."""
    x = maps(replace(SMALL, layout=layout))
    out, where = max_pool_indices(x, backend="cpu")
    assert out.stride() == TF.max_pool2d(x, 2, 2).stride() == where.stride()
    assert max_unpool(out.contiguous(), where, backend="cpu").stride() == x.stride()


@pytest.mark.parametrize("choice", [None, "cpu"], ids=["auto", "kernel"])
def test_compile(choice: str | None, kernels: None, fresh_dynamo: Any) -> None:
    counter = compile_counter("aot_eager")

    def function(x: Tensor) -> Tensor:
        out, where = max_pool_indices(x, backend=choice)
        return max_unpool(out * 2, where, backend=choice)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    x, other = (maps(replace(SMALL, shape=(2, 32, 66, 62), layout="nhwc")).requires_grad_() for _ in range(2))
    for _ in range(2):
        got, want = compiled(x), function(other)
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad(o.square().sum(), v)[0] for o, v in ((got, x), (want, other))))
    assert counter.graphs == 1


def test_nan_infinity_and_zeros(backend: str | None) -> None:
    """All 5^4 windows of NaN, infinities and the two zeros."""
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0])
    windows = torch.cartesian_prod(values, values, values, values).view(-1, 1, 2, 2)
    for x in (windows, windows.view(1, -1, 2, 2), windows.view(1, -1, 2, 2).contiguous(memory_format=torch.channels_last)):
        out, where = max_pool_indices(x, backend=backend)
        expected, index = TF.max_pool2d(x, 2, 2, return_indices=True)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(where, places(index, 2))


X = torch.zeros(2, 3, 4, 6)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: max_pool_indices([1.0]), TypeError, "max_pool_indices: x: expected a Tensor, got list"),
        (lambda: max_pool_indices(X[0]), RuntimeError, "max_pool_indices: x: expected (N, C, H, W), got (3, 4, 6)"),
        (lambda: max_pool_indices(X[..., :5]), RuntimeError, "max_pool_indices: x: expected an even height and width"),
        (lambda: max_pool_indices(X.bool()), NotImplementedError, "max_pool_indices: x: expected a float32, float64"),
        (lambda: max_unpool(X, X), RuntimeError, "max_unpool: where: expected uint8 of shape (2, 3, 4, 6) like y"),
        (lambda: max_unpool(X, X[:1].byte()), RuntimeError, "max_unpool: where: expected uint8 of shape (2, 3, 4, 6) like y"),
        (lambda: max_unpool(X, None), TypeError, "max_unpool: where: expected a Tensor, got NoneType"),
        (lambda: max_unpool(X[0], X[0].byte()), RuntimeError, "max_unpool: y: expected (N, C, H, W), got (3, 4, 6)"),
    ],
)  # fmt: skip
def test_errors(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_errors_of_the_ops(kernels: None) -> None:
    ops = torch.ops.dl4ds_kernels
    for call, message in (
        (lambda: ops.max_pool_indices(X[..., :5]), "max_pool_indices: x: expected an even height and width, got (2, 3, 4, 5)"),
        (lambda: ops.max_pool_indices(X[0]), "max_pool_indices: x: expected (N, C, H, W), got shape (3, 4, 6)"),
        (lambda: ops.max_unpool(X, X), "max_unpool: where: expected dtype uint8, got float32"),
        (lambda: ops.max_unpool(X, X[:1].byte()), "max_unpool: where: expected shape (2, 3, 4, 6), got (1, 3, 4, 6)"),
        (lambda: ops.max_unpool_bwd(X, X.byte()), "max_unpool_bwd: where: expected shape (2, 3, 2, 3), got (2, 3, 4, 6)"),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        assert message in str(error.value)
