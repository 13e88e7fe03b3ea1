"""Torch7's binary ``.t7`` files (fb.resnet.torch, pose-hg-train): numbers, strings, tables, tensors and objects as plain data.

Nothing in a file is run: a Lua class becomes a :class:`T7Object` with its name and fields, a Lua function a :class:`T7Object`
named "function" without its byte code. Every length is checked against what is left of the file before anything is allocated.

Format (little-endian): each value is an int32 tag and a body; tables, tensors and objects carry an int32 number, and come once.
Most classes write one table, their fields; nn.DataParallelTable writes its list of GPUs before it since its version 2.
Reference: torch7's File.lua, generic/Tensor.c and generic/Storage.c; nn's BatchNormalization.lua and cunn's
DataParallelTable.lua for how these two changed between versions.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NIL, _NUMBER, _STRING, _TABLE, _OBJECT, _BOOLEAN, _FUNCTION, _OLD_FUNCTION, _NEW_FUNCTION = range(9)
_ELEMENTS = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "Cuda": torch.float32, "CudaDouble": torch.float64,
    "CudaHalf": torch.float16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8,
    "Byte": torch.uint8, "CudaLong": torch.int64, "CudaInt": torch.int32, "CudaByte": torch.uint8,
}  # fmt: skip
_MAX_DEPTH, _MAX_DIMENSIONS = 200, 16


class T7Error(ValueError):
    """A file that is no Torch7 file, or is damaged; the message has the offset in bytes."""


@dataclass(eq=False)
class T7Object:
    """An instance of a Lua class: ``name`` ("nn.Sequential") and ``fields``, most often a dict."""

    name: str
    fields: Any = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """The field ``key``."""
        return self.fields.get(key, default) if isinstance(self.fields, dict) else default


def load_t7(path: str | Path) -> Any:
    """What a ``.t7`` file holds, tensors on the CPU. Tables are dicts; those with keys 1 … n are lists.

    Raises: T7Error for a truncated or damaged file, an ASCII file, or one with bytes behind the value.
    """
    return parse_t7(Path(path).read_bytes())


def parse_t7(data: bytes) -> Any:
    """:func:`load_t7` of bytes."""
    reader = _Reader(data)
    value = reader.value(0)
    if reader.at != len(data):
        raise T7Error(f"t7: expected the end of the file at byte {reader.at}, got {len(data) - reader.at} more bytes")
    return value


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.seen: dict[int, Any] = {}

    def take(self, count: int, what: str) -> bytes:
        left = len(self.data) - self.at
        if count < 0 or count > left:
            raise T7Error(
                f"t7: {what} at byte {self.at}: expected {count} bytes, got {left} (truncated or not a binary t7 file)"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))[0]

    def string(self, what: str) -> str:
        return self.take(self.number("i", f"length of {what}"), what).decode("latin-1")

    def value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise T7Error(f"t7: value at byte {self.at}: expected at most {_MAX_DEPTH} levels")
        start = self.at
        tag = self.number("i", "tag")
        if tag == _NIL:
            return None
        if tag == _NUMBER:
            number = self.number("d", "number")
            return int(number) if number == number // 1 and abs(number) < 2**53 else number
        if tag == _STRING:
            return self.string("string")
        if tag == _BOOLEAN:
            return bool(self.number("i", "boolean"))
        if tag not in (_TABLE, _OBJECT, _FUNCTION, _OLD_FUNCTION, _NEW_FUNCTION):
            raise T7Error(f"t7: byte {start}: expected a tag from 0 to 8, got {tag}")
        index = 0 if tag == _FUNCTION else self.number("i", "number of an object")
        if index in self.seen:
            return self.seen[index]
        if tag == _TABLE:
            return self.table(index, depth)
        if tag == _OBJECT:
            return self.instance(index, depth)
        made = T7Object("function")
        if index:
            self.seen[index] = made
        self.string("function")
        made.fields = {"upvalues": self.value(depth + 1)}
        return made

    def table(self, index: int, depth: int) -> Any:
        count = self.number("i", "size of a table")
        if not 0 <= count <= (len(self.data) - self.at) // 8:  # a key and a value are two tags at least
            raise T7Error(f"t7: size of a table at byte {self.at}: expected what fits into the file, got {count} entries")
        made: dict[Any, Any] = {}
        self.seen[index] = made
        for _ in range(count):
            key = self.value(depth + 1)
            if isinstance(key, (dict, list, Tensor)):
                raise T7Error(f"t7: key before byte {self.at}: expected a string or number, got a {type(key).__name__}")
            made[key] = self.value(depth + 1)
        if made and all(key in made for key in range(1, len(made) + 1)):
            self.seen[index] = [made[key] for key in range(1, len(made) + 1)]
            return self.seen[index]
        return made

    def instance(self, index: int, depth: int) -> Any:
        name, version = self.string("class name"), 0.0
        if name.startswith("V "):
            at = self.at
            try:
                version = float(name[2:])
            except ValueError:
                raise T7Error(f"t7: byte {at}: expected a version such as 'V 1', got {name!r}") from None
            name = self.string("class name")
        kind, _, what = name.removeprefix("torch.").rpartition("Storage" if name.endswith("Storage") else "Tensor")
        if name.startswith("torch.") and kind in _ELEMENTS and not what:
            made = self.storage(kind) if name.endswith("Storage") else self.tensor(kind, depth)
            self.seen[index] = made
            return made
        made = T7Object(name)
        self.seen[index] = made
        if name == "nn.DataParallelTable" and version >= 2:
            self.value(depth + 1)  # on which GPUs its copies were
        made.fields = self.value(depth + 1)
        return made

    def storage(self, kind: str) -> Tensor:
        dtype = _ELEMENTS[kind]
        count = self.number("q", "size of a storage")
        raw = self.take(count * dtype.itemsize if count >= 0 else -1, f"{count} values of a {kind}Storage")
        return torch.frombuffer(bytearray(raw), dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def tensor(self, kind: str, depth: int) -> Tensor:
        dimensions = self.number("i", "dimensions of a tensor")
        if not 0 <= dimensions <= _MAX_DIMENSIONS:
            raise T7Error(f"t7: tensor at byte {self.at}: expected 0 to {_MAX_DIMENSIONS} dimensions, got {dimensions}")
        size = [self.number("q", "size of a tensor") for _ in range(dimensions)]
        stride = [self.number("q", "stride of a tensor") for _ in range(dimensions)]
        offset = self.number("q", "offset of a tensor") - 1
        storage = self.value(depth + 1)
        if storage is None or not dimensions:
            return torch.empty(0, dtype=_ELEMENTS[kind])
        if not isinstance(storage, Tensor) or storage.dtype is not _ELEMENTS[kind] or storage.dim() != 1:
            raise T7Error(f"t7: tensor before byte {self.at}: expected a {kind}Storage, got {type(storage).__name__}")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if min(size) < 0 or min(stride) < 0 or offset < 0 or (min(size) > 0 and last >= storage.numel()):
            raise T7Error(
                f"t7: tensor before byte {self.at}: expected a view within {storage.numel()} values, got size {size}, "
                f"stride {stride}, offset {offset}"
            )
        return torch.as_strided(storage, size, stride, offset)
