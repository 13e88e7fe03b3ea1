"""Stick figures with eight joints: pictures for pose estimation with exact coordinates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

JOINTS = ("head", "neck", "left hand", "right hand", "hip", "left foot", "right foot", "left elbow")
LIMBS = ((0, 1), (1, 4), (1, 7), (7, 2), (1, 3), (4, 5), (4, 6))


def figures(count: int, *, size: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures of one figure in a random pose; its left arm has an elbow and its left side is lighter, so that sides differ.

    Returns: x (count, 3, size, size) float32 in [0, 1]; joints (count, 8, 2) as (x, y) in pixels, pixel
    centres at whole numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    pictures = torch.rand(count, 3, 1, 1, generator=generator) * 0.4 + 0.2 * torch.rand(
        count, 3, size, size, generator=generator
    )
    joints = torch.empty(count, len(JOINTS), 2)
    for i in range(count):
        r = (torch.rand(10, generator=generator) - 0.5).tolist()
        hip = torch.tensor([size * (0.5 + 0.2 * r[0]), size * (0.55 + 0.1 * r[1])])

        def towards(start: Tensor, angle: float, length: float) -> Tensor:
            return start + size * length * torch.tensor([math.sin(angle), -math.cos(angle)])

        lean = 0.5 * r[2]
        neck = towards(hip, lean, 0.2)
        head = towards(neck, lean + 0.4 * r[3], 0.1)
        elbow = towards(neck, math.pi - 1.2 + 1.6 * r[4], 0.12)
        left = towards(elbow, math.pi - 1.2 + 2.4 * r[5], 0.12)
        right = towards(neck, math.pi + 1.2 + 1.6 * r[6], 0.22)
        feet = [towards(hip, math.pi + side * 0.35 + 0.5 * r[7 + k], 0.27) for k, side in enumerate((-1, 1))]
        points = torch.stack((head, neck, left, right, hip, *feet, elbow)).clamp(2, size - 3)
        for a, b in LIMBS:
            along = points[b] - points[a]
            t = (((x - points[a][0]) * along[0] + (y - points[a][1]) * along[1]) / along.square().sum().clamp(min=1)).clamp(
                0, 1
            )
            distance = ((x - points[a][0] - t * along[0]) ** 2 + (y - points[a][1] - t * along[1]) ** 2).sqrt()
            light = 1.0 if {a, b} & {2, 5, 7} else 0.75
            pictures[i][:, distance < 1.3] = light
        pictures[i][:, (x - head[0]) ** 2 + (y - head[1]) ** 2 < (0.05 * size) ** 2] = torch.tensor([[0.9], [0.6], [0.4]])
        joints[i] = points
    return pictures.clamp(0, 1), joints
