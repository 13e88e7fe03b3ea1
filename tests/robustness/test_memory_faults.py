"""Memory that runs out and sizes beyond 32 bits: F19, F26, and the soak: nothing grows after the warm-up.

Tensors of more than 2^31 elements need 2 GiB and more; here they are bytes-cheap views (expanded, sparse pages that stay
untouched) or 16-bit, and the long ones are part of `make test-full` only. The CUDA kernels' index arithmetic runs on the
simulator, which takes any sizes without having the memory.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _stock import bn_vectors
from torch import Tensor

import dl4ds_kernels as dk
from dl4ds_kernels import _extension
from dl4ds_kernels import functional as F

ROOT = Path(__file__).parent.parent.parent
LARGE = 2**31 + 4096  # elements


def available_gib() -> float:
    """Memory that can be had without swapping, 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
    except (OSError, StopIteration):
        return 0.0


def needs(gib: float) -> None:
    if available_gib() < gib:
        pytest.skip(f"needs {gib:g} GiB of free memory, {available_gib():.1f} are there")


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def far_apart() -> tuple[Tensor, Tensor]:
    """A small tensor whose two samples lie more than 2^31 elements apart (untouched pages cost nothing), and its dense copy."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # the pages between stay untouched
    try:
        memory = torch.empty(LARGE + 64 * 32 * 32, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"the system does not overcommit {2 * LARGE >> 30} GiB of address space: {error}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    values = torch.randn(2, 16, 32, 32).half()
    return memory.as_strided((2, 16, 32, 32), (LARGE, 1024, 32, 1)).copy_(values), values


@pytest.mark.parametrize("op", ["add_act", "bn_act", "max_pool_indices"])
def test_F19_one_stride_beyond_int32(op: str, kernels: None) -> None:
    """Offsets are 64-bit."""
    x, values = far_apart()
    call: dict[str, Callable[[Tensor], Tensor]] = {
        "add_act": lambda t: F.add_act(t, t, backend="cpu"),
        "bn_act": lambda t: F.bn_act(t, *(v.clone() for v in bn_vectors(16)), training=True, backend="cpu"),
        "max_pool_indices": lambda t: F.max_pool_indices(t, backend="cpu")[0],
    }
    assert torch.equal(call[op](x), call[op](values))


@pytest.mark.full
@pytest.mark.parametrize("op", ["add_act", "bn_act-eval", "bn_act-train", "upsample_add"])
def test_F19_more_than_2_to_31_elements(op: str, kernels: None) -> None:
    """All elements are there: the first, the last and those around 2^31 have the values of a small call."""
    needs(13)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        rows = LARGE // 4096
        part = torch.randn(1, 4096, generator=torch.Generator().manual_seed(1)).half()
        x = part.view(1, 64, 64).expand(rows, 64, 64)  # (N, C, W) with a repeated sample: 8 KiB of memory
        if op == "add_act":
            out = F.add_act(x.contiguous(), x, backend="cpu")
            expected = torch.relu(part + part).view(64, 64)
        elif op == "upsample_add":
            pairs = rows // 2 + 1
            low, skip = part[0, :64].view(1, 1, 1, 64).expand(pairs, 32, 1, 64), part[:, :4096].view(1, 32, 1, 128)
            skip = skip.expand(pairs, 32, 2, 128)
            out = F.upsample_add(low, skip, backend="cpu")
            expected = F.upsample_add(low[:1].contiguous(), skip[:1].contiguous(), backend="cpu")[0]
        else:
            training = op == "bn_act-train"
            mean, var = torch.zeros(64), torch.ones(64)
            out = F.bn_act(x, mean, var, training=training, activation="none", backend="cpu")
            if training:  # statistics of a repeated sample are the sample's
                assert torch.allclose(mean, 0.1 * part.view(64, 64).float().mean(1), atol=1e-4)
                expected = F.bn_act(x[:2].contiguous(), None, None, training=True, activation="none", backend="cpu")[0]
            else:
                expected = F.bn_act(x[:1].contiguous(), mean, var, activation="none", backend="cpu")[0]
        assert out.numel() > 2**31
        tolerance = {"rtol": 2e-3, "atol": 2e-3} if op == "bn_act-train" else {"rtol": 0, "atol": 0}
        for n in (0, 1, out.shape[0] // 2, 2**31 // out[0].numel() - 1, 2**31 // out[0].numel(), out.shape[0] - 1):
            torch.testing.assert_close(out[n], expected, **tolerance)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_F19_one_stride_beyond_int32_on_the_simulator() -> None:
    """The CUDA kernel of add_act with the same sparse tensor."""
    from _cuda_host import host
    from ptxsim.fixture import require_nvcc, require_simulator

    require_simulator()
    require_nvcc()
    x, values = far_apart()
    out, _ = host()("add_act", x, x, 1.0, 1, 0.1, False)
    assert torch.equal(out, torch.relu(values + values))


@pytest.mark.parametrize("name", ["add_act", "bn_act"])
def test_F19_cuda_index_arithmetic(name: str) -> None:
    """The CUDA kernels' Params carry 64-bit sizes and strides; no kernel narrows an element index to int."""
    import re

    for path in sorted((ROOT / f"csrc/ops/{name}").glob(f"{name}*.h")):
        for line in path.read_text().splitlines():
            assert not re.search(r"\bint(32_t)?\s+\w*(stride|numel|size|count|elements)\w*\s*[;=,]", line), (
                f"{path.name}: {line}"
            )
    for path in sorted((ROOT / f"csrc/ops/{name}").glob("*.cuh")):
        for line in path.read_text().splitlines():
            narrow = re.search(r"\bint\s+\w+\s*=[^;]*blockIdx\.x\s*\*", line)
            assert not narrow or "int64_t" in line, f"{path.name}: {line.strip()}"


