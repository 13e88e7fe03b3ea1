"""What each process of the SyncBN test does: its part of a batch forward and backward, results to a file. Run by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dl4ds_kernels.modules import BasicBlock, BNAct2d, ConvBNAct2d, SyncBNAct, convert_sync_batchnorm


def net(seed: int = 0) -> nn.Module:
    """Fused layers of several kinds, fp64 so that 1e-6 leaves no doubt; the same weights in every process."""
    torch.manual_seed(seed)
    return nn.Sequential(
        ConvBNAct2d(3, 8, 3, padding=1),
        BasicBlock(8, 8),
        BNAct2d(8, activation="silu", momentum=None),
        nn.Conv2d(8, 4, 1),
        nn.BatchNorm2d(4, affine=False),
    ).double()


def batch(rank: int, world: int) -> Tensor:
    """Uneven parts: 1, 2, 3, … pictures; with four processes the third has none."""
    count = 0 if (world, rank) == (4, 2) else rank + 1
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) * 2 + rank


def loss_weights(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 4 * 36, dtype=x.dtype).view(1, 4, 6, 6)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = convert_sync_batchnorm(net())
    assert sum(type(m) is SyncBNAct for m in model.modules()) == 5
    x = batch(rank, world).requires_grad_()
    out = model(x)
    (out * loss_weights(out)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    results = {"out": out.detach(), "dx": x.grad, "grads": grads, "buffers": dict(model.named_buffers())}
    model = convert_sync_batchnorm(net().float())
    part = batch(rank, world).float()
    first, second = model(part), convert_sync_batchnorm(net().float())(part)
    assert torch.equal(first, second)  # same bits on every run
    try:
        torch.autograd.grad(model(part.requires_grad_()).square().sum(), part, create_graph=True)[0].sum().backward()
        results["double"] = "no error"
    except RuntimeError as error:
        results["double"] = str(error)
    half = SyncBNAct(3).train()(part.detach().bfloat16())
    results["bf16"] = half.float().detach()
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
