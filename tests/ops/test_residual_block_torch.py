"""basic_block and bottleneck in torch: what is kept, launches, compile, export, autocast, Triton, second derivatives."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _assert import compare, compile_counter
from _residual_block import BF16, FP16, FP32, FP64, KINDS, Case, grouped, ours, results, stock, tensors_of
from torch import Tensor

from dl4ds_kernels import functional as F
from dl4ds_kernels._define import CPP, TRITON, has_kernel, triton_interpreted


def saved_bytes(function: Callable[[], Tensor], owned: list[Tensor]) -> int:
    """Bytes of storages that autograd keeps for the call, without the caller's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in owned}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.detach()
        return t.detach()  # an output that is saved would hold its own graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_what_is_kept(kernels: None) -> None:
    """Per element of a bottleneck: the convolutions' outputs and one bit of the output; nothing else of that size."""
    case = Case(layout="nhwc", shape=(2, 16, 32, 32))
    tensors = tensors_of(case)
    leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors.items()}
    pixels = 2 * 32 * 32
    statistics = 4 * 2 * (4 + 4 + 16)
    outputs, mask = 4 * pixels * (4 + 4 + 16), pixels * 16 // 8
    assert saved_bytes(lambda: ours(case, "cpu")(leaves), [*leaves.values()]) == outputs + mask + statistics
    efficient = case._replace(memory_efficient=True)
    outputs = 4 * pixels * (4 + 4)
    assert saved_bytes(lambda: ours(efficient, "cpu")(leaves), [*leaves.values()]) == outputs + mask + statistics


def launches(case: Case) -> list[collections.Counter[str]]:
    """Ops of a call and of its backward pass."""
    leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors_of(case).items()}
    counts: list[collections.Counter[str]] = []
    out = None
    for forwards in (True, False):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = ours(case, "cpu")(leaves) if forwards else out.sum().backward()
        counts.append(collections.Counter(event.name for event in profile.events()))
    return counts


def test_launches(kernels: None) -> None:
    """Convolutions, normalisations and copies of a block with a projection, forward and backward; step by step in NCHW."""
    forward, backward = launches(Case(stride=2, shape=(2, 32, 28, 28)))
    assert forward["aten::convolution"] == 4 and forward["dl4ds_kernels::bn_act"] == 2 and forward["aten::_foreach_copy_"] == 1
    assert forward["dl4ds_kernels::bn_stats"] == 2 and forward["dl4ds_kernels::bn_act_pair"] == 1
    # Two plain activations are made again, no convolution is.
    assert backward["aten::convolution_backward"] == 4 and backward["dl4ds_kernels::bn_act_bwd"] == 2
    assert backward["dl4ds_kernels::bn_act_pair_bwd"] == 1
    assert backward["dl4ds_kernels::bn_act"] == 2 and backward["aten::convolution"] == 0 and backward["aten::add_"] >= 1


def test_launches_of_a_whole_step(kernels: None) -> None:
    """In channels_last one call each way, and nothing beside it but the running statistics and the library's convolutions."""
    forward, backward = launches(Case(stride=2, layout="nhwc", shape=(2, 32, 28, 28)))
    names = [{n for n in found if n.startswith("dl4ds_kernels::")} for found in (forward, backward)]
    assert names == [{f"dl4ds_kernels::residual_{n}" for n in both} for both in (("block", "step"), ("block_bwd", "step_bwd"))]
    assert forward["aten::_foreach_copy_"] == 1 and backward["aten::convolution"] == 0 == backward["aten::add_"]


def test_a_cheap_projection_is_computed_again(kernels: None) -> None:
    """64 to 128 channels beside two 3x3 convolutions: 1/27 of the work, and its output is not kept."""
    x = torch.randn(1, 64, 32, 32)
    rand = lambda *shape: torch.randn(shape).requires_grad_()  # noqa: E731
    norm = lambda: F.BNParams(torch.zeros(128), torch.ones(128), rand(128), rand(128))  # noqa: E731
    params = [
        F.ConvParams(rand(128, 64, 3, 3), norm(), stride=2, padding=1),
        F.ConvParams(rand(128, 128, 3, 3), norm(), padding=1),
    ]
    projection = F.ConvParams(rand(128, 64, 1, 1), norm(), stride=2)
    owned = [x, *(c.weight for c in params), projection.weight]
    kept = saved_bytes(lambda: F.basic_block(x, params, projection, training=True, backend="cpu"), owned)
    assert 2 * 4 * 128 * 256 <= kept < 2.2 * 4 * 128 * 256


