"""NMS on a real GPU: torchvision's indices there, nothing that waits, captured in a graph. Skipped without one.

What can be shown without a GPU is in test_nms_cuda.py (the simulator) and test_nms_triton.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _boxes import make_boxes, make_scores
from _nms_cuda import transcription
from conftest import skip_unless_loaded
from torchvision.ops import nms as stock

from dl4ds_kernels import functional as F

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    skip_unless_loaded(request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 1000, 1024, 1025, 4095, 4096, 4097, 20_000])
def test_equals_torchvision(n: int, dtype: torch.dtype, backend: str) -> None:
    g = np.random.default_rng(n)
    for regime in ("clusters", "sparse", "integers"):
        boxes, scores = make_boxes(g, n, regime, dtype, odd=0.01), make_scores(g, n, dtype)
        keep = F.nms(boxes.cuda(), scores.cuda(), 0.5, backend=backend).cpu()
        if dtype != torch.bfloat16:
            assert torch.equal(keep, stock(boxes.cuda(), scores.cuda(), 0.5).cpu())
        if n <= 1025:
            assert torch.equal(keep, transcription(boxes, scores, 0.5)), "the transcription is not what this GPU computes"


def test_padded_never_waits_and_fits_a_graph(backend: str) -> None:
    g = np.random.default_rng(1)
    for n, classes in ((900, None), (3000, 80)):
        boxes = torch.stack([make_boxes(g, n, "clusters") for _ in range(2)]).cuda()
        scores = torch.rand(2, n, device="cuda")
        ids = None if classes is None else torch.randint(classes, (2, n), device="cuda")
        options = {"iou_threshold": 0.5, "score_threshold": 0.1, "max_output": 100, "backend": backend}
        expected = F.nms_padded(boxes, scores, ids, **options)  # compiles, allocates
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = F.nms_padded(boxes, scores, ids, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        if backend == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = F.nms_padded(boxes, scores, ids, **options)
            scores.copy_(torch.rand_like(scores))
            graph.replay()
            again = F.nms_padded(boxes, scores, ids, **options)
            assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))


def test_memory_at_100k() -> None:
    skip_unless_loaded("cuda")
    boxes, scores = make_boxes(np.random.default_rng(2), 100_000, "sparse").cuda(), torch.rand(100_000, device="cuda")
    ids = torch.randint(80, (100_000,), device="cuda")
    for call in (lambda: F.nms(boxes, scores, 0.5), lambda: F.batched_nms(boxes, scores, ids, 0.5)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before <= 64e6
