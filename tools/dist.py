"""Release files in dist/: sdist, wheel, SBOM and SHA256SUMS, reproducible; what ``make dist`` runs.

    python tools/dist.py [--out dist] [--twice] [--sdist-only]

The sdist is packed with sorted members and fixed times and owners; the wheel is built from the unpacked sdist, without
network and without build isolation, in a new folder of a fixed name (TMPDIR counts: the CUDA part depends on the path).
``--twice`` builds both again from nothing and fails unless every byte is equal. The wheel's compiled files must keep to
torch's C interface, need no library but torch's, CUDA's and the C++ run time, and hold no RPATH and no path of the build
machine. Needs setuptools, wheel, pybind11, ninja and torch (requirements-build.txt) and, for the SBOM, cyclonedx-python-lib.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BUILD_INPUTS = ("setuptools", "wheel", "pybind11", "ninja", "torch", "nvidia-cuda-nvcc", "nvidia-cuda-cccl", "nvidia-cutlass")
# What a compiled file may need: torch's C interface, the CUDA runtime that torch has loaded, the C and C++ runtimes.
_NEEDED = re.compile(
    r"lib(torch(_cpu|_cuda)?\.so|cudart\.so\.\d+|stdc\+\+\.so|gcc_s\.so|gomp\.so|c\.so|m\.so|dl\.so|pthread\.so)|ld-linux"
)


def epoch() -> int:
    """SOURCE_DATE_EPOCH, else the time of the last commit."""
    if os.environ.get("SOURCE_DATE_EPOCH"):
        return int(os.environ["SOURCE_DATE_EPOCH"])
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        sys.exit("dist: no git checkout: set SOURCE_DATE_EPOCH to the time of the release (seconds)")
    return int(done.stdout)


def sources() -> list[str]:
    """Tracked files: what an editor or a build left behind does not ship."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"dist: needs the git checkout: {done.stderr.strip()}")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def build(kind: str, folder: Path, out: Path, when: int) -> Path:
    """The one file that setuptools' ``kind`` (sdist or bdist_wheel) makes of ``folder``."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(when), "PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "UTC"}
    environment.pop("PYTHONPATH", None)
    before = set(out.iterdir()) if out.exists() else set()
    command = [sys.executable, "setup.py", "-q", kind, "--dist-dir", out]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"dist: {kind} failed:\n{done.stdout[-3000:]}")
    (made,) = set(out.iterdir()) - before
    return made


def normalise(path: Path, when: int) -> None:
    """Rewrite a .tar.gz with sorted members, one time, root as owner and plain permissions."""
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda m: m.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = when, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=when) as packed:
        packed.write(buffer.getvalue())


@contextmanager
def build_folder() -> Iterator[str]:
    """A new folder of a fixed name: nvcc hashes a source's absolute path into names that stay in the CUDA part."""
    folder = Path(tempfile.gettempdir()) / "dl4ds-dist-build"
    try:
        folder.mkdir(mode=0o700)  # never into a folder (or link) that somebody else made
    except FileExistsError:
        sys.exit(f"dist: {folder} is there already: another build runs, or one was killed (then remove it)")
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make(out: Path, when: int, wheel: bool) -> list[Path]:
    """sdist and wheel, in ``out``, from a fresh copy of the tracked files."""
    out.mkdir(parents=True, exist_ok=True)
    with build_folder() as scratch:
        tree = Path(scratch) / "tree"
        for name in sources():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
        sdist = build("sdist", tree, out, when)
        normalise(sdist, when)
        if not wheel:
            return [sdist]
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        unpacked = Path(scratch) / sdist.name.removesuffix(".tar.gz")
        made = build("bdist_wheel", unpacked, out, when)
        inspect(made, scratch)
    return [sdist, made]


def inspect(wheel: Path, scratch: str) -> None:
    """Exit unless the compiled files are there, keep to the stable ABI and name no folder of the build machine."""
    with zipfile.ZipFile(wheel) as archive:
        parts = [name for name in archive.namelist() if name.endswith(".so")]
        if not parts:
            sys.exit(f"dist: {wheel.name} has no compiled part")
        for name in parts:
            data = archive.read(name)
            for text in (scratch, str(Path.home()), str(ROOT)):
                if len(text) > 2 and text.encode() + b"/" in data:
                    sys.exit(f"dist: {name} holds the build machine's path {text}")
            if shutil.which("readelf"):
                with tempfile.NamedTemporaryFile(suffix=".so") as file:
                    file.write(data)
                    file.flush()
                    wrong = abi_faults(Path(file.name))
                    print(f"dist: {name} needs glibc {newest_glibc(Path(file.name))} or newer")
                if wrong:
                    sys.exit(f"dist: {name} {wrong[0]}")


