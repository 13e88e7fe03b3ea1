"""upsample_add: the six standard tests over layouts, sizes around every vector width and dtypes, and its errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import Results, compare, compile_counter, run, same_bits, widen
from _cases import BASE, DTYPES, Case, each, images
from conftest import device_of
from torch import Tensor

from dl4ds_kernels._define import op, triton_interpreted
from dl4ds_kernels.functional import upsample_add

WRT = ("low", "skip")
# ``shape`` is low's; ``layout`` low's and ``residual`` skip's.
SMALL = replace(BASE, shape=(2, 6, 5, 7), residual="nchw")
PAIRS = [("nchw", "nchw"), ("nhwc", "nhwc"), ("nchw", "nhwc"), ("nhwc", "nchw"), ("nhwc_cslice", "nhwc_cslice"),
         ("nchw_hwslice", "nchw"), ("transposed", "transposed"), ("nslice", "offset")]  # fmt: skip
CASES = (
    [replace(SMALL, layout=a, residual=b) for a, b in PAIRS]
    + [replace(SMALL, dtype=d, layout=n, residual=n) for d in DTYPES for n in ("nchw", "nhwc")]
    + [replace(SMALL, shape=(2, 3, 3, w), dtype=d) for d in DTYPES for w in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33)]
    + [replace(SMALL, shape=(2, c, 3, 2), layout="nhwc", residual="nhwc") for c in (1, 3, 7, 8, 9, 16, 17, 33, 256)]
    + [replace(SMALL, shape=shape, layout=n, residual=n)
       for shape in ((0, 3, 4, 5), (1, 1, 1, 1), (2, 32, 33, 31)) for n in ("nchw", "nhwc")]
)  # fmt: skip


def problem(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    n, c, h, w = case.shape
    generator = case.generator()
    low = images(case, generator, case.layout)
    skip = images(replace(case, shape=(n, c, 2 * h, 2 * w)), generator, case.residual)
    return {"low": low.to(device), "skip": skip.to(device)}


def ours(case: Case, backend: str | None) -> Any:
    return lambda t: upsample_add(t["low"], t["skip"], backend=backend)


def stock(case: Case) -> Any:
    return lambda t: t["skip"] + TF.interpolate(t["low"], scale_factor=2.0, mode="nearest")


def gradient(case: Case) -> Tensor:
    n, c, h, w = case.shape
    dout = torch.randn(n, c, 2 * h, 2 * w, generator=case.generator()).to(case.dtype)
    return dout.contiguous(memory_format=torch.channels_last) if case.residual == "nhwc" else dout


def three_ways(case: Case, backend: str, wrt: tuple[str, ...]) -> tuple[Results, Results, Results]:
    device = "cpu" if triton_interpreted() else device_of(backend)
    tensors = problem(case, device)
    dout = gradient(case).to(device) if wrt else None
    return (
        run(ours(case, backend), tensors, dout, wrt),
        run(stock(case), tensors, dout, wrt),
        run(stock(case), widen(tensors), None if dout is None else dout.double().cpu(), wrt),
    )


@pytest.fixture(params=["reference", "cpu"] + ["triton"] * torch.cuda.is_available())
def backend(request: pytest.FixtureRequest) -> str:
    """Those that serve this op; where there is no GPU, test_upsample_add_triton.py has Triton's."""
    if request.param == "cpu":
        request.getfixturevalue("kernels")
    return request.param


@each(CASES)
def test_forward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend, ()), backend)


@each(CASES)
def test_backward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend, WRT), backend)


@each([replace(SMALL, shape=(2, 3, 2, 3), dtype=torch.float64, layout=a, residual=b) for a, b in PAIRS])
def test_gradcheck(case: Case, backend: str) -> None:
    t = problem(case, device_of(backend))
    leaves = [v.detach().requires_grad_() for v in t.values()]
    torch.autograd.gradcheck(lambda low, skip: upsample_add(low, skip, backend=backend), leaves)


@each([replace(SMALL, layout=a, residual=b) for a, b in PAIRS])
def test_opcheck(case: Case, kernels: None) -> None:
    t = problem(case)
    torch.library.opcheck(op("upsample_add"), tuple(v.requires_grad_() for v in t.values()))
    torch.library.opcheck(op("upsample_add_bwd"), (gradient(case),))


