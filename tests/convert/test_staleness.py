"""Folded and prepacked weights are never stale: each way of changing a model between two calls, against the stock model."""

import copy

import pytest
import torch
from convert_models import Net, assert_same, image, seeded

import dl4ds_kernels as dk

X = image()
IMAGE8 = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(3))


class Pair:
    """A stock and an optimized model with the same parameters, both warmed up in eval."""

    def __init__(self):
        self.stock = seeded(Net())
        self.fused = dk.optimize(copy.deepcopy(self.stock), inplace=True)
        self.first = self.check()

    def check(self, x=X, tolerance=1e-4):
        with torch.no_grad():
            want, got = self.stock(x), self.fused(x)
        assert_same(got, want, tolerance)
        return want

    def apply(self, change):
        for model in (self.stock, self.fused):
            change(model)

    def check_changed(self):
        """Same results, and the change did change them."""
        now = self.check()
        assert (now - self.first).abs().max() > 1e-3 * self.first.abs().max()
        self.check()  # and the second call, from what the first one kept


def test_in_place_write_to_the_weight():
    pair = Pair()
    with torch.no_grad():
        pair.apply(lambda m: m.blocks[0].conv2.weight.mul_(-1.5))
    pair.check_changed()


def test_optimizer_step():
    pair = Pair()

    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        model(X).square().sum().backward()
        optimizer.step()

    pair.apply(step)
    pair.check_changed()


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign):
    pair = Pair()
    other = seeded(Net(), 9)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    pair.apply(lambda m: m.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign))
    pair.check_changed()


def test_parameter_replaced():
    pair = Pair()
    weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3))
    pair.apply(lambda m: setattr(m.blocks[1].conv1, "weight", weight))
    pair.check_changed()


def test_data_pointer_swapped():
    pair = Pair()
    pair.apply(lambda m: setattr(m.blocks[1].conv1.weight, "data", torch.full((4, 4, 3, 3), 0.3)))
    pair.check_changed()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_dtype_and_back(dtype):
    pair = Pair()
    pair.apply(lambda m: m.to(dtype))
    pair.check(X.to(dtype), 1e-9 if dtype is torch.float64 else 0.06)
    pair.apply(lambda m: m.float())
    pair.check()


def test_channels_last_model_and_input():
    pair = Pair()
    pair.apply(lambda m: m.to(memory_format=torch.channels_last))
    pair.check()
    pair.check(X.to(memory_format=torch.channels_last))


def test_train_and_back():
    pair = Pair()
    pair.apply(lambda m: m.train())
    pair.apply(lambda m: m(X * 3 + 1))
    pair.apply(lambda m: m.eval())
    pair.check_changed()
    for want, got in zip(pair.stock.buffers(), pair.fused.buffers(), strict=True):
        assert_same(got.double(), want.double(), 1e-5)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("through_data", [False, True], ids=["in_place", "data"])
def test_batch_norm_vectors(name, through_data):
    pair = Pair()

    def change(model):
        for block in model.blocks:
            tensor = getattr(block.bn2, name)
            (tensor.data if through_data else tensor.detach()).add_(1.0)

    pair.apply(change)
    pair.check_changed()


def test_batch_norm_vectors_through_numpy():
    pair = Pair()
    pair.apply(lambda m: m.stem[1].running_mean.numpy().__iadd__(2.0))
    pair.check_changed()


@pytest.mark.parametrize("write", [lambda w: w.data.mul_(-2), lambda w: w.detach().numpy().__imul__(-2)], ids=["data", "numpy"])
def test_raw_write_to_the_weight_needs_refresh(write):
    pair = Pair()
    pair.apply(lambda m: write(m.blocks[0].conv1.weight))
    assert dk.refresh(pair.fused) is pair.fused
    pair.check_changed()


def test_bias_of_the_convolution():
    pair = Pair()
    pair.apply(lambda m: m.stem[0].bias.data.add_(1.0))
    pair.check_changed()


def test_eps_and_momentum():
    pair = Pair()
    pair.apply(lambda m: setattr(m.stem[1], "eps", 2.0))
    pair.check_changed()


def test_inference_mode_parameters():
    with torch.inference_mode():
        stock = seeded(Net())
        fused = dk.optimize(copy.deepcopy(stock), inplace=True)
        assert_same(fused(X), stock(X))
        for model in (stock, fused):
            model.blocks[0].conv1.weight.mul_(-2)
        assert_same(fused(X), stock(X))
    with torch.no_grad():
        assert_same(fused(X), stock(X))


