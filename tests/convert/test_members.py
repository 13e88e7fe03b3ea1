"""What is kept because of the modules in a chain: hooks, subclasses, sharing, parametrizations, dtypes, and in which order."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from convert_models import Block, Net, assert_same, conv_bn, image, seeded, stock_calls
from torch import nn
from torch.nn.utils import parametrizations

import dl4ds_kernels as dk

pytestmark = pytest.mark.filterwarnings("ignore:.*changed nothing")
X4 = image(2, 4)


class MyBatchNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        super()._check_input_dim(input)


class MyConv(nn.Conv2d):
    """Standardises its weight, as timm's StdConv2d does: not a plain convolution."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class RenamedConv(nn.Conv2d):
    """A constructor of its own and nothing else."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def extra_repr(self):
        return "renamed"


class RenamedNorm(nn.BatchNorm2d):
    pass


class WithProperty(nn.Conv2d):
    @property
    def dilation(self):
        return (1, 1)

    @dilation.setter
    def dilation(self, value):
        pass


def chain(**kwargs):
    return nn.Sequential(*conv_bn(**kwargs), nn.ReLU())


def hooked(index, register, make=lambda *args: None):
    model = chain()
    getattr(model[index], register)(make)
    return model


def replaced_forward():
    model = chain()
    model[1].forward = lambda x: x * 2
    return model


def with_parametrization():
    model = chain()
    parametrizations.weight_norm(model[0])
    return model


def with_child(index, child):
    model = chain()
    model[index] = child
    return model


CASES = {
    "conv forward hook": (lambda: hooked(0, "register_forward_hook"), "HOOKS", ["bn_act"]),
    "bn forward pre-hook": (lambda: hooked(1, "register_forward_pre_hook"), "HOOKS", []),
    "relu forward hook": (lambda: hooked(2, "register_forward_hook"), "HOOKS", ["conv_bn"]),
    "bn backward hook": (lambda: hooked(1, "register_full_backward_hook"), "HOOKS", []),
    "conv backward pre-hook": (lambda: hooked(0, "register_full_backward_pre_hook"), "HOOKS", ["bn_act"]),
    "forward on the instance": (replaced_forward, "OVERRIDDEN", []),
    "bn subclass": (lambda: with_child(1, MyBatchNorm(4)), "SUBCLASS", []),
    "sync bn": (lambda: with_child(1, nn.SyncBatchNorm(4)), "SUBCLASS", []),
    "conv subclass": (lambda: with_child(0, MyConv(4, 4, 3)), "SUBCLASS", ["bn_act"]),
    "parametrized conv": (with_parametrization, "PARAMETRIZED", ["bn_act"]),
    "no running statistics": (lambda: with_child(1, nn.BatchNorm2d(4, track_running_stats=False)), "NO_RUNNING_STATS", []),
    "reflection padding": (lambda: chain(padding_mode="reflect"), "PADDING_MODE", ["bn_act"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kept_with_a_reason(case):
    make, reason, replaced = CASES[case]
    model = seeded(make())
    fused = dk.optimize(copy.deepcopy(model), inplace=True)
    report = fused.dl4ds_report
    assert [(row.pattern, row.reason) for row in report.kept] == [("conv_bn_act", reason)], report
    assert [row.pattern for row in report.replaced] == replaced
    assert f"1 {reason}" in report.summary()
    for training in (False, True):
        if case == "sync bn" and training:
            continue  # stock SyncBatchNorm trains on accelerators only
        with torch.no_grad():
            assert_same(fused.train(training)(X4), model.train(training)(X4))


def test_subclasses_that_change_nothing_are_replaced():
    """They compute what the stock class does; packed weights, hooks and copies are the subclass's own."""
    stock = seeded(nn.Sequential(RenamedConv(4), RenamedNorm(4), nn.ReLU()))
    fused = dk.optimize(stock)
    assert [row.pattern for row in fused.dl4ds_report.replaced] == ["conv_bn_act"] and not fused.dl4ds_report.kept
    x = image(2, 4, 48)
    with torch.no_grad():
        for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            with stock_calls() as calls:
                got = model(x)
            assert not calls
            assert_same(got, stock(x))
        assert type(fused[0]) is RenamedConv and dk.algorithms(fused).keys() == {"0"}
        fused[0].weight.mul_(2)
        stock[0].weight.mul_(2)
        assert_same(fused(x), stock(x))
        seen = []
        fused[0].register_forward_hook(lambda *args: seen.append(1))
        fused[1].register_forward_hook(lambda *args: seen.append(2))
        assert_same(fused(x), stock(x))
        assert seen == [1, 2]
    fused.train(), stock.train()
    assert_same(fused(x), stock(x))
    assert_same(fused[1].running_var, stock[1].running_var)


