"""What ptxas says of every .cu file on every architecture of the gates: registers, shared memory, spills, advice (C7510 …).

`PYTHONPATH=.:tests python -m ptxsim.resources [--output bench/results/ptxas.md]` compiles what is not in the cache (a file and
architecture at a time, minutes) and exits with 1 where something spills or ptxas gives advice.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import _cuda_launch as launchers

from ptxsim import build, compile_cuda, toolchain
from ptxsim.gates.machine import ARCHITECTURES, ptxas_facts

HEAD = """# ptxas on every .cu file

Written by `python -m ptxsim.resources` (commit {commit}, {compiler}): most registers of a kernel; bytes of stack, spill
stores and loads of all kernels on all four; lines of ptxas advice (C7510: wgmma serialized, and its like); largest static
shared memory. Per kernel: docs/kernel-gates.md.

"""


def row(source: Path) -> tuple[list[str], bool]:
    """One line of the table, and whether anything spills or is advised against."""
    registers, spills, advice, shared, kernels = [], 0, 0, 0, 0
    for arch in ARCHITECTURES:
        _, messages = compile_cuda(source, "cubin", arch, [launchers.CSRC], launchers.FLAGS)
        facts = ptxas_facts(messages)
        kernels = len(facts)
        registers.append(max((f["registers"] for f in facts.values()), default=0))
        spills += sum(f["spill_stores"] + f["spill_loads"] + f["stack"] for f in facts.values())
        advice += len(re.findall(r"C7510|advisory|warning", messages, re.IGNORECASE))
        shared = max([shared, *(f["shared"] for f in facts.values())])
    cells = [
        f"`{source.relative_to(launchers.CSRC)}`",
        str(kernels),
        *map(str, registers),
        str(spills),
        str(advice),
        str(shared),
    ]
    return cells, spills + advice > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=build.REPOSITORY, capture_output=True, text=True
    ).stdout.strip()
    version = re.search(r"release [\d.]+", toolchain.compiler_version(toolchain.nvcc())).group(0)
    titles = ["file", "kernels", *(f"sm_{arch} regs" for arch in ARCHITECTURES), "spills + stack", "advice", "shared"]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    bad = False
    for source in launchers.SOURCES:
        cells, wrong = row(source)
        bad |= wrong
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = HEAD.format(commit=commit, compiler=f"nvcc {version}") + "\n".join(lines) + "\n"
    if options.output:
        options.output.write_text(text)
    print(text)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
