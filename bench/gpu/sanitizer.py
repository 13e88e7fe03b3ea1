"""compute-sanitizer over every op: stray accesses, uninitialised reads, races in shared memory, barriers.

pip install nvidia-cuda-sanitizer-api      # or a CUDA toolkit on PATH
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
CHECK = Path(__file__).resolve().parents[1] / "gpu_check.py"


def executable() -> str | None:
    """compute-sanitizer from PATH, or from the package nvidia-cuda-sanitizer-api."""
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return on_path
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for found in Path(folder).rglob("compute-sanitizer"):
            if found.is_file():
                return str(found)
    return None


def run(dry: bool) -> dict[str, str]:
    """{tool: "right", "SKIP: why" or the end of its report}. A dry run makes the same calls once, without the tool."""
    call = [sys.executable, str(CHECK), "--only-parity-small", *(["--dry-run"] if dry else [])]
    tool = executable()
    if dry:
        done = subprocess.run(call, capture_output=True, text=True)
        return {"the calls alone": "right" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]}
    if tool is None:
        return dict.fromkeys(TOOLS, "SKIP: no compute-sanitizer (pip install nvidia-cuda-sanitizer-api)")
    results = {}
    for name in TOOLS:
        done = subprocess.run([tool, "--tool", name, "--error-exitcode", "1", *call], capture_output=True, text=True)
        results[name] = "right" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
    return results
