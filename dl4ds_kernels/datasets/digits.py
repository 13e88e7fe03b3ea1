"""Handwritten digits that come with scikit-learn: 1797 pictures of 8 x 8 pixels (no download)."""

from __future__ import annotations

import torch
from torch import Tensor

_TEST_FROM = 1437  # the last fifth, in the file's order


def digits(*, train: bool = True) -> tuple[Tensor, Tensor]:
    """Pictures and labels of UCI's optical recognition set, its test file, as scikit-learn ships it.

    Args: train: the first 1437 pictures, otherwise the last 360.
    Returns: x (N, 1, 8, 8) float32 of about zero mean and unit variance; y (N,) int64 in 0 … 9.
    Raises: ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits: needs scikit-learn: pip install 'dl4ds_kernels[data]'") from error
    pictures, labels = load_digits(return_X_y=True)
    x = (torch.from_numpy(pictures).float().view(-1, 1, 8, 8) - 4.884) / 6.017
    part = slice(None, _TEST_FROM) if train else slice(_TEST_FROM, None)
    return x[part], torch.from_numpy(labels).long()[part]
