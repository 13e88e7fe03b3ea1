"""Heatmaps, the loss over all stacks, PCK: against loops over pixels and joints."""

from __future__ import annotations

import math

import pytest
import torch

from dl4ds_kernels import pose


def test_heatmaps_pixel_by_pixel() -> None:
    points = torch.tensor([[[4.0, 3.0], [0.2, 7.4], [20.0, 20.0]]])
    visible = torch.tensor([[True, True, False]])
    maps = pose.encode_heatmaps(points, visible, (9, 11), sigma=1.0)
    assert maps.shape == (1, 3, 9, 11)
    for joint, (cx, cy) in enumerate([(4, 3), (0, 7)]):
        for y in range(9):
            for x in range(11):
                inside = abs(x - cx) <= 3 and abs(y - cy) <= 3
                expected = math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2) if inside else 0.0
                assert float(maps[0, joint, y, x]) == pytest.approx(expected, abs=1e-6)
    assert not maps[0, 2].any()


def test_decode_moves_a_quarter_towards_the_higher_neighbour() -> None:
    maps = torch.zeros(1, 5, 6, 8)
    maps[0, 0, 2, 3], maps[0, 0, 2, 4], maps[0, 0, 1, 3] = 1.0, 0.5, 0.4  # right and up
    maps[0, 1, 0, 5], maps[0, 1, 0, 6] = 1.0, 0.9  # on the border: stays
    maps[0, 2, 4, 4] = maps[0, 2, 3, 6] = 2.0  # two equal maxima: the first in scan order
    maps[0, 3] = -1.0  # nothing positive
    maps[0, 4, 3, 3] = 1.0  # equal neighbours: stays
    points, scores = pose.decode_heatmaps(maps)
    expected = torch.tensor([[3.25, 1.75], [5, 0], [6, 3], [0, 0], [3, 3]])
    torch.testing.assert_close(points[0], expected)
    torch.testing.assert_close(scores[0], torch.tensor([1.0, 1.0, 2.0, -1.0, 1.0]))


def test_decode_brings_back_what_encode_drew() -> None:
    points = torch.rand(4, 6, 2) * 50 + 5
    visible = torch.ones(4, 6, dtype=torch.bool)
    found, scores = pose.decode_heatmaps(pose.encode_heatmaps(points, visible, (64, 64)))
    assert (found - points).abs().max() <= 0.5 + 1e-5 and torch.equal(scores, torch.ones(4, 6))


def test_people_in_one_map_and_flips() -> None:
    points = torch.tensor([[[3.0, 4.0]], [[9.0, 4.0]]])
    maps = pose.encode_heatmaps(points, torch.ones(2, 1, dtype=torch.bool), (9, 12))
    both = pose.combine_maximum(maps)
    assert both.shape == (1, 9, 12) and float(both[0, 4, 3]) == float(both[0, 4, 9]) == 1.0
    batch = torch.randn(2, 4, 5, 6)
    flipped = pose.flip_heatmaps(batch, [(0, 2)])
    assert torch.equal(flipped[:, 0], batch[:, 2].flip(-1)) and torch.equal(flipped[:, 1], batch[:, 1].flip(-1))
    assert torch.equal(pose.flip_heatmaps(flipped, [(0, 2)]), batch)


def test_to_image() -> None:
    """A heatmap pixel covers four image pixels; its middle is theirs."""
    assert pose.to_image(torch.tensor([0.0, 1.0, 63.0])).tolist() == [1.5, 5.5, 253.5]


def test_stacked_mse() -> None:
    target = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    stacks = [torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    expected = sum(torch.nn.functional.mse_loss(s, target) for s in stacks)
    torch.testing.assert_close(pose.stacked_mse(stacks, target), expected)
    visible = torch.tensor([[True, False, True], [False, False, True]])
    by_hand = sum((s - target)[visible].square().mean() for s in stacks)
    torch.testing.assert_close(pose.stacked_mse(stacks, target, visible=visible), by_hand)
    torch.autograd.gradcheck(lambda *s: pose.stacked_mse(s, target, visible=visible), stacks)
    assert float(pose.stacked_mse(stacks, target, visible=torch.zeros(2, 3, dtype=torch.bool)).detach()) == 0.0
    for bad, kind, message in (
        (lambda: pose.stacked_mse([], target), ValueError, "at least one stack"),
        (lambda: pose.stacked_mse([stacks[0], target[:1]], target), RuntimeError, "at 1"),
        (lambda: pose.stacked_mse(stacks, target, visible=visible[:1]), RuntimeError, "visible: expected shape"),
    ):
        with pytest.raises(kind, match=message):
            bad()


def test_pck_joint_by_joint() -> None:
    target = torch.zeros(3, 2, 2)
    points = torch.tensor([[[0.0, 5.0], [3.0, 4.0]], [[0.0, 5.1], [3.0, 4.1]], [[9.0, 9.0], [0.0, 0.0]]])
    visible = torch.tensor([[True, True], [True, True], [False, True]])
    by_joint, total = pose.pck(points, target, visible, scale=10.0)
    assert by_joint.tolist() == [0.5, pytest.approx(2 / 3)] and total == pytest.approx(3 / 5)
    by_joint, total = pose.pck(points, target, visible, scale=torch.tensor([10.0, 11.0, 1.0]))
    assert by_joint.tolist() == [1.0, 1.0] and total == 1.0
    by_joint, total = pose.pck(points, target, torch.zeros_like(visible), 1.0)
    assert by_joint.isnan().all() and math.isnan(total)
    torch.testing.assert_close(pose.normalised_distance(points, target, 10.0)[0], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: pose.encode_heatmaps(torch.zeros(1, 2, 3), torch.ones(1, 2), (4, 4)), RuntimeError, "expected \\(N, J, 2\\)"),
        (lambda: pose.encode_heatmaps(torch.zeros(1, 2, 2), torch.ones(1, 2), (4, 4), sigma=0), ValueError, "sigma: expected"),
        (lambda: pose.decode_heatmaps(torch.zeros(1, 2, 3)), RuntimeError, "expected \\(N, J, H, W\\)"),
        (lambda: pose.pck(torch.zeros(1, 2, 2), torch.zeros(1, 3, 2), torch.ones(1, 2), 1.0), RuntimeError, "twice and"),
        (
            lambda: pose.pck(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.ones(1, 2) > 0, torch.ones(2)),
            RuntimeError,
            "scale",
        ),
    ],
)
def test_errors(call, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
