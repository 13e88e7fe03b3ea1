"""Reader of CIFAR-10 and CIFAR-100 in their binary version (raw bytes; the Python version is a pickle and is not read)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_PIXELS = 3 * 32 * 32
# Files of the training and test part, label bytes before each picture, classes.
_KINDS = {
    10: ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    100: (["train.bin"], ["test.bin"], 2),
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def cifar(folder: str | Path, *, train: bool = True, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Pictures and labels of the user's files.

    Args: folder: holds ``data_batch_1.bin`` … and ``test_batch.bin`` (CIFAR-10) or ``train.bin`` and ``test.bin`` (CIFAR-100,
    fine labels). train: which part. classes: 10 or 100.
    Returns: x (N, 3, 32, 32) float32, normalised by the data set's mean and standard deviation of each channel; y (N,) int64.
    Raises: ValueError for another number of classes or a file of another size; FileNotFoundError with what is missing.
    """
    if classes not in _KINDS:
        raise ValueError(f"cifar: classes: expected 10 or 100, got {classes}")
    training, test, labels = _KINDS[classes]
    rows = []
    for name in training if train else test:
        path = Path(folder) / name
        if not path.is_file():
            raise FileNotFoundError(f"cifar: expected {path} (the *binary* version of CIFAR-{classes})")
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        if not data.numel() or data.numel() % (_PIXELS + labels):
            raise ValueError(f"cifar: {path}: expected rows of {_PIXELS + labels} bytes, got {data.numel()} bytes")
        rows.append(data.view(-1, _PIXELS + labels))
    table = torch.cat(rows)
    y = table[:, labels - 1].long()
    if int(y.max()) >= classes:
        raise ValueError(f"cifar: {folder}: expected labels below {classes}, got {int(y.max())}")
    x = table[:, labels:].reshape(-1, 3, 32, 32).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1), y
