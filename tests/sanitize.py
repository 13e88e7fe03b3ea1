"""``python -m tests.sanitize``: the tests on a C++ part built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.sanitize [--build-only] [--report bench/results/test-asan.md] [-- pytest arguments]

Sources and tests are copied to ``build/sanitize`` and compiled there with a compiler wrapper that adds the flags, so that the
usual build stays as it is and a second run compiles what changed. The sanitizers write every finding to a log and go on; the
exit code is 0 only when all tests passed and the logs are empty. The output pool is off, so that every output has its own
allocation with red zones around it (a block of the pool would hide an overrun). CPU only: GPU kernels have the simulator.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "sanitize"
# -fexpensive-optimizations: -O1 alone makes no fused multiply-adds, so that sums would round unlike those of the usual build.
FLAGS = (
    "-O1 -fexpensive-optimizations -g1 -fno-omit-frame-pointer -fsanitize=address,undefined "
    "-fsanitize-recover=address,undefined -fno-sanitize=vptr -D_GLIBCXX_ASSERTIONS"
)
DEFAULT = ("tests/ops", "tests/robustness", "tests/test_errors.py", "-m", "not full", "-n", "2", "--dist", "worksteal")
# Left out: GPU kernels (the simulator is no code of the package), builds, fresh processes that test imports, and what counts
# the bytes of the process, where the sanitizer's own are in the way.
IGNORED = (
    "tests/ops/*_cuda*.py", "tests/ops/*_triton.py", "tests/robustness/test_install_faults.py",
    "tests/robustness/test_memory_faults.py",
)  # fmt: skip
DESELECTED = ("memory_does_not_grow", "triton", "compile", "interpreter_exit", "simulator")


def copy_sources() -> None:
    """Tracked and new files, only where they differ: a later run recompiles what changed."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {Path(line) for line in listing.stdout.splitlines() if not line.startswith("docs/")}
    for path in wanted:
        source, target = ROOT / path, COPY / path
        if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for room in ("csrc", "tests", "dl4ds_kernels"):
        for path in (COPY / room).rglob("*"):
            stale = path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and path.relative_to(COPY) not in wanted
            if stale and path.is_file():
                path.unlink()


def library(name: str) -> str:
    """Path of a sanitizer's run-time library, which has to be the first one in the process."""
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found):
        sys.exit(f"sanitize: {compiler} has no {name}: install the sanitizer libraries of the compiler")
    return os.path.realpath(found)


def build() -> float:
    """Compile the CPU part with the sanitizers; seconds that it took."""
    wrapper = COPY / "cxx-sanitize"
    script = f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" {FLAGS}\n'
    if not wrapper.exists() or wrapper.read_text() != script:  # ninja does not look into the compiler
        shutil.rmtree(COPY / "build", ignore_errors=True)
    wrapper.write_text(script)
    wrapper.chmod(0o755)
    start = time.monotonic()
    env = {**os.environ, "CXX": str(wrapper), "DL4DS_BUILD_CUDA": "0", "PYTHONPATH": str(COPY)}
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, env=env)
    if done.returncode:
        sys.exit("sanitize: the build failed; the compiler's messages are above")
    # A flag that a compiler ignores would make a run without findings worthless.
    for part in (COPY / "dl4ds_kernels").glob("_C*.so"):
        content = part.read_bytes()
        if not all(symbol in content for symbol in (b"__asan_report_load", b"__ubsan_handle")):
            sys.exit(f"sanitize: {part.name} has no checks of both sanitizers in it: does the compiler take {FLAGS}?")
    return time.monotonic() - start


def environment(logs: Path) -> dict[str, str]:
    options = f"log_path={logs}/finding:print_stacktrace=1:halt_on_error=0"
    return {
        **os.environ,
        "PYTHONPATH": str(COPY),
        "LD_PRELOAD": " ".join((library("libasan.so"), library("libubsan.so"))),
        # Leaks: Python and torch keep memory for good on purpose. Large requests that fail are part of the tests.
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": options,
        "PYTHONMALLOC": "malloc",
        "DL4DS_POOL_MB": "0",
    }


def findings(logs: Path) -> list[str]:
    """One line a finding: what and where, each place once."""
    seen: dict[str, int] = {}
    for path in sorted(logs.iterdir()):
        for line in path.read_text(errors="replace").splitlines():
            found = re.search(r"runtime error: .*|ERROR: AddressSanitizer: .*", line)
            if found:
                place = line.split(": runtime error")[0].removeprefix(str(COPY) + "/") if "runtime error" in line else path.name
                key = f"{place}: {found.group()[:160]}"
                seen[key] = seen.get(key, 0) + 1
    return [f"{key} ({count}x)" for key, count in seen.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--report", type=Path, help="write a summary in Markdown")
    parser.add_argument("tests", nargs="*", default=[], help="arguments for pytest (default: ops, robustness, pool, errors)")
    arguments = parser.parse_args()
    COPY.mkdir(parents=True, exist_ok=True)
    copy_sources()
    seconds = build()
    print(f"sanitize: built in {seconds:.0f} s")
    if arguments.build_only:
        return 0
    logs = COPY / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    ignored = [f"--ignore-glob={path}" for path in IGNORED]
    tests = arguments.tests or [*DEFAULT, *ignored, "-k", " and ".join(f"not {name}" for name in DESELECTED)]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests], cwd=COPY, env=environment(logs), stdout=subprocess.PIPE, text=True
    )
    print(done.stdout[-6000:])
    found = findings(logs)
    print(f"sanitize: {len(found)} places with findings", *found, sep="\n  ")
    if arguments.report:
        arguments.report.write_text(report(tests, done, found, time.monotonic() - start))
    return int(done.returncode != 0 or bool(found))


def report(tests: list[str], done: subprocess.CompletedProcess[str], found: list[str], seconds: float) -> str:
    tail = next((line for line in reversed(done.stdout.splitlines()) if "passed" in line or "failed" in line), "no result")
    compiler = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True).stdout.splitlines()[
        0
    ]
    lines = [
        "# Sanitizers", "",
        "Written by `make test-asan` (`python -m tests.sanitize --report …`): the CPU part under AddressSanitizer and",
        "UndefinedBehaviorSanitizer with the standard library's assertions, output pool off.", "",
        f"- Machine: {platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}; {compiler}",
        f"- Flags: `{FLAGS}`",
        f"- Tests: `pytest {' '.join(tests)}`",
        f"- Result: {tail.strip('= ')}; {seconds:.0f} s; pytest's exit code {done.returncode}",
        f"- Findings: {len(found) or 'none'}", *(f"  - {line}" for line in found), "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
