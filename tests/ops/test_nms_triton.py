"""NMS in Triton: in its interpreter (numpy, on boxes whose arithmetic is exact), and offline on the PTX simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _boxes import make_boxes, make_scores
from _nms_cuda import padded_transcription, transcription

from dl4ds_kernels import functional as F
from dl4ds_kernels._define import triton_interpreted

pytest.importorskip("triton", reason="the Triton backend needs triton")
interpreted = pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine")
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 31, 65, 130])
def test_interpreter(n: int, dtype: torch.dtype) -> None:
    g = np.random.default_rng(n)
    boxes, scores = make_boxes(g, n, "integers", dtype), make_scores(g, n, dtype)
    classes = torch.tensor(g.integers(0, 3, n))
    assert torch.equal(F.nms(boxes, scores, 0.5, backend="triton"), transcription(boxes, scores, 0.5))
    keep = F.batched_nms(boxes, scores, classes, 0.5, backend="triton")
    assert torch.equal(keep, transcription(boxes, scores, 0.5, classes))


@interpreted
def test_interpreter_chunks() -> None:
    g = np.random.default_rng(2)
    boxes, scores = make_boxes(g, 1060, "integers"), make_scores(g, 1060)
    assert torch.equal(F.nms(boxes, scores, 0.5, backend="triton"), transcription(boxes, scores, 0.5))


@interpreted
def test_interpreter_padded() -> None:
    g = np.random.default_rng(3)
    boxes, scores = make_boxes(g, 100, "integers").view(2, 50, 4), make_scores(g, 100).view(2, 50)
    for score_threshold, max_output in ((0.0, 9), (0.3, 60), (float("nan"), 4), (0.0, 0)):
        options = {"iou_threshold": 0.4, "score_threshold": score_threshold, "max_output": max_output}
        got = F.nms_padded(boxes, scores, **options, backend="triton")
        expected = padded_transcription(boxes, scores, None, 0.4, score_threshold, max_output)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.slow
def test_kernels_for_gpus() -> None:
    """Compiled for four architectures and run on the simulator (_nms_triton_offline.py); needs Triton's compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    file = Path(__file__).with_name("_nms_triton_offline.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--noconftest", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
