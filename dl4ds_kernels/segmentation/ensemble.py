"""Ensembles by unanimous vote: what counts is what every network says (the lecture's mouse-cortex volume)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unanimous_classes(logits: Sequence[Tensor], undecided: int = -1) -> Tensor:
    """The class that every network finds most likely, ``undecided`` where they differ.

    Args: logits of each network, all (N, K, …). Of equal logits the first class counts.
    Returns: (N, …) int64. Raises: ValueError for no network; RuntimeError for shapes that differ.
    """
    if not logits:
        raise ValueError("unanimous_classes: logits: expected at least one network, got none")
    shape = logits[0].shape
    for i, one in enumerate(logits):
        if one.shape != shape:
            raise RuntimeError(
                f"unanimous_classes: logits: expected shape {tuple(shape)} like the first, got {tuple(one.shape)} at {i}"
            )
    votes = logits[0].argmax(1)
    agreed = torch.ones_like(votes, dtype=torch.bool)
    for one in logits[1:]:
        agreed &= one.argmax(1) == votes
    return torch.where(agreed, votes, torch.full_like(votes, undecided))


def unanimous(logits: Sequence[Tensor], class_id: int) -> Tensor:
    """Where every network's most likely class is ``class_id``: (N, …) bool.

    Raises: as :func:`unanimous_classes`, and ValueError for a class out of range.
    """
    votes = unanimous_classes(logits)
    classes = logits[0].shape[1]
    if not 0 <= class_id < classes:
        raise ValueError(f"unanimous: class_id: expected 0 to {classes - 1}, got {class_id}")
    return votes == class_id
