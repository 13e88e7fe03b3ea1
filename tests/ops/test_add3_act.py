"""add_act of three operands: forward, backward, layouts, dtypes, contract, on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _assert import Results, compare, compile_counter, run, same_bits, widen
from _cases import ACTIVATIONS, BASE, DTYPES, Case, each, gradient, images
from _offline import run_offline
from conftest import device_of
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import TRITON, has_kernel, op, triton_interpreted
from dl4ds_kernels.functional import add_act
from dl4ds_kernels.modules import AddAct

WRT = ("x", "residual", "residual2")
SLOPE = 0.1
SMALL = replace(BASE, shape=(2, 13, 5, 7))
LAYOUTS = (
    ("nchw", "nchw", "nchw"), ("nhwc", "nhwc", "nhwc"), ("nhwc", "nchw", "nhwc"), ("nchw", "nchw", "nhwc"),
    ("nhwc_cslice", "nhwc_cslice", "nhwc_cslice"), ("transposed", "transposed", "transposed"), ("nslice", "offset", "expanded"),
)  # fmt: skip
CASES = (
    [replace(SMALL, activation=a, alpha=0.5) for a in ACTIVATIONS]
    + [replace(SMALL, activation=a, layout="nhwc", dtype=d) for a in ("relu", "none", "silu") for d in DTYPES]
    + [replace(SMALL, shape=s) for s in ((0, 3, 4, 5), (1, 1, 1, 1), (3, 5, 19), (2, 33, 13, 17), (2, 7, 1, 1))]
)


def problem(case: Case, layouts: tuple[str, ...] | None = None, device: str = "cpu") -> dict[str, Tensor]:
    generator = case.generator()
    return {
        name: images(case, generator, layout).to(device) for name, layout in zip(WRT, layouts or [case.layout] * 3, strict=True)
    }


def ours(case: Case, backend: str | None) -> Any:
    return lambda t: add_act(
        t["x"],
        t["residual"],
        t["residual2"],
        alpha=case.alpha,
        activation=case.activation,
        negative_slope=SLOPE,
        backend=backend,
    )


def stock(case: Case, activation: str | None = None) -> Any:
    code = ACTIVATION_CODES[activation or case.activation]
    return lambda t: apply_activation(case.alpha * (t["x"] + t["residual"] + t["residual2"]), code, SLOPE)


def three_ways(case: Case, backend: str, layouts: tuple[str, ...] | None = None) -> tuple[Results, ...]:
    device = "cpu" if triton_interpreted() else device_of(backend)
    t = problem(case, layouts, device)
    dout = gradient(case, stock(case, "none")(widen(t)), "nhwc" if case.layout == "nhwc" else "nchw").to(device)
    return (
        run(ours(case, backend), t, dout, WRT),
        run(stock(case), t, dout, WRT),
        run(stock(case), widen(t), dout.double().cpu(), WRT),
    )


@each(CASES)
def test_forward_and_backward(case: Case, backend: str) -> None:
    compare(*three_ways(case, backend), backend)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_layouts(layouts: tuple[str, ...], activation: str, backend: str) -> None:
    case = replace(SMALL, activation=activation)
    compare(*three_ways(case, backend, layouts), backend)
    t = problem(case, layouts)
    if device_of(backend) == "cpu":
        assert ours(case, backend)(t).stride() == (t["x"] + t["residual"] + t["residual2"]).stride()


@pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine")
@each([*CASES[:8], replace(SMALL, layout="nhwc", dtype=torch.float64), replace(SMALL, shape=(0, 3, 4, 5))])
def test_interpreter(case: Case) -> None:
    small = replace(case, shape=case.shape if 0 in case.shape else (2, 5, 3, 4))
    if case.dtype != torch.bfloat16:  # the interpreter truncates where a GPU rounds
        compare(*three_ways(small, "triton"), "triton")


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "hardswish"])
def test_gradcheck(activation: str, backend: str) -> None:
    case = replace(SMALL, shape=(2, 3, 2, 3), dtype=torch.float64, activation=activation, alpha=0.7)
    t = problem(case, device=device_of(backend))
    leaves = [v.requires_grad_() for v in t.values()]
    torch.autograd.gradcheck(lambda *v: ours(case, backend)(dict(zip(WRT, v, strict=True))), leaves)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("namespace", ["dl4ds_kernels", TRITON])
def test_opcheck(layouts: tuple[str, ...], namespace: str, kernels: None) -> None:
    if namespace == TRITON and not triton_interpreted():
        pytest.skip("Triton compiles for the GPU of this machine")
    for code in (0, 1):
        leaves = [v.requires_grad_() for v in problem(replace(SMALL, shape=(2, 3, 4, 5)), layouts).values()]
        torch.library.opcheck(op("add3_act", namespace), (*leaves, 0.5, code, SLOPE, True))


def test_compile(kernels: None, fresh_dynamo: Any) -> None:
    case = replace(SMALL, shape=(2, 32, 33, 31), layout="nhwc")
    counter = compile_counter("aot_eager")
    compiled = torch.compile(ours(case, None), fullgraph=True, backend=counter)
    t = problem(case)
    dout = torch.randn(case.shape)
    for _ in range(2):
        same_bits(run(compiled, t, dout, WRT), run(ours(case, None), t, dout, WRT))
    assert counter.graphs == 1


def test_other_shapes_and_dtypes_are_stocks(kernels: None) -> None:
    x, row, wide = torch.randn(2, 3, 4, 5), torch.randn(1, 3, 1, 1), torch.randn(2, 3, 4, 5).double()
    assert torch.equal(add_act(x, row, x, backend="cpu"), torch.relu(x + row + x))
    assert torch.equal(add_act(x, x, wide, backend="cpu"), torch.relu(x + x + wide))
    assert add_act(x.int(), x.int(), x.int()).dtype == torch.int32


def test_module() -> None:
    x, y, z = torch.randn(3, 2, 8, 16, 16).unbind()
    torch.testing.assert_close(AddAct("none")(x, y, z), x + y + z)
    torch.testing.assert_close(AddAct("relu", alpha=0.5)(x, y, z), torch.relu(0.5 * (x + y + z)))


def test_errors() -> None:
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(TypeError, match="add_act: residual2: expected a Tensor, got list"):
        add_act(x, x, [1.0])
    with pytest.raises(RuntimeError, match=r"add_act: residual2: expected a shape that broadcasts with x \(2, 3, 4, 5\)"):
        add_act(x, x, x[..., :3])
    with pytest.raises(RuntimeError, match="add3_act: residual2: expected dtype float32, got float64"):
        torch.ops.dl4ds_kernels.add3_act(x, x, x.double(), 1.0, 1, 0.0, False)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="add3_act: save_mask: expected True for a call with gradients"):
        torch.ops.dl4ds_kernels.add3_act(leaf, x, x, 1.0, 1, 0.0, False)[0].sum().backward()


def test_cuda_tensors_have_a_kernel() -> None:
    assert has_kernel("add3_act", TRITON, "cuda")


@pytest.mark.slow
def test_kernels_for_gpus() -> None:
    """Compiled for four architectures and run on the simulator (_add3_act_triton_offline.py)."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    run_offline("_add3_act_triton_offline.py")
