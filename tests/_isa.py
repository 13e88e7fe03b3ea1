"""A test's code once for each instruction set of the CPU part, which a process chooses when it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

every_isa = pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])


def run_with(isa: str, code: str, test_file: str) -> str:
    """What ``code`` prints in a new process of this ISA, with the folder of ``test_file`` as its argument.

    Skips the test where the CPU lacks the ISA.
    """
    command = [sys.executable, "-c", code, str(Path(test_file).parent)]
    # Test files import this one.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"DL4DS_CPU_ISA": isa, "PYTHONPATH": path}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if "this machine does not have" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr
    return result.stdout
