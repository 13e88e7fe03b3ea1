"""BatchNorm, activation and, where the layer has one, residual: running statistics forward, batch statistics in training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from ... import functional as F
from .._case import Case, Problem, Run, choose, generator, gradients, place, randn, remembered, safe_gradient
from .._shapes import Layer, distinct, layers

EPS, MOMENTUM, SLOPE = 1e-5, 0.1, 0.1
VECTORS = ("weight", "bias", "running_mean", "running_var")


STOCK = ("eager", "eager_cl", "compile")
DEFAULT = "resnet50"


def select(selection: str) -> list[Layer]:
    """One layer of each output size, with and without residual."""
    return distinct(layers(selection), lambda layer: (layer.C_out, layer.H_out, layer.W_out, layer.residual, layer.activation))


def make_vectors(case: Case, g: torch.Generator, channels: int) -> dict[str, Tensor]:
    """BatchNorm vectors (C,) as a trained network has them: fp32, or fp64 beside fp64 tensors."""
    dtype = torch.float64 if case.dtype == "fp64" else torch.float32
    uniform = [torch.rand(channels, generator=g, dtype=dtype) for _ in range(2)]
    normal = [torch.randn(channels, generator=g, dtype=dtype) * 0.2 for _ in range(2)]
    return {"weight": uniform[0] + 0.5, "bias": normal[0], "running_mean": normal[1], "running_var": uniform[1] + 0.5}


def activate(z: Tensor, activation: str, inplace: bool = False) -> Tensor:
    """Stock activation by name."""
    return TF.relu(z, inplace) if activation == "relu" else TF.leaky_relu(z, SLOPE, inplace)


def normalise(y: Tensor, made: dict[str, Tensor], training: bool) -> Tensor:
    """fp64 BatchNorm of ``y`` by its formula."""
    weight, bias, mean, var = (made[name].double().view(1, -1, 1, 1) for name in VECTORS)
    if training:
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    return (y - mean) * (var + EPS).rsqrt() * weight + bias


@remembered
def problem(case: Case) -> Problem:
    g, layer = generator(case), case.layer
    shape = (case.batch, layer.C_out, layer.H_out, layer.W_out)
    inputs = make_vectors(case, g, layer.C_out) | {"x": randn(case, g, shape) + 0.5}
    if layer.residual:
        inputs["residual"] = randn(case, g, shape)
    leaves = {name: t.to(torch.float64, copy=True).requires_grad_(case.backward) for name, t in inputs.items()}
    z = normalise(leaves["x"], leaves, case.backward)
    if layer.residual:
        z = z + leaves["residual"]
    out = activate(z, layer.activation)
    truth, dout = {"out": out.detach()}, None
    if case.backward:
        dout = safe_gradient(case, g, z.detach(), layer.activation)
        wanted = [name for name in ("x", "weight", "bias", "residual") if name in inputs]
        grads = torch.autograd.grad(out, [leaves[name] for name in wanted], dout.double())
        truth |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return Problem(inputs, truth, dout)


def setup(case: Case, provider: str) -> Run:
    """The call of one provider, with inputs and running statistics of its own."""
    made, layer, training = problem(case), case.layer, case.backward
    t: dict[str, Any] = {name: place(case, value, provider) for name, value in made.inputs.items()}
    residual, activation = t.get("residual"), layer.activation

    def stock(inplace: bool) -> Tensor:
        z = TF.batch_norm(t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], training, MOMENTUM, EPS)
        if residual is not None:
            z = z.add_(residual) if inplace else z + residual
        return activate(z, activation, inplace)

    def ours(backend: str) -> Tensor:
        return F.bn_act(
            t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"], residual=residual, training=training,
            momentum=MOMENTUM, eps=EPS, activation=activation, negative_slope=SLOPE, backend=backend,
        )  # fmt: skip

    call = choose(provider, lambda: stock(False), lambda: stock(True), ours)
    size = t["x"].numel() * t["x"].element_size()
    skip = int(residual is not None)
    if not training:
        return Run(call, lambda: {"out": call()}, (2 + skip) * size)
    wanted = [name for name in ("x", "weight", "bias", "residual") if name in t]
    step = gradients(call, [t[name].requires_grad_() for name in wanted], place(case, made.dout, provider))
    names = ["out", *(f"d{name}" for name in wanted)]
    # Least traffic: x twice and out forward; x and dout twice and dx backward; the residual and its gradient once each.
    return Run(step, lambda: dict(zip(names, step(), strict=True)), (8 + 2 * skip) * size)
