"""What each process of the DDP and FSDP2 tests does; run by torchrun, results to a file."""

from __future__ import annotations

import sys
from pathlib import Path

import _models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dl4ds_kernels as dk
from dl4ds_kernels.modules import convert_sync_batchnorm


def train(model: nn.Module, rank: int, steps: int = 3) -> list[float]:
    """A few SGD steps on this process's half of the batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        x, y = _models.image(step), torch.arange(4) % 5
        half = slice(2 * rank, 2 * rank + 2)
        loss = F.cross_entropy(model(x[half]), y[half])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main(folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {}
    for kind in ("own", "optimized"):
        model = convert_sync_batchnorm(_models.make(kind))
        results[f"ddp-{kind}"] = {
            "losses": train(nn.parallel.DistributedDataParallel(model), rank),
            "state": model.state_dict(),
        }
        sharded = convert_sync_batchnorm(_models.make(kind))
        fully_shard(sharded)
        losses = train(sharded, rank)
        state = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in sharded.state_dict().items()}
        results[f"fsdp-{kind}"] = {"losses": losses, "state": state}
    # The other order: what is wrapped first is optimized afterwards.
    wrapped = nn.parallel.DistributedDataParallel(convert_sync_batchnorm(_models.make("stock")))
    after = dk.optimize(wrapped, inplace=True)
    results["ddp-after"] = {"losses": train(after, rank), "state": after.module.state_dict()}
    sharded = _models.make("stock")
    fully_shard(sharded)
    after = dk.optimize(sharded, inplace=True)
    results["fsdp-after"] = {"losses": train(after, rank)}
    plain = _models.make("stock")
    fully_shard(plain)
    results["fsdp-stock"] = {"losses": train(plain, rank)}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
