"""2x2 transposed convolution with stride 2, BatchNorm and ReLU, as modules; x has the shape of a layer's output."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...modules._run import ActSpec
from ...modules._transposed import run_conv_transpose_bn_act
from .._case import Case, Problem, Run, choose, generator, gradients, place, randn, remembered, safe_gradient
from .._shapes import Layer, distinct, layers
from .bn_act import EPS, MOMENTUM, VECTORS, make_vectors, normalise

STOCK = ("eager", "eager_cl", "compile")
DEFAULT = "1024x16x16,512x32x32,256x64x64,128x128x128"  # the ways up of a U-Net at 256 x 256
WANTED = ("x", "conv_weight", "weight", "bias")


def select(selection: str) -> list[Layer]:
    """One layer of each output size."""
    return distinct(layers(selection), lambda layer: (layer.C_out, layer.H_out, layer.W_out))


def _channels_out(case: Case) -> int:
    return max(1, case.layer.C_out // 2)


@remembered
def problem(case: Case) -> Problem:
    g, layer, k = generator(case), case.layer, _channels_out(case)
    weight = (randn(case, g, (layer.C_out, k, 2, 2)) * (2 / layer.C_out) ** 0.5).to(case.torch_dtype)
    inputs = {"x": randn(case, g, (case.batch, layer.C_out, layer.H_out, layer.W_out)), "conv_weight": weight}
    inputs |= make_vectors(case, g, k)
    leaves = {name: t.to(torch.float64, copy=True).requires_grad_(case.backward) for name, t in inputs.items()}
    z = normalise(torch.conv_transpose2d(leaves["x"], leaves["conv_weight"], None, 2), leaves, case.backward)
    out = torch.relu(z)
    truth, dout = {"out": out.detach()}, None
    if case.backward:
        dout = safe_gradient(case, g, z.detach(), "relu")
        grads = torch.autograd.grad(out, [leaves[name] for name in WANTED], dout.double())
        truth |= {f"d{name}": grad for name, grad in zip(WANTED, grads, strict=True)}
    return Problem(inputs, truth, dout)


def setup(case: Case, provider: str) -> Run:
    """The call of one provider, with inputs and layers of its own."""
    made, layer, k = problem(case), case.layer, _channels_out(case)
    conv = nn.ConvTranspose2d(layer.C_out, k, 2, 2, bias=False)
    bn = nn.BatchNorm2d(k, eps=EPS, momentum=MOMENTUM, dtype=made.inputs["weight"].dtype)
    with torch.no_grad():
        conv.weight = nn.Parameter(place(case, made.inputs["conv_weight"], provider))
        for name in VECTORS:
            getattr(bn, name).copy_(made.inputs[name])
    conv, bn = (module.to(case.device).train(case.backward) for module in (conv, bn))
    x = place(case, made.inputs["x"], provider)

    def stock(inplace: bool) -> Tensor:
        z = bn(conv(x))
        return z.relu_() if inplace else torch.relu(z)

    ours = partial(run_conv_transpose_bn_act, x, conv, bn, ActSpec("relu"))
    call = choose(provider, lambda: stock(False), lambda: stock(True), ours)
    flops = 8 * k * x.numel()
    traffic = (x.numel() + conv.weight.numel() + 4 * k * x.numel() // layer.C_out) * x.element_size()
    if not case.backward:
        return Run(call, lambda: {"out": call()}, traffic, flops)
    leaves = (x, conv.weight, bn.weight, bn.bias)
    step = gradients(call, [leaf.requires_grad_() for leaf in leaves], place(case, made.dout, provider))
    names = ("out", *(f"d{name}" for name in WANTED))
    return Run(step, lambda: dict(zip(names, step(), strict=True)), 3 * traffic, 3 * flops)
