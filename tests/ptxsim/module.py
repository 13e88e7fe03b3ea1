"""Launching kernels of a PTX module on numpy arrays and CPU tensors."""

from __future__ import annotations

import ctypes as c
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import library as core
from .report import Report


def aligned(array: Any) -> Any:
    """A copy that begins at a multiple of 256 bytes, as device allocations do (numpy's begin at multiples of 16)."""
    if isinstance(array, np.ndarray):
        buffer = np.empty(array.nbytes + 256, np.uint8)
        start = -buffer.ctypes.data % 256
        copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy
    import torch

    buffer = torch.empty(array.numel() * array.element_size() + 256, dtype=torch.uint8)
    start = -buffer.data_ptr() % 256
    copy = torch.from_numpy(buffer.numpy()[start : start + array.numel() * array.element_size()]).view(array.dtype)
    return torch.as_strided(copy, array.shape, array.stride()).copy_(array)


class Arr:
    """An array argument: a numpy array or a CPU tensor with a name for the reports.

    read_only: writes are reported. scratch: the contents are poisoned before the launch, and reading a byte that no
    kernel has written is reported. output: the same, and bytes that stay unwritten are reported too.
    """

    def __init__(self, array: Any, name: str, read_only: bool = False, output: bool = False, scratch: bool = False) -> None:
        if isinstance(array, np.ndarray):
            if not array.flags.c_contiguous:
                raise ValueError(f"{name}: pass a contiguous array (or its base, and offsets as arguments)")
            self.address, self.bytes = array.ctypes.data, array.nbytes
        else:  # a torch tensor: its whole storage belongs to it
            storage = array.untyped_storage()
            self.address, self.bytes = storage.data_ptr(), storage.nbytes()
            if array.storage_offset():
                raise ValueError(f"{name}: pass a tensor with storage offset 0")
        self.array, self.name = array, name
        self._flags = (
            (0 if read_only else core.WRITABLE) | (core.UNDEFINED if output or scratch else 0) | (core.OUTPUT if output else 0)
        )
        if output or scratch:
            c.memset(self.address, 0xFF, self.bytes)

    def register(self) -> int:
        """Makes the array known to the simulator; returns the tagged address to hand to kernels."""
        return core.library().ptxsim_register(self.address, self.bytes, self._flags, self.name.encode())


class Struct:
    """A by-value structure argument: a `struct` format with explicit padding ("<3Q2i") and its values, arrays included."""

    def __init__(self, layout: str, *values: Any) -> None:
        self.layout, self.values = layout, values

    def pack(self) -> bytes:
        """The bytes of the structure; registers its arrays."""
        return struct.pack(self.layout, *(v.register() if isinstance(v, Arr) else v for v in self.values))


def _triple(size: int | Sequence[int]) -> c.Array:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return (c.c_uint32 * 3)(*sizes, *(1,) * (3 - len(sizes)))


def _argument_bytes(value: Any, kind: str, size: int) -> bytes:
    if isinstance(value, Arr):
        return value.register().to_bytes(8, "little")
    if isinstance(value, Struct):
        return value.pack()
    if isinstance(value, (bytes, bytearray, c.Structure)):
        return bytes(value)
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, float):
        return {2: np.float16, 4: np.float32, 8: np.float64}[size](value).tobytes()
    if kind in ("f32", "f64"):
        return _argument_bytes(float(value), kind, size)
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


class Module:
    """PTX code, from its text or from a file."""

    def __init__(self, ptx: str | Path) -> None:
        text = Path(ptx).read_text() if isinstance(ptx, Path) or "\n" not in ptx else ptx
        self.text = text
        self._handle = core.library().ptxsim_load(text.encode())
        if not self._handle:
            raise core.SimulatorError(core.last_error())
        description = core.library().ptxsim_describe(self._handle)
        if description is None:
            raise core.SimulatorError(core.last_error())
        self.kernels: dict[str, dict[str, Any]] = json.loads(description.decode())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            core.library().ptxsim_unload(self._handle)

    def kernel(self, name: str) -> str:
        """The full name of the only kernel whose name contains `name`."""
        found = [k for k in self.kernels if k == name] or [k for k in self.kernels if name in k]
        if len(found) != 1:
            raise LookupError(f"{len(found)} kernels match {name!r}; the module has {', '.join(self.kernels)}")
        return found[0]

    def unsupported(self) -> list[str]:
        """Instructions of all kernels that the simulator can't execute."""
        return [problem for kernel in self.kernels.values() for problem in kernel["unsupported"]]

    @contextmanager
    def replacing(self, kernel: str) -> Iterator[None]:
        """Inside, host launchers that launch a kernel of this name run this module's version of it."""
        core.library().ptxsim_replace(kernel.encode(), self._handle)
        try:
            yield
        finally:
            core.library().ptxsim_replace(kernel.encode(), None)

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        smem: int = 0,
        stop: bool = True,
        **options: int,
    ) -> Report:
        """Runs one kernel and returns its Report.

        args: one per kernel parameter: Arr, a numpy array (writable), int, float, numpy scalar, Struct, bytes or
        ctypes structure; missing trailing ones are 0 (Triton's scratch pointers). smem: bytes of dynamic shared memory.
        stop: raise SimulatorError when the kernel can't go on; with False the report says so. options: races,
        traffic, lazy_copies, schedule (seed of block and warp order), max_reports, budget, tags.
        """
        name = self.kernel(kernel)
        parameters = self.kernels[name]["parameters"]
        if len(args) > len(parameters):
            raise TypeError(f"{name} takes {len(parameters)} arguments, not {len(args)}")
        core.set_options(**options)
        core.library().ptxsim_clear()
        buffers = []
        for i, (kind, size) in enumerate(parameters):
            value = args[i] if i < len(args) else 0
            if isinstance(value, np.ndarray):
                value = Arr(value, f"arg{i}")
            data = _argument_bytes(value, kind, size)
            if len(data) != size:
                raise TypeError(f"{name}: argument {i} has {len(data)} bytes, the parameter {size}")
            buffers.append(c.create_string_buffer(data, size))
        pointers = (c.c_void_p * max(1, len(buffers)))(*map(c.addressof, buffers))
        core.take_results()
        core.library().ptxsim_launch(self._handle, name.encode(), _triple(grid), _triple(block), smem, pointers)
        report = Report.from_result(core.take_results()[-1])
        if stop and report.stopped:
            raise core.SimulatorError("\n".join([report.stopped, *report.errors[:-1]]))
        return report
