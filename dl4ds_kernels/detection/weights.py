"""Darknet's ``.weights`` files, both header versions, read and written byte for byte.

Little-endian: int32 major, minor, revision; the number of images seen, 64 bits from version 0.2 on and 32 before; then float32
values layer by layer without names. What comes in which order is the network's business
(:meth:`dl4ds_kernels.models.darknet.DarknetNet.weight_slots`); this file knows headers, sizes and errors.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_VERSION = struct.Struct("<iii")
_MAX_VERSION = 1000


class WeightsError(ValueError):
    """The file does not fit the network; the message says where and by how many bytes."""


class WeightSlot(NamedTuple):
    """A run of float32 values in the file: its name for messages, the tensor it fills, and whether it is a matrix of a
    connected layer (stored transposed by files whose version is over 1000)."""

    name: str
    tensor: Tensor
    connected: bool = False


@dataclass(frozen=True)
class WeightsHeader:
    """Version and images seen. Darknet writes 0.2 (64-bit ``seen``) today and wrote 0.1 (32-bit) for YOLOv1."""

    major: int = 0
    minor: int = 2
    revision: int = 0
    seen: int = 0

    @property
    def wide(self) -> bool:
        """Whether ``seen`` takes 64 bits."""
        return self.major * 10 + self.minor >= 2 and self.major < _MAX_VERSION and self.minor < _MAX_VERSION

    @property
    def transposed(self) -> bool:
        """Whether matrices of connected layers are stored (inputs, outputs)."""
        return self.major > _MAX_VERSION or self.minor > _MAX_VERSION

    @property
    def size(self) -> int:
        """Bytes of the header: 20 or 16."""
        return _VERSION.size + (8 if self.wide else 4)

    def pack(self) -> bytes:
        """The header's bytes. Raises: WeightsError for numbers that do not fit."""
        try:
            return _VERSION.pack(self.major, self.minor, self.revision) + struct.pack("<Q" if self.wide else "<I", self.seen)
        except struct.error as error:
            raise WeightsError(
                f"weights: header: expected 32-bit versions and a count that fits, got {self} ({error})"
            ) from None


def read_header(path: str | Path) -> WeightsHeader:
    """The header of a file. Raises: WeightsError if the file is missing or too short for one."""
    try:
        with open(path, "rb") as file:
            start = file.read(20)
    except OSError as error:
        raise WeightsError(f"weights: cannot read {path}: {error.strerror or error}") from None
    if len(start) < 16:
        raise WeightsError(f"weights: {path}: expected a header of 16 or 20 bytes, got a file of {len(start)}")
    header = WeightsHeader(*_VERSION.unpack_from(start))
    if len(start) < header.size:
        raise WeightsError(f"weights: {path}: expected a header of {header.size} bytes, got a file of {len(start)}")
    (seen,) = struct.unpack_from("<Q" if header.wide else "<I", start, _VERSION.size)
    return WeightsHeader(header.major, header.minor, header.revision, seen)


def file_size(slots: Sequence[WeightSlot], header: WeightsHeader | None = None) -> int:
    """Bytes of the file for a network's slots."""
    return (header or WeightsHeader()).size + 4 * sum(slot.tensor.numel() for slot in slots)


@torch.no_grad()
def load_weights(path: str | Path, slots: Sequence[WeightSlot], *, allow_shorter: bool = False) -> WeightsHeader:
    """Fill the tensors of ``slots`` from a file; nothing is touched unless the size fits.

    Args:
        path: the ``.weights`` file. slots: in the file's order.
        allow_shorter: the file may end early between two slots (a pretrained trunk); the rest keeps its values.

    Returns: the header. Raises: WeightsError naming the slot where a truncated file ends, or how much a longer one is over.
    """
    _check_machine()
    header = read_header(path)
    have, need = os.path.getsize(path), file_size(slots, header)
    if have > need:
        raise WeightsError(f"weights: {path}: expected {need} bytes for this network, got {have}: {have - need} too many")
    count = len(slots)
    if have < need:
        count, inside = _slot_at(slots, have - header.size)
        if inside or not allow_shorter:
            raise WeightsError(
                f"weights: {path}: expected {need} bytes for this network, got {have}: the file ends in {slots[count].name}"
            )
    with open(path, "rb") as file:
        file.seek(header.size)
        for slot in slots[:count]:
            data = bytearray(4 * slot.tensor.numel())
            if file.readinto(data) != len(data):
                raise WeightsError(f"weights: {path}: the file became shorter while it was read, in {slot.name}")
            if not data:
                continue
            values = torch.frombuffer(data, dtype=torch.float32)
            if slot.connected and header.transposed:
                outputs, inputs = slot.tensor.shape
                slot.tensor.copy_(values.view(inputs, outputs).T)
            else:
                slot.tensor.copy_(values.view(slot.tensor.shape))
    return header


@torch.no_grad()
def save_weights(path: str | Path, slots: Sequence[WeightSlot], header: WeightsHeader | None = None) -> None:
    """Write the tensors of ``slots``; the file appears whole or not at all.

    Raises: WeightsError for a tensor that is not float32, or a path that cannot be written.
    """
    _check_machine()
    header, path = header or WeightsHeader(), Path(path)
    for slot in slots:
        if slot.tensor.dtype != torch.float32:
            raise WeightsError(f"weights: {slot.name}: expected float32, which the format stores, got {slot.tensor.dtype}")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(header.pack())
                for slot in slots:
                    tensor = slot.tensor.T if slot.connected and header.transposed else slot.tensor
                    if tensor.numel():
                        file.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise WeightsError(f"weights: cannot write {path}: {error.strerror or error}") from None


def _slot_at(slots: Sequence[WeightSlot], offset: int) -> tuple[int, bool]:
    """The slot that the byte ``offset`` behind the header falls into, and whether it is inside and not at its start."""
    for i, slot in enumerate(slots):
        if offset < 4 * slot.tensor.numel():
            return i, offset > 0
        offset -= 4 * slot.tensor.numel()
    return len(slots) - 1, True


def _check_machine() -> None:
    if sys.byteorder != "little":
        raise WeightsError("weights: expected a little-endian machine like the format, got a big-endian one")
