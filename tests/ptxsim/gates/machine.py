"""What ptxas and the disassembler say of compiled kernels: registers, spills, width of accesses, tensor-core instructions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import toolchain
from . import limits

ARCHITECTURES = ("80", "90", "100", "120")
HALVES = (torch.float16, torch.bfloat16)


def ptxas_facts(messages: str) -> dict[str, dict[str, int]]:
    """Per kernel in the messages of `ptxas -v`: registers, stack, spill_stores, spill_loads, shared (static bytes)."""
    facts: dict[str, dict[str, int]] = {}
    for part in re.split(r"Compiling entry function '", messages)[1:]:
        sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        facts[part[: part.index("'")]] = {
            "registers": int(re.search(r"Used (\d+) registers", part).group(1)),
            "shared": int(shared.group(1)) if shared else 0,
            **dict(zip(("stack", "spill_stores", "spill_loads"), map(int, sizes), strict=True)),
        }
    return facts


def tool() -> str | None:
    """cuobjdump, which comes with nvcc and with triton."""
    return toolchain.cuda_tool("cuobjdump")


def disassembled(cubin: Path) -> dict[str, str]:
    """SASS per kernel of a cubin."""
    assert tool() is not None, "no cuobjdump (it comes with nvcc and with triton)"
    listing = subprocess.run([tool(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = {text.split()[0]: text for text in re.split(r"Function : ", listing)[1:]}
    assert found, f"{cubin}: no function"
    return found


def loops(listing: str) -> list[str]:
    """Bodies of the loops of one function's SASS: what lies between a branch back and its target."""
    lines = [m.groups() for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", listing)]
    found = []
    for i, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)*`?\(?(0x[0-9a-f]+)", text)
        if target and int(target.group(1), 16) < int(address, 16):
            first = next(j for j, (a, _) in enumerate(lines) if int(a, 16) >= int(target.group(1), 16))
            found.append("\n".join(t for _, t in lines[first : i + 1]))
    return found


def problems(backend: ModuleType, arch: str, only: Any = None) -> list[str]:
    """Kernels with a stack, spills, local memory or atomics, too many registers, or narrower accesses than promised."""
    found = []
    for kernel, name, dtype, used, sass in backend.machine_code(arch, only):
        most, name = limits.limits_of(backend.NAME, backend.stem(kernel)), f"{name} on sm_{arch}"
        if used["stack"] or used["spill_stores"] or used["spill_loads"]:
            found.append(f"{name} spills: {used}")
        if used["registers"] > most.registers:
            found.append(f"{name} has {used['registers']} registers, more than {most.registers}")
        if re.search(r"\b(LDL|STL)\b", sass):
            found.append(f"{name} uses local memory")
        # ATOMS.OR and .AND RZ, [UR..]: the books of tensor memory on sm_100, kept in shared memory by tcgen05's allocation.
        if re.search(r"(?<!BAR\.)\b(ATOM|ATOMG|ATOMS(?!\.(?:OR|AND) RZ, \[UR)|RED|REDG)\.", sass):
            found.append(f"{name} uses atomics")
        if most.mma and dtype in HALVES and not re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", sass):
            found.append(f"{name}: no tensor-core instruction")
        if backend.is_vector(kernel):
            # Triton's kernels work on one tile a program: where there is no loop, the whole body is the main loop.
            bodies = loops(sass) if backend.NAME == "cuda" else [sass]
            for what, wanted, pattern in (
                ("load", most.wide_loads, r"\b(LDG|LDGSTS)\.E[\w.]*\.128"),
                ("store", most.wide_stores, r"\bSTG\.E[\w.]*\.128"),
            ):
                if wanted and not any(re.search(pattern, body) for body in bodies):
                    found.append(f"{name}: no {what} of 128 bits in a main loop ({len(bodies)} loops)")
    return found
