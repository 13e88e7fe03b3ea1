"""How often the machine instructions of a kernel run: SASS from ptxas, executions from the simulator.

`nvdisasm -gp` names the PTX line that each machine instruction was made from, and the simulator counts the executions of every
PTX instruction. A block of SASS runs as often as the PTX blocks that most of its instructions come from: neither a branch made
predicates nor an instruction moved out of a loop changes that. Where ptxas unrolled a loop, copies share the executions.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from . import mutate, toolchain
from .report import Report

# PTX instructions that become one machine instruction each: how many there are of one tells the copies of its block.
_ANCHORS = re.compile(
    r"(@!?%p\d+ )?(ld\.global|st\.global|ld\.shared|st\.shared|fma\.rn|mul(\.rn)?\.f32|add(\.rn)?\.f32|mma|shfl)"
)
_LOAD = re.compile(r"\bLDG\.E[\w.]*\.128")
_WIDE = re.compile(r"\b(LDG|LDGSTS|STG)\.E[\w.]*\.128")
_BRANCH = re.compile(r"\b(BRA|EXIT|RET|CALL|BRX|JMP)\b")


@dataclass
class Block:
    """Machine instructions that run together, and how often per launch (over all warps)."""

    code: list[tuple[int, str]] = field(default_factory=list)  # PTX line, text
    executions: float = 0.0


def _ptx_blocks(ptx: str, kernel: str) -> tuple[dict[int, int], dict[int, int], dict[int, str]]:
    """PTX line -> index of its (first) instruction, line -> basic block, line -> text, of one kernel."""
    start = ptx.index("\n{\n", re.search(rf"\.entry {re.escape(kernel)}\(", ptx).end())
    body = ptx[start : ptx.index("\n}\n", start) + 1]
    first_line = ptx.count("\n", 0, start) + 1
    index, block, texts = {}, {}, {}
    number = place = end = 0
    for found in mutate.STATEMENT.finditer(body):
        text = found.group(3)
        if not text:
            continue
        if re.search(r"(?m)^\s*[$\w]+:", body[end : found.start(3)]):
            number += 1
        line = first_line + body.count("\n", 0, found.start(3))
        index.setdefault(line, place)
        block[line] = number
        texts.setdefault(line, text)
        place, end = place + 1, found.end(3)
        if re.match(r"(@!?%p\d+\s+)?(bra|ret|brx)", text):
            number += 1
    return index, block, texts


@functools.lru_cache(maxsize=16)
def _listing(cubin: Path) -> str:
    tool = toolchain.cuda_tool("nvdisasm")
    assert tool is not None, "no nvdisasm (it comes with triton)"
    return subprocess.run([tool, "-gp", "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def _sass(cubin: Path, kernel: str) -> list[Block]:
    """The basic blocks of a kernel's machine code."""
    listing = _listing(cubin)
    begin = listing.index(f"\n.text.{kernel}:")
    end = listing.find("\n//------", begin)
    blocks, line = [Block()], 0
    for text in listing[begin : end if end > 0 else None].splitlines():
        mark = re.match(r'\s*//## File ".nv_debug_ptx_txt", line (\d+)', text)
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", text)
        if mark:
            line = int(mark.group(1))
        elif re.match(r"\.L_\w+:|\$\w+", text):
            blocks.append(Block())
        elif found:
            blocks[-1].code.append((line, found.group(1)))
            if _BRANCH.search(found.group(1)):
                blocks.append(Block())
    return [b for b in blocks if b.code]


@dataclass(frozen=True)
class Dynamic:
    """Of one launch. instructions: machine instructions of all warps. wide: among them accesses of 16 bytes a lane to global
    memory, and counted: the same as the simulator counts them. flight: vectors of tensors that a warp asks for in its main loop
    before it reads the first of them.
    """

    instructions: float
    wide: float
    counted: float
    flight: int


def _registers(operands: str) -> set[int]:
    return {int(n) for n in re.findall(r"\bR(\d+)\b", operands)}


def _in_flight(code: list[tuple[bool, str]]) -> int:
    """Most loads (marked) issued before an instruction reads what an earlier one of them brings."""
    waiting: list[set[int]] = []
    most = 0
    for is_load, text in code:
        opcode, _, operands = re.sub(r"^@!?U?P\d+\s+", "", text).partition(" ")
        target, _, sources = operands.partition(",")
        if is_load:
            first = int(re.search(r"R(\d+)", target).group(1))
            registers = set(range(first, first + 4))
            waiting = [other for other in waiting if other != registers] + [registers]  # or a copy on another path
            most = max(most, len(waiting))
            continue
        reads = _registers(operands if opcode.startswith("ST") else sources)
        for i, registers in enumerate(waiting):
            if registers & reads:
                waiting = waiting[i + 1 :]
                break
    return most


def dynamic(cubin: Path, ptx: str, report: Report) -> Dynamic:
    """Of a launch whose report has lines; ptxas made `cubin` from `ptx`."""
    index, block_of, texts = _ptx_blocks(ptx, report.kernel)
    counted = {line["index"]: line for line in report.lines}
    executions: dict[int, int] = defaultdict(int)
    for line, i in index.items():
        executions[block_of[line]] = max(executions[block_of[line]], counted.get(i, {"warps": 0})["warps"])
    blocks = _sass(cubin, report.kernel)
    made = Counter(line for b in blocks for line, _ in b.code)
    anchors = {line for line, text in texts.items() if _ANCHORS.match(text)}
    # A copy of an instruction behind code that never runs is on another path (of tensors with other strides, say), not a share.
    live = []
    for b in blocks:
        sure = [
            executions[block_of[line]] > 0
            for line, _ in b.code
            if line in block_of and (line not in anchors or made[line] == 1)
        ]
        if 2 * sum(sure) >= len(sure):
            live.append(b)
    made = Counter(line for b in live for line, _ in b.code)
    copies: dict[int, list[int]] = defaultdict(list)
    for line in anchors:
        if made[line]:
            copies[block_of[line]].append(made[line])
    share = {n: sorted(found)[len(found) // 2] for n, found in copies.items()}
    for b in live:
        votes: Counter[float] = Counter()
        for line, _ in b.code:
            n = block_of.get(line)
            runs = executions[n] / (made[line] if line in anchors else share.get(n, 1)) if n is not None else 0.0
            votes[runs] += len(b.code) if line in anchors else 1  # anchors outvote all others
        b.executions = max(votes, key=lambda value: (votes[value], value))

    def loads(line: int, text: str) -> bool:
        return bool(_LOAD.search(text)) and bool(re.search(r"ld\.global[.\w]*\.v4\.[ub]32", texts.get(line, "")))

    hottest = max((b.executions for b in blocks if any(loads(*c) for c in b.code)), default=0)
    hot = [(loads(line, text), text) for b in blocks if b.executions >= 0.25 * hottest > 0 for line, text in b.code]
    requests = sum(b.executions * sum(bool(_WIDE.search(t)) for _, t in b.code) for b in blocks)
    vector = re.compile(r"\.v4\.[ubf]32|\.v2\.[ubf]64|cp\.async")
    wanted = sum(
        line["requests"] for line in report.lines if vector.search(line["text"]) and ".shared" not in line["text"][:14]
    )
    return Dynamic(sum(b.executions * len(b.code) for b in blocks), requests, wanted, _in_flight(hot))
