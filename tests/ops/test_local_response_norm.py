"""local_response_norm: the six standard tests over layouts, windows, exponents and dtypes, and its errors."""

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
from dl4ds_kernels.functional import local_response_norm

SMALL = replace(BASE, shape=(2, 13, 5, 7))
LAYOUTS = ("nchw", "nhwc", "nhwc_cslice", "nchw_hwslice", "transposed", "nslice", "offset", "expanded")
PAPER = (5, 5e-4, 0.75, 2.0)
CASES = (
    [replace(SMALL, layout=layout) for layout in LAYOUTS]
    + [replace(SMALL, dtype=d, layout=n) for d in DTYPES for n in ("nchw", "nhwc")]
    + [replace(SMALL, shape=(2, 3, 3, w), dtype=d) for d in (torch.float32, torch.bfloat16) for w in (1, 7, 8, 16, 17, 43)]
    + [replace(SMALL, shape=(2, c, 3, 2), layout="nhwc") for c in (1, 3, 4, 7, 8, 9, 16, 17, 33, 96)]
    + [replace(SMALL, shape=s) for s in ((4, 6, 9), (2, 6, 3, 4, 5), (3, 40, 1, 1), (1, 96, 55, 55))]
    + [replace(SMALL, shape=(2, 6, 3, 4, 5), layout="nhwc"), replace(SMALL, shape=(1, 96, 31, 33), layout="nhwc")]
)
# size, alpha, beta, k: even windows, one channel, more channels than there are, exponents of each kind.
SETTINGS = [
    (2, 1e-4, 0.75, 1.0),
    (1, 0.5, 0.5, 1.0),
    (4, 1.0, 1.0, 0.5),
    (40, 0.3, 0.75, 1.0),
    (3, 0.7, 0.6, 1.5),
    (5, 1.0, 2.0, 1.0),
]


def problem(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    return {"x": images(case, case.generator(), case.layout).to(device)}


def ours(backend: str | None, *settings: Any) -> Any:
    return lambda t: local_response_norm(t["x"], *(settings or PAPER), backend=backend)


def stock(*settings: Any) -> Any:
    """Stock torch; where it has no kernel (half precision on the CPU) the reference, in the same dtype."""

    def call(t: dict[str, Tensor]) -> Tensor:
        if t["x"].dtype in (torch.float16, torch.bfloat16) and not t["x"].is_cuda:
            return local_response_norm(t["x"], *(settings or PAPER), backend="reference")
        return TF.local_response_norm(t["x"], *(settings or PAPER))

    return call


def gradient(case: Case) -> Tensor:
    dout = torch.randn(case.shape, generator=case.generator()).to(case.dtype)
    return dout.contiguous(memory_format=torch.channels_last) if case.layout == "nhwc" and dout.dim() == 4 else dout


def three_ways(case: Case, backend: str, *settings: Any) -> tuple[Results, Results, Results]:
    device = "cpu" if triton_interpreted() else device_of(backend)
    tensors, dout = problem(case, device), gradient(case)
    # Stock views its intermediate results, which not every layout allows.
    plain = {"x": tensors["x"].contiguous()}
    return (
        run(ours(backend, *settings), tensors, dout.to(device), ("x",)),
        run(stock(*settings), plain, dout.to(device), ("x",)),
        run(stock(*settings), widen(plain), dout.double(), ("x",)),
    )


@each(CASES)
def test_forward_and_backward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend), backend)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@each([replace(SMALL, layout=n, dtype=d) for n in ("nchw", "nhwc") for d in (torch.float32, torch.float16)])
def test_settings(case: Case, settings: tuple[Any, ...], backend: str) -> None:
    compare(*three_ways(case, backend, *settings), backend)


@pytest.mark.parametrize("settings", [PAPER, (4, 0.9, 0.6, 1.2)], ids=str)
@each([replace(SMALL, shape=(2, 7, 2, 3), dtype=torch.float64, layout=n) for n in ("nchw", "nhwc", "nhwc_cslice")])
def test_gradcheck(case: Case, settings: tuple[Any, ...], backend: str) -> None:
    leaf = problem(case, device_of(backend))["x"].requires_grad_()
    torch.autograd.gradcheck(lambda x: local_response_norm(x, *settings, backend=backend), leaf)


@each([replace(SMALL, layout=n) for n in ("nchw", "nhwc", "nhwc_cslice", "transposed")])
def test_opcheck(case: Case, kernels: None) -> None:
    x = problem(case)["x"]
    torch.library.opcheck(op("local_response_norm"), (x.clone().requires_grad_(), *PAPER))
    torch.library.opcheck(op("local_response_norm"), (x, *PAPER))
    torch.library.opcheck(op("local_response_norm_bwd"), (gradient(case), x, *PAPER))


