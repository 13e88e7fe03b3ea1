"""Bad and odd input to NMS: rows 28 to 42 of the fault checklist, by number. What torchvision does is the expectation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BACKENDS, device_of, skip_unless_loaded
from torch import Tensor

from dl4ds_kernels import functional as F

torchvision = pytest.importorskip("torchvision", reason="torchvision's behaviour is the expectation")
NAN, INF = float("nan"), float("inf")
BOXES = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.1, 0.0, 2.1, 2.0], [5.0, 5.0, 7.0, 7.0]])
SCORES = torch.tensor([0.9, 0.8, 0.7])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    skip_unless_loaded(request.param)
    return request.param


def run(boxes: Tensor, scores: Tensor, threshold: float, backend: str) -> list[int]:
    """Ours on the backend's device; equal to torchvision on the same device where it takes the dtype."""
    device = device_of(backend)
    boxes, scores = boxes.to(device), scores.to(device)
    keep = F.nms(boxes, scores, threshold, backend=backend)
    assert keep.dtype == torch.int64 and keep.device == boxes.device
    if backend != "reference" and boxes.dtype in (torch.float32, torch.float64):
        assert torch.equal(keep, torchvision.ops.nms(boxes, scores, threshold))
    return keep.tolist()


def test_F28_no_box_and_one_box(backend: str) -> None:
    assert run(BOXES[:0], SCORES[:0], 0.5, backend) == []
    assert run(BOXES[:1], SCORES[:1], 0.5, backend) == [0]
    keep, count = F.nms_padded(
        BOXES[None, :0].to(device_of(backend)), SCORES[None, :0].to(device_of(backend)),
        iou_threshold=0.5, max_output=2, backend=backend,
    )  # fmt: skip
    assert keep.tolist() == [[-1, -1]] and count.tolist() == [0]


WRONG = {
    "1-dim boxes": (BOXES[0], SCORES[:1]),
    "3-dim boxes": (BOXES[None], SCORES),
    "3 columns": (BOXES[:, :3], SCORES),
    "5 columns": (torch.cat([BOXES, BOXES[:, :1]], 1), SCORES),
    "2-dim scores": (BOXES, SCORES[:, None]),
    "fewer scores": (BOXES, SCORES[:2]),
    "more scores": (BOXES, SCORES.repeat(2)),
}


@pytest.mark.parametrize("name", WRONG)
def test_F29_wrong_dims_columns_lengths(name: str) -> None:
    boxes, scores = WRONG[name]
    with pytest.raises(RuntimeError, match="nms: (boxes|scores): expected"):
        F.nms(boxes, scores, 0.5)
    with pytest.raises(RuntimeError):
        torchvision.ops.nms(boxes, scores, 0.5)


@pytest.mark.parametrize("value", [BOXES.tolist(), BOXES.numpy(), None, 3], ids=lambda v: type(v).__name__)
def test_F30_not_a_tensor(value: object) -> None:
    for call in (
        lambda: F.nms(value, SCORES, 0.5),
        lambda: F.batched_nms(BOXES, SCORES, value, 0.5),
        lambda: F.nms_padded(value, SCORES[None], iou_threshold=0.5, max_output=1),
    ):
        with pytest.raises(TypeError, match="expected a Tensor"):
            call()
    with pytest.raises(TypeError, match="nms: scores: expected a Tensor"):
        F.nms(BOXES, value, 0.5)


