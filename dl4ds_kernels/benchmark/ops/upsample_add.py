"""``skip + nearest x 2 (low)``: low has the shape of a layer's output, skip twice its height and width."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as TF
from torch import Tensor

from ... import functional as F
from .._case import Case, Problem, Run, choose, generator, gradients, place, randn, remembered
from .._shapes import Layer, distinct, layers

STOCK = ("eager", "eager_cl", "compile")
DEFAULT = "256x8x8,256x16x16,256x32x32,128x64x64"  # the levels of an hourglass at 256 x 256


def select(selection: str) -> list[Layer]:
    """One layer of each output size."""
    return distinct(layers(selection), lambda layer: (layer.C_out, layer.H_out, layer.W_out))


@remembered
def problem(case: Case) -> Problem:
    g, layer = generator(case), case.layer
    n, c, h, w = case.batch, layer.C_out, layer.H_out, layer.W_out
    low, skip = randn(case, g, (n, c, h, w)), randn(case, g, (n, c, 2 * h, 2 * w))
    truth = {"out": skip.double() + low.double().repeat_interleave(2, 2).repeat_interleave(2, 3)}
    dout = None
    if case.backward:
        dout = randn(case, g, (n, c, 2 * h, 2 * w))
        truth |= {"dlow": dout.double().view(n, c, h, 2, w, 2).sum((3, 5)), "dskip": dout.double()}
    return Problem({"low": low, "skip": skip}, truth, dout)


def _eager(low: Tensor, skip: Tensor) -> Tensor:
    return skip + TF.interpolate(low, scale_factor=2.0, mode="nearest")


def _inplace(low: Tensor, skip: Tensor) -> Tensor:
    return skip.add_(TF.interpolate(low, scale_factor=2.0, mode="nearest"))


def setup(case: Case, provider: str) -> Run:
    """The call of one provider, with inputs of its own."""
    made = problem(case)
    low, skip = (place(case, made.inputs[name], provider) for name in ("low", "skip"))
    fn = choose(provider, _eager, None if case.backward else _inplace, F.upsample_add)
    call = partial(fn, low, skip)
    size = skip.numel() * skip.element_size()
    if not case.backward:
        return Run(call, lambda: {"out": call()}, 9 * size // 4)
    step = gradients(call, [low.requires_grad_(), skip.requires_grad_()], place(case, made.dout, provider))
    # Least traffic: low, skip and out forward; dout is the gradient of skip, dlow a quarter of it.
    return Run(step, lambda: dict(zip(("out", "dlow", "dskip"), step(), strict=True)), 14 * size // 4)
