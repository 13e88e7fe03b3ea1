"""MTCNN's trained cascade on a photograph: the same face with our NMS, torchvision's, and the redirected one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import dl4ds_kernels as dk
from dl4ds_kernels import functional as F

pytest.importorskip("skimage", reason="the photograph is scikit-image's astronaut")
torchvision = pytest.importorskip("torchvision", reason="torchvision is compared with")
if importlib.util.find_spec("facenet_pytorch") is None:
    pytest.skip("the weights are in the facenet-pytorch wheel: pip install --no-deps facenet-pytorch", allow_module_level=True)


def _script():
    path = Path(__file__).parents[1] / "bench/mtcnn.py"
    spec = importlib.util.spec_from_file_location("mtcnn_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_same_faces(tmp_path: Path) -> None:
    mtcnn = _script()
    image, nets = mtcnn.photograph(None), mtcnn.networks()
    boxes, scores, counts = mtcnn.detect(image, nets, F.batched_nms)
    stock = mtcnn.detect(image, nets, torchvision.ops.batched_nms)
    with dk.patch_torchvision_nms():
        patched = mtcnn.detect(image, nets, torchvision.ops.batched_nms)
    assert torch.equal(boxes, stock[0]) and torch.equal(scores, stock[1]) and torch.equal(boxes, patched[0])
    assert counts == stock[2] and counts["P-Net, within a level: boxes"] > counts["P-Net, within a level: kept"] > 100
    # One face; by eye it spans about these pixels of the 512 x 512 photograph.
    assert boxes.shape == (1, 4) and float(scores[0]) > 0.99
    torch.testing.assert_close(boxes[0], torch.tensor([182.0, 62.0, 269.0, 172.0]), atol=12, rtol=0)
    mtcnn.draw(image, {"ours": (boxes, scores), "torchvision": stock[:2]}, tmp_path / "faces.png")
    assert (tmp_path / "faces.png").stat().st_size > 10_000
