"""SyncBatchNorm of several processes (torchrun, gloo, CPU) against one process on the joined batch.

That is what ``nn.SyncBatchNorm`` computes too; torch's own refuses CPU tensors in training, so that it cannot stand beside.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dl4ds_kernels.modules import BNAct2d, ConvBNAct2d, SyncBNAct, convert_sync_batchnorm
from dl4ds_kernels.modules.sync_bn import merge_moments, sync_bn_act

sys.path.insert(0, str(Path(__file__).parent))
import _sync_worker as worker

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def torchrun(script: Path, processes: int, *arguments: object) -> None:
    """Run a script in several processes; fails with their output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(world: int, tmp_path: Path) -> None:
    """Outputs, input gradients, summed parameter gradients and running statistics, uneven batches (one of them empty)."""
    torchrun(Path(worker.__file__), world, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    model = worker.net()
    x = torch.cat([worker.batch(rank, world) for rank in range(world)]).requires_grad_()
    out = model(x)
    (out * worker.loss_weights(out)).sum().backward()
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(torch.cat([p["out"] for p in parts]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([p["dx"] for p in parts]), x.grad, **close)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sum(p["grads"][name] for p in parts), parameter.grad, **close)
    for name, buffer in model.named_buffers():
        for part in parts:
            torch.testing.assert_close(part["buffers"][name], buffer, **close)
    assert all("once_differentiable" in p["double"] or "differentiated twice" in p["double"] for p in parts), parts[0]["double"]
    joined = torch.cat([worker.batch(rank, world) for rank in range(world)]).bfloat16()
    want = torch.relu(nn.functional.batch_norm(joined.float(), None, None, training=True))
    torch.testing.assert_close(torch.cat([p["bf16"] for p in parts]), want, rtol=1e-2, atol=1e-2)


def test_merge_of_moments() -> None:
    data = [torch.randn(n, 3, dtype=torch.float64) * 3 + 1e4 for n in (1, 5, 0, 64)]
    rows = []
    for d in data:
        mean = d.mean(0) if len(d) else torch.zeros(3, dtype=torch.float64)
        rows.append(torch.cat((mean, (d - mean).square().sum(0), torch.tensor([float(len(d))], dtype=torch.float64))))
    mean, var, total = merge_moments(torch.stack(rows))
    joined = torch.cat(data)
    torch.testing.assert_close(mean, joined.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(var, joined.var(0, correction=0), rtol=1e-10, atol=0)
    assert float(total) == 70


def test_alone_it_is_bn_act() -> None:
    x = torch.randn(4, 6, 5, 5)
    ours, plain = SyncBNAct(6, activation="leaky_relu"), BNAct2d(6, activation="leaky_relu")
    assert torch.equal(ours(x), plain(x)) and torch.equal(ours.running_var, plain.running_var)
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    assert not ours.syncs() and list(ours.state_dict()) == list(plain.state_dict())
    with pytest.raises(ValueError, match="SyncBNAct: x: expected 2 to 5 dimensions"):
        ours(torch.randn(6))


def test_one_process_group(tmp_path: Path) -> None:
    """The formula itself, in a group of one: gradcheck and the values of bn_act, with every option."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, r = (torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        w, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

        def call(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            return sync_bn_act(x, None, None, w, b, residual=r, activation="silu", eps_mode="std")

        assert torch.autograd.gradcheck(call, (x, w, b, r))
        layer = BNAct2d(4, activation="silu", eps_mode="std").double()
        layer.weight.data, layer.bias.data = w.detach(), b.detach()
        torch.testing.assert_close(call(x, w, b, r), layer(x, r), rtol=1e-10, atol=1e-10)
        # A large mean over a small spread: the value is centred before it is scaled.
        far = torch.randn(64, 4, 4, 4) * 1e-1 + 1e3
        want = nn.functional.batch_norm(far.double(), None, None, training=True)
        got = sync_bn_act(far, None, None, activation="none")
        stock = nn.functional.batch_norm(far, None, None, training=True)
        assert (got - want).abs().max() <= 2 * (stock - want).abs().max() + 1e-6
    finally:
        dist.destroy_process_group()


def test_conversion_shares_and_keeps() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    model = nn.ModuleDict({"a": ConvBNAct2d(2, 4, 1), "b": nn.BatchNorm1d(3, momentum=None), "c": Mine(2)}).eval()
    weight, keys = model["b"].weight, list(model.state_dict())
    converted = convert_sync_batchnorm(model)
    assert converted is model and list(model.state_dict()) == keys
    assert type(model["a"].bn) is SyncBNAct and type(model["b"]) is SyncBNAct and type(model["c"]) is Mine
    assert model["b"].weight is weight and model["b"].momentum is None and not model["b"].training
    alone = convert_sync_batchnorm(BNAct2d(2, activation="relu6", eps_mode="std"))
    assert alone.activation == "relu6" and alone.eps_mode == "std"
