"""A forward that does more than call tensor operations runs stock, and what a trace saw is checked at every call."""

import random
import time

import pytest
import torch
import torch.nn.functional as F
from convert_models import Block, Net, assert_same, conv_bn, image, seeded, stock_calls
from torch import nn

import dl4ds_kernels as dk

X4 = image(2, 4)
SEEN: list = []
COUNT = 0


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv_bn()
        self.relu = nn.ReLU()
        self.scale = 1.0
        self.sizes = [1, 2]
        self.config = type("Config", (), {"wide": False})()
        self.extra = None

    def run(self, x):
        return self.relu(self.bn(self.conv(x)))


def on_data(self, x):
    return self.run(x) if x.sum() > 0 else x


def on_shape(self, x):
    return self.run(x) if len(x) > 1 else x


def on_star(self, *xs):
    return self.run(xs[0])


def no_grad(self, x):
    with torch.no_grad():
        return self.run(x)


@torch.no_grad()
def no_grad_decorator(self, x):
    return self.run(x)


@torch.autocast("cpu", torch.bfloat16)
def autocast(self, x):
    return self.run(x)


def coin(self, x):
    return self.run(x) if random.random() < 0.5 else x


def torch_coin(self, x):
    return self.run(x) + (torch.rand(()) < 0.5)


def torch_branch(self, x):
    return self.run(x) if torch.rand(()) < 0.5 else x


def global_state(self, x):
    return self.run(x) if torch.is_grad_enabled() else x


def compiling(self, x):
    return x if torch.compiler.is_compiling() else self.run(x)


def tracing(self, x):
    return x if torch.jit.is_tracing() else self.run(x)


def clock(self, x):
    return self.run(x) * (time.time() > 0)


def prints(self, x):
    print("called")
    return self.run(x)


def counts(self, x):
    self.calls = 1
    return self.run(x)


def global_counter(self, x):
    global COUNT
    COUNT += 1
    return self.run(x)


def collects(self, x):
    out = self.run(x)
    SEEN.append(out)
    return out


def own_list(self, x):
    self.sizes.append(3)
    return self.run(x)


def object_attribute(self, x):
    return self.run(x) if not self.config.wide else x


def checkpointed(self, x):
    return torch.utils.checkpoint.checkpoint(self.run, x, use_reentrant=False)


def mapping_methods(self, x):
    out = self.relu(self.bn(self.conv(x)))
    return out.get("a", out)


REFUSED = [
    on_data, on_shape, on_star, no_grad, no_grad_decorator, autocast, coin, torch_coin, torch_branch,
    global_state, compiling, tracing, clock, prints, counts, global_counter, collects, own_list,
    object_attribute, checkpointed, mapping_methods,
]  # fmt: skip


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_refused_with_a_reason(forward):
    model = type("User", (Chain,), {"forward": forward})()
    before = dict(vars(model)), list(model.sizes), list(SEEN), COUNT
    report = dk.analyze(model)
    assert [(row.fqn, row.reason) for row in report] == [("bn", "UNTRACEABLE")], report
    assert report.rows[0].detail
    assert (dict(vars(model)), list(model.sizes), list(SEEN), COUNT) == before
    with pytest.warns(UserWarning, match="1 UNTRACEABLE"):
        assert "forward" not in vars(dk.optimize(model))


def test_containers_below_a_refused_one_are_fused():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x) if x.sum() > 0 else x

    assert dk.analyze(Outer()).summary() == "2 of 2 conv-bn-act replaced"


@pytest.mark.filterwarnings("ignore:.*changed nothing")
def test_isinstance_and_optional_arguments():
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = [x]
        return self.run(torch.cat(x, 1))

    stock = seeded(type("User", (Chain,), {"forward": forward})())
    fused = dk.optimize(stock)
    with torch.no_grad():
        with stock_calls() as calls:
            assert_same(fused(X4), fused([X4[:, :2], X4[:, 2:]]))
        assert calls["BatchNorm2d"] == 0  # the call with a list has a plan of its own


