"""What setup.py says when something is missing: no compiler, no nvcc, another CUDA, CPU-only torch. One sentence each.

setup.py runs as a program, on a copy, to the point of the message; compilers and toolkits are fakes. Torn files and unsupported
GPUs are in tests/robustness/test_install_faults.py (F52, F53).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HIDE = "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'nvidia' else f(n, *a)\n"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What setup.py reads before it compiles."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/bindings.cpp").write_text("")
    (tmp_path / "dl4ds_kernels").mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "dl4ds_kernels" / name, tmp_path / "dl4ds_kernels")
    return tmp_path


def build(folder: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"{before}import runpy, sys; sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; runpy.run_path('setup.py')"
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CXX", "DL4DS_BUILD_CUDA", "SOURCE_DATE_EPOCH")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env={**env, **environment}, capture_output=True, text=True, timeout=900)


def toolkit(folder: Path, release: str | None) -> Path:
    """A CUDA toolkit: a script that prints its version and an empty header; without nvcc for None."""
    (folder / "include").mkdir(parents=True)
    (folder / "include/cuda_runtime.h").write_text("")
    if release:
        (folder / "bin").mkdir()
        nvcc = folder / "bin/nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        nvcc.chmod(0o755)
    return folder


def test_no_compiler(sources: Path) -> None:
    done = build(sources, CXX="no-such-compiler", DL4DS_BUILD_CUDA="0")
    assert done.returncode != 0 and "no C++ compiler 'no-such-compiler' on PATH" in done.stderr and "set CXX" in done.stderr
    assert "Traceback" not in done.stderr


def test_cpu_only_torch(sources: Path) -> None:
    done = build(sources, "import torch; torch.version.cuda = None\n", DL4DS_BUILD_CUDA="1")
    assert done.returncode != 0 and f"torch {torch.__version__} is not a CUDA build" in done.stderr


def without_others(version: str = "13.0") -> str:
    """torch is a CUDA build; no toolkit from PyPI, none of the system's."""
    return (
        f"{HIDE}import torch; torch.version.cuda = {version!r}\n"
        "import pathlib; e = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda p, *a, **k: not str(p).startswith('/usr/local/cuda') and e(p, *a, **k)\n"
    )


def test_toolkit_of_another_cuda(sources: Path, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda-12", "12.4")
    done = build(sources, without_others(), DL4DS_BUILD_CUDA="1", CUDA_HOME=str(home))
    assert done.returncode != 0 and "no complete CUDA 13 toolkit" in done.stderr
    assert f"{home}: CUDA 12.4" in done.stderr and "pip install 'cuda-toolkit[nvcc,cccl]==13.0.*'" in done.stderr


def test_missing_nvcc(sources: Path, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda-13", None)
    done = build(sources, without_others(), DL4DS_BUILD_CUDA="1", CUDA_HOME=str(home))
    assert done.returncode != 0 and f"{home}: no nvcc and headers" in done.stderr and "set CUDA_HOME" in done.stderr


def test_auto_says_what_was_left_out(sources: Path, tmp_path: Path) -> None:
    """Not an error: the CPU part is built, and the summary names the reason (the compiler here does nothing)."""
    done = build(sources, without_others(), DL4DS_BUILD_CUDA="auto", CXX="false")
    assert "CUDA part skipped: no complete CUDA 13 toolkit" in done.stdout


def test_release_builds_have_no_paths_of_the_machine(sources: Path) -> None:
    """Commands of a reproducible build: prefixes mapped, no line tables of nvcc, symbols stripped, hardened, no RPATH."""
    build(sources, SOURCE_DATE_EPOCH="1700000000", CXX="false")
    text = next((sources / "build").glob("*/build.ninja")).read_text().replace("$\n", "")
    assert f"-ffile-prefix-map={sources}=." in text and "-Wl,-s" in text and "-lineinfo" not in text
    assert "-z,relro,-z,now" in text and "-fstack-protector-strong" in text and "rpath" not in text


@pytest.mark.full
def test_two_builds_are_bit_equal(tmp_path: Path) -> None:
    """The CPU part built twice, in two folders: the same bytes, and no path of either in them."""
    parts = []
    for name in ("one", "another-folder"):
        folder = tmp_path / name
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, folder)
        (folder / "dl4ds_kernels").mkdir()
        for file in ("__init__.py", "_version.py"):
            shutil.copy(ROOT / "dl4ds_kernels" / file, folder / "dl4ds_kernels")
        done = build(folder, SOURCE_DATE_EPOCH="1700000000", DL4DS_BUILD_CUDA="0")
        assert done.returncode == 0, done.stderr[-2000:]
        content = next((folder / "dl4ds_kernels").glob("_C*.so")).read_bytes()
        assert str(folder).encode() not in content
        parts.append(content)
    assert parts[0] == parts[1]


def test_sdist_has_every_source(tmp_path: Path) -> None:
    """What git tracks of the package and the C++ side is in the sdist; no compiled file is."""
    import tarfile

    listing = subprocess.run(["git", "ls-files", "dl4ds_kernels", "csrc"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("needs the git checkout")
    folder = tmp_path / "tree"
    for name in [*listing.stdout.split(), "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md",
                 "CONTRIBUTING.md", "SECURITY.md", "Makefile"]:  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    missing = set(listing.stdout.split()) - names
    assert not missing, sorted(missing)[:10]
    assert {"setup.py", "pyproject.toml", "SECURITY.md"} <= names and not any(n.endswith((".so", ".o")) for n in names)