@each([replace(SMALL, layout=n, shape=s) for n in ("nchw", "nhwc") for s in ((2, 13, 5, 7), (2, 1, 5, 7), (2, 7, 1, 1))])
def test_layout(case: Case, kernels: None) -> None:
    """Stock's strides; the gradient lies like x."""
    x = problem(case)["x"]
    out, stock_out = local_response_norm(x, *PAPER, backend="cpu"), TF.local_response_norm(x, *PAPER)
    dx = op("local_response_norm_bwd")(gradient(case), x, *PAPER)
    for size, *strides in zip(x.shape, out.stride(), dx.stride(), stock_out.stride(), x.stride(), strict=True):
        assert size == 1 or len(set(strides)) == 1


@pytest.mark.parametrize("choice", [None, "cpu"], ids=["auto", "kernel"])
def test_compile(choice: str | None, kernels: None, fresh_dynamo: Any) -> None:
    case = replace(SMALL, shape=(2, 32, 33, 31), layout="nhwc")
    counter = compile_counter("aot_eager")
    compiled = torch.compile(ours(choice), fullgraph=True, backend=counter)
    tensors, dout = problem(case), gradient(case)
    expected = run(ours(choice), tensors, dout, ("x",))
    for _ in range(2):
        same_bits(run(compiled, tensors, dout, ("x",)), expected)
    assert counter.graphs == 1


@each([replace(SMALL, shape=(3, 37, 33, 17), layout=n) for n in ("nchw", "nhwc")])
def test_same_bits_with_any_number_of_threads(case: Case, kernels: None) -> None:
    tensors, dout = problem(case), gradient(case)
    first = run(ours("cpu"), tensors, dout, ("x",))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        same_bits(run(ours("cpu"), tensors, dout, ("x",)), first)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_nan_infinity_and_zero_denominators(layout: str, kernels: None) -> None:
    """They spread over their windows as in torch, and no further."""
    x = problem(replace(SMALL, shape=(1, 19, 3, 5), layout=layout))["x"]
    x[0, 3, 1, 1], x[0, 11, 2, 4], x[0, 15, 0, 0] = float("nan"), float("inf"), float("-inf")
    x[0, :, 0, 3] = 0
    for settings in (PAPER, (5, 1.0, 0.75, 0.0), (3, 1.0, 0.6, 0.0), (5, -1.0, 0.75, 0.5), (5, -1.0, 2.0, 0.5)):
        got, want = local_response_norm(x, *settings, backend="cpu"), TF.local_response_norm(x, *settings)
        torch.testing.assert_close(got, want, equal_nan=True)


def test_empty(backend: str) -> None:
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)):
        x = torch.ones(shape, device=device_of(backend), requires_grad=True)
        out = local_response_norm(x, 5, backend=backend)
        assert out.shape == shape and torch.autograd.grad(out.sum(), x)[0].shape == shape
    assert op("local_response_norm")(torch.ones(0, 3, 4, 5), *PAPER).shape == (0, 3, 4, 5)


X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize("backend_name", [None, "cpu", "reference"])
@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda b: local_response_norm([1.0], 5, backend=b), TypeError, "x: expected a Tensor, got list"),
        (
            lambda b: local_response_norm(X[0, 0], 5, backend=b),
            ValueError,
            "x: expected at least 3 dimensions (N, C, …), got 2",
        ),
        (lambda b: local_response_norm(X, 0, backend=b), RuntimeError, "size: expected a positive number of channels, got 0"),
    ],
)
def test_errors(call: Any, kind: type[Exception], message: str, backend_name: str | None) -> None:
    with pytest.raises(kind) as error:
        call(backend_name)
    assert f"local_response_norm: {message}" in str(error.value)


def test_errors_of_the_op(kernels: None) -> None:
    ops = torch.ops.dl4ds_kernels
    for call, message in (
        (lambda: ops.local_response_norm(X[0, 0], *PAPER), "x: expected 3 to 5 dims (N, C, ...), got shape (4, 5)"),
        (lambda: ops.local_response_norm(X.long(), *PAPER), "x: expected dtype float32, float64, float16 or bfloat16"),
        (lambda: ops.local_response_norm(X, 0, *PAPER[1:]), "size: expected a positive number, got 0"),
        (lambda: ops.local_response_norm_bwd(X[:1], X, *PAPER), "dout: expected shape (2, 3, 4, 5), got (1, 3, 4, 5)"),
        (lambda: ops.local_response_norm_bwd(X.double(), X, *PAPER), "dout: expected dtype float32, got float64"),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        assert message in str(error.value)