def test_F31_dtypes_or_devices_differ() -> None:
    with pytest.raises(RuntimeError, match="nms: scores: expected dtype torch.float32 like boxes, got torch.float64"):
        F.nms(BOXES, SCORES.double(), 0.5)
    with pytest.raises(RuntimeError, match="nms: scores: expected a tensor on cpu like boxes, got meta"):
        F.nms(BOXES, SCORES.to("meta"), 0.5)
    with pytest.raises(RuntimeError, match="batched_nms: idxs: expected a tensor on cpu like scores, got meta"):
        F.batched_nms(BOXES, SCORES, torch.zeros(3).to("meta"), 0.5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_F32_dtypes_without_an_nms(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=r"nms: boxes: expected a float32, float64, float16 or bfloat16 tensor"):
        F.nms(BOXES.to(dtype), SCORES.to(dtype), 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_F32_half_on_the_cpu_is_an_extension(dtype: torch.dtype) -> None:
    """Documented: torchvision refuses it there, ours computes in float32."""
    with pytest.raises(RuntimeError, match="not implemented"):
        torchvision.ops.nms(BOXES.to(dtype), SCORES.to(dtype), 0.5)
    assert F.nms(BOXES.to(dtype), SCORES.to(dtype), 0.5).tolist() == [0, 2]


def test_F33_nan_score_comes_first_and_is_kept(backend: str) -> None:
    assert run(BOXES, torch.tensor([NAN, 0.8, 0.9]), 0.5, backend) == [0, 2]
    assert run(BOXES, torch.tensor([0.9, NAN, -NAN]), 0.5, backend) == [1, 2]
    assert all(run(BOXES, torch.tensor([NAN, NAN, NAN]), 0.5, backend) == [0, 2] for _ in range(5))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("column", range(4))
def test_F34_nan_or_infinite_box_suppresses_nothing(column: int, value: float, backend: str) -> None:
    boxes = BOXES[:1].repeat(3, 1)
    boxes[:2, column] = value
    infinite_corner = (value > 0) == (column >= 2)  # a box that is infinitely large, not inverted
    kept = run(boxes, SCORES, 0.5, backend)
    assert kept == [0, 1, 2] or not (value != value or infinite_corner)


@pytest.mark.parametrize("box", [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0], [2.0, 2.0, 0.0, 0.0], [2.0, 0.0, 0.0, 2.0]])
def test_F35_boxes_without_area_and_inverted_ones(box: list[float], backend: str) -> None:
    assert run(torch.tensor([box, box, BOXES[0].tolist()]), SCORES, 0.0, backend) == [0, 1, 2]


@pytest.mark.parametrize(("threshold", "expected"), [(-0.1, [0]), (1.1, [0, 1, 2]), (NAN, [0, 1, 2]), (1.0, [0, 1, 2])])
def test_F36_thresholds_outside_of_0_to_1(threshold: float, expected: list[int], backend: str) -> None:
    assert run(BOXES, SCORES, threshold, backend) == expected


def test_F37_equal_scores_by_index_on_every_run(backend: str) -> None:
    g = torch.Generator().manual_seed(1)
    centres = torch.rand(700, 2, generator=g) * 200
    boxes = torch.cat([centres, centres + 20], 1)
    scores = torch.randint(0, 3, (700,), generator=g).float()
    first = run(boxes, scores, 0.3, backend)
    assert all(run(boxes, scores, 0.3, backend) == first for _ in range(3))
    ranks = [(-float(scores[i]), i) for i in first]
    assert ranks == sorted(ranks)


def test_F38_iou_exactly_at_the_threshold(backend: str) -> None:
    """Halves are exact: not above the threshold, kept. 0.3 as a float32 is above the double 0.3: the CPU drops, CUDA keeps."""
    halves = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]])
    assert run(halves, SCORES[:2], 0.5, backend) == [0, 1]
    assert run(halves, SCORES[:2], float(np.nextafter(0.5, 0)), backend) == ([0] if device_of(backend) == "cpu" else [0, 1])
    tenths = torch.tensor([[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 3.0, 1.0]])
    assert run(tenths, SCORES[:2], 0.3, backend) == ([0] if device_of(backend) == "cpu" else [0, 1])


@pytest.mark.parametrize("n", [63, 64, 65, 4095, 4096, 4097])
def test_F39_sizes_around_blocks(n: int, backend: str) -> None:
    if backend == "reference" and n > 65:
        pytest.skip("the reference is slow by design")
    g = torch.Generator().manual_seed(n)
    centres = torch.rand(n, 2, generator=g) * 300
    assert run(torch.cat([centres, centres + 30], 1), torch.rand(n, generator=g), 0.4, backend)


