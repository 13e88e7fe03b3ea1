"""What the CUDA kernels of NMS cost: memory, launches, waiting, work left out, barriers, registers, machine code."""

from __future__ import annotations

import re
import subprocess

import _cuda_launch as cuda
import numpy as np
import pytest
import torch
from _boxes import make_boxes
from _nms_cuda import launch, sizes
from ptxsim import compile_cuda, toolchain
from ptxsim.fixture import require_nvcc, require_simulator

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SOURCE = cuda.CSRC / "ops/nms/nms_fwd.cu"
MB = 2**20


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_simulator()
    require_nvcc()


def test_memory_is_linear_and_small() -> None:
    """At 100,000 boxes at most 64 MB (torchvision: 1.25 GB); four times the boxes, four times the memory."""
    for dtype in DTYPES:
        for classes in (False, True):
            bytes_, _ = sizes(1, 100_000, classes, dtype)
            assert bytes_ <= 64e6, (dtype, classes, bytes_)
            assert sizes(1, 400_000, classes, dtype)[0] < 4.2 * bytes_
    assert sizes(1, 100_000, False)[0] < 9 * MB
    assert sizes(64, 1024, True)[0] == 0, "images of one block need none"


def test_launches() -> None:
    """Counted, and known from the sizes alone: a graph may be captured and replayed."""
    assert sizes(64, 1000, True)[1] == sizes(1, 1, False)[1] == 1
    assert sizes(1, 2000, False)[1] == 1 + 4 * 3 + 1 + 1 + 2 + 1
    assert sizes(1, 5000, False)[1] == 1 + 4 * 3 + 1 + 1 + 3 * 3 - 1 + 1
    assert sizes(8, 5000, True)[1] == 1 + 4 * 3 + 1 + 2 * 3 + 1 + 1 + 1 + 3 * 3 - 1 + 1
    assert sizes(1, 100_000, False)[1] == 162 and sizes(1, 100_000, True)[1] == 170
    assert sizes(1, 5000, False, torch.float16)[1] == sizes(1, 5000, False)[1] - 6


RUNTIME_THAT_WAITS = re.compile(r"cuda(\w*Synchronize|Memcpy\w*|Malloc\w*|Free\w*|EventQuery|StreamQuery)")


def test_the_launcher_never_waits() -> None:
    """Its object calls nothing of the CUDA runtime that waits, allocates or copies."""
    listing = subprocess.run(["nm", "-u", str(cuda.objects()[SOURCE])], capture_output=True, text=True, check=True).stdout
    assert "cudaLaunchKernel" in listing or "cudaLaunch" in listing
    assert not RUNTIME_THAT_WAITS.search(listing), RUNTIME_THAT_WAITS.findall(listing)


def test_early_exit() -> None:
    """Once max_output boxes are kept, later rounds do nothing."""
    boxes = make_boxes(np.random.default_rng(3), 4500, "sparse")[None]
    scores = torch.linspace(1, 0, 4500)[None]

    def instructions(max_output: int) -> dict[str, list[int]]:
        counts: dict[str, list[int]] = {}
        for report in launch(boxes, scores, None, 0.5, None, max_output)[2]:
            name = re.search(r"nms_\w+?_kernel", report.kernel).group()
            counts.setdefault(name, []).append(report.counters["thread_instructions"])
        return counts

    few, all_ = instructions(100), instructions(4500)
    assert few["nms_mask_kernel"][1] < all_["nms_mask_kernel"][1] / 4
    assert few["nms_decide_kernel"][2] < all_["nms_decide_kernel"][2] / 4
    assert few["nms_push_kernel"][0] < all_["nms_push_kernel"][0] / 4


def test_two_barriers_per_64_boxes() -> None:
    """In the block that solves an image, beyond those of the sort; one in the block that decides a chunk."""
    boxes = make_boxes(np.random.default_rng(3), 1024, "sparse")[None]
    scores = torch.linspace(1, 0, 1024)[None]

    def barriers(n: int) -> int:
        return launch(boxes[:, :n], scores[:, :n].contiguous(), None, 0.5)[2][0].counters["barriers"]

    warps = 16
    assert barriers(1024) - barriers(960) == 2 * warps  # the same sort of 1024 keys, 64 boxes more


def test_resources() -> None:
    """ptxas: nothing spilled; registers let a multiprocessor be full or half full; shared memory below 48 KB."""
    for arch in ("80", "90", "120"):
        _, log = compile_cuda(SOURCE, "cubin", arch, [cuda.CSRC], cuda.FLAGS)
        parts = re.split(r"Compiling entry function '", log)[1:]
        assert len(parts) > 35
        for part in parts:
            name = part[: part.index("'")]
            spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
            registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
            assert not any(map(int, spills)), f"{name}: {spills}"
            assert int(registers.group(1)) <= (96 if "nms_image" in name or "Float64" in name else 64), (
                f"{name}: {registers.group()}"
            )
            assert shared is None or int(shared.group(1)) <= 48 * 1024, f"{name}: {shared.group()}"
            if "nms_mask" in name and "Float32" in name:
                assert int(registers.group(1)) <= 40, f"{name}: {registers.group()}"


def test_machine_code() -> None:
    """No atomics, no local memory; boxes move 16 bytes at a time; one division a pair test, off the common path."""
    tool = toolchain.cuda_tool("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump (CUDA toolkit or the triton package)")
    path, _ = compile_cuda(SOURCE, "cubin", "80", [cuda.CSRC], cuda.FLAGS)
    listing = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    for text in re.split(r"Function : ", listing)[1:]:
        kernel = text.split()[0]
        assert not re.search(r"(?<!BAR\.)\b(LDL|STL|ATOM|ATOMG|ATOMS|RED|REDG)\b", text), kernel
        if re.search(r"nms_(mask|push|bins)", kernel) and "Float64" not in kernel:
            assert re.search(r"\bLDG\.E\.128", text), f"{kernel}: no 16-byte load"
            assert len(re.findall(r"MUFU\.RCP", text)) <= 6, kernel
