"""A writer of Torch7's binary format for tests, written from the format's description and sharing no code with the reader."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch

ELEMENTS = {
    torch.float32: ("Float", "<f4"),
    torch.float64: ("Double", "<f8"),
    torch.int64: ("Long", "<i8"),
    torch.uint8: ("Byte", "u1"),
}


class Lua:
    """A Lua object: class name and fields."""

    def __init__(self, name: str, version: int = 1, **fields: Any) -> None:
        self.name, self.version, self.fields = name, version, fields


class Function:
    """A Lua function: byte code and the variables that it closes over, by name."""

    def __init__(self, code: str, **upvalues: Any) -> None:
        self.code, self.upvalues = code, [{"name": n, "value": v} for n, v in upvalues.items()]


class Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self.numbers: dict[int, int] = {}
        self.alive: list[Any] = []

    def ints(self, *values: int) -> None:
        self.out += struct.pack(f"<{len(values)}i", *values)

    def longs(self, *values: int) -> None:
        self.out += struct.pack(f"<{len(values)}q", *values)

    def text(self, value: str) -> None:
        self.ints(len(value))
        self.out += value.encode("latin-1")

    def numbered(self, value: Any) -> bool:
        """Writes the number of an object; True if its body has to follow."""
        known = id(value) in self.numbers
        if not known:
            self.numbers[id(value)] = len(self.numbers) + 1
            self.alive.append(value)
        self.ints(self.numbers[id(value)])
        return not known

    def write(self, value: Any) -> Writer:
        if value is None:
            self.ints(0)
        elif isinstance(value, bool):
            self.ints(5, int(value))
        elif isinstance(value, (int, float)):
            self.ints(1)
            self.out += struct.pack("<d", value)
        elif isinstance(value, str):
            self.ints(2)
            self.text(value)
        elif isinstance(value, (dict, list)):
            self.ints(3)
            if self.numbered(value):
                items = list(enumerate(value, 1)) if isinstance(value, list) else list(value.items())
                self.ints(len(items))
                for key, item in items:
                    self.write(key)
                    self.write(item)
        elif isinstance(value, Lua):
            self.ints(4)
            if self.numbered(value):
                if value.version:  # files from before versions have none
                    self.text(f"V {value.version}")
                self.text(value.name)
                if value.name == "nn.DataParallelTable" and value.version >= 2:
                    self.write(value.fields["gpuAssignments"])
                self.write(value.fields)
        elif isinstance(value, Function):
            self.ints(8)
            if self.numbered(value):
                self.text(value.code)
                self.write(value.upvalues)
        elif isinstance(value, torch.Tensor):
            self.tensor(value)
        else:
            raise TypeError(type(value))
        return self

    def tensor(self, value: torch.Tensor) -> None:
        kind, form = ELEMENTS[value.dtype]
        self.ints(4)
        if not self.numbered(value):
            return
        self.text("V 1")
        self.text(f"torch.{kind}Tensor")
        self.ints(value.dim())
        self.longs(*value.shape, *value.stride(), value.storage_offset() + 1)
        base = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        self.ints(4)
        key = value.untyped_storage().data_ptr()
        known = key in self.numbers
        self.ints(self.numbers.setdefault(key, len(self.numbers) + 1))
        if not known:
            self.text("V 1")
            self.text(f"torch.{kind}Storage")
            self.longs(base.numel())
            self.out += base.numpy().astype(np.dtype(form)).tobytes()
        self.alive.append(base)


def t7(value: Any) -> bytes:
    return bytes(Writer().write(value).out)
