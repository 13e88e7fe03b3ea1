"""Finds and loads the two compiled parts; importing the package never fails because of them.

``_C``    pybind11 module: host facts and the CPU kernels (stable ABI; runs on any torch >= 2.11).
``_cuda`` shared library: CUDA kernels and their registrations; loaded only where torch is a CUDA build of the
          CUDA major that the library was built with.

The reason why a part is not there is kept, not raised: :func:`missing_reason` gives it, with the cure, to the call
that needs the part, and ``python -m dl4ds_kernels info`` prints it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import struct
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent
_REBUILD = "rebuild it with `pip install --no-build-isolation -e .` (or `pip install .`) in this environment"
MIN_TORCH = (2, 11)


@dataclass
class Part:
    """One compiled part: whether it is loaded and, if not, why and what to do."""

    name: str
    loaded: bool = False
    reason: str = ""
    cure: str = ""
    path: str = ""

    def message(self) -> str:
        return f"{self.reason}; {self.cure}" if self.cure else self.reason


_cpu = Part("_C")
_cuda = Part("_cuda")
_module: types.ModuleType | None = None


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def build_info() -> dict[str, Any]:
    """Facts written by setup.py when it built the parts (empty for a tree that was never built)."""
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def _find(stem: str) -> Path | None:
    candidates = sorted(p for p in _PACKAGE.glob(f"{stem}.*") if p.suffix in (".so", ".pyd"))
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    for path in candidates:
        if any(path.name == stem + suffix for suffix in suffixes):
            return path
    return candidates[0] if candidates else None


def _check_whole(path: Path) -> None:
    """Raise ImportError for an ELF file that ends before its section table does: loading one kills the process (SIGBUS)."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:5] != b"\x7fELF\x02" or len(head) < 64:  # not 64-bit ELF: left to the loader's own message
        if head[:4] == b"\x7fELF" or not head:
            raise ImportError(f"{path.name} is truncated")
        return
    table, entry, count = struct.unpack_from("<Q", head, 0x28)[0], *struct.unpack_from("<HH", head, 0x3A)
    if table + entry * count > path.stat().st_size:
        raise ImportError(f"{path.name} is truncated")


def _load_cpu() -> None:
    global _module
    path = _find("_C")
    if path is None:
        _cpu.reason, _cpu.cure = "the C++ part dl4ds_kernels._C is not built", _REBUILD
        return
    _cpu.path = str(path)
    if _torch_version() < MIN_TORCH:
        _cpu.reason = f"the C++ part needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, this is torch {torch.__version__}"
        _cpu.cure = "upgrade torch"
        return
    try:
        _check_whole(path)
        _module = importlib.import_module("dl4ds_kernels._C")
        _cpu.loaded = True
    except Exception as error:  # a torn, foreign or mismatched file must not break `import dl4ds_kernels`
        built = build_info().get("python", "another Python")
        _cpu.reason = f"the C++ part {path.name} was found but does not load ({error}); it was built for {built}"
        _cpu.cure = _REBUILD


def _load_cuda() -> None:
    path = _find("_cuda")
    built = build_info().get("cuda_version")
    if torch.version.cuda is None:
        _cuda.reason = f"torch {torch.__version__} is not a CUDA build"
        _cuda.cure = "install a CUDA build of torch, then " + _REBUILD
        return
    if path is None:
        skipped = build_info().get("cuda_skipped")
        _cuda.reason = "the CUDA part dl4ds_kernels._cuda is not built" + (f" ({skipped})" if skipped else "")
        _cuda.cure = f"{_REBUILD} with DL4DS_BUILD_CUDA=1; until then the Triton backend serves CUDA tensors"
        return
    _cuda.path = str(path)
    if built and built.split(".")[0] != torch.version.cuda.split(".")[0]:
        _cuda.reason = f"the CUDA part was built for CUDA {built}, torch {torch.__version__} uses CUDA {torch.version.cuda}"
        _cuda.cure = f"{_REBUILD}; until then the Triton backend serves CUDA tensors"
        return
    try:
        _check_whole(path)
        torch.ops.load_library(str(path.resolve()))
        _cuda.loaded = True
    except Exception as error:
        _cuda.reason = f"the CUDA part {path.name} was found but does not load ({error})"
        _cuda.cure = f"{_REBUILD}; until then the Triton backend serves CUDA tensors"


def load() -> None:
    """Load what can be loaded, once. Called by ``dl4ds_kernels/__init__.py`` before the ops are defined."""
    if not _cpu.loaded and not _cpu.reason:
        _load_cpu()
        _load_cuda()


def host() -> types.ModuleType | None:
    """The pybind11 module ``_C`` or None when it is not loaded."""
    return _module


def status() -> dict[str, Part]:
    """State of both compiled parts, by name."""
    return {"_C": _cpu, "_cuda": _cuda}


def missing_reason(device_type: str) -> str:
    """Why there is no compiled kernel for ``device_type`` and what to do about it."""
    part = {"cpu": _cpu, "cuda": _cuda}.get(device_type)
    if part is None:
        return f"dl4ds_kernels has no compiled kernels for device type {device_type!r}; move the tensors to cpu or cuda"
    if part.loaded:
        return f"the compiled part {part.name} has no kernel for this op; {_REBUILD}"
    return part.message()
