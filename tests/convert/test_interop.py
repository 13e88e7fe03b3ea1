"""An optimized model goes wherever a stock one goes: compile, export, tracing, copying, pickling."""

import copy
import gc
import inspect
import io
import pickle

import pytest
import torch
from convert_models import Block, Net, assert_same, image, seeded, stock_calls
from torch import nn

import dl4ds_kernels as dk

X = image()


@pytest.fixture(params=["net", "resnet"])
def pair(request):
    """(stock, optimized) of a small network and of a small torchvision ResNet."""
    if request.param == "net":
        stock = Net()
    else:
        resnet = pytest.importorskip("torchvision.models.resnet", reason="torchvision is not installed")
        stock = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    stock = seeded(stock)
    return stock, dk.optimize(stock)


def outputs(stock, other, x=X, tolerance=1e-4):
    with torch.no_grad():
        assert_same(other(x), stock(x), tolerance)


def test_type_signature_and_names(pair):
    stock, fused = pair
    assert type(fused) is type(stock) and fused.dl4ds_report.replaced
    for (name, a), (other, b) in zip(stock.named_modules(), fused.named_modules(), strict=True):
        assert name == other and type(a) is type(b)
        assert inspect.signature(a.forward) == inspect.signature(b.forward)
        assert a.forward.__doc__ == b.forward.__doc__ and a.forward.__name__ == b.forward.__name__
    assert repr(fused) == repr(stock)


@pytest.fixture
def net():
    stock = seeded(Net())
    return stock, dk.optimize(stock)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compile_fullgraph(net, training):
    stock, fused = net
    torch.compiler.reset()
    compiled = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager")
    if not training:
        outputs(stock, compiled)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    out = compiled(x)
    out.square().sum().backward()
    want = stock.train(training)(y)
    want.square().sum().backward()
    assert_same(out, want)
    assert_same(x.grad, y.grad, 1e-3)
    torch.compiler.reset()


@pytest.mark.slow
def test_compile_a_resnet(pair):
    stock, fused = pair
    torch.compiler.reset()
    outputs(stock, torch.compile(fused, fullgraph=True, backend="aot_eager"))
    torch.compiler.reset()


@pytest.mark.slow
def test_compile_inductor():
    stock = seeded(Net())
    torch.compiler.reset()
    outputs(stock, torch.compile(dk.optimize(stock), fullgraph=True))
    torch.compiler.reset()


def test_optimize_a_compiled_model():
    stock = seeded(Net())
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(stock), fullgraph=True, backend="aot_eager")
    outputs(stock, compiled)
    fused = dk.optimize(compiled, inplace=True)
    assert len(fused.dl4ds_report.replaced) == 5
    outputs(stock, fused)
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_export(net, strict):
    stock, fused = net
    program = torch.export.export(fused, (X,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("dl4ds" in target for target in targets), "what is exported is standard operators"
    assert set(program.state_dict) == set(stock.state_dict())
    outputs(stock, program.module())


def test_onnx_export(net, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx.reference import ReferenceEvaluator

    stock, fused = net
    path = tmp_path / "model.onnx"
    torch.onnx.export(fused, (X,), str(path), dynamo=True, verbose=False)
    model = onnx.load(str(path))
    assert {node.domain for node in model.graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}
    with torch.no_grad():
        want = stock(X)
    assert_same(torch.from_numpy(ReferenceEvaluator(model).run(None, {model.graph.input[0].name: X.numpy()})[0]), want)


def test_fx_symbolic_trace(pair):
    stock, fused = pair
    traced = torch.fx.symbolic_trace(fused)
    outputs(stock, traced)
    kinds = {type(traced.get_submodule(node.target)) for node in traced.graph.nodes if node.op == "call_module"}
    assert nn.BatchNorm2d in kinds and nn.Conv2d in kinds  # the stock operations
    again = dk.optimize(traced, inplace=True)
    assert len(again.dl4ds_report.replaced) == len(fused.dl4ds_report.replaced)
    outputs(stock, again)


def test_jit_trace(pair, tmp_path):
    stock, fused = pair
    with torch.no_grad():
        traced = torch.jit.trace(fused, X)
    outputs(stock, traced)
    outputs(stock, traced, image(1, size=9, seed=4))
    traced.save(str(tmp_path / "traced.pt"))
    outputs(stock, torch.jit.load(str(tmp_path / "traced.pt")))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_duplicates_are_optimized_too(pair, duplicate):
    stock, fused = pair
    with torch.no_grad():
        fused(X)
    other = duplicate(fused)
    outputs(stock, other)
    assert other.dl4ds_report.to_dict() == fused.dl4ds_report.to_dict()
    assert not {id(p) for p in other.parameters()} & {id(p) for p in fused.parameters()}
    with torch.no_grad(), stock_calls() as calls:
        other(X)
    assert not calls
    # The duplicate's forwards work on the duplicate.
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
        assert not torch.allclose(other(X), stock(X))
    outputs(stock, fused)


def test_a_duplicate_that_is_compiled_first():
    stock = seeded(Net())
    torch.compiler.reset()
    outputs(stock, torch.compile(copy.deepcopy(dk.optimize(stock)), fullgraph=True, backend="aot_eager"))
    torch.compiler.reset()


def test_pickle_has_no_code_and_no_packed_weight():
    fused = dk.optimize(seeded(Net()))
    before = len(pickle.dumps(fused))
    with torch.no_grad():
        fused(X)
    assert len(pickle.dumps(fused)) <= before + 500  # the holders, empty
    stock = len(pickle.dumps(Net()))
    assert before < stock + 6000


def test_submodule_used_and_copied_alone():
    stock = seeded(nn.Sequential(Block()))
    fused = dk.optimize(stock)
    x = image(2, 4)
    for block in (fused[0], copy.deepcopy(fused[0]), pickled(fused[0])):
        outputs(stock, block, x)


def test_forward_is_callable_directly_and_keeps_the_model_alive():
    stock = seeded(Net())
    forward = dk.optimize(stock).forward
    gc.collect()
    outputs(stock, forward)


def test_functional_call_and_vmap_over_parameters():
    stock = seeded(Net())
    fused = dk.optimize(stock)
    values = {name: p.detach() * 1.1 for name, p in stock.named_parameters()}
    with torch.no_grad():
        want = torch.func.functional_call(stock, values, (X,))
        assert_same(torch.func.functional_call(fused, values, (X,)), want)
    gradients = [
        torch.func.grad(lambda v, m=model: torch.func.functional_call(m, v, (X,)).square().sum())(values)
        for model in (stock, fused)
    ]
    for name in values:
        assert_same(gradients[1][name], gradients[0][name], 1e-3)


def test_meta_and_fake_tensors():
    with torch.device("meta"):
        fused = dk.optimize(Net().eval())
        assert fused(torch.empty(2, 3, 8, 8)).shape == (2, 5)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, torch.no_grad():
        fused = dk.optimize(Net().eval(), inplace=True)
        assert fused(mode.from_tensor(torch.zeros(2, 3, 8, 8))).shape == (2, 5)


def test_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    stock = seeded(Net())
    fused = copy.deepcopy(dk.optimize(stock))  # plans at its first call: many at once
    inputs = [image(seed=i) for i in range(16)]

    def work(x):
        with torch.no_grad():
            return fused(x)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, inputs))
    with torch.no_grad():
        for x, got in zip(inputs, results, strict=True):
            assert_same(got, stock(x))
