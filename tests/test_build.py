"""setup.py: a second build does nothing, wrong settings fail loudly, the facts are recorded, the network is not touched."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dl4ds_kernels import _extension

ROOT = Path(__file__).parent.parent
INFO = _extension.build_info()
BUILD = ROOT / "build" / f"cpython-{sys.version_info.major}{sys.version_info.minor}-torch-{torch.__version__}"
NETWORK = {"urllib", "http", "socket", "ssl", "ftplib", "requests", "httpx", "aiohttp"}


def build(root: Path, timeout: int = 170, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext --inplace`` in ``root`` with the settings that the present build was made with."""
    settings = {"DL4DS_BUILD_CUDA": "1" if INFO.get("cuda_version") else "0"}
    if INFO.get("cuda_archs"):
        settings["TORCH_CUDA_ARCH_LIST"] = INFO["cuda_archs"]
    env = {**os.environ, **settings, **environment}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def copy_of_sources(tmp_path: Path) -> Path:
    """What a build needs, in a folder of its own: a failing build must not touch the real one."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "dl4ds_kernels").mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "dl4ds_kernels" / name, tmp_path / "dl4ds_kernels")
    return tmp_path


def test_second_build_does_nothing() -> None:
    import ninja

    if not INFO or not (BUILD / "build.ninja").exists():
        pytest.skip("the package was not built in this checkout (installed from elsewhere, or never built)")
    pending = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "-n"], capture_output=True, text=True).stdout
    if "no work to do" not in pending:
        pytest.skip("sources are newer than the build: run `make build` first")
    parts = {path: path.stat() for path in (ROOT / "dl4ds_kernels").glob("_C*.so")} | {
        path: path.stat() for path in (ROOT / "dl4ds_kernels").glob("_cuda*.so")
    }
    assert parts
    result = build(ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "no work to do" in result.stdout
    for path, before in parts.items():
        after = path.stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino), path.name
    assert _extension.build_info() == INFO


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DL4DS_BUILD_CUDA": "maybe"}, ["DL4DS_BUILD_CUDA", "expected 0, 1 or auto", "'maybe'"]),
        ({"DL4DS_BUILD_CUDA": "0", "CXX": "false"}, ["the build failed", "CXX"]),
        ({"DL4DS_BUILD_CUDA": "0", "MAX_JOBS": "0"}, ["MAX_JOBS: expected a positive number, got '0'"]),
        ({"DL4DS_BUILD_CUDA": "0", "MAX_JOBS": "many"}, ["MAX_JOBS: expected a positive number, got 'many'"]),
        ({"DL4DS_BUILD_CUDA": "0", "CUTLASS_PATH": "/nowhere"}, ["CUTLASS_PATH", "cutlass/version.h", "got /nowhere"]),
    ],
    ids=["choice", "compiler", "no-jobs", "jobs", "cutlass"],
)
def test_wrong_settings_fail_loudly(environment: dict[str, str], words: list[str], copy_of_sources: Path) -> None:
    result = build(copy_of_sources, **environment)
    assert result.returncode != 0
    for word in words:
        assert word in result.stderr, result.stderr[-2000:]
    assert not list((copy_of_sources / "dl4ds_kernels").glob("*.so"))


def test_wrong_architecture_fails_loudly(copy_of_sources: Path) -> None:
    result = build(copy_of_sources, DL4DS_BUILD_CUDA="auto", TORCH_CUDA_ARCH_LIST="turing")
    if "CUDA part skipped" in result.stdout:
        pytest.skip("no CUDA toolkit for this torch: the list of architectures is not read")
    assert result.returncode != 0 and "TORCH_CUDA_ARCH_LIST: expected entries like 8.0" in result.stderr
    assert "'turing'" in result.stderr


def test_cuda_that_cannot_be_built_fails_when_asked_for(copy_of_sources: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build: what DL4DS_BUILD_CUDA=1 asks for can be done")
    result = build(copy_of_sources, DL4DS_BUILD_CUDA="1")
    assert result.returncode != 0 and "is not a CUDA build" in result.stderr


def test_build_info_is_recorded() -> None:
    if not INFO:
        pytest.skip("the package was not built by setup.py")
    wanted = {"version", "torch", "stable_abi_target", "python", "cuda_version", "cuda_archs", "cuda_skipped", "cutlass"}
    assert wanted <= INFO.keys()
    assert (INFO["cutlass"] is None) == (INFO["cuda_version"] is None)
    assert re.match(r"\d+\.\d+\.\d+$|no headers", INFO["cutlass"] or "no headers")
    assert (INFO["cuda_version"] is None) == (INFO["cuda_skipped"] is not None)
    compiled = _extension.host().build_info()
    assert compiled["version"] == INFO["version"]
    assert compiled["torch_target_version"] >> 48 == 0x020A
    assert json.loads((ROOT / "dl4ds_kernels/_build_info.json").read_text()) == INFO


def test_the_compiled_part_is_loaded() -> None:
    """The suite proves little about kernels that it does not run."""
    assert _extension.status()["_C"].loaded, _extension.missing_reason("cpu")


@pytest.mark.parametrize("path", [ROOT / "setup.py", *sorted((ROOT / "dl4ds_kernels").glob("_*.py"))], ids=lambda p: p.name)
def test_no_network_import(path: Path) -> None:
    """Neither the build nor the import of the package can reach the network, or run pip to do it."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & NETWORK
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not {"pip", "wget", "curl"} & strings


def test_metadata() -> None:
    """What an isolated build needs is stated, and torch has a floor but no ceiling."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    requires = " ".join(project["build-system"]["requires"])
    assert all(name in requires for name in ("setuptools", "pybind11", "ninja", "torch>=2.10", "cuda-toolkit"))
    assert project["project"]["dependencies"] == ["torch>=2.10"]
