"""Finds the compilers: the host's C++ compiler, nvcc, and the disassemblers that come with triton."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path


def cxx() -> str | None:
    """The host C++ compiler: $CXX, else g++, clang++ or c++ on the path."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


@functools.cache
def nvcc() -> str | None:
    """nvcc from CUDA_HOME, the standard folder, the path, or the `cuda-toolkit[nvcc]` wheels."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    candidates.append(Path(shutil.which("nvcc") or "nvcc-is-not-on-the-path"))
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and spec.submodule_search_locations else []:
        candidates.append(Path(root) / "cu13" / "bin" / "nvcc")
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    return None


@functools.cache
def cuda_tool(name: str) -> str | None:
    """`ptxas`, `cuobjdump` or `nvdisasm`: beside nvcc, else from the triton package."""
    folders = [Path(nvcc()).resolve().parent] if nvcc() else []
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    return None


@functools.cache
def machine_identity() -> str:
    """What an object built with -march=native depends on: architecture and CPU features."""
    features = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.machine() + features


@functools.cache
def compiler_version(compiler: str) -> str:
    """First lines of `compiler --version` (part of the cache keys)."""
    return subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True).stdout
