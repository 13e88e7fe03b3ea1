"""Convolution, BatchNorm, optional residual and activation as modules: stock layers against the same layers through ours."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...modules._run import ActSpec, run_conv_bn_act
from .._case import OURS, Case, Problem, Run, choose, generator, gradients, place, randn, remembered, safe_gradient
from .._shapes import Layer, distinct, layers
from .bn_act import EPS, MOMENTUM, SLOPE, VECTORS, activate, make_vectors, normalise

STOCK = ("eager", "eager_cl", "compile")
DEFAULT = "resnet50"
# Inference in fp32 on the CPU may choose Winograd F(4x4), F(6x6) or Strassen, as models without exact=True do: measured up to
# 5, 30 and 2 times stock's error, where twice would refuse our own default. The documented bound is 1e-4.
_FAST_LIMIT = 5e-5


def floor(case: Case, provider: str) -> float:
    """Error that is allowed whatever stock's own is."""
    fast = provider in OURS and case.device == "cpu" and case.dtype == "fp32" and not case.backward
    return _FAST_LIMIT if fast else 0.0


def select(selection: str) -> list[Layer]:
    """Every layer of a different geometry."""
    return distinct(layers(selection), lambda x: (x.C, x.H, x.W, x.C_out, x.kernel, x.stride, x.activation, x.residual))


@remembered
def problem(case: Case) -> Problem:
    g, layer = generator(case), case.layer
    fan_in = layer.C * layer.kernel**2
    weight = (randn(case, g, (layer.C_out, layer.C, layer.kernel, layer.kernel)) * (2 / fan_in) ** 0.5).to(case.torch_dtype)
    vectors = make_vectors(case, g, layer.C_out)
    inputs = {"x": randn(case, g, (case.batch, layer.C, layer.H, layer.W)), "conv_weight": weight, **vectors}
    if layer.residual:
        inputs["residual"] = randn(case, g, (case.batch, layer.C_out, layer.H_out, layer.W_out))
    leaves = {name: t.to(torch.float64, copy=True).requires_grad_(case.backward) for name, t in inputs.items()}
    y = torch.conv2d(leaves["x"], leaves["conv_weight"], None, layer.stride, layer.padding)
    z = normalise(y, leaves, case.backward)
    if layer.residual:
        z = z + leaves["residual"]
    out = activate(z, layer.activation)
    truth, dout = {"out": out.detach()}, None
    if case.backward:
        dout = safe_gradient(case, g, z.detach(), layer.activation)
        wanted = _wanted(inputs)
        grads = torch.autograd.grad(out, [leaves[name] for name in wanted], dout.double())
        truth |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return Problem(inputs, truth, dout)


def _wanted(inputs: dict[str, Tensor]) -> list[str]:
    return [name for name in ("x", "conv_weight", "weight", "bias", "residual") if name in inputs]


def _modules(case: Case, inputs: dict[str, Tensor], provider: str) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Stock layers with the problem's parameters, in training mode when the case has a backward."""
    layer = case.layer
    conv = nn.Conv2d(layer.C, layer.C_out, layer.kernel, layer.stride, layer.padding, bias=False)
    bn = nn.BatchNorm2d(layer.C_out, eps=EPS, momentum=MOMENTUM, dtype=inputs["weight"].dtype)
    with torch.no_grad():
        conv.weight = nn.Parameter(place(case, inputs["conv_weight"], provider))
        for name in VECTORS:
            getattr(bn, name).copy_(inputs[name])
    modules = conv.to(case.device), bn.to(case.device)
    for module in modules:
        module.train(case.backward)
    return modules


def setup(case: Case, provider: str) -> Run:
    """The call of one provider, with inputs and layers of its own."""
    made, layer = problem(case), case.layer
    conv, bn = _modules(case, made.inputs, provider)
    x = place(case, made.inputs["x"], provider)
    residual = place(case, made.inputs["residual"], provider) if layer.residual else None

    def stock(inplace: bool) -> Tensor:
        z = bn(conv(x))
        if residual is not None:
            z = z.add_(residual) if inplace else z + residual
        return activate(z, layer.activation, inplace)

    act = ActSpec(layer.activation, SLOPE if layer.activation == "leaky_relu" else 0.0)
    call = choose(provider, lambda: stock(False), lambda: stock(True), partial(run_conv_bn_act, x, conv, bn, act, residual))
    element, N = x.element_size(), case.batch
    size_out = N * layer.C_out * layer.H_out * layer.W_out
    flops = 2 * size_out * layer.C * layer.kernel**2
    traffic = (x.numel() + conv.weight.numel() + size_out * (2 if layer.residual else 1)) * element
    if not case.backward:
        return Run(call, lambda: {"out": call()}, traffic, flops)
    leaves = {"x": x, "conv_weight": conv.weight, "weight": bn.weight, "bias": bn.bias, "residual": residual}
    wanted = _wanted(made.inputs)
    step = gradients(call, [leaves[name].requires_grad_() for name in wanted], place(case, made.dout, provider))
    names = ["out", *(f"d{name}" for name in wanted)]
    return Run(step, lambda: dict(zip(names, step(), strict=True)), 3 * traffic, 3 * flops)
