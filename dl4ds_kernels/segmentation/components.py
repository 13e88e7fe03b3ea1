"""Connected components of 2-D pictures and 3-D volumes, in plain torch (scipy not needed, any device).

Every voxel starts with its own index as label; labels then flow to the minimum of their neighbourhood, and each label jumps to
the label of the voxel it names, so that a component of diameter d settles in about log d rounds instead of d.
"""

from __future__ import annotations

import torch
from torch import Tensor


def connected_components(mask: Tensor, *, min_size: int = 1) -> tuple[Tensor, int]:
    """Components of touching voxels (faces only: 6 neighbours in a volume, 4 in a picture).

    Args:
        mask: (H, W) or (D, H, W) bool. min_size: components with fewer voxels become background.

    Returns: int64 labels of ``mask``'s shape, 0 background, components numbered from 1 in the order of their first voxel (as
    ``scipy.ndimage.label`` numbers them), and their number. Raises: RuntimeError for another rank or dtype.
    """
    if mask.dtype != torch.bool or mask.dim() not in (2, 3):
        raise RuntimeError(
            f"connected_components: mask: expected bool (H, W) or (D, H, W), got {mask.dtype} {tuple(mask.shape)}"
        )
    if not mask.numel():
        return mask.long(), 0
    nowhere = mask.numel()
    index = torch.arange(nowhere, device=mask.device).view(mask.shape)
    label = torch.where(mask, index, nowhere)
    pairs = [(d, mask.narrow(d, 0, mask.shape[d] - 1) & mask.narrow(d, 1, mask.shape[d] - 1)) for d in range(mask.dim())]
    parent = torch.arange(nowhere + 1, device=mask.device)  # the root that each voxel's label points to
    while True:
        before = label
        label = label.clone()
        for d, touching in pairs:
            low, high = label.narrow(d, 0, label.shape[d] - 1), label.narrow(d, 1, label.shape[d] - 1)
            smallest = torch.where(touching, torch.minimum(low, high), low)
            new_high = torch.where(touching, torch.minimum(low, high), high)
            label.narrow(d, 0, label.shape[d] - 1).copy_(smallest)
            label.narrow(d, 1, label.shape[d] - 1).copy_(torch.minimum(new_high, label.narrow(d, 1, label.shape[d] - 1)))
        # A voxel that found a smaller label tells its former root, and everybody follows the roots to the end.
        parent.scatter_reduce_(0, before.flatten(), label.flatten(), "amin")
        while not torch.equal(parent[parent], parent):
            parent = parent[parent]
        label = parent[label]
        if torch.equal(label, before):
            break
    return _number(label, nowhere, min_size)


def _number(label: Tensor, nowhere: int, min_size: int) -> tuple[Tensor, int]:
    """Roots to 1, 2, …: a root is the smallest index of its component, so their order is that of the first voxels."""
    roots, inverse, sizes = label.unique(sorted=True, return_inverse=True, return_counts=True)
    kept = (roots != nowhere) & (sizes >= min_size)
    numbers = torch.where(kept, kept.cumsum(0), torch.zeros_like(roots))
    return numbers[inverse], int(kept.sum())
