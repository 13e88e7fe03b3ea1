"""Finds and loads the two compiled parts; importing the package never fails because of them.

``_C``    pybind11 module: host facts and the CPU kernels (stable ABI; runs on any torch >= 2.10).
``_cuda`` shared library: CUDA kernels and their registrations; loaded only where torch is a CUDA build of the
          CUDA major that the library was built with.

The reason why a part is not there is kept, not raised: :func:`missing_reason` gives it, with the cure, to the call
that needs the part, and ``python -m dl4ds_kernels info`` prints it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import re
import struct
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent
_REBUILD = "rebuild it with `pip install --no-build-isolation -e .` (or `pip install .`) in this environment"
MIN_TORCH = (2, 10)


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
        facts = json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    # All facts are texts or null; anything else was not written by setup.py.
    return {k: v for k, v in facts.items() if v is None or isinstance(v, str)} if isinstance(facts, dict) else {}


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
        if torch.version.hip is not None:
            _cuda.reason = f"torch {torch.__version__} is a ROCm build; there is no HIP part"
            _cuda.cure = "the Triton backend serves these GPUs (pip install triton), stock torch everything else"
            return
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
        # torch's loader names only the file; why is in the exception that it came from
        _cuda.reason = f"the CUDA part {path.name} was found but does not load ({error.__cause__ or error})"
        _cuda.cure = f"{_REBUILD}; until then the Triton backend serves CUDA tensors"


def load() -> None:
    """Load what can be loaded, once. Called by ``dl4ds_kernels/__init__.py`` before the ops are defined."""
    if not _cpu.loaded and not _cpu.reason:
        _load_cpu()
        _load_cuda()


def gpu_archs() -> str:
    """The architectures that the CUDA part was compiled for, as TORCH_CUDA_ARCH_LIST spells them; empty without one."""
    return _module.cuda_archs() if _module is not None else build_info().get("cuda_archs") or ""


def no_code_for(capability: tuple[int, int]) -> str:
    """Why the CUDA part does not run on a GPU of this capability; empty where it does.

    Machine code runs on GPUs of its major number with the same or a higher minor one; PTX is compiled by the driver for
    anything newer. Asked before a launch: "no kernel image" comes late and names no cure.
    """
    archs = gpu_archs()
    for entry in filter(None, re.split(r"[;\s]+", archs)):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            continue
        major, minor, specific, ptx = int(found[1]), int(found[2]), found[3], found[4]
        if capability == (major, minor) or (not specific and capability[0] == major and capability[1] >= minor):
            return ""
        if ptx and not specific and capability >= (major, minor):
            return ""
    number = f"{capability[0]}.{capability[1]}"
    return (
        f"the CUDA part was compiled for {archs or 'no GPU'}, this GPU has compute capability {number}; {_REBUILD} with "
        f"TORCH_CUDA_ARCH_LIST={number}; until then the Triton backend or stock torch serves it"
    )


_runs_on: dict[int, bool] = {}  # by device index


def runs_on_gpu(index: int) -> bool:
    """Whether the CUDA part has code for this GPU; asked of the driver once (not while compiling: then it is assumed)."""
    known = _runs_on.get(index)
    if known is None:
        if torch.compiler.is_compiling():
            return True
        known = _runs_on[index] = not no_code_for(torch.cuda.get_device_capability(index))
    return known


def host() -> types.ModuleType | None:
    """The pybind11 module ``_C`` or None when it is not loaded."""
    return _module


def status() -> dict[str, Part]:
    """State of both compiled parts, by name."""
    return {"_C": _cpu, "_cuda": _cuda}


def missing_reason(device_type: str) -> str:
    """Why there is no compiled kernel for ``device_type`` and what to do about it."""
    part = {"cpu": _cpu, "cuda": _cuda}.get(device_type)
    if device_type == "cuda" and _cuda.loaded and torch.cuda.is_available():
        missing = no_code_for(torch.cuda.get_device_capability())
        if missing:
            return missing
    if part is None:
        return f"dl4ds_kernels has no compiled kernels for device type {device_type!r}; move the tensors to cpu or cuda"
    if part.loaded:
        return f"the compiled part {part.name} has no kernel for this op; {_REBUILD}"
    return part.message()
