"""The rows of the fault checklist that need a GPU: F19, F26, F48 to F50, F53. Part of ``bench/gpu_check.py``.

F47 (the same bits a hundred times) is the rule of every op in rules.py.

Each check returns None, or one sentence on what was wrong; a check that this machine cannot make returns ``SKIP: why``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from dl4ds_kernels import _extension
from dl4ds_kernels import functional as F

BACKENDS = ("cuda", "triton")


def _vectors(channels: int, device: str = "cuda") -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    mean, var, weight, bias = (torch.rand(channels, generator=g).to(device) for _ in range(4))
    return [mean - 0.5, var + 0.2, weight + 0.5, bias]


def F19_more_than_2_to_31_elements() -> str | None:
    """2^31 + 4096 half-precision elements: the last ones have the values of a small call."""
    free, _ = torch.cuda.mem_get_info()
    if free < 14 << 30:
        return f"SKIP: needs 14 GiB of free GPU memory, {free >> 30} are there"
    part = torch.randn(4096, device="cuda").half()
    x = part.view(1, 64, 64).expand((2**31 + 4096) // 4096, 64, 64)
    for backend in BACKENDS:
        out = F.add_act(x.contiguous(), x.contiguous(), backend=backend)
        if not (torch.equal(out[-1], torch.relu(2 * x[0])) and torch.equal(out[0], out[-1])):
            return f"add_act, {backend}: the last sample differs"
        del out
        torch.cuda.empty_cache()
    return None


def F26_out_of_memory() -> str | None:
    """torch.OutOfMemoryError, nothing kept, and the next call works."""
    x = torch.randn(2**24, device="cuda")
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.01, 2 * before / total))
    try:
        kept = []
        try:
            for _ in range(1000):
                kept.append(F.add_act(x, x, backend="cuda"))
        except torch.OutOfMemoryError:
            pass
        else:
            return "no torch.OutOfMemoryError although the memory was limited"
        kept.clear()
        torch.cuda.empty_cache()
        if torch.cuda.memory_allocated() != before:
            return "memory is still allocated after the failed call"
        return None if torch.equal(F.add_act(x, x, backend="cuda"), torch.relu(2 * x)) else "the next call is wrong"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def F48_second_gpu() -> str | None:
    """Tensors on cuda:1 while cuda:0 is current."""
    if torch.cuda.device_count() < 2:
        return "SKIP: needs two GPUs"
    with torch.cuda.device(0):
        x = torch.randn(2, 8, 40, 40, device="cuda:1")
        for backend in BACKENDS:
            out = F.bn_act(x, *_vectors(8, "cuda:1"), backend=backend)
            expected = F.bn_act(x.cpu(), *_vectors(8, "cpu"))
            if out.device.index != 1 or torch.cuda.current_device() != 0:
                return f"{backend}: result on {out.device}, current device {torch.cuda.current_device()}"
            if not torch.allclose(out.cpu(), expected, rtol=1e-4, atol=1e-5):
                return f"{backend}: wrong values on cuda:1"
    return None


def F49_streams_and_graphs() -> str | None:
    """A side stream behind a long copy, record_stream, and capture in a CUDA graph."""
    x, vectors = torch.randn(16, 64, 56, 56, device="cuda"), _vectors(64)
    for backend in BACKENDS:
        expected = F.bn_act(x, *vectors, residual=x, backend=backend)
        side, late = torch.cuda.Stream(), torch.empty_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late.copy_(x)  # a kernel on another stream would read `late` before this
            out = F.bn_act(late, *vectors, residual=late, backend=backend)
            out.record_stream(side)
        torch.cuda.current_stream().wait_stream(side)
        if not torch.equal(out, expected):
            return f"{backend}: ran before the work queued on its stream"
        graph = torch.cuda.CUDAGraph()
        static = x.clone()
        with torch.cuda.graph(graph):
            captured = F.bn_act(static, *vectors, residual=static, backend=backend)
        static.copy_(x * 2)
        graph.replay()
        if not torch.equal(captured, F.bn_act(x * 2, *vectors, residual=x * 2, backend=backend)):
            return f"{backend}: a replayed graph gives another result"
    return None


_FORK = """
import os, torch
from dl4ds_kernels import functional as F
x = torch.randn(9, device="cuda")
F.add_act(x, x)
child = os.fork()
if child == 0:
    try:
        F.add_act(torch.randn(9, device="cuda"), x)
    except RuntimeError as error:
        os._exit(0 if "forked subprocess" in str(error) else 2)
    os._exit(1)
raise SystemExit(os.waitpid(child, 0)[1] != 0)
"""


def F50_fork_after_cuda() -> str | None:
    """torch's own error in the child."""
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, env=dict(os.environ))
    return None if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-200:]}"


def F53_code_for_this_gpu() -> str | None:
    """The CUDA part has machine code or PTX for the GPUs that are here."""
    for index in range(torch.cuda.device_count()):
        missing = _extension.no_code_for(torch.cuda.get_device_capability(index))
        if missing:
            return missing
    return None


CHECKS: tuple[Callable[[], str | None], ...] = (
    F19_more_than_2_to_31_elements,
    F26_out_of_memory,
    F48_second_gpu,
    F49_streams_and_graphs,
    F50_fork_after_cuda,
    F53_code_for_this_gpu,
)


def run(dry: bool = False) -> dict[str, str]:
    """Every check by name: "right", "SKIP: why", or what was wrong."""
    if dry:
        return {check.__name__: "SKIP: needs a GPU" for check in CHECKS}
    results = {}
    for check in CHECKS:
        try:
            results[check.__name__] = check() or "right"
        except Exception as error:  # one broken check must not hide the others
            results[check.__name__] = f"{type(error).__name__}: {error}"
        torch.cuda.empty_cache()
    return results
