"""bn_act_max_pool: numbers, gradcheck, opcheck, what is kept, statistics, compile, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import compare, compile_counter, run, widen
from _cases import ACTIVATIONS, BASE, DTYPES, Case, bn_vectors, each, grid, images
from conftest import device_of
from torch import Tensor

from dl4ds_kernels import functional as F
from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import op

WRT = ("x", "weight", "bias")
SLOPE, MOMENTUM, EPS = 0.1, 0.2, 1e-3
CASES = grid(layout=("nchw", "nhwc", "nhwc_cslice", "transposed"), dtype=DTYPES[:2], activation=ACTIVATIONS, training=(False,))
CASES += [replace(BASE, shape=shape, layout="nhwc") for shape in ((2, 64, 28, 28), (3, 1, 5, 7), (2, 3, 3, 2))]
CASES += [replace(BASE, affine=affine) for affine in ("", "weight")]
CASES += [replace(BASE, dtype=dtype, activation="none", layout="nhwc") for dtype in DTYPES[2:]]
POOLS = {"resnet": (3, 2, 1, 1, False), "vgg": (2, None, 0, 1, False), "odd": ((3, 2), (1, 2), (1, 0), (2, 1), True)}


def problem(case: Case, device: str = "cpu") -> dict[str, Any]:
    x = images(case, case.generator(), case.layout)
    tensors = {"x": x, **bn_vectors(case, x)}
    return {name: t if t is None or device == "cpu" else t.to(device) for name, t in tensors.items()}


def ours(case: Case, backend: str | None, pool: tuple[Any, ...] = POOLS["resnet"]) -> Any:
    names = ("kernel_size", "stride", "pool_padding", "dilation", "ceil_mode")

    def call(t: dict[str, Any]) -> Tensor:
        return F.bn_act_max_pool(
            t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], training=case.training, momentum=MOMENTUM,
            eps=EPS, activation=case.activation, negative_slope=SLOPE, backend=backend, **dict(zip(names, pool, strict=True)),
        )  # fmt: skip

    return call


def stock(case: Case, pool: tuple[Any, ...] = POOLS["resnet"]) -> Any:
    def call(t: dict[str, Any]) -> Tensor:
        z = TF.batch_norm(t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], case.training, MOMENTUM, EPS)
        return TF.max_pool2d(apply_activation(z, ACTIVATION_CODES[case.activation], SLOPE), *pool)

    return call


@each(CASES)
def test_numbers(case: Case, backend: str) -> None:
    """Output, gradients and running statistics within twice stock torch's error."""
    tensors = problem(case, device_of(backend))
    wide = widen(tensors)
    dout = torch.randn(stock(case)({n: t if t is None else t.clone() for n, t in wide.items()}).shape, dtype=torch.float64)
    if case.dtype in DTYPES[2:]:  # which of two values that rounding makes equal is the largest decides where a gradient goes
        dout.fill_(1.0)
    narrow = dout.to(case.dtype).to(tensors["x"].device)
    wrt = WRT if case.dtype not in DTYPES[2:] else ("bias",)
    results = run(ours(case, backend), tensors, narrow, wrt), run(stock(case), tensors, narrow, wrt)
    compare(*results, run(stock(case), wide, dout, wrt), backend)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_gradcheck(pool: str, training: bool, kernels: None) -> None:
    case = replace(BASE, shape=(2, 3, 6, 5), dtype=torch.float64, training=training, activation="silu")
    tensors = problem(case)

    def function(*leaves: Tensor) -> Tensor:
        statistics = {name: tensors[name].clone() for name in ("running_mean", "running_var")}
        return ours(case, "cpu", POOLS[pool])({**dict(zip(WRT, leaves, strict=True)), **statistics})

    torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in WRT])


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "transposed"])
def test_opcheck(layout: str, kernels: None) -> None:
    case = replace(BASE, shape=(2, 5, 6, 4), layout=layout)
    t = problem(case)
    for name in WRT:
        t[name].requires_grad_()
    scalars = (EPS, False, 1, SLOPE, [3, 3], [2, 2], [1, 1], [1, 1], False)
    vectors = (t["weight"], t["bias"], t["running_mean"], t["running_var"])
    torch.library.opcheck(op("bn_act_max_pool"), (t["x"], *vectors, True, MOMENTUM, *scalars))
    with torch.no_grad():
        plain = [v.detach() for v in (t["x"], t["weight"], t["bias"])]
        out, mean, rstd, _, _ = op("bn_act_max_pool")(*plain, *vectors[2:], True, MOMENTUM, *scalars)
        torch.library.opcheck(
            op("bn_act_max_pool_bwd"), (torch.randn_like(out), *plain, mean, rstd, True, *scalars, True, True)
        )


def test_only_the_input_is_kept(kernels: None) -> None:
    case = replace(BASE, shape=(2, 64, 28, 28), layout="nhwc")
    tensors = {n: t.requires_grad_(n in WRT) for n, t in problem(case).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.detach()), t)[1], lambda t: t):
        ours(case, "cpu")(tensors)
    assert max(t.numel() for t in kept if t.data_ptr() != tensors["x"].data_ptr()) == 64


def test_statistics_move_once(kernels: None) -> None:
    tensors = {n: t.requires_grad_(n in WRT) for n, t in problem(BASE).items()}
    out = ours(BASE, "cpu")(tensors)
    after = tensors["running_mean"].clone(), tensors["running_var"].clone()
    out.sum().backward()
    assert torch.equal(tensors["running_mean"], after[0]) and torch.equal(tensors["running_var"], after[1])
    with pytest.raises(RuntimeError, match="bn_act_max_pool: expected a first-order gradient"):
        (dx,) = torch.autograd.grad(ours(BASE, "cpu")(tensors).square().sum(), tensors["x"], create_graph=True)
        dx.sum().backward()


def test_compile(kernels: None, fresh_dynamo: Any) -> None:
    counter = compile_counter("aot_eager")
    compiled = torch.compile(ours(BASE, "cpu"), fullgraph=True, backend=counter)
    tensors = problem(BASE)
    dout = torch.randn(stock(BASE)({n: t.clone() for n, t in tensors.items()}).shape)
    expected = run(ours(BASE, "cpu"), tensors, dout, WRT)
    for _ in range(2):
        actual = run(compiled, tensors, dout, WRT)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert counter.graphs == 1


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(3, 4)}, RuntimeError, r"bn_act_max_pool: x: expected \(N, C, H, W\), got \(3, 4\)"),
        ({"x": 1}, TypeError, "bn_act_max_pool: x: expected a Tensor, got int"),
        ({"weight": torch.ones(2)}, RuntimeError, r"bn_act_max_pool: weight: expected shape \(C,\) = \(63,\), got \(2,\)"),
    ],
    ids=["rank", "type", "weight"],
)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str, kernels: None) -> None:
    tensors = problem(BASE)
    tensors["x"].requires_grad_()
    with pytest.raises(kind, match=message):
        ours(BASE, "cpu")({**tensors, **change})
