"""Which chains of a user's module are found, which are left, and that either way the results are the stock ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from convert_models import Block, assert_same, conv_bn, image, seeded, stock_calls
from torch import nn

import dl4ds_kernels as dk


def check(model, *inputs, replaced=(), kept=(), gradients=True):
    """Patterns replaced, reasons kept, and in eval and train the stock results, gradients and statistics; no BN runs stock.

    ``gradients=False``: for forwards that write to what autograd saved, which stock torch refuses too.
    """
    model = seeded(model).double()
    inputs = [x.double() for x in inputs]
    report = dk.analyze(model)
    assert sorted(row.pattern for row in report.replaced) == sorted(replaced), report
    assert sorted(row.reason for row in report.kept) == sorted(kept), report
    for training in (False, True):
        stock = copy.deepcopy(model).train(training)
        fused = dk.optimize(copy.deepcopy(model), inplace=True).train(training)
        results = []
        for candidate in (stock, fused):
            leaves = [x.clone().requires_grad_(gradients) for x in inputs]
            # A non-leaf copy, so that modules that write to their input work as they do inside a network.
            out = candidate(*[leaf * 1 for leaf in leaves])
            out = out if isinstance(out, tuple) else (out,)
            results.append([*out, *candidate.buffers()])
            if gradients:
                sum(o.square().sum() for o in out).backward()
                results[-1] += [leaf.grad for leaf in leaves] + [p.grad for p in candidate.parameters()]
        assert len(results[0]) == len(results[1])
        for want, got in zip(*results, strict=True):
            assert_same(got.double(), want.double(), 1e-9)
        with torch.no_grad(), stock_calls() as calls:
            fused(*inputs)
        assert not any("BatchNorm" in name for name in calls)
    return report


class ConvBN(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.bn = conv_bn(width, width)
        self.relu = nn.ReLU()


def module(forward, base=ConvBN, **children):
    """An instance of a new subclass of ``base`` with this forward and more children."""
    made = type("User", (base,), {"forward": forward})()
    for name, child in children.items():
        setattr(made, name, child)
    return made


X4 = image(2, 4, 8)


@pytest.mark.parametrize(
    "act",
    [
        F.relu, torch.relu, torch.relu_, lambda x: F.relu(x, inplace=True), lambda x: F.relu(x, True), lambda x: x.relu(),
        lambda x: x.relu_(), F.leaky_relu, lambda x: F.leaky_relu(x, 0.3), lambda x: F.leaky_relu(x, 0.3, True),
        F.relu6, F.silu, F.hardswish,
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)  # fmt: skip
def test_functional_activations(act):
    check(module(lambda self, x: act(self.bn(self.conv(x)))), X4, replaced=["conv_bn_act"])


@pytest.mark.parametrize(
    "act", [nn.ReLU(True), nn.LeakyReLU(0.3), nn.ReLU6(), nn.SiLU(True), nn.Hardswish()], ids=lambda m: type(m).__name__
)
def test_activation_modules_in_a_sequential(act):
    report = check(nn.Sequential(*conv_bn(), act, *conv_bn(), act), X4, replaced=["conv_bn_act"] * 2)
    assert [row.members for row in report] == [("0", "1", "2"), ("3", "4", "5")]


def test_unknown_activation_leaves_conv_bn():
    check(module(lambda self, x: torch.tanh(self.bn(self.conv(x)))), X4, replaced=["conv_bn"])


def test_slope_changed_later_is_seen():
    model = dk.optimize(seeded(nn.Sequential(*conv_bn(), nn.LeakyReLU(0.2))))
    model[2].negative_slope = 0.7
    stock = dk.restore(copy.deepcopy(model))
    with torch.no_grad():
        assert_same(model(X4), stock(X4))


def test_block_with_shared_relu_and_in_place_add():
    check(Block(), X4, replaced=["conv_bn_act", "conv_bn_add_act"])


@pytest.mark.parametrize(
    "add",
    [
        lambda y, x: y + x, lambda y, x: x + y, lambda y, x: torch.add(y, x), lambda y, x: torch.add(x, y, alpha=1),
        lambda y, x: y.add(x), lambda y, x: y.add_(x),
    ],
)  # fmt: skip
def test_residual_additions(add):
    check(module(lambda self, x: F.relu(add(self.bn(self.conv(x)), x))), X4, replaced=["conv_bn_add_act"])
    check(module(lambda self, x: add(self.bn(self.conv(x)), x)), X4, replaced=["conv_bn_add"])


def test_scaled_addition_is_not_a_residual():
    check(module(lambda self, x: F.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))), X4, replaced=["conv_bn"])


def test_residual_that_broadcasts():
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))

    check(module(forward), X4, replaced=["conv_bn_add_act"])


def test_addition_without_batch_norm():
    check(module(lambda self, x, y: F.relu(x + y), nn.Module), X4, image(2, 4, 8, seed=5), replaced=["add_act"])


def test_doubled_output():
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + y)

    check(module(forward), X4, replaced=["conv_bn", "add_act"])


def test_two_branches_that_both_end_in_batch_norm():
    conv2, bn2 = conv_bn()

    def forward(self, x):
        short = self.bn2(self.conv2(x))
        return self.relu(short + self.bn(self.conv(x)))

    check(module(forward, conv2=conv2, bn2=bn2), X4, replaced=["conv_bn", "conv_bn_add_act"])


def test_pre_activation_block():
    class PreAct(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.conv1, self.bn2 = conv_bn()
            self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            out = self.relu(self.bn1(x))
            out = self.conv1(out)
            return x + self.conv2(self.relu(self.bn2(out)))

    check(PreAct(), X4, replaced=["bn_act", "conv", "conv_bn_act"])


def test_batch_norm_of_other_dimensions():
    flat = module(lambda self, x: F.relu(self.bn1(self.fc(x))), fc=nn.Linear(6, 3), bn1=nn.BatchNorm1d(3))
    del flat.conv, flat.bn
    check(flat, torch.randn(5, 6), replaced=["bn_act"])
    check(nn.Sequential(nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3), nn.ReLU()), torch.randn(2, 2, 3, 4, 5), replaced=["bn_act"])


def test_unbatched_batch_norm_raises_the_stock_error():
    fused = dk.optimize(nn.Sequential(*conv_bn(), nn.ReLU()))
    with pytest.raises(ValueError, match="expected 4D input"):
        fused(torch.randn(4, 8, 8))


def test_output_of_batch_norm_used_twice():
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) * y

    check(module(forward), X4, replaced=["conv_bn"], kept=["MULTIPLE_USERS"])


def test_intermediate_result_returned():
    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.bn(y)), y

    check(module(forward), X4, replaced=["bn_act"], kept=["MULTIPLE_USERS"])


def test_intermediate_changed_in_place_elsewhere():
    def forward(self, x):
        y = self.bn(self.conv(x))
        y.mul_(2)
        return self.relu(y)

    check(module(forward), X4, kept=["MULTIPLE_USERS"], replaced=["conv_bn"])


def test_in_place_activation_whose_result_is_dropped():
    def forward(self, x):
        y = self.bn(self.conv(x))
        F.relu_(y)
        return y

    check(module(forward), X4, replaced=["conv_bn"], kept=["MULTIPLE_USERS"])


def test_input_changed_in_place_between_the_operations():
    def forward(self, x):
        y = self.conv(x)
        x.mul_(3)
        return self.relu(self.bn(y)) + x

    check(module(forward), X4, replaced=["bn_act"], kept=["REORDERED"], gradients=False)


def test_input_changed_by_a_submodule_between_the_operations():
    def forward(self, x):
        y = self.bn(self.conv(x))
        short = self.short(x)
        return self.relu(y + short)

    writes = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    check(module(forward, short=writes), X4, replaced=["conv_bn", "add_act", "conv"], kept=["REORDERED"], gradients=False)
    reads = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
    check(module(forward, short=reads), X4, replaced=["conv_bn_add_act", "conv_act"])


def test_in_place_addition_into_the_input_is_kept():
    def forward(self, x):
        x += self.bn(self.conv(x))
        return F.relu(x)

    model = module(forward)
    check(model, X4, replaced=["conv_bn"], kept=["INPLACE"], gradients=False)
    x = X4.double()
    y = x.clone()
    with torch.no_grad():
        model(x)
        dk.optimize(model)(y)
    assert_same(x, y)
    assert not torch.equal(x, X4.double())


def test_addition_into_the_input_is_seen_by_the_caller():
    def forward(self, x, y):
        x += y
        return F.relu(x)

    model = module(forward, nn.Module)
    with pytest.warns(UserWarning, match="1 kept: 1 INPLACE"):
        check(model, X4, image(2, 4, 8, seed=7), kept=["INPLACE"])


class Gate(nn.Module):
    """A squeeze-and-excitation block that may be told to return its input, to scale it in place, or to clear it."""

    how = "product"

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        gate = self.fc(x.mean((2, 3), keepdim=True)).sigmoid()
        if self.how == "in place":
            return x.mul_(gate)
        if self.how == "input":
            return x
        return x * gate


def gated(self, x):
    y = self.short(self.bn(self.conv(x)))
    y += x
    return F.relu(y)


def test_addition_into_what_a_submodule_made():
    check(module(gated, short=Gate()), X4, replaced=["add_act", "conv", "conv_bn"])
    gate = Gate()
    gate.how = "in place"  # of the convolution's output, which the trace does not follow back into this forward
    check(module(gated, short=gate), X4, replaced=["conv", "conv_bn"], kept=["INPLACE"], gradients=False)


def test_what_is_known_of_a_submodule_holds_only_while_it_does_the_same():
    def forward(self, x):
        y = self.bn(self.conv(x))
        short = self.short(x)
        return self.relu(y + short)

    model = module(forward, short=Gate())
    fused = dk.optimize(model.eval())
    for how in ("product", "in place", "input", "product"):
        model.short.how = fused.short.how = how
        with torch.no_grad():
            x, y = X4.clone(), X4.clone()
            assert_same(fused(x), model(y))
            assert_same(x, y)


def test_one_relu_before_and_after_a_convolution():
    check(
        nn.Sequential(nn.ReLU(), *conv_bn(), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()), X4, replaced=["conv_bn_act", "conv_act"]
    )


def test_convolutions_without_batch_norm():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1))
    check(net, X4, replaced=["conv_act", "conv"])


def test_a_lone_convolution_that_cannot_be_replaced_is_no_missed_fusion():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.MaxPool2d(2), *conv_bn())
    check(net, X4, replaced=["conv_bn"])


@pytest.mark.parametrize("between", [nn.Dropout(0.0), nn.Identity(), nn.Sequential(nn.Identity(), nn.Dropout2d(0.0))])
def test_modules_that_pass_their_input_on_do_not_break_a_chain(between):
    check(nn.Sequential(*conv_bn(), between, nn.ReLU()), X4, replaced=["conv_bn_act"])


def test_dropout_breaks_a_chain_in_training_only():
    torch.manual_seed(0)
    model = seeded(nn.Sequential(*conv_bn(), nn.Dropout(0.5), nn.ReLU()))
    assert [row.pattern for row in dk.analyze(model).replaced] == ["conv_bn_act"]
    assert [row.pattern for row in dk.analyze(model.train()).replaced] == ["conv_bn"]
    fused = dk.optimize(model)
    for training in (True, False, True):
        model.train(training), fused.train(training)
        torch.manual_seed(1)
        want = model(X4)
        torch.manual_seed(1)
        with stock_calls() as calls:
            assert_same(fused(X4), want)
        assert calls["BatchNorm2d"] == 0 and calls["ReLU"] == int(training)


def test_a_hook_or_an_exchange_between_the_members_is_seen():
    model = seeded(nn.Sequential(*conv_bn(), nn.Identity(), nn.ReLU()))
    fused, seen = dk.optimize(model), []
    handle = fused[2].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        assert_same(fused(X4), model(X4))
        assert len(seen) == 1 and seen[0].min() < 0
        handle.remove()
        fused[2] = nn.Tanh()
        assert_same(fused(X4), model[3](model[1](model[0](X4)).tanh()))


class Tail(nn.Sequential):
    """As monai's ADN: what follows a convolution."""