def test_a_subclass_that_hides_an_attribute_is_kept():
    model = nn.Sequential(WithProperty(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    assert [row.reason for row in dk.analyze(model).kept] == ["SUBCLASS"]


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_parameters_are_kept():
    model = nn.Sequential(nn.Conv2d(4, 4, 1).to(torch.complex64), nn.BatchNorm2d(4), nn.ReLU())
    assert [row.reason for row in dk.analyze(model).kept] == ["DTYPE"]


def test_shared_relu_is_fine_shared_batch_norm_and_convolution_are_kept():
    conv, bn = conv_bn()
    relu = nn.ReLU()
    other, other_bn = conv_bn()
    shared = nn.Sequential(conv, bn, relu, other, bn, relu, conv, other_bn, relu)
    report = dk.analyze(shared)
    assert [row.reason for row in report.kept] == ["SHARED_MODULE"] * 3
    assert [row.pattern for row in report.replaced] == ["bn_act"]  # the last BatchNorm is its own
    seeded(shared)
    with torch.no_grad():
        assert_same(dk.optimize(shared)(X4), shared(X4))
        shared.train()
        fused = dk.optimize(shared)
        assert_same(fused(X4), shared(X4))
    assert_same(fused[1].running_mean, shared[1].running_mean)


def test_module_shared_between_containers_is_kept_after_copying_too():
    a, b = chain(), chain()
    b[1] = a[1]
    fused = dk.optimize(seeded(nn.Sequential(a, b)))
    assert [row.reason for row in fused.dl4ds_report.kept] == ["SHARED_MODULE"] * 2
    again = copy.deepcopy(fused)
    with torch.no_grad(), stock_calls() as calls:
        again(X4)
    assert calls["BatchNorm2d"] == 2


def test_module_called_twice_in_one_forward_is_kept():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv_bn()

        def forward(self, x):
            return F.relu(self.bn(self.conv(F.relu(self.bn(self.conv(x))))))

    assert [row.reason for row in dk.analyze(Twice()).kept] == ["SHARED_MODULE"] * 2


def test_hook_on_the_container_is_called_and_nothing_is_kept():
    fused = dk.optimize(seeded(Net()))
    seen = []
    fused.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert not fused.dl4ds_report.kept
    with torch.no_grad(), stock_calls() as calls:
        fused(image())
    assert seen == [torch.Size([2, 4, 16, 16])] and not calls
    assert not dk.optimize(fused).dl4ds_report.kept


def test_forward_patched_onto_a_container_is_kept():
    block = Block()
    block.forward = lambda x: x + 1
    fused = dk.optimize(nn.Sequential(block))
    assert {row.reason for row in fused.dl4ds_report} == {"UNTRACEABLE"}
    assert torch.equal(fused(X4), X4 + 1)
    dk.restore(fused)
    assert torch.equal(fused(X4), X4 + 1)


def test_wrapped_like_ddp_before_and_after():
    class Wrapper(nn.Module):
        """Calls its module as nn.parallel.DistributedDataParallel does."""

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs, **kwargs):
            return self.module(*inputs, **kwargs)

    stock = seeded(Net())
    x = image()
    for wrapped in (Wrapper(dk.optimize(stock)), dk.optimize(Wrapper(copy.deepcopy(stock)))):
        with torch.no_grad(), stock_calls() as calls:
            out = wrapped(x)
        assert not calls
        with torch.no_grad():
            assert_same(out, stock(x))


def test_data_parallel_replicas_run_on_their_own_modules():
    fused = dk.optimize(seeded(nn.Sequential(Block())))
    replica = fused[0]._replicate_for_data_parallel()  # what nn.DataParallel calls for each device
    replica._modules["bn1"] = seeded(nn.BatchNorm2d(4), 7)
    stock = copy.deepcopy(dk.restore(copy.deepcopy(fused))[0])
    stock.bn1 = replica.bn1
    with torch.no_grad(), stock_calls() as calls:
        got = replica(X4)
    assert not calls
    with torch.no_grad():
        assert_same(got, stock(X4))
        assert not torch.allclose(got, fused(X4))


def test_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stock = seeded(Net()).train()
        after = dk.optimize(nn.parallel.DistributedDataParallel(copy.deepcopy(stock)), inplace=True)
        before = nn.parallel.DistributedDataParallel(dk.optimize(stock))
        x = image()
        for model in (stock, after, before):
            model(x).square().sum().backward()
        for want, *got in zip(stock.parameters(), after.parameters(), before.parameters(), strict=True):
            for g in got:
                assert_same(g.grad, want.grad)
        assert len(after.dl4ds_report.replaced) == 5
    finally:
        torch.distributed.destroy_process_group()


def test_sync_batch_norm_conversion_after_optimize():
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(dk.optimize(seeded(Net())))
    stock = dk.restore(copy.deepcopy(fused))
    with torch.no_grad(), stock_calls() as calls:
        got = fused(image())
    assert calls["SyncBatchNorm"] == 5
    with torch.no_grad():
        assert_same(got, stock(image()))
