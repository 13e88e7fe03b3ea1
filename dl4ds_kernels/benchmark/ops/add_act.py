"""``relu(x + residual)`` on the block outputs of a network."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ... import functional as F
from .._case import Case, Problem, Run, choose, generator, gradients, place, randn, remembered, safe_gradient
from .._shapes import Layer, distinct, layers

STOCK = ("eager", "eager_cl", "compile")
DEFAULT = "resnet50"


def select(selection: str) -> list[Layer]:
    """One layer of each output size; where a network has skip connections, only the sizes that a skip is added to."""
    found = layers(selection)
    skips = [layer for layer in found if layer.residual]
    return distinct(skips or found, lambda layer: (layer.C_out, layer.H_out, layer.W_out))


@remembered
def problem(case: Case) -> Problem:
    g, layer = generator(case), case.layer
    shape = (case.batch, layer.C_out, layer.H_out, layer.W_out)
    x, residual = randn(case, g, shape), randn(case, g, shape)
    z = x.double() + residual.double()
    truth = {"out": torch.relu(z)}
    dout = None
    if case.backward:
        dout = safe_gradient(case, g, z, "relu")
        truth["dx"] = dout.double() * (z > 0)
    return Problem({"x": x, "residual": residual}, truth, dout)


def _eager(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x + residual)


def _inplace(x: Tensor, residual: Tensor) -> Tensor:
    return torch.relu_(x.add_(residual))


def _ours(x: Tensor, residual: Tensor, backend: str) -> Tensor:
    return F.add_act(x, residual, activation="relu", backend=backend)


def setup(case: Case, provider: str) -> Run:
    """The call of one provider, with inputs of its own."""
    made = problem(case)
    x, residual = (place(case, made.inputs[name], provider) for name in ("x", "residual"))
    fn = choose(provider, _eager, None if case.backward else _inplace, _ours)
    call = partial(fn, x, residual)
    size = x.numel() * x.element_size()
    if not case.backward:
        return Run(call, lambda: {"out": call()}, 3 * size)
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    step = gradients(call, leaves, place(case, made.dout, provider))
    # Least traffic: two reads and a write forward, one read and one write backward, one bit an element in between.
    return Run(step, lambda: dict(zip(("out", "dx"), step()[:2], strict=True)), 5 * size + x.numel() // 4)