def test_statistics_move_once(kernels: None) -> None:
    """One update for a call, none while backward computes again; none at all in eval."""
    for training in (True, False):
        case = Case("basic_block", 2, memory_efficient=True, training=training)
        leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors_of(case).items()}
        before = {n: t.clone() for n, t in leaves.items() if n.startswith("bn")}
        out = ours(case, "cpu")(leaves)
        versions = {n: leaves[n]._version for n in before}
        after = {n: leaves[n].detach().clone() for n in before}
        out.sum().backward()
        for name in before:
            if name.endswith((".mean", ".var")):
                assert torch.equal(before[name], after[name]) == (not training), name
                assert leaves[name]._version == versions[name] and torch.equal(leaves[name], after[name]), name


@pytest.mark.parametrize("case", [Case(stride=2, layout="nhwc"), Case("preact_bottleneck")], ids=lambda case: case.id)
def test_compile(case: Case, kernels: None, fresh_dynamo: Any) -> None:
    """One graph, no recompile for the same shapes, and the results of the uncompiled call."""
    counter = compile_counter("aot_eager")
    compiled = torch.compile(ours(case, "cpu"), fullgraph=True, backend=counter)
    tensors = tensors_of(case)
    expected = results(case, ours(case, "cpu"), tensors)
    for _ in range(2):
        actual = results(case, compiled, tensors)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert counter.graphs == 1


@pytest.mark.slow
def test_compile_inductor(kernels: None, fresh_dynamo: Any) -> None:
    case = Case(stride=2, layout="nhwc", shape=(2, 32, 28, 28))
    tensors = tensors_of(case)
    expected = results(case, ours(case, "cpu"), tensors)
    actual = results(case, torch.compile(ours(case, "cpu"), fullgraph=True), tensors)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


class _Module(torch.nn.Module):
    def __init__(self, case: Case, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.case, self.names = case, [n for n in tensors if n != "x"]
        for name in self.names:
            self.register_buffer(name.replace(".", "_"), tensors[name].detach())

    def forward(self, x: Tensor) -> Tensor:
        t = {name: getattr(self, name.replace(".", "_")) for name in self.names}
        return ours(self.case, None)({"x": x, **t})


@pytest.mark.parametrize("kind", KINDS)
def test_export(kind: str) -> None:
    """torch.export writes standard ops."""
    case = Case(kind, 2, training=False)
    tensors = tensors_of(case)
    program = torch.export.export(_Module(case, tensors), (tensors["x"],))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not any("dl4ds" in target for target in targets)
    torch.testing.assert_close(program.module()(tensors["x"]), stock(case)(tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast(dtype: torch.dtype, kernels: None) -> None:
    """Convolutions in the autocast dtype, BatchNorm vectors and every gradient in fp32; as close to fp64 as stock autocast.

    A smooth activation: half precision puts some values on the other side of a kink, in stock torch too.
    """
    case = Case(stride=2, activation="silu", layout="nhwc", shape=(2, 32, 28, 28))
    tensors = tensors_of(case)

    def under(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(t: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype):
                return function(t)

        return call

    got, eager = results(case, under(ours(case, "cpu")), tensors), results(case, under(stock(case)), tensors)
    truth = results(case, stock(case), tensors, FP64)
    assert got["out"].dtype == dtype
    for name, t in truth.items():
        assert name == "out" or got[name].dtype == FP32, name
        error, stock_error = (got[name].double() - t).norm(), (eager[name].double() - t).norm()
        assert error <= 2 * stock_error + 4 * torch.finfo(dtype).eps * t.norm(), name


@pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine: `backend` covers it")
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
@pytest.mark.parametrize("kind", ["basic_block", "preact_basic_block"])
def test_triton(kind: str) -> None:
    """The same schedule over the Triton kernels, in Triton's interpreter."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    case = Case(kind, 2, layout="nhwc", shape=(2, 4, 4, 3))
    tensors = tensors_of(case)
    got, eager = results(case, ours(case, "triton"), tensors), results(case, stock(case), tensors)
    truth = results(case, stock(case), tensors, FP64)
    compare(grouped(got), grouped(eager), grouped(truth), "triton")


def test_registered_where_bn_act_is() -> None:
    """The schedule serves each namespace and device that has its kernels, and no other."""
    for namespace in (CPP, TRITON):
        for device in ("cpu", "cuda"):
            expected = has_kernel("bn_act", namespace, device)
            for name in ("residual_block", "residual_block_bwd", "bn_act_max_pool", "bn_act_max_pool_bwd"):
                assert has_kernel(name, namespace, device) == expected


def test_second_backward_is_refused(kernels: None) -> None:
    leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors_of(Case()).items()}
    (dx,) = torch.autograd.grad(ours(Case(), "cpu")(leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="residual_block: expected a first-order gradient"):
        dx.sum().backward()


def test_a_changed_tensor_is_noticed(kernels: None) -> None:
    leaves = {n: t.requires_grad_(not n.endswith((".mean", ".var"))) for n, t in tensors_of(Case()).items()}
    x = leaves["x"].detach().clone()
    out = ours(Case(), "cpu")({**leaves, "x": x})
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
