"""Tiles, losses, metrics, ensembles and connected components, against numpy, scipy and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dl4ds_kernels import models
from dl4ds_kernels import segmentation as seg

ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is the oracle here, not installed")


@pytest.mark.parametrize(
    ("shape", "before", "after"), [((5,), (3,), (4,)), ((4, 5), (0, 2), (3, 1)), ((3, 4, 5), (7, 9, 1), (2, 8, 0))]
)
def test_mirror_pad_is_numpys(shape: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *shape)
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), *zip(before, after, strict=True)], mode="reflect")
    assert torch.equal(seg.mirror_pad(x, before, after), torch.from_numpy(expected))


def valid_mean(x: Tensor) -> Tensor:
    """A network of two valid 3^n means: it takes two pixels off each side."""
    pool = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.dim()]
    return pool(pool(x, 3, 1), 3, 1)


@pytest.mark.parametrize("shape", [(11,), (13, 9), (7, 8, 9)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_overlap_tile_equals_one_pass(shape: tuple[int, ...], batch_size: int) -> None:
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    got = seg.overlap_tile(valid_mean, x, tile=8, margin=2, batch_size=batch_size)
    assert got.shape == x.shape
    torch.testing.assert_close(got, valid_mean(seg.mirror_pad(x, [2] * len(shape), [2] * len(shape))))


def test_overlap_tile_through_the_unet() -> None:
    """Pooling asks for tile starts in steps of 16: outputs of 20 pixels, moved by 16, agree where they overlap."""
    net = models.unet(1, 2, width=4).eval()
    x = torch.randn(1, 1, 60, 50)
    with torch.no_grad():
        got = seg.overlap_tile(net, x, tile=204, margin=92)
        padded = seg.mirror_pad(x, (92, 92), (92, 92))
        expected = net(padded[:, :, :204, 20:224])
    assert got.shape == (1, 2, 60, 50)
    torch.testing.assert_close(got[:, :, :20, 20:40], expected, rtol=1e-4, atol=1e-5)


def test_overlap_tile_errors() -> None:
    x = torch.randn(1, 1, 9, 9)
    with pytest.raises(ValueError, match="expected tile > 2 \\* margin"):
        seg.overlap_tile(valid_mean, x, tile=4, margin=2)
    with pytest.raises(RuntimeError, match="expected outputs of size \\(6, 6\\) for tiles \\(8, 8\\), got \\(4, 4\\)"):
        seg.overlap_tile(valid_mean, x, tile=8, margin=1)


def test_weighted_cross_entropy() -> None:
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(3, (2, 4, 5)), torch.rand(2, 4, 5, dtype=torch.float64)
    total = 0.0
    for n in range(2):
        for i in range(4):
            for j in range(5):
                z = logits[n, :, i, j]
                total = total - weight[n, i, j] * (z[target[n, i, j]] - torch.logsumexp(z, 0))
    torch.testing.assert_close(seg.weighted_cross_entropy(logits, target, weight, reduction="sum"), total)
    torch.testing.assert_close(seg.weighted_cross_entropy(logits, target, weight), total / weight.sum())
    torch.testing.assert_close(seg.weighted_cross_entropy(logits, target), F.cross_entropy(logits, target))
    torch.autograd.gradcheck(lambda z: seg.weighted_cross_entropy(z, target, weight), logits)
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        seg.weighted_cross_entropy(logits, target, weight[:1])
    with pytest.raises(ValueError, match="reduction"):
        seg.weighted_cross_entropy(logits, target, reduction="max")


def test_separation_weights_pixel_by_pixel() -> None:
    instances = torch.zeros(12, 14, dtype=torch.int64)
    instances[1:5, 1:5], instances[1:6, 7:12], instances[8:11, 3:9] = 1, 2, 3
    got = seg.separation_weights(instances)
    foreground = float((instances > 0).double().mean())
    for i in range(12):
        for j in range(14):
            distances = sorted(
                min(math.hypot(i - a, j - b) for a, b in torch.nonzero(instances == label).tolist()) for label in (1, 2, 3)
            )
            share = foreground if instances[i, j] > 0 else 1 - foreground
            expected = 0.5 / share + 10 * math.exp(-((distances[0] + distances[1]) ** 2) / 50)
            assert float(got[i, j]) == pytest.approx(expected, rel=1e-5)
    only = (instances == 1).long()
    assert torch.equal(seg.separation_weights(only, class_weight=torch.tensor([1.0, 2.0])), 1.0 + only)
    with pytest.raises(RuntimeError, match="expected integers \\(H, W\\)"):
        seg.separation_weights(instances.float())


def test_mean_iou() -> None:
    target, prediction = torch.randint(4, (2, 9, 9)), torch.randint(4, (2, 9, 9))
    target[0, 0] = 255
    confusion = seg.confusion_matrix(prediction, target, 5)
    counted = target != 255
    expected = []
    for c in range(4):
        a, b = (prediction == c) & counted, (target == c) & counted
        expected.append(float((a & b).sum() / (a | b).sum()))
    torch.testing.assert_close(seg.class_iou(confusion)[:4], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    assert seg.class_iou(confusion)[4].isnan() and seg.mean_iou(confusion) == pytest.approx(sum(expected) / 4, rel=1e-6)
    halves = [seg.confusion_matrix(prediction[i], target[i], 5) for i in range(2)]
    assert torch.equal(halves[0] + halves[1], confusion)
    assert math.isnan(seg.mean_iou(torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="prediction: expected classes 0 to 1"):
        seg.confusion_matrix(prediction, target, 2)
    with pytest.raises(RuntimeError, match="like target"):
        seg.confusion_matrix(prediction[0], target, 4)


def test_unanimous_vote_of_five() -> None:
    logits = [torch.randn(1, 3, 6, 7, 8) * 0.3 for _ in range(5)]
    for one in logits:
        one[:, 1, :3] += 2  # all agree here
    votes = np.stack([one.numpy().argmax(1) for one in logits])
    assert torch.equal(seg.unanimous(logits, 1), torch.from_numpy((votes == 1).all(0)))
    expected = np.where((votes == votes[0]).all(0), votes[0], -1)
    assert torch.equal(seg.unanimous_classes(logits), torch.from_numpy(expected))
    assert (expected == -1).any() and (expected >= 0).any()
    for bad, kind, message in (
        (lambda: seg.unanimous([], 0), ValueError, "at least one network"),
        (lambda: seg.unanimous(logits, 3), ValueError, "class_id: expected 0 to 2, got 3"),
        (lambda: seg.unanimous([logits[0], logits[1][..., :4]], 1), RuntimeError, "like the first"),
    ):
        with pytest.raises(kind, match=message):
            bad()


def snake(n: int) -> Tensor:
    """One component as long as the picture allows."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


