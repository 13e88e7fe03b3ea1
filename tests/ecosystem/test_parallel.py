"""DDP and FSDP2 with two processes (torchrun, gloo, CPU): with SyncBN they train as one process does on the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import _models
import _parallel_worker as worker
from test_sync_bn import torchrun

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def _alone(kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same steps in one process on the whole batch."""
    model = _models.make(kind)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
    for step in range(3):
        loss = F.cross_entropy(model(_models.image(step)), torch.arange(4) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model.state_dict()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    torchrun(Path(worker.__file__), 2, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in ("own", "optimized"):
        losses, state = _alone(kind)
        for wrapper in ("ddp", "fsdp"):
            results = [p[f"{wrapper}-{kind}"] for p in parts]
            means = [sum(pair) / 2 for pair in zip(*(r["losses"] for r in results), strict=True)]
            assert means == pytest.approx(losses, rel=1e-4), wrapper
            for result in results:
                for name, value in state.items():
                    torch.testing.assert_close(
                        result["state"][name], value, rtol=1e-3, atol=1e-4, msg=f"{wrapper} {kind} {name}"
                    )
    losses, state = _alone("stock")
    for rank in range(2):
        for name, value in state.items():
            torch.testing.assert_close(parts[rank]["ddp-after"]["state"][name], value, rtol=1e-3, atol=1e-4, msg=name)
        assert parts[rank]["fsdp-after"]["losses"] == pytest.approx(parts[rank]["fsdp-stock"]["losses"], rel=1e-4)
