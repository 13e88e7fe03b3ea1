"""What the gate tests share: today's share, and running a check where Triton compiles."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import build

ROTATION = int(os.environ.get("DL4DS_ROTATION", time.time() // 86400))


def rotating(values: list, share: int) -> list:
    """All values as pytest parameters; those outside today's share carry the `full` mark."""
    start = ROTATION * share % max(len(values), 1)
    today = {(start + i) % len(values) for i in range(share)} if values else set()
    marks = {False: [pytest.mark.full], True: []}
    return [pytest.param(v, marks=marks[i in today], id=_label(v)) for i, v in enumerate(values)]


def _label(value: object) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return "-".join(p.stem if isinstance(p, Path) else str(p).removeprefix("torch.") for p in parts)


def where_triton_compiles(code: str) -> str:
    """Runs statements in a process with Triton's compiler (conftest gives this one its interpreter); the output, or fails."""
    paths = os.pathsep.join([str(build.REPOSITORY / "tests"), str(build.REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=build.REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout
