"""The objects of the last build, for tests that run what ships: launchers with their kernels' PTX, compiled only once."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# The folder that setup.py builds in.
BUILD = ROOT / "build" / f"cpython-{sys.version_info.major}{sys.version_info.minor}-torch-{torch.__version__}"
MAGIC, PTX, COMPRESSED = 0xBA55ED50, 1, 0xA000  # of a fat binary; kind of an entry; flags of an entry


def built_objects(sources: Sequence[Path], flags: Sequence[str]) -> list[Path] | None:
    """One object for each source; None where the last build had other flags or GPUs, or the sources have changed since."""
    objects = [BUILD / f"{source.relative_to(ROOT)}.o" for source in sources]
    file = BUILD / "build.ninja"
    if not file.exists() or not all(o.exists() for o in objects):
        return None
    text = " ".join(file.read_text().replace("$\n", " ").split())
    rule = text.partition("rule nvcc ")[2].partition("deps = ")[0]
    # NDEBUG and the macros decide what the launchers check, CUTLASS whether there are any; one PTX is what can be run.
    if any(f" {flag} " not in rule for flag in (*flags, "--no-compress")):
        return None
    if rule.count("-gencode") != 2 or "code=compute_80" not in rule:
        return None
    try:
        asked = [sys.executable, "-m", "ninja", "-n", "-C", str(BUILD), *map(str, objects)]
        if "no work to do" not in subprocess.run(asked, capture_output=True, text=True, check=True).stdout:
            return None
    except (OSError, subprocess.CalledProcessError):
        return None
    return objects


def ptx_in(path: Path) -> str:
    """The PTX text that nvcc embedded in an object; empty if there is none, or only a compressed one."""
    data, texts = path.read_bytes(), []
    at = data.find(struct.pack("<I", MAGIC))
    while at >= 0:
        _, header, size = struct.unpack_from("<HHQ", data, at + 4)
        entry, end = at + header, at + header + size
        while entry < end:
            (kind,), (head, length) = struct.unpack_from("<H", data, entry), struct.unpack_from("<IQ", data, entry + 4)
            (entry_flags,) = struct.unpack_from("<Q", data, entry + 40)
            if kind == PTX and not entry_flags & COMPRESSED:
                texts.append(data[entry + head : entry + head + length].rstrip(b"\0").decode())
            entry += head + length
        at = data.find(struct.pack("<I", MAGIC), end)
    return _indented(texts[0]) if len(texts) == 1 else ""


def _indented(ptx: str) -> str:
    """What stands in braces after a tab, as nvcc prints it (what it embeds has no white space): a body ends at `}` alone."""
    lines, depth = [], 0
    for line in ptx.split("\n"):
        inside = depth > 0
        depth += line.count("{") - line.count("}")
        lines.append(f"\t{line}" if inside and depth and line else line)
    return "\n".join(lines)
