"""``relu(x + a + b)`` of three tensors, on the block outputs of a network."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ... import functional as F
from .._case import Case, Problem, Run, choose, generator, gradients, place, randn, remembered, safe_gradient
from .._shapes import Layer, distinct, layers

STOCK = ("eager", "eager_cl", "compile")
DEFAULT = "256x64x64,64x112x112"  # between two hourglasses at 256 x 256, and a large map


def select(selection: str) -> list[Layer]:
    """One layer of each output size."""
    return distinct(layers(selection), lambda layer: (layer.C_out, layer.H_out, layer.W_out))


@remembered
def problem(case: Case) -> Problem:
    g, layer = generator(case), case.layer
    operands = {name: randn(case, g, (case.batch, layer.C_out, layer.H_out, layer.W_out)) for name in ("x", "a", "b")}
    z = sum(t.double() for t in operands.values())
    truth, dout = {"out": torch.relu(z)}, None
    if case.backward:
        dout = safe_gradient(case, g, z, "relu")
        truth["dx"] = dout.double() * (z > 0)
    return Problem(operands, truth, dout)


def _eager(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.relu(x + a + b)


def _inplace(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.relu_(x.add_(a).add_(b))


def setup(case: Case, provider: str) -> Run:
    """The call of one provider, with inputs of its own."""
    made = problem(case)
    operands = [place(case, t, provider) for t in made.inputs.values()]
    call = partial(choose(provider, _eager, None if case.backward else _inplace, F.add_act), *operands)
    size = operands[0].numel() * operands[0].element_size()
    if not case.backward:
        return Run(call, lambda: {"out": call()}, 4 * size)
    step = gradients(call, [t.requires_grad_() for t in operands], place(case, made.dout, provider))
    # Least traffic: three reads and a write forward, one read and one write backward, one bit an element in between.
    return Run(step, lambda: dict(zip(("out", "dx"), step()[:2], strict=True)), 6 * size + operands[0].numel() // 4)
