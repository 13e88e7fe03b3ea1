"""AlexNet's local response normalisation on layer outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import Tensor

from ... import functional as F
from .._case import Case, Problem, Run, choose, generator, gradients, place, randn, remembered
from .._shapes import Layer, distinct, layers

SETTINGS = (5, 5e-4, 0.75, 2.0)  # size, alpha, beta, k of the paper
STOCK = ("eager", "eager_cl", "compile")
DEFAULT = "96x55x55,256x27x27"  # AlexNet's two


def select(selection: str) -> list[Layer]:
    """One layer of each output size."""
    return distinct(layers(selection), lambda layer: (layer.C_out, layer.H_out, layer.W_out))


@remembered
def problem(case: Case) -> Problem:
    g, layer = generator(case), case.layer
    shape = (case.batch, layer.C_out, layer.H_out, layer.W_out)
    x = randn(case, g, shape) * 10  # activations large enough to matter beside k
    leaf = x.double().requires_grad_(case.backward)
    size, alpha, beta, k = SETTINGS
    padded = TF.pad(leaf.square(), (0, 0, 0, 0, size // 2, (size - 1) // 2))
    out = leaf / (k + alpha / size * padded.unfold(1, size, 1).sum(-1)) ** beta
    truth, dout = {"out": out.detach()}, None
    if case.backward:
        dout = randn(case, g, shape)
        truth["dx"] = torch.autograd.grad(out, leaf, dout.double())[0]
    return Problem({"x": x}, truth, dout)


def _eager(x: Tensor) -> Tensor:
    return TF.local_response_norm(x, *SETTINGS)


def _ours(x: Tensor, backend: str) -> Tensor:
    return F.local_response_norm(x, *SETTINGS, backend=backend)


def setup(case: Case, provider: str) -> Run:
    """The call of one provider, with an input of its own."""
    made = problem(case)
    x = place(case, made.inputs["x"], provider)
    fn = choose(provider, _eager, None, _ours)
    size = x.numel() * x.element_size()
    if not case.backward:
        return Run(lambda: fn(x), lambda: {"out": fn(x)}, 2 * size)
    step = gradients(lambda: fn(x), [x.requires_grad_()], place(case, made.dout, provider))
    return Run(step, lambda: dict(zip(("out", "dx"), step(), strict=True)), 5 * size)
