"""tools/dist.py: release files that are equal byte for byte, with hashes and SBOM; what it refuses. Whole wheels: `full`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EPOCH = "1700000000"


@pytest.fixture(scope="module")
def dist() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dist_tool", ROOT / "tools/dist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    if subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("needs the git checkout: only tracked files are shipped")
    command = [sys.executable, ROOT / "tools/dist.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def hashes_hold(folder: Path) -> list[str]:
    """Names in SHA256SUMS, after each was checked."""
    names = []
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
        names.append(name)
    return names


@pytest.mark.slow
def test_sdist_twice_with_hashes_and_sbom(tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx", reason="the SBOM needs cyclonedx-python-lib")
    texts = []
    for name in ("one", "two"):
        done = run("--sdist-only", "--out", tmp_path / name, "--twice", SOURCE_DATE_EPOCH=EPOCH)
        assert done.returncode == 0 and "two builds are equal" in done.stdout, done.stdout + done.stderr
        names = hashes_hold(tmp_path / name)
        texts.append({n: (tmp_path / name / n).read_bytes() for n in names})
    assert texts[0] == texts[1]  # the SBOM too: its serial number and time come from the files and the epoch
    (sdist,) = (n for n in texts[0] if n.endswith(".tar.gz"))
    with tarfile.open(tmp_path / "one" / sdist) as archive:
        members = archive.getmembers()
    assert {m.mtime for m in members} == {int(EPOCH)} and {(m.uid, m.uname) for m in members} == {(0, "")}
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert not [m.name for m in members if m.name.endswith((".so", ".o", ".pyc"))]
    (document,) = (json.loads(text) for n, text in texts[0].items() if n.endswith(".cdx.json"))
    assert document["bomFormat"] == "CycloneDX" and document["metadata"]["component"]["name"] == "dl4ds_kernels"
    parts = {c["name"]: c for c in document["components"]}
    assert parts[sdist]["hashes"][0]["content"] == hashlib.sha256(texts[0][sdist]).hexdigest()
    assert parts["torch"]["scope"] == "required" and "pybind11" in parts


def test_an_old_release_is_not_signed_again(tmp_path: Path) -> None:
    (tmp_path / "old.whl").write_text("")
    done = run("--out", tmp_path)
    assert done.returncode != 0 and "is not empty" in done.stderr and "Traceback" not in done.stderr


def test_a_build_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "dl4ds-dist-build").symlink_to(tmp_path)
    done = run("--sdist-only", "--out", tmp_path / "out", SOURCE_DATE_EPOCH=EPOCH, TMPDIR=str(tmp_path))
    assert done.returncode != 0 and "is there already" in done.stderr and "Traceback" not in done.stderr


def _wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_wheels_that_must_not_ship_are_refused(tmp_path: Path, dist: ModuleType) -> None:
    with pytest.raises(SystemExit, match="has no compiled part"):
        dist.inspect(_wheel(tmp_path / "a.whl", {"x.py": b""}), "/tmp/scratch")
    with pytest.raises(SystemExit, match="holds the build machine's path"):
        dist.inspect(_wheel(tmp_path / "b.whl", {"_C.so": b"\0/tmp/scratch/csrc/x.cpp\0"}), "/tmp/scratch")
    if shutil.which("gcc") is None or shutil.which("readelf") is None:
        pytest.skip("the checks of the ABI need gcc and readelf")

    def compiled(name: str, text: str, *flags: str | Path) -> Path:
        (tmp_path / f"{name}.c").write_text(text)
        command = ["gcc", "-shared", "-fPIC", f"{name}.c", "-o", f"lib{name}.so", *flags]
        subprocess.run(command, check=True, cwd=tmp_path)
        return _wheel(tmp_path / f"{name}.whl", {"_C.so": (tmp_path / f"lib{name}.so").read_bytes()})

    plain, cpp = "int f(void) { return 1; }\n", "void _ZN3c105ErrorD1Ev(void);\nvoid f(void) { _ZN3c105ErrorD1Ev(); }\n"
    dist.inspect(compiled("plain", plain), "/nonexistent/scratch")
    for wheel, why in (
        (compiled("rpath", plain, "-Wl,-rpath,/opt/lib"), "has an RPATH"),
        (compiled("cpp", cpp), "C\\+\\+ symbols of torch.*_ZN3c105ErrorD1Ev"),
        (compiled("foreign", plain, "-Wl,--no-as-needed", "-L.", "-lplain"), "that torch does not bring: libplain.so"),
    ):
        with pytest.raises(SystemExit, match=why):
            dist.inspect(wheel, "/nonexistent/scratch")


def test_normalising_hides_who_packed_and_when(tmp_path: Path, dist: ModuleType) -> None:
    found = []
    for mode, when, order in ((0o600, 1, "ab"), (0o664, 10**9, "ba")):
        path = tmp_path / "t.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name in order:
                file = tmp_path / name
                file.write_text(name)
                file.chmod(mode)
                os.utime(file, (when, when))
                archive.add(file, arcname=name)
        dist.normalise(path, int(EPOCH))
        found.append(path.read_bytes())
    assert found[0] == found[1] and struct.unpack("<I", found[0][4:8])[0] == int(EPOCH)


@pytest.mark.full
def test_wheel_twice(tmp_path: Path) -> None:
    """The CPU part as a wheel, from the sdist, in two folders: the same bytes; the file imports and is loaded."""
    pytest.importorskip("cyclonedx", reason="the SBOM needs cyclonedx-python-lib")
    done = run("--out", tmp_path / "dist", "--twice", SOURCE_DATE_EPOCH=EPOCH, DL4DS_BUILD_CUDA="0")
    assert done.returncode == 0 and "two builds are equal" in done.stdout, done.stdout + done.stderr
    (wheel,) = (n for n in hashes_hold(tmp_path / "dist") if n.endswith(".whl"))
    with zipfile.ZipFile(tmp_path / "dist" / wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = "import dl4ds_kernels as dk; print(dk.__file__, dk._extension.status()['_C'].loaded)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "installed") in out and "True" in out
