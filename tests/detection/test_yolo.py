"""YOLOv1's decode, detection, targets and loss, against scalar transcriptions of the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dl4ds_kernels.detection import YoloLayout, decode, detect, encode_targets, responsible_boxes, yolo_loss

LAYOUTS = [YoloLayout(), YoloLayout(3, 3, 4), YoloLayout(2, 1, 1, sqrt=False)]
ids = [f"S{v.side}-B{v.boxes}-C{v.classes}" for v in LAYOUTS]


def random_output(layout: YoloLayout, n: int = 2) -> Tensor:
    return torch.rand(n, layout.outputs, generator=torch.Generator().manual_seed(layout.outputs))


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_decode_index_by_index(layout: YoloLayout) -> None:
    """The flat vector: all classes, all confidences, all boxes; ``cell = row * S + column``."""
    output = random_output(layout)
    height, width = 100, 60
    boxes, scores = decode(output, layout, (height, width))
    s, b, c = layout.side, layout.boxes, layout.classes
    assert boxes.shape == (2, s * s * b, 4) and scores.shape == (2, s * s * b, c)
    for n in range(2):
        flat = output[n].tolist()
        for cell in range(s * s):
            row, column = divmod(cell, s)
            for k in range(b):
                confidence = flat[s * s * c + cell * b + k]
                x, y, w, h = flat[s * s * (c + b) + (cell * b + k) * 4 :][:4]
                w, h = (w * w, h * h) if layout.sqrt else (w, h)
                x, y, w, h = (x + column) / s * width, (y + row) / s * height, w * width, h * height
                expected = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
                torch.testing.assert_close(boxes[n, cell * b + k], expected, rtol=1e-5, atol=1e-4)
                classes = torch.tensor(flat[cell * c : cell * c + c])
                torch.testing.assert_close(scores[n, cell * b + k], confidence * classes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_split_and_join(layout: YoloLayout) -> None:
    output = random_output(layout)
    assert torch.equal(layout.join(*layout.split(output)), output)
    assert layout.split(output)[0].data_ptr() == output.data_ptr()


def area_iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def darknet_suppression(boxes: list[list[float]], scores: list[list[float]], iou: float) -> set[tuple[int, int]]:
    """Class by class: of the scores that are left, a box takes away those it overlaps by more."""
    kept = set()
    for c in range(len(scores[0])):
        left = {i: row[c] for i, row in enumerate(scores) if row[c] > 0}
        for i in sorted(left, key=lambda i: -left[i]):
            if left[i] == 0:
                continue
            kept.add((i, c))
            for j in left:
                if 0 < left[j] < left[i] and area_iou(boxes[i], boxes[j]) > iou:
                    left[j] = 0
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5])
def test_detect_is_darknets_class_wise_suppression(threshold: float) -> None:
    layout = YoloLayout(4, 2, 3)
    output = random_output(layout, 3)
    boxes, scores = decode(output, layout, (80, 90))
    found = detect(output, layout, (80, 90), score_threshold=threshold, iou_threshold=0.4)
    for n in range(3):
        kept_scores = torch.where(scores[n] > threshold, scores[n], 0.0).tolist()
        expected = darknet_suppression(boxes[n].tolist(), kept_scores, 0.4)
        assert len(found[n].scores) == len(expected) > 0
        values = sorted((round(kept_scores[i][c], 5), c) for i, c in expected)
        assert (
            sorted((round(s, 5), c) for s, c in zip(found[n].scores.tolist(), found[n].labels.tolist(), strict=True)) == values
        )
        assert found[n].scores.tolist() == sorted(found[n].scores.tolist(), reverse=True)
        assert found[n].boxes.min() >= 0 and (found[n].boxes <= torch.tensor([90, 80, 90, 80])).all()


def test_nothing_above_the_threshold() -> None:
    layout = YoloLayout()
    (found,) = detect(torch.zeros(1, layout.outputs), layout, (10, 10))
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.labels.shape == (0,)


def test_targets() -> None:
    """Rows by hand: centres to cells, the first of two objects in a cell, small ones left out, the far border."""
    layout = YoloLayout(2, 2, 3)
    boxes = torch.tensor([[0, 0, 20, 40], [10, 30, 30, 50], [60, 90, 60.2, 100], [80, 180, 120, 220]], dtype=torch.float32)
    truth = encode_targets(boxes, torch.tensor([2, 1, 0, 0]), layout, (200, 100))
    assert truth.shape == (4, 8)
    torch.testing.assert_close(truth[0], torch.tensor([1, 0, 0, 1, 0.2, 0.2, 0.2, 0.2]))
    torch.testing.assert_close(truth[3], torch.tensor([1, 1, 0, 0, 1.0, 1.0, 0.4, 0.2]))
    assert not truth[1:3].any()


def scalar_loss(flat: list[float], truth: Tensor, layout: YoloLayout) -> dict[str, float]:
    """The paper's sum for one image, term by term, with darknet's choice of the responsible box."""
    s, b, c = layout.side, layout.boxes, layout.classes
    parts = dict.fromkeys(("position", "size", "objects", "no_objects", "classes", "cost", "iou"), 0.0)
    for cell in range(s * s):
        t = truth[cell].tolist()
        conf = [flat[s * s * c + cell * b + k] for k in range(b)]
        own = None
        if t[0]:
            tx, ty, tw, th = t[1 + c :]
            best, best_iou, best_rmse = 0, 0.0, 20.0
            for k in range(b):
                x, y, w, h = flat[s * s * (c + b) + (cell * b + k) * 4 :][:4]
                w, h = (w * w, h * h) if layout.sqrt else (w, h)
                one = [x / s - w / 2, y / s - h / 2, x / s + w / 2, y / s + h / 2]
                two = [tx / s - tw / 2, ty / s - th / 2, tx / s + tw / 2, ty / s + th / 2]
                iou = area_iou(one, two)
                rmse = math.sqrt((x / s - tx / s) ** 2 + (y / s - ty / s) ** 2 + (w - tw) ** 2 + (h - th) ** 2)
                if best_iou > 0 or iou > 0:
                    if iou > best_iou:
                        best, best_iou = k, iou
                elif rmse < best_rmse:
                    best, best_rmse = k, rmse
            own = best
            x, y, w, h = flat[s * s * (c + b) + (cell * b + best) * 4 :][:4]
            deltas = {
                "position": [5 * (tx - x), 5 * (ty - y)],
                "size": [5 * (math.sqrt(v) - (o if layout.sqrt else math.sqrt(o))) for v, o in ((tw, w), (th, h))],
                "objects": [best_iou - conf[best]],
                "classes": [t[1 + i] - flat[cell * c + i] for i in range(c)],
            }
            scale = {"position": 5, "size": 5, "objects": 1, "classes": 1}
            for name, values in deltas.items():
                parts[name] += sum(v * v / scale[name] for v in values)
                parts["cost"] += sum(v * v for v in values)
            parts["iou"] += best_iou
        for k in range(b):
            if k != own:
                parts["no_objects"] += 0.5 * conf[k] ** 2
                parts["cost"] += (0.5 * conf[k]) ** 2
    return parts


def problem(layout: YoloLayout) -> tuple[Tensor, Tensor]:
    output = random_output(layout, 3).double()
    generator = torch.Generator().manual_seed(5)
    truths = []
    for _ in range(3):
        centre, size = torch.rand(4, 2, generator=generator) * 100, torch.rand(4, 2, generator=generator) * 40 + 2
        labels = torch.randint(layout.classes, (4,), generator=generator)
        truths.append(encode_targets(torch.cat((centre - size / 2, centre + size / 2), 1).double(), labels, layout, (100, 100)))
    return output, torch.stack(truths)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_loss_term_by_term(layout: YoloLayout) -> None:
    output, truth = problem(layout)
    expected = [scalar_loss(output[n].tolist(), truth[n], layout) for n in range(3)]
    paper, darknet = (yolo_loss(output, truth, layout, variant=v) for v in ("paper", "darknet"))
    for name in ("position", "size", "objects", "no_objects", "classes"):
        want = sum(parts[name] for parts in expected)
        assert float(getattr(paper, name)) == pytest.approx(want, rel=1e-9), name
        assert float(getattr(darknet, name)) == pytest.approx(want / 2, rel=1e-9), name
    total = sum(sum(parts[k] for k in parts if k not in ("cost", "iou")) for parts in expected)
    assert float(paper.total) == pytest.approx(total, rel=1e-9)
    cost = sum(parts["cost"] for parts in expected)
    assert float(paper.cost) == float(darknet.cost) == pytest.approx(cost, rel=1e-9)
    objects = int(truth[..., 0].sum())
    assert float(paper.mean_iou) == pytest.approx(sum(parts["iou"] for parts in expected) / objects, rel=1e-9)


def test_darknets_gradient_is_scale_times_difference() -> None:
    """``delta = scale * (target - output)``: minus the gradient; its squares add up to the reported cost."""
    layout = YoloLayout()
    output, truth = problem(layout)
    output.requires_grad_()
    loss = yolo_loss(output, truth, layout, variant="darknet")
    (gradient,) = torch.autograd.grad(loss.total, output)
    assert float(gradient.square().sum()) == pytest.approx(float(loss.cost), rel=1e-9)
    classes, _, _ = layout.split(gradient)
    want = layout.split(output)[0] - truth[..., 1:21]
    torch.testing.assert_close(classes, want * truth[..., :1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("variant", ["paper", "darknet"])
def test_loss_gradcheck(layout: YoloLayout, variant: str) -> None:
    """The targets' IoU is a constant: no gradient flows through it."""
    output, truth = problem(YoloLayout(2, layout.boxes, 2, layout.sqrt))
    layout = YoloLayout(2, layout.boxes, 2, layout.sqrt)
    best, iou = responsible_boxes(layout.split(output)[2], truth[..., 3:], layout)
    assert best.shape == iou.shape == (3, 4)

    def fixed(values: Tensor) -> Tensor:
        """The loss with the IoU of the unchanged output as target, as an explicit constant."""
        loss = yolo_loss(values, truth, layout, variant=variant, rescore=False)
        confidence = layout.split(values)[1].gather(2, best.unsqueeze(-1)).squeeze(-1)
        has = truth[..., 0] != 0
        factor = 1.0 if variant == "paper" else 0.5
        return loss.total - loss.objects + factor * (iou - confidence)[has].square().sum()

    leaf = output.clone().requires_grad_()
    (expected,) = torch.autograd.grad(fixed(leaf), leaf)
    (got,) = torch.autograd.grad(yolo_loss(leaf, truth, layout, variant=variant).total, leaf)
    torch.testing.assert_close(got, expected)
    torch.autograd.gradcheck(lambda v: yolo_loss(v, truth, layout, variant=variant, rescore=False).total, leaf)


