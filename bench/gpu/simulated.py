"""Dry run only: the GPU kernels of every op on the PTX simulator of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run() -> dict[str, str]:
    """Today's share of the simulator's gates (`make test` takes the same), as pytest's last line."""
    if not (REPOSITORY / "tests" / "ptxsim").is_dir():
        return {"kernels": "SKIP: no tests/ here (the simulator is not installed with the package)"}
    call = [sys.executable, "-m", "pytest", "-q", "-m", "not full", "tests/ptxsim/test_gates.py", "-k", "results_and_traffic"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=REPOSITORY)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {
        f"kernels ({lines[-1].strip('= ')})" if lines else "kernels": "right"
        if done.returncode == 0
        else "\n".join(lines[-30:])
    }
