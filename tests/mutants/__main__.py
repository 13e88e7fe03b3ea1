"""``python -m tests.mutants [names] [--kind cpu] [--report bench/results/mutants.md]``: apply each mutant, run its tests.

Works on a copy in ``build/mutants``; the checkout stays as it is. Each distinct selection of tests first has to pass on the
unchanged copy. A mutant is killed when pytest reports failures; "broken" (no test ran, a syntax error) does not count. The
exit code is 0 only if every mutant was killed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import ninja
import torch

from .catalog import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutants"
BUILD = ROOT / "build" / f"cpython-{sys.version_info.major}{sys.version_info.minor}-torch-{torch.__version__}"
LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "BROKEN"


def prepare() -> None:
    """The tracked and new files, the compiled parts and the simulator's cache in ``build/mutants``."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    shutil.rmtree(COPY, ignore_errors=True)
    for name in files:
        source = ROOT / name
        if source.is_file() and not name.startswith("docs/"):
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, COPY / name)
    for part in (*(ROOT / "dl4ds_kernels").glob("*.so"), ROOT / "dl4ds_kernels/_build_info.json"):
        shutil.copy2(part, COPY / "dl4ds_kernels")
    (COPY / "build").mkdir()
    (ROOT / "build/ptxsim").mkdir(exist_ok=True)
    (COPY / "build/ptxsim").symlink_to(ROOT / "build/ptxsim")


def ask_ninja(*arguments: str) -> str:
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def objects_with(file: str) -> list[str]:
    """Object files whose compilation read ``file``, from ninja's log of dependencies."""
    found, current = [], ""
    for line in ask_ninja("-t", "deps").splitlines():
        if line and not line[0].isspace():
            current = line.split(":")[0]
        elif line.strip() == str(ROOT / file) and current.endswith(".cpp.o"):
            found.append(current)
    return [name if os.path.isabs(name) else str(BUILD / name) for name in dict.fromkeys(found)]


def rebuild(file: str) -> None:
    """Compile what includes ``file`` from the copy and link it with the other objects of the checkout's build."""
    changed = objects_with(file)
    if not changed:
        raise RuntimeError(f"no object of {BUILD.name} was built from {file}: build first")
    link = ask_ninja("-t", "commands", "-s", f"{BUILD}/_C.so").strip()
    for target in changed:
        command = ask_ninja("-t", "commands", "-s", target).strip()
        fresh = target.replace(str(BUILD), str(COPY / "objects"))
        Path(fresh).parent.mkdir(parents=True, exist_ok=True)
        command = command.replace(f"{ROOT}/csrc", f"{COPY}/csrc").replace(target, fresh)
        done = subprocess.run(shlex.split(command), cwd=BUILD, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"does not compile: {done.stderr.strip().splitlines()[-1]}")
        link = link.replace(target, fresh)
    output = COPY / "dl4ds_kernels" / LIBRARY
    output.unlink()
    subprocess.run(shlex.split(link.replace(f"{BUILD}/_C.so", str(output))), cwd=BUILD, check=True, capture_output=True)


def pytest(tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit code of pytest in the copy, and its last line."""
    env = {**os.environ, "PYTHONPATH": str(COPY)}
    marks = () if "-m" in tests else ("-m", "not full")
    command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=line", "--disable-warnings", *tests, *marks]
    done = subprocess.run(command, cwd=COPY, env=env, capture_output=True, text=True, timeout=1800)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return done.returncode, failed[0] if failed else lines[-1] if lines else ""


def judge(mutant: Mutant) -> tuple[str, str]:
    """(verdict, the test that failed or what went wrong); the copy is put back."""
    path, library = COPY / mutant.file, COPY / "dl4ds_kernels" / LIBRARY
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        if mutant.kind == "cpu":
            rebuild(mutant.file)
        code, detail = pytest(mutant.tests)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return BROKEN, str(error)
    except subprocess.TimeoutExpired:
        return KILLED, "the tests hang"
    finally:
        path.write_text(text)
        if mutant.kind == "cpu":
            library.unlink(missing_ok=True)
            shutil.copy2(ROOT / "dl4ds_kernels" / LIBRARY, library)
    if code == 0:
        return SURVIVED, detail
    crashed = code < 0 or code in (134, 139)
    return (KILLED, detail) if code == 1 or crashed else (BROKEN, f"pytest exit {code}: {detail}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants to run (default: all)")
    parser.add_argument("--kind", choices=("python", "cpu", "cuda"))
    parser.add_argument("--report", type=Path, help="write the table as Markdown")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.kind in (None, m.kind) and (not arguments.names or m.name in arguments.names)]
    prepare()
    rows, bad, sound = [], 0, {}
    for mutant in chosen:
        start = time.monotonic()
        if mutant.tests not in sound:
            sound[mutant.tests] = pytest(mutant.tests)
        code, detail = sound[mutant.tests]
        verdict, detail = judge(mutant) if code == 0 else (BROKEN, f"fails without the mutant: {detail}")
        bad += verdict != KILLED
        rows.append((mutant.kind, mutant.name, verdict, detail.removeprefix("tests/")))
        print(f"{verdict:9} {mutant.kind:7} {mutant.name:45} {time.monotonic() - start:5.0f} s  {detail}", flush=True)
    print(f"{len(rows) - bad} of {len(rows)} killed")
    if arguments.report:
        table = "".join(f"| {kind} | {name} | {verdict} | `{detail}` |\n" for kind, name, verdict, detail in rows)
        arguments.report.write_text(
            "# Mutants\n\nWritten by `python -m tests.mutants --report …`: one wrong line each in a copy of the package, and "
            f"the first test that notices.\n{len(rows) - bad} of {len(rows)} killed. torch {torch.__version__}.\n\n"
            f"| where | mutant | verdict | by |\n|---|---|---|---|\n{table}"
        )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
