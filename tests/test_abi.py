"""The libtorch stable ABI: no C++ symbol of torch in the built files, and the same files run under another torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from dl4ds_kernels import _extension

ROOT = Path(__file__).parent.parent
PARTS = [Path(part.path) for part in _extension.status().values() if part.path]
SECOND_TORCH, OLDEST_TORCH = "2.13.0", "2.10.0"


def tool(name: str, *arguments: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name.split(".")[0])
def test_uses_the_c_interface_of_torch(part: Path) -> None:
    symbols = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", part).splitlines()]
    assert any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in symbols), "the C shims are what it should use"


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name.split(".")[0])
def test_nothing_ties_it_to_this_torch_or_machine(part: Path) -> None:
    """No C++ symbol of torch, no library but torch's and the run times', no RPATH: what a release is held to."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", tool("readelf", "-d", part))
    assert any("torch" in name for name in needed) and not any("torch_python" in name or "c10" in name for name in needed)
    spec = importlib.util.spec_from_file_location("dist_tool", ROOT / "tools/dist.py")
    dist = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dist)
    assert dist.abi_faults(part) == []


def second_environment(version: str) -> Path:
    """Python of an environment with another torch, made once; torch apart it sees the packages of this one."""
    tag = f"abi-torch-{version}-cpython-{sys.version_info.major}{sys.version_info.minor}"
    folder, stamp = ROOT / "build" / tag, ROOT / "build" / tag / "complete"
    python = folder / "bin" / "python"
    if stamp.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
    pip = [python, "-m", "pip", "install", "-q", "--retries", "1", "--timeout", "20"]
    wheel = f"torch=={version}+cpu"
    # pip's own configuration first (a local folder of wheels), then PyTorch's index of CPU wheels; PyPI has CUDA builds only:
    # of the oldest one for CUDA 12, gigabytes with its libraries, so only in the full run.
    choices = [(["--no-deps"], wheel), (["--no-deps", "--index-url", "https://download.pytorch.org/whl/cpu"], wheel)]
    if version == OLDEST_TORCH:
        choices.append(([], f"torch=={version}"))
    for extra, wheel in choices:
        result = subprocess.run([*pip, *extra, wheel], capture_output=True, text=True, timeout=900)
        if result.returncode == 0:
            break
    else:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"{wheel} cannot be had here: {result.stderr.strip().splitlines()[-1]}")
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "zz_packages_of_the_first.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    stamp.touch()
    return python


@pytest.mark.full
@pytest.mark.parametrize("version", [SECOND_TORCH, OLDEST_TORCH])
def test_same_files_under_another_torch(version: str) -> None:
    """Forward and backward of every op on the CPU kernels that were built against this torch."""
    if torch.__version__.startswith(version):
        pytest.skip(f"this torch is {version} itself")
    if not _extension.status()["_C"].loaded:
        pytest.skip(_extension.missing_reason("cpu"))
    python = second_environment(version)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    facts = "import torch, dl4ds_kernels as dk; print(torch.__version__, dk._extension.status()['_C'])"
    loaded = subprocess.run([python, "-c", facts], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert loaded.startswith(version) and "loaded=True" in loaded and str(PARTS[0]) in loaded
    files = [f"tests/ops/test_{op}.py" for op in ("bn_act", "add_act", "conv_bn_act")]
    selection = "cpu and (test_forward or test_backward or prepacked) and (nhwc or eval or H28)"
    command = [python, "-m", "pytest", *files, "-k", selection, "-m", "not slow and not full", "-p", "no:randomly"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", result.stdout + " 0 passed").group(1)) > 200
