"""2x2 max-pooling with switches and the unpooling that goes with it; the pooled map has the shape of a layer's output."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import Tensor

from ... import functional as F
from .._case import Case, Problem, Run, choose, generator, gradients, place, randn, remembered
from .._shapes import Layer, distinct, layers

STOCK = ("eager", "eager_cl", "compile")
DEFAULT = "64x112x112,128x56x56,256x28x28,512x14x14"  # DeconvNet's poolings


def select(selection: str) -> list[Layer]:
    """One layer of each output size."""
    return distinct(layers(selection), lambda layer: (layer.C_out, layer.H_out, layer.W_out))


@remembered
def problem(case: Case) -> Problem:
    g, layer = generator(case), case.layer
    shape = (case.batch, layer.C_out, 2 * layer.H_out, 2 * layer.W_out)
    # All values differ: among equal maxima a half-precision tensor is full of, any place would be right.
    order = torch.randperm(4, generator=g)
    x = randn(case, g, shape).float().round(decimals=1)
    x = (x + 0.01 * order.view(2, 2).repeat(layer.H_out, layer.W_out)).to(case.torch_dtype)
    leaf = x.double().requires_grad_(case.backward)
    out = _stock(leaf)
    truth, dout = {"out": out.detach()}, None
    if case.backward:
        dout = randn(case, g, shape)
        truth["dx"] = torch.autograd.grad(out, leaf, dout.double())[0]
    return Problem({"x": x}, truth, dout)


def _stock(x: Tensor) -> Tensor:
    out, index = TF.max_pool2d(x, 2, 2, return_indices=True)
    return TF.max_unpool2d(out, index, 2, 2)


def _ours(x: Tensor, backend: str) -> Tensor:
    out, where = F.max_pool_indices(x, backend=backend)
    return F.max_unpool(out, where, backend=backend)


def setup(case: Case, provider: str) -> Run:
    """The call of one provider, with an input of its own."""
    made = problem(case)
    x = place(case, made.inputs["x"], provider)
    fn = choose(provider, _stock, None, _ours)
    size, places = x.numel() * x.element_size(), x.numel() // 4
    # Least traffic: x, the maxima twice, the places twice, out; the same way back.
    traffic = 5 * size // 2 + 2 * places
    if not case.backward:
        return Run(lambda: fn(x), lambda: {"out": fn(x)}, traffic)
    step = gradients(lambda: fn(x), [x.requires_grad_()], place(case, made.dout, provider))
    return Run(step, lambda: dict(zip(("out", "dx"), step(), strict=True)), 2 * traffic)
