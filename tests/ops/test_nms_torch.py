"""NMS inside torch: opcheck, compile, export, and torchvision redirected to our kernel."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from _boxes import BOXES, FLOATS, SCORES, make_boxes, oracle
from conftest import skip_unless_loaded
from torch import Tensor

import dl4ds_kernels as dk
from dl4ds_kernels import functional as F

torchvision = pytest.importorskip("torchvision", reason="torchvision is what is redirected")


@pytest.fixture(autouse=True)
def _compiled_part() -> None:
    skip_unless_loaded("cpu")


def test_opcheck() -> None:
    g = np.random.default_rng(13)
    ops = torch.ops.dl4ds_kernels
    for dtype in FLOATS:
        boxes, scores = make_boxes(g, 40, "uniform", dtype), torch.rand(40, dtype=dtype)
        idxs = torch.tensor(g.integers(0, 3, 40))
        torch.library.opcheck(ops.nms.default, (boxes, scores, 0.5))
        torch.library.opcheck(ops.nms.default, (boxes.t().contiguous().t().requires_grad_(), scores, 0.5))
        torch.library.opcheck(ops.batched_nms.default, (boxes, scores, idxs, 0.5))
        torch.library.opcheck(ops.nms_padded.default, (boxes[None], scores[None], None, 0.5, 0.0, 9))
        torch.library.opcheck(ops.nms_padded.default, (boxes[None], scores[None], idxs[None], 0.5, 0.1, 50))


def test_compile_fullgraph(fresh_dynamo: object) -> None:
    g = np.random.default_rng(14)
    boxes, scores, idxs = make_boxes(g, 120, "uniform"), torch.rand(120), torch.tensor(g.integers(0, 3, 120))

    def padded(boxes: Tensor, scores: Tensor) -> Tensor:
        keep, count = F.nms_padded(boxes * 2, scores, iou_threshold=0.4, max_output=30)
        return keep * count[:, None]

    compiled = torch.compile(padded, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(boxes[None], scores[None]), padded(boxes[None], scores[None]))

    def variable(boxes: Tensor, scores: Tensor, idxs: Tensor) -> Tensor:
        keep = F.nms(boxes, scores, 0.4)
        return boxes[F.batched_nms(boxes, scores, idxs, 0.4)].sum(0) + boxes[keep].sum(0)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(variable, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(boxes, scores, idxs), variable(boxes, scores, idxs))


def test_export_holds_torchvisions_op() -> None:
    class Post(torch.nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
            return boxes[F.nms(boxes, scores, 0.4)]

    g = np.random.default_rng(15)
    boxes, scores = make_boxes(g, 60, "uniform"), torch.rand(60)
    program = torch.export.export(Post(), (boxes, scores))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "torchvision.nms.default" in targets and not any("dl4ds" in target for target in targets)
    assert torch.equal(program.module()(boxes, scores), Post()(boxes, scores))


# ---- patch_torchvision_nms --------------------------------------------------------------------------------------------


def redirected() -> bool:
    """Whether torchvision::nms runs our kernel: torchvision's own refuses float16 on the CPU."""
    with contextlib.suppress(RuntimeError):
        return torchvision.ops.nms(BOXES.half(), SCORES.half(), 0.5).dtype == torch.int64
    return False


def test_patch_redirects_and_restores() -> None:
    stock = torchvision.ops.boxes.batched_nms
    assert not redirected()
    with dk.patch_torchvision_nms():
        assert redirected() and torchvision.ops.batched_nms is not stock
        with dk.patch_torchvision_nms():
            assert redirected()
        assert redirected()
    assert not redirected() and torchvision.ops.batched_nms is stock and torchvision.ops.boxes.batched_nms is stock
    with pytest.raises(ZeroDivisionError), dk.patch_torchvision_nms():
        1 / 0  # noqa: B018
    assert not redirected()


@pytest.mark.parametrize("n", [0, 1, 900, 3000])
def test_patched_functions_give_torchvisions_results(n: int) -> None:
    g = np.random.default_rng(n)
    boxes, scores = make_boxes(g, n, "clusters"), torch.tensor(g.permutation(n) / max(n, 1)).float()
    idxs = torch.tensor(g.integers(0, 20, n))
    before = oracle(boxes, scores, 0.5), torchvision.ops.batched_nms(boxes, scores, idxs, 0.5)
    scripted = torch.jit.script(torchvision.ops.nms)
    with dk.patch_torchvision_nms():
        assert torch.equal(oracle(boxes, scores, 0.5), before[0]) and torch.equal(scripted(boxes, scores, 0.5), before[0])
        assert torch.equal(torchvision.ops.batched_nms(boxes, scores, idxs, 0.5), before[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detection_models_give_the_same_outputs(name: str) -> None:
    torch.manual_seed(1)
    options = {"min_size": 64, "max_size": 96} if "ssd" not in name else {}
    options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.0  # an untrained model is sure of nothing
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=7, **options).eval()
    image = torch.rand(3, 64, 80)
    with torch.no_grad():
        expected = model([image])[0]
        with dk.patch_torchvision_nms():
            got = model([image])[0]
    assert expected["boxes"].shape[0] > 10
    assert all(torch.equal(got[key], expected[key]) for key in ("boxes", "scores", "labels"))