@pytest.mark.parametrize("n", [100_000, 400_000])
def test_F39_memory_does_not_grow_with_the_square(n: int) -> None:
    """400,000 boxes as a bit mask would be 20 GB; these calls stay under 150 bytes a box."""
    skip_unless_loaded("cpu")
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads the peak memory from /proc")
    g = torch.Generator().manual_seed(n)
    centres = torch.rand(n, 2, generator=g) * 40 * n**0.5
    boxes, scores = torch.cat([centres, centres + 10], 1), torch.rand(n, generator=g)
    Path("/proc/self/clear_refs").write_text("5")

    def read(field: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1]) * 1024

    before = read("VmRSS")
    keep = F.nms(boxes, scores, 0.5, backend="cpu")
    assert read("VmHWM") - before < 150 * n + 2**22
    rows = keep.unique()
    assert n // 2 < keep.numel() <= n and torch.equal(keep, rows[scores[rows].sort(descending=True, stable=True)[1]])


def test_F40_class_ids_of_any_size_and_kind(backend: str) -> None:
    """Huge and negative coordinates, ids up to 1e9 and float ids: each class by itself, without the trick's rounding."""
    device = device_of(backend)
    far = [[-3e7, 0.0, -3e7 + 64, 64.0], [3e7, 0.0, 3e7 + 64, 64.0]]
    base = torch.tensor([far[0], [0.0, 0.0, 1.0, 1.0], [0.25, 0.0, 1.25, 1.0], far[1]])
    scores = torch.tensor([0.6, 0.9, 0.8, 0.7])
    for ids in (
        torch.tensor([10**9, 5, 5, 0]),
        torch.tensor([-(2**63), 2**63 - 1, 2**63 - 1, 0]),
        torch.tensor([1e9, 0.5, 0.5, -2.5]),
        torch.tensor([1, 0, 0, 1], dtype=torch.bool),
    ):
        expected = torchvision.ops.boxes._batched_nms_vanilla(base, scores, ids, 0.5)
        got = F.batched_nms(base.to(device), scores.to(device), ids.to(device), 0.5, backend=backend)
        assert got.tolist() == expected.tolist() == [1, 3, 0]


def test_F41_empty_batched_takes_anything() -> None:
    keep = F.batched_nms(torch.empty(0, 4), None, None, None)
    assert keep.shape == (0,) and keep.dtype == torch.int64
    assert torchvision.ops.batched_nms(torch.empty(0, 4), None, None, None).shape == (0,)


def test_F42_export_keeps_an_unbacked_size() -> None:
    class Post(torch.nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
            return boxes[F.nms(boxes, scores, 0.5)]

    program = torch.export.export(Post(), (BOXES, SCORES))
    assert torch.equal(program.module()(BOXES, SCORES), BOXES[[0, 2]])
    assert program.module()(BOXES, torch.tensor([NAN, 0.9, 0.8])).shape == (2, 4)


def test_F42_fixed_sizes_for_cuda_graphs(fresh_dynamo: object) -> None:
    """nms_padded's shapes depend on its arguments alone; nms says that its own do not (so nobody captures it)."""

    def post(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return F.nms_padded(boxes, scores, iou_threshold=0.5, max_output=5)

    compiled = torch.compile(post, fullgraph=True, backend="aot_eager")
    keep, count = compiled(BOXES[None], SCORES[None])
    assert keep.tolist() == [[0, 2, -1, -1, -1]] and count.tolist() == [2]
    meta = torch.ops.dl4ds_kernels.nms_padded(BOXES[None].to("meta"), SCORES[None].to("meta"), None, 0.5, 0.0, 5)
    assert meta[0].shape == (1, 5) and meta[1].shape == (1,)
    tag = torch.Tag.dynamic_output_shape
    ops = torch.ops.dl4ds_kernels
    assert tag in ops.nms.default.tags and tag in ops.batched_nms.default.tags and tag not in ops.nms_padded.default.tags
