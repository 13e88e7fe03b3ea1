"""Our layers and optimized models under torch's own tools: compile, autocast, checkpointing, EMA, export, torch.func."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from ptxsim._gate import rotating
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dl4ds_kernels as dk
from dl4ds_kernels.modules import BNAct2d

sys.path.insert(0, str(Path(__file__).parent))
from _models import image, make

KINDS = ("own", "optimized")


@pytest.fixture(autouse=True)
def _kernels_on_small_tensors(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The kernels serve these small tensors too: the ecosystem must work with the ops, not with the stock path."""
    if "thresholds" in request.fixturenames and request.getfixturevalue("thresholds") == "measured":
        return
    for name in ("bn_act", "add_act", "conv_bn_act"):
        monkeypatch.setitem(dk._backend.MIN_NUMEL, name, 0)
    for module in ("bn_act", "add_act"):
        monkeypatch.setattr(sys.modules[f"dl4ds_kernels.functional.{module}"], "_SMALL", 0)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of a loss."""
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    return [p.grad.clone() for p in model.parameters()]


def close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-4) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def stock_of(kind: str) -> nn.Module:
    """What ``kind`` must agree with: the stock network, or our layers on the reference path."""
    return make("stock" if kind == "optimized" else "own")


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", [*KINDS, "after"])
def test_compile_without_breaks_or_recompiles(kind: str, training: bool, fresh_dynamo: Any) -> None:
    """fullgraph, backward included; three steps compile once. "after": the stock model is compiled, then optimized."""
    model = make("stock" if kind == "after" else kind).train(training)
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    if kind == "after":
        compiled = dk.optimize(compiled, inplace=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            close(step(compiled, image(seed)), step(eager, image(seed)))
    assert counter.frame_count == 1
    for a, b in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SIZES = [(4, 3, 16, 16), (3, 3, 16, 16), (9, 3, 64, 64), (2, 3, 128, 24), (16, 3, 40, 120)]


@pytest.mark.slow
@pytest.mark.parametrize("case", rotating([(kind, mode) for mode in ("eval", "train") for kind in KINDS], 2))
def test_compile_of_any_size(case: tuple[str, str], fresh_dynamo: Any) -> None:
    """dynamic=True, sizes on both sides of what is served in eager mode: as few graphs as of stock layers."""
    kind, training = case[0], case[1] == "train"
    graphs: dict[str, list[int]] = {}
    for name in (kind, "stock"):
        torch._dynamo.reset()
        model = make(name).train(training)
        eager = copy.deepcopy(model)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for size in SIZES:
            x = torch.randn(size, generator=torch.Generator().manual_seed(0))
            # One activation of thousands on the other side of its kink moves a gradient by 7e-4 (seen without AVX-512).
            close(step(compiled, x), step(eager, x), 2e-3)
            graphs.setdefault(name, []).append(counter.frame_count)
    assert graphs[kind] == graphs["stock"] and graphs["stock"][0] == graphs["stock"][2], graphs  # three squares, one graph


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_with_grad_scaler(kind: str, dtype: torch.dtype) -> None:
    """Mixed precision trains, BatchNorm's parameters and statistics stay fp32, an overflow skips the step."""
    model = make(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        with torch.autocast("cpu", dtype):
            out = model(image())
            loss = F.cross_entropy(out.float(), torch.arange(4) % 5)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert out.dtype == dtype and losses[-1] < 0.6 * losses[0]
    assert all(t.dtype == torch.float32 for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    if scaler.is_enabled():
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(image()).float(), torch.arange(4) % 5)
        scaler.scale(loss * float("inf")).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() < scale and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    """Recomputed gradients are the kept ones, bit for bit; reentrant, whose loss inference kernels make, within rounding."""
    model, kept = make(kind), make(kind)
    want = step(kept, image())
    x = image().requires_grad_()
    got = step(lambda_module(lambda y: checkpoint(model, y, use_reentrant=reentrant), model), x)
    for a, b in zip(got, want, strict=True):
        if reentrant:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(a, b)


class lambda_module(nn.Module):
    """A function of a model as a module with that model's parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("kind", KINDS)
def test_average_of_weights(kind: str) -> None:
    """AveragedModel copies, follows and runs; ``update_bn`` re-estimates its statistics."""
    model = make(kind)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = [p.detach().clone() for p in model.parameters()]
    average.update_parameters(model)
    step(model, image())
    optimizer.step()
    average.update_parameters(model)
    for a, b, c in zip(first, model.parameters(), average.module.parameters(), strict=True):
        torch.testing.assert_close(c, 0.5 * a + 0.5 * b)
    torch.optim.swa_utils.update_bn([image(5), image(6)], average)
    reference = make("stock" if kind == "optimized" else kind)
    reference.load_state_dict(average.module.state_dict())
    torch.testing.assert_close(average.eval()(image(2)), reference.eval()(image(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_train_on_their_own(kind: str) -> None:
    model = make(kind)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        close(step(other, image()), step(copy.deepcopy(model), image()), 1e-6)
        before = [b.clone() for b in model.buffers()]
        other(image(3))
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_batch_norm(kind: str) -> None:
    """BatchNorm in eval within a model in training: running statistics, gradients for the rest, no statistics touched."""
    model, stock = make(kind), stock_of(kind)
    for m in (model, stock):
        m.train()
        for layer in m.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval().requires_grad_(False)
    before = [b.clone() for b in model.buffers()]
    with dk.backend("reference" if kind == "own" else "auto"):
        F.cross_entropy(stock(image()), torch.arange(4) % 5).backward()
    F.cross_entropy(model(image()), torch.arange(4) % 5).backward()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_cumulative_average(kind: str) -> None:
    """``momentum=None``: running statistics are the mean over the batches, equal to stock's."""
    model, stock = make(kind), stock_of(kind)
    for m in (model, stock):
        for layer in m.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
    for seed in range(3):
        model(image(seed))
        with dk.backend("reference" if kind == "own" else "auto"):
            stock(image(seed))
    for a, b in zip(model.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("thresholds", ["measured", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_and_onnx(kind: str, thresholds: str, tmp_path: Path) -> None:
    """Standard ops only, with a dynamic batch; ONNX Runtime computes the same."""
    model = make(kind).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: batch},))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert targets and not any("dl4ds" in t for t in targets), targets
    x = torch.cat((image(), image(2)))
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-5)
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    torch.onnx.export(program, (), tmp_path / "net.onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_export_of_a_training_graph(kind: str) -> None:
    program = torch.export.export(make(kind).train(), (image(),))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert targets and not any("dl4ds" in t for t in targets), targets


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_and_grad(kind: str) -> None:
    """torch.func.functional_call with other parameters, under torch.func.grad: autograd's gradients."""
    model = make(kind).eval()
    parameters = {n: p.detach() * 1.1 for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, (parameters, buffers), (x,)), torch.arange(len(x)) % 5)

    grads = torch.func.grad(loss)(parameters, image())
    other = make(kind).eval()
    other.load_state_dict(parameters, strict=False)
    for got, want in zip(grads.values(), step(other, image()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind: str) -> None:
    """jvp against a finite difference in fp64."""
    model = make(kind).eval().double()
    x, v = image().double(), image(7).double()
    value, tangent = torch.func.jvp(model, (x,), (v,))
    with torch.no_grad():
        torch.testing.assert_close(value, model(x))
        torch.testing.assert_close(tangent, (model(x + 1e-6 * v) - model(x - 1e-6 * v)) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_samples(kind: str) -> None:
    """Per-sample outputs by vmap in eval are the batch's."""
    model = make(kind).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.vmap(lambda x: model(x.unsqueeze(0)).squeeze(0))(image()), model(image()), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_is_a_clear_error(kind: str) -> None:
    x = image().requires_grad_()
    (first,) = torch.autograd.grad(make(kind)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected a first-order gradient, got a second backward"):
        first.sum().backward()


def test_second_derivative_on_the_reference_path() -> None:
    """``dk.backend("reference")`` is plain torch: derivatives of any order."""
    layer = BNAct2d(3, activation="silu").double()
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    with dk.backend("reference"):
        assert torch.autograd.gradgradcheck(layer.eval(), (x,))
