"""torch's own samples (OpInfo, ModuleInfo) for the operations we replace, ours against theirs in fp64, gradients included.

PyTorch tests its operators with these inputs and errors; they come with the wheel (``torch.testing._internal``). A sample that
lies outside of what our function does (a pooling window other than 2x2, …) is counted, and the counts are asserted, so that the
driver cannot silently check nothing. Interop suites are weak on numbers, hence fp64 and tight tolerances.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import functional as F

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
methods = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="not in this torch")
from torch.testing._internal.common_modules import module_db  # noqa: E402

OPS = {op.name: op for op in methods.op_db if not op.variant_test_name}
MODULES = {info.name.removeprefix("nn."): info for info in module_db}
BACKENDS = (None, "cpu", "reference")


class Outside(Exception):
    """The sample asks for something that our function does not do."""


def conv2d(backend: str | None, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Convolution with an identity BatchNorm: eps = 0 and running variance 1 change no bit."""
    options = dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
    if not x.is_floating_point():
        raise Outside("complex numbers")
    mean, var = x.new_zeros(weight.shape[0]), x.new_ones(weight.shape[0])
    options = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in options.items()}
    options = {k: v * 2 if isinstance(v, tuple) and len(v) == 1 else v for k, v in options.items()}
    return F.conv_bn_act(
        x, weight, bias, running_mean=mean, running_var=var, eps=0.0, activation="none", backend=backend, **options
    )


def batch_norm(backend: str | None, x: Tensor, mean: Any, var: Any, *args: Any, **kwargs: Any) -> Tensor:
    if x.dim() < 2:
        raise Outside("one empty dimension, which torch lets pass")
    named = dict(zip(("weight", "bias", "training", "momentum", "eps"), args, strict=False)) | kwargs
    weight, bias = named.pop("weight", None), named.pop("bias", None)
    named.pop("cudnn_enabled", None)
    return F.bn_act(x, mean, var, weight, bias, activation="none", backend=backend, **named)


def relu(backend: str | None, x: Tensor, inplace: bool = False) -> Tensor:
    return F.add_act(x, torch.zeros_like(x), backend=backend)


def add(backend: str | None, x: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    if alpha != 1 or not isinstance(other, Tensor) or not isinstance(x, Tensor):
        raise Outside("alpha scales one operand in torch, both in ours; no Python numbers")
    return F.add_act(x, other, activation="none", backend=backend)


# name: (ours, samples that have to fit at least)
DRIVEN: dict[str, tuple[Callable[..., Tensor], int]] = {
    "nn.functional.conv2d": (conv2d, 20),
    "nn.functional.batch_norm": (batch_norm, 10),
    "nn.functional.relu": (relu, 4),
    "add": (add, 5),
}


def leaves(sample: Any) -> list[Tensor]:
    values = [sample.input, *sample.args, *sample.kwargs.values()]
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad]


