"""Cases of the residual_block tests: their tensors, the block through our API and through stock torch, and all results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as TF
from _assert import Results
from _cases import lay_out
from torch import Tensor

from dl4ds_kernels import functional as F
from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation

SLOPE = 0.1
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Case(NamedTuple):
    """One block on (3, 8, 7, 6); ``stride`` 2 comes with a projection to 12 channels."""

    kind: str = "bottleneck"
    stride: int = 1
    dtype: torch.dtype = FP32
    layout: str = "nchw"
    activation: str = "relu"
    training: bool = True
    memory_efficient: bool = False
    affine: bool = True
    leading: bool = True  # a BatchNorm in front of a pre-activation block
    groups: int = 1
    conv_bias: bool = False
    eps_mode: str = "var"
    wide: bool = False  # fp32 BatchNorm vectors beside half-precision convolutions
    shape: tuple[int, ...] = (3, 8, 7, 6)

    @property
    def id(self) -> str:
        base = Case()
        named = (
            f"{name}={value}".replace("torch.", "") for name, value in self._asdict().items() if value != getattr(base, name)
        )
        return "-".join(named).replace(" ", "") or "base"

    @property
    def preact(self) -> bool:
        return self.kind.startswith("preact")

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(F, self.kind)


KINDS = ("basic_block", "bottleneck", "preact_basic_block", "preact_bottleneck")


def tensors_of(case: Case) -> dict[str, Tensor]:
    """Every tensor of the call by name: x, conv<i>.weight, conv<i>.bias, bn<i>.weight, bn<i>.bias, bn<i>.mean, bn<i>.var."""
    g = torch.Generator().manual_seed(len(case.id) + 7 * case.stride)
    dtype, vectors = case.dtype, FP32 if case.wide and case.dtype in (BF16, FP16) else case.dtype

    def randn(*shape: int, of: torch.dtype = dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=FP64) * scale + shift).to(of)

    cin = case.shape[1]
    out = cin if case.stride == 1 else cin + 4
    width = 4 if "bottleneck" in case.kind else out
    channels = [(cin, width, 1), (width, width, 3), (width, out, 1)]
    if "basic" in case.kind:
        channels = [(cin, width, 3), (width, out, 3)]
    if case.stride == 2:
        channels.append((cin, out, 1))
    tensors = {"x": lay_out(randn(*case.shape), case.layout)}
    for i, (c, o, k) in enumerate(channels):
        groups = case.groups if k == 3 else 1
        tensors[f"conv{i}.weight"] = randn(o, c // groups, k, k, scale=(c * k * k / groups) ** -0.5)
        if case.conv_bias:
            tensors[f"conv{i}.bias"] = randn(o)
        projection = case.stride == 2 and i == len(channels) - 1
        if case.preact and (projection or (i == 0 and not case.leading)):
            continue
        n = c if case.preact else o
        if case.affine:
            tensors[f"bn{i}.weight"] = randn(n, of=vectors, scale=0.3, shift=1.0)
            tensors[f"bn{i}.bias"] = randn(n, of=vectors)
        tensors[f"bn{i}.mean"] = randn(n, of=vectors, scale=0.1)
        tensors[f"bn{i}.var"] = randn(n, of=vectors).abs() + 0.5
    return tensors


def params_of(case: Case, t: dict[str, Tensor]) -> tuple[list[F.ConvParams], F.ConvParams | None]:
    """The same as the public functions take it."""
    count = sum(name.startswith("conv") and name.endswith("weight") for name in t)
    strided = 1 if case.kind == "bottleneck" else 0
    params = []
    for i in range(count):
        projection = case.stride == 2 and i == count - 1
        norm = None
        if f"bn{i}.mean" in t:
            vectors = (t[f"bn{i}.mean"], t[f"bn{i}.var"], t.get(f"bn{i}.weight"), t.get(f"bn{i}.bias"))
            norm = F.BNParams(*vectors, momentum=0.2 + 0.1 * i, eps=1e-3 * (i + 1), eps_mode=case.eps_mode)
        kernel = t[f"conv{i}.weight"].shape[2]
        params.append(
            F.ConvParams(
                t[f"conv{i}.weight"], norm, t.get(f"conv{i}.bias"), case.stride if projection or i == strided else 1,
                kernel // 2, groups=case.groups if kernel == 3 else 1,
            )
        )  # fmt: skip
    return (params[:-1], params[-1]) if case.stride == 2 else (params, None)


def ours(case: Case, backend: str | None) -> Callable[[dict[str, Tensor]], Tensor]:
    extra = {"alpha": 0.5**0.5} if case.preact else {}

    def call(t: dict[str, Tensor]) -> Tensor:
        return case.function(
            t["x"], *params_of(case, t), training=case.training, activation=case.activation, negative_slope=SLOPE,
            memory_efficient=case.memory_efficient, backend=backend, **extra,
        )  # fmt: skip

    return call


def stock(case: Case) -> Callable[[dict[str, Tensor]], Tensor]:
    """What a user writes today."""

    def call(t: dict[str, Tensor]) -> Tensor:
        params, projection = params_of(case, t)

        def conv(z: Tensor, p: F.ConvParams) -> Tensor:
            return TF.conv2d(z, p.weight, p.bias, p.stride, p.padding, 1, p.groups)

        def bn(z: Tensor, p: F.ConvParams) -> Tensor:
            m = p.norm
            if case.eps_mode == "std":  # torch has sqrt(var + eps) only: the second form by its own eps
                wide = z.to(FP64)
                mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
                unbiased = wide.var((0, 2, 3))
                with torch.no_grad():
                    m.running_mean.lerp_(mean.to(z.dtype), m.momentum)
                    m.running_var.lerp_(unbiased.to(z.dtype), m.momentum)
                shape = (1, -1, 1, 1)
                normal = (wide - mean.view(shape)) / (var.sqrt() + m.eps).view(shape)
                return (normal * m.weight.view(shape) + m.bias.view(shape)).to(z.dtype)
            return TF.batch_norm(z, m.running_mean, m.running_var, m.weight, m.bias, case.training, m.momentum, m.eps)

        def act(z: Tensor) -> Tensor:
            return apply_activation(z, ACTIVATION_CODES[case.activation], SLOPE)

        z = source = t["x"]
        if case.preact:
            for i, p in enumerate(params):
                if p.norm is not None:
                    z = act(bn(z, p))
                source = z if i == 0 else source
                z = conv(z, p)
            return 0.5**0.5 * (z + (t["x"] if projection is None else conv(source, projection)))
        for i, p in enumerate(params):
            z = bn(conv(z, p), p)
            z = act(z) if i + 1 < len(params) else z
        return act(z + (t["x"] if projection is None else bn(conv(t["x"], projection), projection)))

    return call


def results(
    case: Case, function: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype | None = None
) -> Results:
    """Output, every gradient and the running statistics after one call."""
    leaves = {n: t.detach().clone() if t.dim() == 1 else t.detach() for n, t in tensors.items()}
    if dtype is not None:
        leaves = {n: t.to(dtype).cpu() for n, t in leaves.items()}
    names = [n for n in leaves if not n.endswith((".mean", ".var"))]
    for name in names:
        leaves[name].requires_grad_()
    out = function(leaves)
    g = torch.Generator().manual_seed(3)
    dout = torch.randn(out.shape, generator=g, dtype=FP64)
    grads = torch.autograd.grad(out, [leaves[n] for n in names], dout.to(out.dtype).to(out.device))
    found: Results = {"out": out.detach(), **{f"d{n}": grad for n, grad in zip(names, grads, strict=True)}}
    return found | {n: t for n, t in leaves.items() if n.endswith((".mean", ".var"))}


def grouped(found: Results) -> Results:
    """All gradients of one kind as one: some are zero but for rounding (a bias in front of a BatchNorm) and have no scale."""
    groups: dict[str, list[Tensor]] = {}
    for name, t in found.items():
        groups.setdefault(name if name in ("out", "dx") else name[0] + name[name.index(".") :], []).append(t.flatten())
    return {name: torch.cat(ts) for name, ts in groups.items()}