def test_F19_nms_of_more_boxes_than_a_mask_could_hold() -> None:
    """N^2 / 64 mask words pass 2^31 at 371,000 boxes; test_F39 runs 400,000: the CPU kernel builds no such mask."""
    from dl4ds_kernels import functional

    boxes = torch.zeros(1, 4).expand(400_000, 4)  # all the same: the first suppresses none of the others, areas are 0
    scores = torch.zeros(1).expand(400_000)
    keep = functional.nms(boxes, scores, 0.5, backend="cpu")
    assert torch.equal(keep, torch.arange(400_000))


OUT_OF_MEMORY = """
import resource, torch
import dl4ds_kernels as dk
from dl4ds_kernels import functional as F
torch.set_num_threads(2)
x = torch.randn(2, 64, 256, 512)  # 64 MiB
mean, var = torch.zeros(64), torch.ones(64)
weight = torch.randn(64, 64, 3, 3)
for _ in range(2):
    F.add_act(x, x, backend="cpu")
dk._extension.host().pool_trim()
used = dk._extension.host().pool_stats()["used_bytes"]
now = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + (8 << 20), resource.RLIM_INFINITY))
calls = {
    "add_act": lambda t: F.add_act(t, t, backend="cpu"),
    "bn_act": lambda t: F.bn_act(t, mean.clone(), var.clone(), training=True, backend="cpu"),
    "conv_bn_act": lambda t: F.conv_bn_act(t, weight, running_mean=mean, running_var=var, padding=1, backend="cpu"),
    "max_pool_indices": lambda t: F.max_pool_indices(t, backend="cpu"),
    "upsample_add": lambda t: F.upsample_add(t[:, :, :128, :256], t, backend="cpu"),
}
for name, call in calls.items():
    for _ in range(2):
        try:
            with torch.no_grad():
                call(x)
        except (RuntimeError, MemoryError) as error:
            print(name, "->", type(error).__name__, str(error).splitlines()[0])
        else:
            print(name, "-> no error")
assert dk._extension.host().pool_stats()["used_bytes"] == used, "a failed call keeps memory"
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for name, call in calls.items():
    with torch.no_grad():
        call(x)
stats = dk._extension.host().pool_stats()
assert stats["used_bytes"] == used, stats
print("afterwards: fine")
"""


def test_F26_out_of_memory_and_the_call_after_it(kernels: None) -> None:
    """A request that the system refuses is a memory error, keeps nothing, and the next call works."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits the address space with Linux's RLIMIT_AS")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer reserves its own address space")
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.endswith("afterwards: fine\n")
    for name in ("add_act", "bn_act", "conv_bn_act", "max_pool_indices", "upsample_add"):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ->")]
        assert len(lines) == 2 and all("no error" not in line for line in lines), done.stdout
        assert all("-> RuntimeError" in line and "allocate memory" in line for line in lines), done.stdout


def test_F26_backend_of_a_gpu_that_runs_out() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU; covered by bench/gpu_check.py F26")
    x = torch.randn(2**26, device="cuda")
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            [F.add_act(x, x, backend="cuda") for _ in range(400)]
        torch.cuda.empty_cache()
        assert torch.equal(F.add_act(x[:100], x[:100]), torch.relu(2 * x[:100]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def soak(rounds: int) -> list[int]:
    """Resident bytes after each tenth of ``rounds`` mixed calls of many sizes, with and without gradients."""
    g = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()).eval()
    weight = torch.randn(16, 16, 3, 3)
    sizes = []
    for i in range(rounds):
        n, h, w = (int(torch.randint(1, high, (), generator=g)) for high in (5, 48, 48))
        x = torch.randn(n, 16, 2 * h, 2 * w, requires_grad=i % 2 == 0)
        mean, var = torch.zeros(16), torch.ones(16)
        out = F.add_act(F.bn_act(x, mean, var, training=True, backend="cpu"), x, backend="cpu")
        if x.requires_grad:
            out.sum().backward()
        with torch.no_grad():
            F.conv_bn_act(x, weight, running_mean=mean, running_var=var, padding=1, backend="cpu")
            F.max_pool_indices(x, backend="cpu")
            corners = torch.rand(100 + i % 300, 2, generator=g) * 50
            F.nms(torch.cat([corners, corners + 9], 1), torch.rand(len(corners), generator=g), 0.5, backend="cpu")
            if i % 20 == 0:
                model = dk.optimize(net)
                model(torch.randn(1, 3, 32, 32))
                del model
            with contextlib.suppress(RuntimeError):  # errors must not keep tensors alive
                F.add_act(x, x[:, :7, :1, :1], backend="cpu")
        del x, out
        if i % max(1, rounds // 10) == 0:
            gc.collect()
            sizes.append(rss())
    return sizes


@pytest.mark.parametrize(
    "rounds",
    [pytest.param(150, id="short"), pytest.param(20_000, id="long", marks=pytest.mark.full)],
)
def test_soak_memory_is_flat(rounds: int, kernels: None) -> None:
    """After the warm-up the resident size stays: a leak of one small tensor a round would show many times over."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads the resident size from /proc")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer keeps freed memory in quarantine")
    soak(60)
    sizes = soak(rounds)
    half = len(sizes) // 2
    first, last = max(sizes[:half]), min(sizes[half:])
    assert last - first < 16 << 20, f"resident MiB: {[size >> 20 for size in sizes]}"
    stats = _extension.host().pool_stats()
    assert stats["used_bytes"] + stats["idle_bytes"] <= stats["limit_bytes"] + stats["peak_used_bytes"]