def own(sample: Any, training: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The arguments, with running statistics (which training calls write to) copied."""
    copied = [v.clone() if training and isinstance(v, Tensor) and not v.requires_grad else v for v in sample.args]
    named = {
        k: v.clone() if training and isinstance(v, Tensor) and not v.requires_grad else v for k, v in sample.kwargs.items()
    }
    return sample.input, tuple(copied), named


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b or "auto")
@pytest.mark.parametrize("name", DRIVEN)
def test_samples(name: str, backend: str | None, kernels: None) -> None:
    """Values and gradients in fp64 on every sample that fits."""
    ours, least = DRIVEN[name]
    fitting = outside = 0
    for sample in OPS[name].sample_inputs("cpu", torch.float64, requires_grad=True):
        training = "batch_norm" in name
        x, args, kwargs = own(sample, training)
        try:
            got = ours(backend, x, *args, **kwargs)
        except Outside:
            outside += 1
            continue
        fitting += 1
        x, args, kwargs = own(sample, training)
        kwargs.pop("inplace", None)
        expected = OPS[name].op(x, *args, **kwargs)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, equal_nan=True, check_stride=False)
        inputs = leaves(sample)
        if inputs and got.numel() and got.requires_grad:
            dout = torch.randn(expected.shape, dtype=torch.float64)
            grads = torch.autograd.grad(got, inputs, dout, allow_unused=True)
            stock = torch.autograd.grad(expected, inputs, dout, allow_unused=True)
            for a, b in zip(grads, stock, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert fitting >= least, f"{fitting} samples of {fitting + outside} fit"


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b or "auto")
def test_max_pool_inputs(backend: str | None, kernels: None) -> None:
    """Torch's samples for max_pool2d have other windows than our 2x2: their images, cut to even sizes, with our window."""
    seen = set()
    for sample in OPS["nn.functional.max_pool2d"].sample_inputs("cpu", torch.float64, requires_grad=True):
        x = sample.input
        if x.dim() != 4 or (x.shape, x.stride()) in seen:
            continue
        seen.add((x.shape, x.stride()))
        x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
        got, _ = F.max_pool_indices(x, backend=backend)
        expected = torch.nn.functional.max_pool2d(x, 2)
        assert torch.equal(got, expected)
        dout = torch.randn(expected.shape, dtype=torch.float64)
        assert torch.equal(torch.autograd.grad(got, x, dout)[0], torch.autograd.grad(expected, x, dout)[0])
    assert len(seen) >= 2, seen


@pytest.mark.parametrize("backend", [None, "cpu"], ids=lambda b: b or "auto")
@pytest.mark.parametrize("name", ["nn.functional.conv2d", "nn.functional.batch_norm", "add"])
def test_error_inputs(name: str, backend: str | None, kernels: None) -> None:
    """Inputs that torch refuses: ours refuses them with the same type of exception."""
    ours, _ = DRIVEN[name]
    refused = 0
    for error in OPS[name].error_inputs("cpu") if OPS[name].error_inputs_func else ():
        sample = error.sample_input
        with pytest.raises(Exception) as stock:
            OPS[name].op(sample.input, *sample.args, **sample.kwargs)
        try:
            with torch.no_grad(), pytest.raises(Exception) as got:
                ours(backend, sample.input, *sample.args, **sample.kwargs)
        except Outside:
            continue
        if got.type is Outside:
            continue
        assert issubclass(got.type, stock.type), f"{got.type.__name__}: {got.value}; stock: {stock.type.__name__}"
        refused += 1
    assert refused >= {"nn.functional.conv2d": 8}.get(name, 0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["BatchNorm2d", "Conv2d", "ReLU"])
def test_modules(name: str, training: bool, kernels: None) -> None:
    """Every module sample inside conv -> BatchNorm -> activation: optimized and stock agree, state and gradients included."""
    info, checked = MODULES[name], 0
    for sample in info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training):
        if sample.forward_input is None:
            continue
        module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
        x = sample.forward_input.args[0]
        if name == "Conv2d":
            chain = [module, nn.BatchNorm2d(module.out_channels), nn.ReLU()]
        elif name == "BatchNorm2d":
            chain = [nn.Conv2d(x.shape[1], x.shape[1], 1, bias=False), module, nn.SiLU()]
        elif x.dim() == 4:
            chain = [nn.Conv2d(x.shape[1], 3, 1), nn.BatchNorm2d(3), module]
        else:
            continue
        torch.manual_seed(checked)
        if x.dim() == 3:  # BatchNorm2d has no unbatched form
            x = x.unsqueeze(0)
        stock = nn.Sequential(*chain).double().train(training)
        model = dk.optimize(copy.deepcopy(stock), inplace=True)
        results = []
        for net in (model, stock):
            leaf = x.detach().clone().requires_grad_()
            out = net(leaf)
            grads = torch.autograd.grad(out.square().sum(), [leaf, *net.parameters()])
            results.append([out.detach(), *grads, *(v.clone() for v in net.state_dict().values())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert list(model.state_dict()) == list(stock.state_dict())
        checked += 1
    assert checked >= {"BatchNorm2d": 4, "Conv2d": 4, "ReLU": 1}[name]
