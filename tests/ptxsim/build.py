"""Builds the simulator and CUDA sources on demand; results are cached by the hash of everything they depend on."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from . import toolchain

CORE = Path(__file__).resolve().parent / "core"
REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]


class BuildError(RuntimeError):
    """A compiler failed; the message holds its output."""


def cache_folder() -> Path:
    """`build/ptxsim` of the checkout, or the user's cache folder when the checkout is read-only."""
    if os.access(REPOSITORY, os.W_OK):
        return REPOSITORY / "build" / "ptxsim"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dl4ds_kernels" / "ptxsim"


def run(command: Sequence[str]) -> str:
    """Runs a compiler and returns its output (stdout and stderr); raises BuildError when it fails."""
    done = subprocess.run(list(command), capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def digest(*parts: str | bytes | Path) -> str:
    """Hash of texts and of the contents of files."""
    h = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:20]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process (and thread) at a time; the file stays, empty."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(folder: str, key: str, names: Sequence[str], make) -> Path:
    """The folder cache/folder/key holding `names`; `make(temporary_folder)` creates it once, atomically.

    Another process that needs it meanwhile waits: the tests run in two, and one compilation keeps both cores busy.
    """
    target = cache_folder() / folder / key
    if all((target / name).exists() for name in names):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / f".lock-{key}"):
        if all((target / name).exists() for name in names):
            return target
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
        try:
            make(temporary)
            shutil.rmtree(target, ignore_errors=True)  # what an interrupted clean-up left
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def simulator() -> Path:
    """Folder with libptxsim.so and cudart.o (the stand-in runtime for host libraries)."""
    compiler = toolchain.cxx()
    if compiler is None:
        raise BuildError("the simulator needs a C++17 compiler (g++ or clang++)")
    sources = sorted(CORE.glob("*.cpp"))
    native = [] if "DL4DS_PTXSIM_PORTABLE" in os.environ else ["-march=native"]
    key = digest(
        *sources, *sorted(CORE.glob("*.h")), *FLAGS, *native, toolchain.compiler_version(compiler), toolchain.machine_identity()
    )

    def make(folder: Path) -> None:
        def compile_one(source: Path) -> None:
            extra = ["-frounding-math"] if source.stem == "rounding" else []
            output = folder / f"{source.stem}.o"
            run([*compiler.split(), *FLAGS, *native, *extra, "-c", str(source), "-o", str(output)])

        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
            list(pool.map(compile_one, sources))
        objects = [str(o) for o in sorted(folder.glob("*.o")) if o.stem != "cudart"]
        run([*compiler.split(), "-shared", "-o", str(folder / "libptxsim.so"), *objects])
        for path in objects:
            os.unlink(path)

    return cached("core", key, ["libptxsim.so", "cudart.o"], make)


NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "-diag-suppress=177"]


def _includes(paths: Sequence[Path | str]) -> list[str]:
    return [f"-I{path}" for path in paths]


def _header_texts(includes: Sequence[Path | str], source: Path) -> list[Path]:
    headers = {
        h
        for folder in [*map(Path, includes), source.parent]
        for pattern in ("**/*.h", "**/*.cuh")
        for h in folder.glob(pattern)
    }
    return sorted(headers)


def compile_cuda(
    source: Path | str,
    output: str = "ptx",
    arch: str = "80",
    includes: Sequence[Path | str] = (),
    flags: Sequence[str] = (),
) -> tuple[Path, str]:
    """Compiles one .cu file; returns the file and nvcc's messages.

    output: "ptx" (virtual architecture), "cubin" (with `-Xptxas -v` in the messages) or "object" (host code with
    embedded, uncompressed PTX, for `HostLibrary`).
    """
    compiler = toolchain.nvcc()
    if compiler is None:
        raise BuildError("nvcc was not found (CUDA_HOME, /usr/local/cuda, PATH, cuda-toolkit[nvcc])")
    source = Path(source)
    modes = {
        "ptx": ["-ptx", f"-arch=compute_{arch}"],
        "cubin": ["-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"],
        "object": ["-c", "-gencode", f"arch=compute_{arch},code=compute_{arch}", "--no-compress", "-Xcompiler", "-fPIC"],
    }
    options = [*NVCC_FLAGS, *modes[output], *_includes(includes), *flags]
    key = digest(source, *_header_texts(includes, source), *options, toolchain.compiler_version(compiler), str(source))
    name = f"{source.stem}.{'o' if output == 'object' else output}"

    def make(folder: Path) -> None:
        messages = run([compiler, *options, str(source), "-o", str(folder / name)])
        (folder / "messages.txt").write_text(messages)

    folder = cached("cuda", key, [name, "messages.txt"], make)
    return folder / name, (folder / "messages.txt").read_text()


def link_host_library(objects: Sequence[Path | str]) -> Path:
    """Links nvcc objects with the stand-in runtime into one shared library that needs no CUDA."""
    compiler = toolchain.cxx()
    objects = [Path(o) for o in objects]
    core = simulator()
    key = digest(*objects, str(core))

    def make(folder: Path) -> None:
        link = ["-shared", "-Wl,-Bsymbolic", "-o", str(folder / "libkernels.so"), *map(str, objects), str(core / "cudart.o")]
        run([*compiler.split(), *link, f"-L{core}", "-lptxsim", f"-Wl,-rpath,{core}"])

    return cached("host", key, ["libkernels.so"], make) / "libkernels.so"
