"""The roofs of a machine: the highest arithmetic and memory rates that stock torch reaches, for roofline plots and floors."""

from __future__ import annotations

import torch

from ._timing import measure

_ROUNDS = 10


def peak_gflops(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a large matrix product or a large direct convolution, the best of ten of each."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    x = torch.randn(16, 512, 14, 14, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 3, 3, device=device, dtype=dtype)
    work = {"mm": 2 * 2048**3, "conv": 2 * 16 * 14 * 14 * 512 * 512 * 9}
    calls = {"mm": lambda: torch.mm(a, a), "conv": lambda: torch.conv2d(x, weight, padding=1)}
    timings = measure(calls, rounds=_ROUNDS, warmup=1, device=device, budget_s=20.0)
    return max(work[name] / (timing.best * 1e6) for name, timing in timings.items())


def peak_gbytes(device: str = "cpu") -> float:
    """GB/s of a copy between two buffers of 256 MiB, far larger than the caches; read and write counted, best of ten."""
    source, target = torch.empty(2**26, device=device).fill_(1.0), torch.empty(2**26, device=device)
    timings = measure({"copy": lambda: target.copy_(source)}, rounds=_ROUNDS, warmup=1, device=device, budget_s=20.0)
    return 2 * source.numel() * source.element_size() / (timings["copy"].best * 1e6)