@pytest.mark.filterwarnings("ignore:.*changed nothing")
def test_a_tail_of_norm_and_activation_continues_the_chain_around_it():
    def nested():
        conv, bn = conv_bn()
        return nn.Sequential(conv, Tail(bn, nn.Dropout(0.0), nn.ReLU()))

    check(nested(), X4, replaced=["conv_bn_act"])
    model = seeded(nested())
    fused = dk.optimize(model)
    assert [row.members for row in fused.dl4ds_report] == [("0", "1.0", "1.2")]
    with torch.no_grad():
        with stock_calls() as calls:
            got = fused(X4)
        assert not calls
        assert_same(got, model(X4))
        seen = []
        fused[1].register_forward_hook(lambda module, args, out: seen.append(args[0]))
        assert_same(fused(X4), model(X4))
        assert len(seen) == 1 and torch.allclose(seen[0], model[0](X4), atol=1e-5)
    assert dk.optimize(nested(), exclude="1").dl4ds_report.kept[0].reason == "EXCLUDED"
    # A convolution inside makes it a container with chains of its own.
    inner = nn.Sequential(*conv_bn(), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    check(inner, X4, replaced=["conv_bn", "conv_bn"])


class Joins(nn.Module):
    """As timm's DlaRoot: takes a list."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, xs: list[torch.Tensor]):
        return F.relu(self.bn(self.conv(torch.cat(xs, 1))) + xs[0])


class Consumes(Joins):
    def forward(self, xs: list[torch.Tensor]):
        first = xs.pop(0)
        return F.relu(self.bn(self.conv(torch.cat([first, *xs], 1))))


def test_a_list_of_tensors_as_argument():
    model = seeded(Joins())
    fused = dk.optimize(model)
    assert [row.pattern for row in fused.dl4ds_report] == ["conv_bn_add_act"]
    with torch.no_grad():
        for xs in ([X4, 2 * X4], [X4, X4[:, :2], X4[:, 2:]], (X4, X4)):
            with stock_calls() as calls:
                got = fused(xs)
            assert not calls
            assert_same(got, model(xs))
    assert [row.reason for row in dk.analyze(Consumes()).kept] == ["UNTRACEABLE"]


def test_subclassed_sequential_and_module_list():
    class Stage(nn.Sequential):
        pass

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([*conv_bn(), nn.ReLU(), *conv_bn()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    check(Stage(*conv_bn(), nn.ReLU()), X4, replaced=["conv_bn_act"])
    report = check(Listed(), X4, replaced=["conv_bn_act", "conv_bn"])
    assert report.rows[0].members == ("layers.0", "layers.1", "layers.2")


def test_grandchildren_called_by_path():
    def forward(self, x):
        return self.relu(self.inner.bn(self.inner.conv(x)))

    inner = module(lambda self, x: x)
    del inner.relu
    outer = module(forward, nn.Module, inner=inner, relu=nn.ReLU())
    report = check(outer, X4, replaced=["conv_bn_act"])
    assert report.rows[0].fqn == "inner.conv"


def test_helper_methods_properties_and_super():
    class Base(ConvBN):
        def body(self, x):
            return self.bn(self.conv(x))

        @property
        def act(self):
            return self.relu

        def forward(self, x):
            return self.act(self.body(x))

    class Derived(Base):
        def forward(self, x):
            return super().forward(x) + 1

    check(Derived(), X4, replaced=["conv_bn_act"])


def test_fx_graph_module():
    traced = torch.fx.symbolic_trace(nn.Sequential(Block(), Block()))
    check(traced, X4, replaced=["conv_bn_act", "conv_bn_add_act"] * 2)


def test_block_registered_twice_runs_fused_both_times():
    block = Block()
    check(nn.Sequential(block, block), X4, replaced=["conv_bn_act", "conv_bn_add_act"])


def test_kwargs_defaults_and_keyword_only_arguments():
    def forward(self, x, skip=None, *, scale=1.0, twice=False):
        y = self.bn(self.conv(x))
        y = F.relu(y if skip is None else y + skip) * scale
        return y * 2 if twice else y

    stock = seeded(module(forward))
    fused = dk.optimize(stock)
    skip = image(2, 4, 8, seed=3)
    calls = [
        ((X4,), {}),
        ((X4, skip), {}),
        ((), {"x": X4, "skip": skip}),
        ((X4,), {"scale": 2.5}),
        ((X4, None), {"twice": True, "scale": 3}),
    ]
    with torch.no_grad():
        for args, kwargs in [*calls, *reversed(calls)]:
            want = stock(*args, **kwargs)
            with stock_calls() as counts:
                assert_same(fused(*args, **kwargs), want)
            assert not counts, (args, kwargs)
    with pytest.raises(TypeError, match="forward"):
        fused(X4, wrong=1)
    with pytest.raises(TypeError):
        fused()
