"""``SyncBNAct``: BatchNorm over the batches of all processes, with residual and activation in the same pass.

Each process contributes the number, mean and centred sum of squares of its values, 2 C + 1 numbers; all gather them and merge
them in the order of ranks (Chan et al.), in fp64, so that every process has the same bits in every run. Backward gathers 2 C
numbers. What is as large as the activations is done by :func:`~dl4ds_kernels.functional.bn_act`, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import bn_act
from .bn_act import BNAct2d, batch_statistics_choice


def merge_moments(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chan's merge of moments, first row first.

    Args: parts (R, 2 C + 1) float64: means (C), centred sums of squares (C) and the number of values of each of R parts; a part
    of no values has zeros.
    Returns: mean (C,), biased variance (C,) and number () of all values together.
    """
    channels = parts.shape[1] // 2
    total, mean, squares = parts[0, -1], parts[0, :channels], parts[0, channels:-1]
    for part in parts[1:]:
        count = part[-1]
        whole = total + count
        share = count / whole.clamp(min=1)
        delta = part[:channels] - mean
        mean = mean + delta * share
        squares = squares + part[channels:-1] + delta.square() * (total * share)
        total = whole
    return mean, squares / total.clamp(min=1), total


def _gather(vector: Tensor, group: Any) -> Tensor:
    """(world size, n): the vectors of all processes in the order of ranks."""
    if torch.compiler.is_compiling():
        from torch.distributed import _functional_collectives as traceable

        gathered = traceable.all_gather_tensor(vector.unsqueeze(0), 0, dist.group.WORLD if group is None else group)
        return traceable.wait_tensor(gathered)
    found = [torch.empty_like(vector) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, vector.contiguous(), group=group)
    return torch.stack(found)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


class _SyncStatistics(torch.autograd.Function):
    """x (N, C, …) -> mean (C,), biased variance (C,), number of values, over all processes; fp32 (fp64 for fp64 x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        channels = x.shape[1]
        if x.numel():
            var, mean = torch.var_mean(wide, [d for d in range(x.dim()) if d != 1], correction=0)
        else:
            var = mean = wide.new_zeros(channels)
        count = x.numel() // channels if channels else 0
        number = torch.full((1,), float(count), dtype=torch.float64, device=x.device)
        parts = _gather(torch.cat((mean.double(), var.double() * count, number)), group)
        mean, var, total = merge_moments(parts)
        ctx.group = group
        ctx.save_for_backward(x, mean, total)
        ctx.mark_non_differentiable(total)
        return mean.to(wide.dtype), var.to(wide.dtype), total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, mean, total = ctx.saved_tensors
        channels = x.shape[1]
        summed = _gather(torch.cat((dmean.double(), dvar.double())), ctx.group)
        both = summed[0]
        for row in summed[1:]:
            both = both + row
        slope = 2 * both[channels:] / total
        offset = both[:channels] / total - slope * mean
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        dx = torch.addcmul(_per_channel(offset.to(dtype), x), x.to(dtype), _per_channel(slope.to(dtype), x))
        return dx.to(x.dtype), None


def sync_bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    eps_mode: str = "var",
    activation: str = "relu",
    negative_slope: float = 0.1,
    group: Any = None,
) -> Tensor:
    """:func:`~dl4ds_kernels.functional.bn_act` in training, with statistics over the batches of all processes of ``group``.

    Every process of the group must call it, forward and backward, with the same C; N and the rest may differ, N = 0 included.

    Args: as ``bn_act``; group: a process group, default the world's.
    Returns: (N, C, …). Differentiable once in x, weight, bias, residual; gradients of weight and bias are those of this
    process's part, as with ``nn.SyncBatchNorm`` (DistributedDataParallel averages them).
    """
    mean, var, total = _SyncStatistics.apply(x, group)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = var * (total / (total - 1).clamp(min=1)).to(var.dtype)
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    rstd = (var.sqrt() + eps).reciprocal() if eps_mode == "std" else (var + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    # (x - m) * scale + shift, m a constant: the value is centred before it is scaled, and the mean's gradient takes the shift.
    fixed = mean.detach()
    shift = (fixed - mean) * scale
    shift = shift if bias is None else shift + bias.to(rstd.dtype)
    return bn_act(
        x, fixed, torch.ones_like(fixed), scale, shift, residual=residual, training=False, eps=0.0, activation=activation,
        negative_slope=negative_slope,
    )  # fmt: skip


class SyncBNAct(BNAct2d):
    """``BNAct2d`` (same arguments, attributes and state_dict) whose batch statistics are those of all processes.

    In eval, without an initialised process group or alone in it, it is ``BNAct2d``. Statistics are merged in the order of
    ranks; batches may differ in size.

    Args: as :class:`BNAct2d`; process_group: default the world's.
    Shape: x (N, C, …) with 2 to 5 dimensions, residual like x -> the same. Raises: ValueError for another rank.
    """

    def __init__(self, num_features: int, *args: Any, process_group: Any = None, **options: Any) -> None:
        super().__init__(num_features, *args, **options)
        self.process_group = process_group

    def _check_input_dim(self, x: Tensor) -> None:
        if not 2 <= x.dim() <= 5:
            raise ValueError(f"SyncBNAct: x: expected 2 to 5 dimensions (N, C, …), got {x.dim()}")

    def syncs(self) -> bool:
        """Whether this call talks to other processes."""
        uses_batch = self.training or self._buffers["running_mean"] is None
        return uses_batch and dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.run(x, residual, self.activation, self.negative_slope)

    def run(self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float) -> Tensor:
        """The forward with another activation: blocks pass the one that stands behind this layer."""
        self._check_input_dim(x)
        training, momentum, running_mean, running_var = batch_statistics_choice(self)
        options = {"momentum": momentum, "eps": self.eps, "eps_mode": self.eps_mode, "activation": activation}
        options |= {"negative_slope": negative_slope, "residual": residual}
        if self.syncs():
            return sync_bn_act(x, running_mean, running_var, self.weight, self.bias, group=self.process_group, **options)
        return bn_act(x, running_mean, running_var, self.weight, self.bias, training=training, **options)


_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BNAct2d)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """``module`` with every BatchNorm and ``BNAct2d`` replaced by :class:`SyncBNAct`, sharing parameters and buffers.

    Fused blocks (``ConvBNAct2d``, the residual blocks, models of this package, optimized models) keep residual and activation
    in BatchNorm's pass. Exact types only: subclasses stay as they are. Convert after ``dk.optimize``, before
    DistributedDataParallel.

    Returns: ``module`` itself, or its replacement where it is a BatchNorm.
    """
    if type(module) in _CONVERTED:
        return _converted(module, process_group)
    for name, child in module.named_children():
        new = convert_sync_batchnorm(child, process_group)
        if new is not child:
            setattr(module, name, new)
    return module


def _converted(bn: nn.Module, process_group: Any) -> SyncBNAct:
    ours = type(bn) is BNAct2d
    new = SyncBNAct(
        bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, process_group=process_group, device="meta",
        activation=bn.activation if ours else "none", negative_slope=bn.negative_slope if ours else 0.0,
        eps_mode=bn.eps_mode if ours else "var",
    )  # fmt: skip
    new._parameters, new._buffers, new.training = bn._parameters, bn._buffers, bn.training
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(new, hooks, getattr(bn, hooks))
    return new
