"""Runs one PTX instruction on many operands: each thread loads its operands, executes it and stores the results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from . import Arr, Module, Report
from ._exact import FORMATS

BITS = {"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64, "pred": 32, "tf32": 32}
BITS |= {f"{kind}{n}": n for kind in "bus" for n in (8, 16, 32, 64)}
_STORAGE = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SPECIALS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


def raw(values, kind: str) -> np.ndarray:
    """Bit patterns of integers (taken modulo the width) as unsigned numpy integers."""
    bits = BITS[kind]
    return np.array([int(v) & ((1 << bits) - 1) for v in np.asarray(values, dtype=object).ravel()], dtype=_STORAGE[bits])


def signed(bits: int, width: int) -> int:
    """A bit pattern as a two's complement integer."""
    return bits - (1 << width) if bits >> (width - 1) & 1 else bits


def samples(kind: str, count: int, seed: int) -> list[int]:
    """Bit patterns worth trying: the corners of the type, then random ones."""
    width = BITS[kind]
    rng = np.random.default_rng(seed)
    random = [int.from_bytes(rng.bytes(8), "little") & ((1 << width) - 1) for _ in range(count)]
    if kind in FORMATS:
        f = FORMATS[kind]
        one = f.bias << f.fraction
        corners = [
            0,
            1,
            (1 << f.fraction) - 1,
            1 << f.fraction,
            one,
            one + 1,
            one - 1,
            one + (3 << (f.fraction - 1)),
            f.infinity - 1,
            f.infinity,
            f.nan,
        ]
        corners += [c | f.sign for c in corners[:-1]]
        near = [(one + int(d)) & ((1 << width) - 1) for d in rng.integers(-(4 << f.fraction), 4 << f.fraction, count)]
        return corners + [x for pair in zip(near, random, strict=False) for x in pair]
    top = 1 << (width - 1)
    return [
        0,
        1,
        2,
        3,
        width - 1,
        width,
        width + 1,
        top - 1,
        top,
        top + 1,
        (1 << width) - 1,
        (1 << width) - 2,
        0x55 * (((1 << width) - 1) // 255),
    ] + random


def operands(kinds: Sequence[str], count: int = 150, seed: int = 0, corners: int = 22) -> list[list[int]]:
    """Operand lists: all combinations of the corners of the first two, then zipped random samples."""
    columns = [samples(kind, 3 * count, seed + i) for i, kind in enumerate(kinds)]
    few = corners if len(kinds) == 2 else 7 if len(kinds) > 2 else len(columns[0])
    rows = list(itertools.product(*(column[:few] for column in columns)))
    rows += list(zip(*(column[few : few + count] for column in columns), strict=False))
    return [list(column) for column in zip(*rows, strict=False)]


def _register(kind: str) -> str:
    return {"pred": "pred"}.get(kind, f"b{BITS[kind]}")


def program(instruction: str, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """PTX of a kernel `k` whose parameters are the input arrays, the output arrays and the number of threads.

    instruction: one or more statements with %a0, %a1, … for the inputs and %d0, … for the outputs.
    """
    arrays = [*inputs, *outputs]
    lines = [".version 8.0", ".target sm_90", ".address_size 64", ".visible .entry k("]
    lines.append(",\n".join([f".param .u64 p{i}" for i in range(len(arrays))] + [".param .u32 n"]))
    lines += [
        ")",
        "{",
        ".reg .pred %out;",
        ".reg .b32 %t<4>;",
        ".reg .b64 %q<4>;",
        ".reg .b32 %n;",
        ".reg .b32 %sel;",
        ".reg .b16 %h;",
    ]
    lines += [f".reg .{_register(k)} %a{i};" for i, k in enumerate(inputs)]
    lines += [f".reg .{_register(k)} %d{i};" for i, k in enumerate(outputs)]
    lines += ["mov.u32 %t0, %tid.x;", "mov.u32 %t1, %ctaid.x;", "mov.u32 %t2, %ntid.x;", "mad.lo.s32 %t0, %t1, %t2, %t0;"]
    lines += ["ld.param.u32 %n, [n];", "setp.ge.u32 %out, %t0, %n;", "@%out bra DONE;"]

    def address(i: int, kind: str) -> list[str]:
        return [f"ld.param.u64 %q0, [p{i}];", f"mul.wide.u32 %q1, %t0, {BITS[kind] // 8};", "add.s64 %q0, %q0, %q1;"]

    for i, kind in enumerate(inputs):
        lines += address(i, kind)
        if kind == "pred":
            lines += ["ld.global.b32 %sel, [%q0];", f"setp.ne.b32 %a{i}, %sel, 0;"]
        else:
            lines.append(f"ld.global.b{BITS[kind]} %a{i}, [%q0];")
    lines.append(instruction)
    for i, kind in enumerate(outputs):
        lines += address(len(inputs) + i, kind)
        if kind == "pred":
            lines += [f"selp.b32 %sel, 1, 0, %d{i};", "st.global.b32 [%q0], %sel;"]
        else:
            lines.append(f"st.global.b{BITS[kind]} [%q0], %d{i};")
    return "\n".join([*lines, "DONE:", "ret;", "}", ""])


def execute(
    instruction: str, inputs: Sequence[str], outputs: Sequence[str], values: Sequence[Sequence[int]], block: int = 128
) -> list[list[int]]:
    """Bit patterns of the outputs for columns of input bit patterns; the launch must be clean."""
    count = len(values[0])
    arrays = [raw(column, kind) for column, kind in zip(values, inputs, strict=False)]
    results = [np.zeros(count, _STORAGE[BITS[kind]]) for kind in outputs]
    args = [Arr(a, f"in{i}", read_only=True) for i, a in enumerate(arrays)] + [
        Arr(r, f"out{i}", output=True) for i, r in enumerate(results)
    ]
    module = Module(program(instruction, inputs, outputs))
    assert not module.unsupported(), module.unsupported()
    module.launch("k", -(-count // block), block, [*args, count]).check()
    return [[int(x) for x in r] for r in results]


def launch(body: str, args: Sequence, block: int = 32, grid: int = 1, smem: int = 0, shared: int = 0, **options: int) -> Report:
    """Runs a hand-written body with parameters p0, p1, … (64-bit) and registers %r, %q, %f, %p, %h; s is a shared array."""
    parameters = ",\n".join(f".param .u64 p{i}" for i in range(len(args)))
    loads = "\n".join(f"ld.param.u64 %q{i}, [p{i}];" for i in range(len(args)))
    source = f""".version 8.0
.target sm_90
.address_size 64
.visible .entry k({parameters})
{{
.reg .pred %p<8>;
.reg .b16 %h<32>;
.reg .b32 %r<32>;
.reg .b64 %q<32>;
.reg .f32 %f<32>;
{f".shared .align 16 .b8 s[{shared}];" if shared else ""}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""
    return Module(source).launch("k", grid, block, args, smem=smem, stop=False, **options)
