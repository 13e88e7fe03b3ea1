"""For the ``_*_triton_offline.py`` files of this folder: the shared fixtures, and the inspection of compiled kernels.

Those files run in a process where Triton compiles (``run_offline``); each adds what its kernels write to ``WRITTEN``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_offline(file: str) -> None:
    """Run an offline test file beside the caller in a process of its own, where Triton compiles for GPUs."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--noconftest", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]


def inspect_kernels(launches: list[Any], capability: int, folder: Path, vectors: set[str], registers: int = 72) -> set[str]:
    """Compile what was launched: no spills, at most ``registers``; kernels in ``vectors`` move 16 bytes at a time.

    Returns the names of the kernels seen.
    """
    from _triton_offline import compile_launch

    seen = set()
    for kernel, programs, given in launches:
        compiled = compile_launch(kernel, programs, given, capability)
        used = compiled.resources(folder)
        seen.add(compiled.name)
        assert used["STACK"] == used["LOCAL"] == 0, f"{compiled.name}: spills, {used}"
        assert used["REG"] <= registers, f"{compiled.name}: {used}"
        if compiled.name in vectors:
            accesses = compiled.global_accesses()
            assert "v4.b32" in accesses or "v2.b64" in accesses, f"{compiled.name}: {accesses}"
    return seen