def changing(change):
    """``change(model)`` on a stock and on an optimized model; both then give the same."""

    class User(Chain):
        def forward(self, x):
            if self.extra is not None:
                x = self.extra(x)
            x = self.run(x) * self.scale + sum(self.sizes)
            return F.dropout(x, 0.5, self.training)

    stock = seeded(User())
    fused = dk.optimize(stock)
    with torch.no_grad():
        assert_same(fused(X4), stock(X4))
        for model in (stock, fused):
            change(model)
        torch.manual_seed(0)
        want = stock(X4)
        torch.manual_seed(0)
        got = fused(X4)
    assert_same(got, want)
    return fused


def test_attribute_changed_later():
    changing(lambda m: setattr(m, "scale", 2.5))
    changing(lambda m: m.sizes.append(10))


def test_training_flag_read_by_the_forward():
    fused = changing(lambda m: m.train())
    with torch.no_grad():
        for mode in (False, True, False):
            fused.train(mode)
            with stock_calls() as calls:
                fused(X4)
            assert not calls


def test_submodule_that_was_none():
    changing(lambda m: setattr(m, "extra", nn.ReLU6()))
    extra = nn.Conv2d(4, 4, 1)
    changing(lambda m: m.__setattr__("extra", extra))


def test_method_replaced_on_the_instance():
    changing(lambda m: setattr(m, "run", lambda x: x * 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "bn", nn.Identity()),
        lambda m: setattr(m, "conv", nn.AvgPool2d(3, 1, 1)),
        lambda m: setattr(m, "relu", nn.Tanh()),
        lambda m: m.bn.register_forward_hook(lambda module, args, out: out + 1),
        lambda m: m.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda m: m.relu.register_forward_hook(lambda module, args, out: out - 1),
        lambda m: m.register_forward_hook(lambda module, args, out: out * 3),
        lambda m: setattr(m.conv, "forward", lambda x: x),
        lambda m: setattr(m.bn, "eps", 0.5),
        lambda m: m.__setattr__("bn", nn.SyncBatchNorm.convert_sync_batchnorm(m.bn)),
        lambda m: torch.nn.utils.parametrizations.weight_norm(m.conv) and m.conv.parametrizations.weight.original0.data.mul_(2),
    ],
    ids=["bn", "conv", "relu", "bn_hook", "conv_pre_hook", "relu_hook", "own_hook", "forward", "eps", "sync_bn", "weight_norm"],
)  # fmt: skip
def test_member_changed_later(change):
    changing(change)


def test_sequential_changed_later():
    stock = seeded(nn.Sequential(*conv_bn(), nn.ReLU()))
    fused = dk.optimize(stock)
    last = seeded(nn.BatchNorm2d(4), 5)
    for model in (stock, fused):
        model.append(last)
    with torch.no_grad():
        assert_same(fused(X4), stock(X4))
        for model in (stock, fused):
            del model[1]
        assert_same(fused(X4), stock(X4))


def test_hook_added_and_removed_later():
    fused = dk.optimize(seeded(Net()))
    x = image()
    shapes = []
    handle = fused.blocks[0].bn1.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    with torch.no_grad():
        with stock_calls() as calls:
            fused(x)
        assert calls["BatchNorm2d"] == 1 and len(shapes) == 1
        handle.remove()
        with stock_calls() as calls:
            fused(x)
        assert not calls and len(shapes) == 1


def test_global_hooks_see_every_module():
    fused = dk.optimize(seeded(Net()))
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: names.append(type(module).__name__))
    try:
        fused(image())
    finally:
        handle.remove()
    assert names.count("BatchNorm2d") == 5 and names.count("Conv2d") == 5


def test_profiler_of_the_user_is_put_back():
    import sys

    def profiler(frame, event, arg):
        return None

    sys.setprofile(profiler)
    try:
        dk.analyze(Net())
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_other_threads_run_models_while_one_is_planned():
    import threading

    model, x = seeded(Net()), image()
    with torch.no_grad():
        want = model(x)
    wrong, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(model(x), want):
                    wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            dk.analyze(Net())
    finally:
        stop.set()
        thread.join()
    assert not wrong