MASKS = {
    "volume 0.3": lambda: torch.rand(12, 13, 14) < 0.3,
    "volume 0.35, at the percolation": lambda: torch.rand(24, 24, 24) < 0.35,
    "volume 0.8": lambda: torch.rand(9, 10, 11) < 0.8,
    "picture": lambda: torch.rand(40, 37) < 0.55,
    "snake": lambda: snake(33),
    "spiral in a volume": lambda: torch.stack([snake(17), snake(17).T, snake(17)]),
    "empty": lambda: torch.zeros(4, 5, 6, dtype=torch.bool),
    "full": lambda: torch.ones(4, 5, 6, dtype=torch.bool),
    "one voxel": lambda: torch.ones(1, 1, 1, dtype=torch.bool),
    "no voxel": lambda: torch.zeros(0, 3, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
def test_connected_components_are_scipys(name: str) -> None:
    mask = MASKS[name]()
    labels, count = seg.connected_components(mask)
    expected, number = ndimage.label(mask.numpy())
    assert count == number and torch.equal(labels, torch.from_numpy(expected).long())


def test_small_components_become_background() -> None:
    mask = torch.rand(20, 20) < 0.4
    labels, count = seg.connected_components(mask, min_size=4)
    reference, number = ndimage.label(mask.numpy())
    sizes = np.bincount(reference.ravel())[1:]
    assert count == int((sizes >= 4).sum()) and 0 < count < number
    assert torch.equal(labels > 0, torch.from_numpy(np.isin(reference, np.nonzero(sizes >= 4)[0] + 1)))
    assert labels.unique().tolist() == list(range(count + 1))
    with pytest.raises(RuntimeError, match="expected bool"):
        seg.connected_components(mask.float())