def _readelf(flag: str, part: Path) -> str:
    return subprocess.run(["readelf", "-W", flag, part], capture_output=True, text=True, check=True).stdout


def abi_faults(part: Path) -> list[str]:
    """Why this compiled file would not run with other versions of torch or on other machines; empty when nothing is wrong."""
    dynamic = _readelf("-d", part)
    undefined = re.findall(r" UND (\S+)", _readelf("--dyn-syms", part))
    mangled = [name for name in undefined if re.match(r"_Z\w*?(3c10|2at|5torch|6caffe2)", name)]
    foreign = [name for name in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic) if not _NEEDED.match(name)]
    found = ["has an RPATH"] if re.search(r"\((RPATH|RUNPATH)\)", dynamic) else []
    found += [f"uses C++ symbols of torch, which change with its version: {', '.join(mangled[:5])}"] if mangled else []
    return found + ([f"needs libraries that torch does not bring: {', '.join(foreign)}"] if foreign else [])


def newest_glibc(part: Path) -> str:
    """The newest GLIBC_ version among the symbols that it takes from the C library, "none" if there is none."""
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", _readelf("-V", part))}
    return ".".join(map(str, max(versions))) if versions else "none"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sbom(files: list[Path], out: Path, when: int) -> Path:
    """CycloneDX 1.6: the package with the hashes of its files, what it needs at run time, what built it."""
    try:
        from cyclonedx.model import HashAlgorithm, HashType, Property
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentScope, ComponentType
        from cyclonedx.model.license import LicenseExpression
        from cyclonedx.output.json import JsonV1Dot6
        from packageurl import PackageURL
    except ImportError as error:
        sys.exit(f"dist: the SBOM needs cyclonedx-python-lib ({error}): pip install 'cyclonedx-python-lib>=8'")
    version = re.search(r'__version__ = "(.+)"', (ROOT / "dl4ds_kernels/_version.py").read_text()).group(1)

    def component(name: str, number: str | None, scope: ComponentScope, role: str) -> Component:
        url = PackageURL("pypi", None, name, number)
        return Component(
            name=name, version=number, type=ComponentType.LIBRARY, purl=url, bom_ref=f"{role}:{url}", scope=scope,
            properties=[Property(name="dl4ds:role", value=role)],
        )  # fmt: skip

    root = Component(
        name="dl4ds_kernels", version=version, type=ComponentType.LIBRARY, bom_ref="dl4ds_kernels",
        purl=PackageURL("pypi", None, "dl4ds-kernels", version), licenses=[LicenseExpression("BSD-3-Clause")],
    )  # fmt: skip
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, " ".join(map(digest, files))))
    bom.metadata.component, bom.metadata.timestamp = root, datetime.fromtimestamp(when, timezone.utc)
    for file in files:
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest(file))]
        bom.components.add(Component(name=file.name, type=ComponentType.FILE, hashes=hashes, bom_ref=f"file:{file.name}"))
    torch = component("torch", None, ComponentScope.REQUIRED, "runtime: torch>=2.10")
    bom.components.add(torch)
    for name in _BUILD_INPUTS:
        try:
            number = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        bom.components.add(component(name, number, ComponentScope.EXCLUDED, "build"))
    bom.register_dependency(root, [torch])
    path = out / f"dl4ds_kernels-{version}.cdx.json"
    path.write_text(JsonV1Dot6(bom).output_as_string(indent=1) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--twice", action="store_true", help="build again from nothing and compare every byte")
    parser.add_argument("--sdist-only", action="store_true", help="no wheel")
    arguments = parser.parse_args()
    when = epoch()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        sys.exit(f"dist: {arguments.out} is not empty: files of an older release must not be signed again")
    files = make(arguments.out, when, not arguments.sdist_only)
    if arguments.twice:
        with tempfile.TemporaryDirectory(prefix="dl4ds-again-") as folder:
            again = make(Path(folder), when, not arguments.sdist_only)
            differ = [a.name for a, b in zip(files, again, strict=True) if digest(a) != digest(b)]
        if differ:
            sys.exit(f"dist: two builds differ: {', '.join(differ)}")
        print(f"dist: two builds are equal: {', '.join(path.name for path in files)}")
    files.append(sbom(files, arguments.out, when))
    lines = "".join(f"{digest(path)}  {path.name}\n" for path in sorted(files))
    (arguments.out / "SHA256SUMS").write_text(lines)
    print(lines, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