def test_no_object_at_all() -> None:
    layout = YoloLayout()
    output = random_output(layout).requires_grad_()
    loss = yolo_loss(output, torch.zeros(2, 49, 25), layout)
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(float(0.5 * layout.split(output.detach())[1].square().sum()), rel=1e-5)
    assert output.grad.isfinite().all() and float(loss.mean_iou) == 0


ZEROS, V1 = torch.zeros(1, 1470), YoloLayout()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: decode(ZEROS[:, :7], V1, (9, 9)), RuntimeError, "output: expected shape (N, 1470)"),
        (lambda: yolo_loss(ZEROS, torch.zeros(1, 49, 24), V1), RuntimeError, "truth: expected shape (1, 49, 25)"),
        (lambda: yolo_loss(ZEROS, torch.zeros(1, 49, 25), V1, variant="v2"), ValueError, "variant: expected"),
        (lambda: encode_targets(torch.zeros(2, 3), torch.zeros(2).long(), V1, (9, 9)), RuntimeError, "(M, 4) and (M,)"),
        (lambda: encode_targets(torch.zeros(1, 4), torch.tensor([20]), V1, (9, 9)), ValueError, "labels: expected 0 to 19"),
        (lambda: encode_targets(torch.full((1, 4), 30.0), torch.tensor([1]), V1, (9, 9)), ValueError, "centres inside"),
    ],
)
def test_errors(call, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
