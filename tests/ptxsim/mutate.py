"""Seeded bugs: textual operators on the PTX of one kernel.

`mutants(ptx, kernel)` returns changed modules, each with one plausible mistake. A simulator worth its name reports it, or the
numbers change: test_mutants.py runs the mutants of the project's kernels and lists the survivors. `wrong_grid` is not in the
text: it is the launch with one block more or less, for the caller to make.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Mutant:
    """A module with one changed kernel."""

    operator: str
    line: int  # source line of the change (.loc), 0 if unknown
    before: str
    after: str
    ptx: str
    file: str = ""  # its source file
    index: int = -1  # of the instruction, as in Report.lines
    grid_delta: int = 0  # blocks more than the launcher asks for

    def __str__(self) -> str:
        place = f"{self.file.rpartition('/')[2]}:{self.line}" if self.file else f"line {self.line}"
        return f"{self.operator} at {place}: {self.before.strip()}  ->  {self.after.strip() or '(removed)'}"


# An operator takes a statement and yields the statements that replace it, one per mutant ("" removes it).
Operator = Callable[[str], Iterator[str]]
OPERATORS: dict[str, Operator] = {}


def operator(function: Operator) -> Operator:
    """Registers an operator under its name."""
    OPERATORS[function.__name__] = function
    return function


def _substituted(pattern: str, replacement: str) -> Operator:
    compiled = re.compile(pattern)

    def apply(statement: str) -> Iterator[str]:
        if compiled.search(statement):
            yield compiled.sub(replacement, statement, count=1)

    return apply


def _swapped(statement: str, first: int, second: int) -> str:
    """Exchanges two operands (0 is the destination)."""
    head, _, rest = statement.partition(" ")
    operands = [o.strip() for o in rest.rstrip(";").split(",")]
    operands[first], operands[second] = operands[second], operands[first]
    return f"{head} {', '.join(operands)};"


def _width(statement: str) -> tuple[int, int]:
    """Bytes of an element and elements of a ld, st or cp.async statement."""
    vector = re.search(r"\.v([248])\.", statement)
    kind = re.search(r"\.[busf](8|16|32|64)\b", statement)
    if statement.startswith("cp.async"):
        return int(re.search(r", (\d+)", statement).group(1)), 1
    return BYTES[kind.group(1)] if kind else 4, int(vector.group(1)) if vector else 1


def _shifted(statement: str, bytes_: int) -> str:
    """The same access `bytes_` further on (the first address of the statement)."""
    address = re.search(r"\[([^\]+]+)(?:\+(-?\d+))?\]", statement)
    offset = int(address.group(2) or 0) + bytes_
    return statement[: address.start()] + f"[{address.group(1)}+{offset}]" + statement[address.end() :]


MEMORY = re.compile(r"^(ld|st)\.(?:volatile\.)?(global|shared)|^cp\.async\.c[ag]")


@operator
def missing_barrier(statement: str) -> Iterator[str]:
    if re.match(r"(bar|barrier)\.(cta\.)?(sync|red|warp)", statement):
        yield ""


@operator
def wait_group_off_by_one(statement: str) -> Iterator[str]:
    match = re.match(r"cp\.async\.wait_group\s+(\d+)", statement)
    if match:
        yield f"cp.async.wait_group {int(match.group(1)) + 1};"
    elif statement.startswith("cp.async.wait_all"):
        yield ""


@operator
def off_by_one(statement: str) -> Iterator[str]:
    """The next element instead of this one."""
    if MEMORY.match(statement) and not statement.startswith("cp.async"):
        size, count = _width(statement)
        yield _shifted(statement, size * count)


@operator
def misaligned_vector(statement: str) -> Iterator[str]:
    """A vector that begins one element too late."""
    if MEMORY.match(statement) and not statement.startswith("cp.async"):
        size, count = _width(statement)
        if count > 1:
            yield _shifted(statement, size)


@operator
def uninitialised_tail(statement: str) -> Iterator[str]:
    """A store to global memory that is not made."""
    if re.match(r"st\.(?:volatile\.)?global", statement):
        yield ""


@operator
def stale_shared_memory(statement: str) -> Iterator[str]:
    """A store to shared memory that is not made."""
    if re.match(r"st\.(?:volatile\.)?shared", statement):
        yield ""


@operator
def swapped_operands(statement: str) -> Iterator[str]:
    if re.match(r"(sub|div)\b", statement):
        yield _swapped(statement, 1, 2)
    elif re.match(r"(fma|mad)\b", statement):
        yield (
            _swapped(statement, 2, 3) if re.match(r"(fma|mad)\.\w+\.(f16|bf16|f32|f64|f16x2|bf16x2)", statement) else statement
        )
    elif statement.startswith("selp"):
        yield _swapped(statement, 1, 2)


@operator
def forgotten_addend(statement: str) -> Iterator[str]:
    """fma without its c."""
    match = re.match(r"fma\.rn(?:\.ftz)?\.(f32|f64)\s+(.*);", statement, re.S)
    if match:
        operands = [o.strip() for o in match.group(2).split(",")]
        yield f"mul.{match.group(1)} {', '.join(operands[:3])};"


@operator
def wrong_sign(statement: str) -> Iterator[str]:
    yield from _substituted(r"^add\.(rn\.)?(f\d+)", r"sub.\1\2")(statement)
    yield from _substituted(r"^sub\.(rn\.)?(f\d+)", r"add.\1\2")(statement)


@operator
def nan_losing_max(statement: str) -> Iterator[str]:
    """A comparison or maximum that treats NaN the other way."""
    yield from _substituted(r"^(min|max)\.NaN\.", r"\1.")(statement)
    yield from _substituted(r"^setp\.(lt|le|gt|ge|eq)\.(f16|bf16|f32|f64)", r"setp.\1u.\2")(statement)
    yield from _substituted(r"^setp\.(lt|le|gt|ge|eq)u\.(f16|bf16|f32|f64)", r"setp.\1.\2")(statement)


@operator
def missing_mask(statement: str) -> Iterator[str]:
    """A guard that is forgotten: what it skips is executed by everybody."""
    match = re.match(r"@(!?%p\w+)\s+(.*)", statement, re.S)
    if match:
        yield "" if match.group(2).startswith("bra") else match.group(2)


@operator
def wrong_predicate(statement: str) -> Iterator[str]:
    match = re.match(r"@(!?)(%p\w+)(\s+.*)", statement, re.S)
    if match:
        yield f"@{'' if match.group(1) else '!'}{match.group(2)}{match.group(3)}"


@operator
def loose_comparison(statement: str) -> Iterator[str]:
    """< becomes <=, and so on: one step too many, or too few."""
    pairs = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}
    match = re.match(r"setp\.(lt|le|gt|ge|eq|ne)(\.(?:and\.|or\.)?[us](?:16|32|64).*)", statement, re.S)
    if match:
        yield f"setp.{pairs[match.group(1)]}{match.group(2)}"


@operator
def unsigned_wrap(statement: str) -> Iterator[str]:
    """A signed comparison with a constant done unsigned: a difference below zero becomes huge."""
    yield from _substituted(r"^(setp\.(?:lt|le|gt|ge)|min|max)\.s(32|64)(\s+%\w+, %\w+, -?\d+;)", r"\1.u\2\3")(statement)


@operator
def race_between_blocks(statement: str) -> Iterator[str]:
    """All blocks believe to be the first."""
    yield from _substituted(r"^mov\.u32(\s+%r\d+), %ctaid\.[xyz]", r"mov.u32\1, 0")(statement)


@operator
def wrong_lane(statement: str) -> Iterator[str]:
    """A shuffle over another distance, or without half of the warp."""
    match = re.match(r"(shfl\.sync\.\w+\.b32\s+[^,]+,[^,]+, )(\d+)(, .*)", statement, re.S)
    if match:
        yield f"{match.group(1)}{int(match.group(2)) ^ 3}{match.group(3)}"
    if statement.startswith("shfl.sync") and re.search(r", -1;$", statement):
        yield re.sub(r", -1;$", ", 65535;", statement)


@operator
def wrong_rounding(statement: str) -> Iterator[str]:
    yield from _substituted(r"^cvt\.rn\.(f16|bf16|f16x2|bf16x2)\.", r"cvt.rz.\1.")(statement)


@operator
def wrong_thread(statement: str) -> Iterator[str]:
    """Every thread believes to be its neighbour on the left (thread 0 itself)."""
    match = re.match(r"mov\.u32(\s+)(%r\d+), %tid\.x;", statement)
    if match:
        r = match.group(2)
        yield f"mov.u32 {r}, %tid.x; max.u32 {r}, {r}, 1; sub.u32 {r}, {r}, 1;"


def kernel_text(ptx: str, kernel: str) -> str:
    """A module with this kernel alone (and everything that is not a kernel)."""
    ptx = re.sub(r"(?m)^\t?\.section[^{]*\{[^}]*\}", "", ptx)  # debug information
    pieces = re.split(r"(?m)^(?=(?:\.visible |\.weak )?\.entry )", ptx)
    kept = [pieces[0]]
    for piece in pieces[1:]:
        end = piece.index("\n}") + 2
        name = re.search(r"\.entry\s+([\w$]+)", piece).group(1)
        kept.append(piece if name == kernel else piece[end:])
    return "".join(kept)


STATEMENT = re.compile(
    r"\.loc\s+(\d+)\s+(\d+)|(?<=[\n;{}])[ \t]*((?:@!?%\w+\s+)?[a-z][\w.:]*(?:\s[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*)?;)"
)


def _body(ptx: str, kernel: str) -> tuple[str, int]:
    """The module with this kernel alone, and where its body begins."""
    text = kernel_text(ptx, kernel)
    return text, text.index("{", text.index(")", re.search(rf"\.entry\s+{re.escape(kernel)}\b", text).end()))


def _plain(statement: str) -> str:
    """One space between words, none in addresses (Triton writes `[ %rd1 + 4 ]`)."""
    text = re.sub(r"\s+", " ", statement).replace(" ;", ";")
    return re.sub(r"\[ ?([^\]]*?) ?\]", lambda m: f"[{m.group(1).replace(' ', '')}]", text)


def _changes(apply: Operator, statement: str) -> Iterator[str]:
    """What an operator makes of a statement and, behind its guard, of the instruction alone."""
    yield from apply(statement)
    guarded = re.match(r"(@!?%\w+ )(.*)", statement, re.S)
    if guarded:
        for changed in apply(guarded.group(2)):
            yield changed and guarded.group(1) + changed


def mutants(
    ptx: str, kernel: str, executed: set[int] | frozenset[int] | None = None, most: int = 1 << 30, seed: int = 0
) -> list[Mutant]:
    """Mutants of one kernel; at most `most` per operator, drawn by seed from the sites it applies to, in order.

    executed: instruction indices (Report.lines) to which changes are limited: what no test runs, no test can find.
    """
    text, start = _body(ptx, kernel)
    body = text[start:]
    files = dict(re.findall(r'(?m)^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx))
    statements: list[tuple[str, int, re.Match[str], str]] = []
    file, line = "", 0
    for match in STATEMENT.finditer(body):
        if match.group(1):
            if match.group(2) == "0":  # the compiler does not know
                continue
            file, line = files.get(match.group(1), ""), int(match.group(2))
        else:
            statements.append((file, line, match, _plain(match.group(3))))
    found: list[Mutant] = []
    for name, apply in OPERATORS.items():
        sites: list[Mutant] = []
        for index, (file, line, match, plain) in enumerate(statements):
            if executed is not None and index not in executed:
                continue
            for changed in _changes(apply, plain):
                if changed != plain:
                    mutated = text[:start] + body[: match.start(3)] + changed + body[match.end(3) :]
                    sites.append(Mutant(name, line, plain, changed, mutated, file, index))
        if len(sites) > most:
            chosen = random.Random(f"{seed}:{kernel}:{name}").sample(range(len(sites)), most)
            sites = [sites[i] for i in sorted(chosen)]
        found += sites
    return found


def statement_count(ptx: str, kernel: str) -> int:
    """Instructions that `mutants` sees in a kernel: as many as the simulator decodes (its final ret is its own)."""
    text, start = _body(ptx, kernel)
    return sum(1 for match in STATEMENT.finditer(text[start:]) if match.group(3))


def probe(mutant: Mutant, original: str) -> str | None:
    """PTX of the unchanged kernel that traps where the mutant's instruction would give another value; None if there is no such.

    original: the module with the unchanged kernel alone. For comparisons and conversions, whose result is one register.
    """
    before = re.match(r"(setp|cvt)\S* (%\w+), (.*);$", mutant.before)
    after = re.match(r"(setp|cvt)(\S*) (%\w+), (.*);$", mutant.after)
    if not before or not after or before.group(1) != after.group(1):
        return None
    kind, result = before.group(1), before.group(2)
    if kind == "setp":
        extra = f"{kind}{after.group(2)} %ptxsim_p, {after.group(4)}; xor.pred %ptxsim_p, %ptxsim_p, {result};"
    else:
        width = 32 if "x2" in after.group(2) else 16
        extra = (
            f"{kind}{after.group(2)} %ptxsim_{width}, {after.group(4)}; setp.ne.b{width} %ptxsim_p, %ptxsim_{width}, {result};"
        )
    # The operands may be overwritten by the original, so the other comes first.
    first, _, check = extra.partition("; ")
    text, start = original, original.index("{", original.index(")", original.index(".entry ")))
    sites = [m for m in STATEMENT.finditer(text[start:]) if m.group(3)]
    site = sites[mutant.index]
    at, end = start + site.start(3), start + site.end(3)
    registers = "\n.reg .pred %ptxsim_p; .reg .b16 %ptxsim_16; .reg .b32 %ptxsim_32;\n"
    body = text[start + 1 : at] + f"{first}; {text[at:end]} {check} @%ptxsim_p trap;" + text[end:]
    return text[: start + 1] + registers + body