def test_inference_mode_calls_of_a_normal_model():
    pair = Pair()
    with torch.inference_mode():
        assert_same(pair.fused(X), pair.stock(X))
    with torch.no_grad():
        pair.apply(lambda m: m.blocks[0].conv1.weight.mul_(-2))
    with torch.inference_mode():
        assert_same(pair.fused(X), pair.stock(X))
    pair.check_changed()


def test_gradients_in_eval_mode():
    pair = Pair()
    pair.apply(lambda m: m(X).square().sum().backward())
    for want, got in zip(pair.stock.parameters(), pair.fused.parameters(), strict=True):
        assert_same(got.grad, want.grad)


def test_partly_frozen_training():
    pair = Pair()
    pair.apply(lambda m: m.train() and m.blocks[0].eval())
    pair.apply(lambda m: [p.requires_grad_(False) for p in m.stem.parameters()])
    pair.apply(lambda m: m(X).square().sum().backward())
    for want, got in zip(pair.stock.parameters(), pair.fused.parameters(), strict=True):
        assert (want.grad is None) == (got.grad is None)
        if want.grad is not None:
            assert_same(got.grad, want.grad)


def test_autocast():
    pair = Pair()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = pair.stock(X), pair.fused(X)
    assert_same(got, want, 0.06)
    pair.check()


class InPlace(torch.nn.Module):
    """Sums in place: of the branch into which the shortcut goes, of the shortcut, and of two tensors without a BatchNorm."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.conv, self.bn = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3)
        self.side = torch.nn.BatchNorm2d(3)

    def forward(self, x):
        identity = self.side(x)
        out = self.bn(self.conv(x)) if self.order != "act" else self.conv(x)
        if self.order == "shortcut":
            identity += out
            return torch.relu(identity)
        if self.order == "plain":
            return torch.relu(out + identity)
        out += identity
        return torch.relu(out)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("order", ["branch", "shortcut", "act", "plain"])
def test_sums_in_place_keep_their_dtype_under_autocast(order: str, training: bool):
    """``out += identity`` is bfloat16 where ``out`` is, ``out + identity`` is float32; gradients reach both."""
    stock = InPlace(order).train(training)
    fused = dk.optimize(stock, (X,))
    assert any("add" in row.pattern for row in fused.dl4ds_report.replaced)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            want, got = copy.deepcopy(stock)(X), fused(X)
        assert got.dtype == want.dtype == (torch.float32 if order in ("shortcut", "plain") else torch.bfloat16)
        assert_same(got, want, 0.02)
    got.float().square().sum().backward()
    used = [name for name in ("conv.weight", "bn.weight", "side.weight") if order != "act" or name != "bn.weight"]
    assert all(fused.get_parameter(name).grad.abs().max() > 0 for name in used)


@pytest.mark.parametrize("training", [False, True])
def test_residual_blocks_keep_their_dtype_under_autocast(training: bool):
    """A block of ours does as torchvision's when its input is float32."""
    import torchvision

    torch.manual_seed(0)
    stock = torchvision.models.resnet.BasicBlock(8, 8).train(training)
    block = dk.modules.BasicBlock(8, 8).train(training)
    block.load_state_dict(stock.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        want, got = stock(IMAGE8), block(IMAGE8)
        assert got.dtype == want.dtype == dk.optimize(stock)(IMAGE8).dtype == torch.bfloat16
    assert_same(got, want, 0.02)


def test_copies_do_not_share_what_they_keep():
    pair = Pair()
    copied = copy.deepcopy(pair.fused)
    with torch.no_grad():
        copied.blocks[0].conv1.weight.mul_(-2)
        assert not torch.allclose(copied(X), pair.first, rtol=1e-3)
    pair.check()


def test_different_input_sizes():
    pair = Pair()
    for size in (16, 7, 1, 33, 16):
        pair.check(image(1, size=size))


def test_state_dict_has_nothing_new_after_a_call():
    pair = Pair()
    assert list(pair.fused.state_dict()) == list(pair.stock.state_dict())
    assert [name for name, _ in pair.fused.named_modules()] == [name for name, _ in pair.stock.named_modules()]
    assert [name for name, _ in pair.fused.named_buffers()] == [name for name, _ in pair.stock.named_buffers()]
