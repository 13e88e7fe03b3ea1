"""Problems of dense_block, ours and stock's answers to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor

from dl4ds_kernels import functional as F
from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
SLOPE, MOMENTUM, EPS = 0.2, 0.3, 1e-3
Results = dict[str, Tensor]


class Case(NamedTuple):
    shape: tuple[int, ...] = (3, 19, 7, 6)  # no multiple of a vector anywhere
    layers: int = 3
    growth: int = 5
    width: int = 12  # of the bottleneck; 0: without
    dtype: torch.dtype = FP32
    layout: str = "nhwc"
    activation: str = "relu"
    affine: bool = True
    bias: bool = False
    running: bool = True
    eps_mode: str = "var"
    wide: bool = False  # BatchNorm vectors in fp32 beside 16-bit features
    memory_efficient: bool = False
    keep_activations: bool = False
    training: bool = True

    @property
    def id(self) -> str:
        base = Case()
        return ",".join(f"{f}={str(v).replace(' ', '')}" for f, v, d in zip(self._fields, self, base, strict=True) if v != d)


def tensors_of(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(shape, generator=g, dtype=FP64)  # noqa: E731
    n, c, h, w = case.shape
    spread = torch.rand(c, generator=g, dtype=FP64).view(1, -1, 1, 1) + 0.5
    format = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
    tensors = {"x": (rand(n, c, h, w) * spread + rand(1, c, 1, 1)).to(case.dtype).contiguous(memory_format=format)}
    vector_dtype = FP32 if case.wide else case.dtype
    for layer in range(case.layers):
        plan = [(c, case.width, 1), (case.width, case.growth, 3)] if case.width else [(c, case.growth, 3)]
        for i, (inputs, outputs, kernel) in enumerate(plan):
            name = f"{layer}.{i}."
            weight = rand(outputs, inputs, kernel, kernel) / (inputs * kernel * kernel) ** 0.5
            tensors[name + "conv"] = weight.to(case.dtype)
            if case.bias:
                tensors[name + "shift"] = rand(outputs).to(case.dtype)
            if case.affine:
                tensors[name + "weight"] = (rand(inputs) * 0.3 + 1).to(vector_dtype)
                tensors[name + "bias"] = (rand(inputs) * 0.3).to(vector_dtype)
            if case.running:
                tensors[name + "mean"] = rand(inputs).to(vector_dtype)
                tensors[name + "var"] = (rand(inputs).abs() + 0.5).to(vector_dtype)
        c += case.growth
    return tensors


def params_of(case: Case, t: dict[str, Tensor]) -> list[list[F.ConvParams]]:
    layers = []
    for layer in range(case.layers):
        own = []
        for i in range(2 if case.width else 1):
            v = lambda what, name=f"{layer}.{i}.": t.get(name + what)  # noqa: E731
            norm = F.BNParams(v("mean"), v("var"), v("weight"), v("bias"), MOMENTUM, EPS, case.eps_mode)
            own.append(F.ConvParams(v("conv"), norm, v("shift"), padding=v("conv").shape[2] // 2))
        layers.append(own)
    return layers


def ours(case: Case, backend: str | None) -> Callable[[dict[str, Tensor]], Tensor]:
    def call(t: dict[str, Tensor]) -> Tensor:
        return F.dense_block(
            t["x"], params_of(case, t), training=case.training, activation=case.activation, negative_slope=SLOPE,
            memory_efficient=case.memory_efficient, keep_activations=case.keep_activations, backend=backend,
        )  # fmt: skip

    return call


def stock(case: Case) -> Callable[[dict[str, Tensor]], Tensor]:
    """What a user writes today."""

    def call(t: dict[str, Tensor]) -> Tensor:
        x = t["x"]
        for layer in params_of(case, t):
            z = x
            for p in layer:
                m = p.norm
                if case.eps_mode == "std":
                    mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), unbiased=False, keepdim=True)
                    with torch.no_grad():
                        m.running_mean.lerp_(mean.flatten(), MOMENTUM)
                        m.running_var.lerp_(z.var((0, 2, 3)), MOMENTUM)
                    z = (z - mean) / (var.sqrt() + EPS) * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1)
                else:
                    z = TF.batch_norm(z, m.running_mean, m.running_var, m.weight, m.bias, case.training, MOMENTUM, EPS)
                z = apply_activation(z, ACTIVATION_CODES[case.activation], SLOPE)
                z = TF.conv2d(z, p.weight, p.bias, padding=p.padding)
            x = torch.cat([x, z], 1)
        return x

    return call


def is_running(name: str) -> bool:
    return name.endswith((".mean", ".var"))


def results(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype | None = None, steps: int = 1
) -> Results:
    """Output, every gradient and the running statistics after ``steps`` calls."""
    leaves = {n: t.detach().clone() for n, t in tensors.items()}
    if dtype is not None:
        leaves = {n: t.to(dtype).cpu() for n, t in leaves.items()}
    names = [n for n in leaves if not is_running(n)]
    for name in names:
        leaves[name].requires_grad_()
    for _ in range(steps):
        out = function(leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=FP64)
    dout = dout.to(out.device, out.dtype).contiguous(memory_format=torch.channels_last)
    grads = torch.autograd.grad(out, [leaves[n] for n in names], dout)
    found: Results = {"out": out.detach(), **{f"d{n}": grad for n, grad in zip(names, grads, strict=True)}}
    return found | {n: t for n, t in leaves.items() if is_running(n)}