@each([replace(SMALL, layout=a, residual=b) for a, b in PAIRS[:4]])
def test_layout(case: Case, kernels: None) -> None:
    """channels_last where skip is, whatever low is; the gradient of low lies like the gradient of the sum."""
    t = problem(case)
    out = upsample_add(t["low"], t["skip"], backend="cpu")
    assert out.stride() == t["skip"].stride() and out.data_ptr() != t["skip"].data_ptr()
    dout = gradient(case)
    dlow = op("upsample_add_bwd")(dout)
    assert dlow.is_contiguous(memory_format=torch.channels_last if case.residual == "nhwc" else torch.contiguous_format)


@pytest.mark.parametrize("choice", [None, "cpu"], ids=["auto", "kernel"])
def test_compile(choice: str | None, kernels: None, fresh_dynamo: Any) -> None:
    case = replace(SMALL, shape=(2, 32, 33, 31), layout="nhwc", residual="nhwc")
    counter = compile_counter("aot_eager")
    function = ours(case, choice)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    tensors, dout = problem(case), gradient(case)
    expected = run(function, tensors, dout, WRT)
    for _ in range(2):
        same_bits(run(compiled, tensors, dout, WRT), expected)
    assert counter.graphs == 1


def test_same_bits_with_any_number_of_threads(kernels: None) -> None:
    case = replace(SMALL, shape=(3, 37, 33, 17))
    tensors, dout = problem(case), gradient(case)
    first = run(ours(case, "cpu"), tensors, dout, WRT)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        same_bits(run(ours(case, "cpu"), tensors, dout, WRT), first)


def test_nan_and_infinity(backend: str) -> None:
    low = torch.tensor([[[[float("nan"), float("inf")], [1.0, -0.0]]]])
    skip = torch.zeros(1, 1, 4, 4)
    skip[0, 0, 0, 3] = float("-inf")
    low, skip = low.to(device_of(backend)), skip.to(device_of(backend))
    assert torch.equal(upsample_add(low, skip, backend=backend).isnan(), stock(BASE)({"low": low, "skip": skip}).isnan())


def test_gradient_of_one_input(kernels: None) -> None:
    t = problem(SMALL)
    for name in WRT:
        leaf = t[name].clone().requires_grad_()
        out = upsample_add(**{**t, name: leaf}, backend="cpu")
        (got,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        assert torch.equal(got, torch.full_like(leaf, 4.0 if name == "low" else 1.0))


X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("low", "skip", "kind", "message"),
    [
        ([1.0], X, TypeError, "upsample_add: low: expected a Tensor, got list"),
        (X, None, TypeError, "upsample_add: skip: expected a Tensor, got NoneType"),
        (X[0], X, RuntimeError, "upsample_add: low: expected (N, C, H, W), got (3, 4, 5)"),
        (X, X, RuntimeError, "upsample_add: skip: expected shape (2, 3, 8, 10) for low (2, 3, 4, 5), got (2, 3, 4, 5)"),
        (X, torch.zeros(2, 3, 9, 10), RuntimeError, "upsample_add: skip: expected shape (2, 3, 8, 10)"),
    ],
)
def test_errors(low: Any, skip: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        upsample_add(low, skip)
    assert message in str(error.value)


def test_errors_of_the_op(kernels: None) -> None:
    for low, skip, message in (
        (X, X, "skip: expected twice the height and width of low (2, 3, 4, 5), got (2, 3, 4, 5)"),
        (X, torch.zeros(2, 3, 8, 10).double(), "skip: expected dtype float32, got float64"),
        (X[0], X, "low: expected (N, C, H, W), got shape (3, 4, 5)"),
        (X.long(), X, "low: expected dtype float32, float64, float16 or bfloat16"),
    ):
        with pytest.raises(RuntimeError) as error:
            torch.ops.dl4ds_kernels.upsample_add(low, skip)
        assert message in str(error.value)
    with pytest.raises(RuntimeError, match="dout: expected an even height and width"):
        torch.ops.dl4ds_kernels.upsample_add_bwd(X)
