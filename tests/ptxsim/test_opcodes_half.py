"""f16 and bf16 instructions, single and packed, against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from . import _exact as exact
from ._exact import FORMATS
from ._opcode import execute, operands, samples
from .test_opcodes_float import extreme, flush, same, saturate

KINDS = ["f16", "bf16"]


def relu(bits: int, fmt: exact.Format) -> int:
    """max(x, 0), NaN kept."""
    return 0 if bits & fmt.sign and bits & (fmt.sign - 1) <= fmt.infinity else bits


def check(instruction: str, kind: str, arity: int, reference) -> None:
    """The scalar instruction, and its packed twin on pairs of the same rows."""
    fmt = FORMATS[kind]
    columns = operands([kind] * arity)
    want = [reference(*row) for row in zip(*columns, strict=False)]
    (got,) = execute(instruction, [kind] * arity, [kind], columns)
    for row, g, w in zip(zip(*columns, strict=False), got, want, strict=False):
        assert same(g, w, fmt), f"{instruction} {[f'{b:x}' for b in row]}: got {g:x}, expected {w:x}"
    packed_columns = [[low | high << 16 for low, high in zip(column, column[::-1], strict=False)] for column in columns]
    packed = instruction.replace(f".{kind}", f".{kind}x2")
    (got,) = execute(packed, [f"{kind}x2"] * arity, [f"{kind}x2"], packed_columns)
    for g, low, high in zip(got, want, want[::-1], strict=False):
        assert same(g & 0xFFFF, low, fmt) and same(g >> 16, high, fmt), f"{packed}: got {g:x}, expected {high:x}{low:04x}"


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic(kind):
    fmt = FORMATS[kind]
    value = fmt.decode
    check(f"add.rn.{kind} %d0, %a0, %a1;", kind, 2, lambda a, b: fmt.encode(exact.add(value(a), value(b))))
    check(f"sub.{kind} %d0, %a0, %a1;", kind, 2, lambda a, b: fmt.encode(exact.add(value(a), -value(b))))
    check(f"mul.{kind} %d0, %a0, %a1;", kind, 2, lambda a, b: fmt.encode(exact.mul(value(a), value(b))))
    check(f"fma.rn.{kind} %d0, %a0, %a1, %a2;", kind, 3, lambda a, b, c: fmt.encode(exact.fma(value(a), value(b), value(c))))


@pytest.mark.parametrize("kind", KINDS)
def test_modifiers(kind):
    fmt = FORMATS[kind]

    def fused(a, b, c):
        return fmt.encode(exact.fma(fmt.decode(a), fmt.decode(b), fmt.decode(c)))

    check(f"fma.rn.relu.{kind} %d0, %a0, %a1, %a2;", kind, 3, lambda a, b, c: relu(fused(a, b, c), fmt))
    if kind == "f16":
        check("fma.rn.sat.f16 %d0, %a0, %a1, %a2;", kind, 3, lambda a, b, c: saturate(fused(a, b, c), fmt))
        check(
            "fma.rn.ftz.f16 %d0, %a0, %a1, %a2;",
            kind,
            3,
            lambda a, b, c: flush(fused(*(flush(x, fmt) for x in (a, b, c))), fmt),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["min", "max"])
def test_min_max(op, kind):
    fmt = FORMATS[kind]
    check(f"{op}.{kind} %d0, %a0, %a1;", kind, 2, extreme(fmt, op == "max", False))
    check(f"{op}.NaN.{kind} %d0, %a0, %a1;", kind, 2, extreme(fmt, op == "max", True))
    magnitude = extreme(fmt, op == "max", False)
    check(
        f"{op}.xorsign.abs.{kind} %d0, %a0, %a1;",
        kind,
        2,
        lambda a, b: magnitude(a & ~fmt.sign, b & ~fmt.sign) | ((a ^ b) & fmt.sign),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_signs(kind):
    fmt = FORMATS[kind]
    check(f"neg.{kind} %d0, %a0;", kind, 1, lambda a: a ^ fmt.sign)
    check(f"abs.{kind} %d0, %a0;", kind, 1, lambda a: a & ~fmt.sign)


@pytest.mark.parametrize("kind", KINDS)
def test_approximations(kind):
    fmt = FORMATS[kind]
    values = [fmt.encode(Fraction(i, 8)) if i else 0 for i in range(-40, 41)]
    for op, function in (("ex2.approx", lambda x: 2.0**x), ("tanh.approx", math.tanh)):
        (got,) = execute(f"{op}.{kind} %d0, %a0;", [kind], [kind], [values])
        assert got == [fmt.encode(function(float(fmt.decode(b)))) for b in values], op


def test_predicates_of_pairs():
    column, other = samples("f16", 80, 1), samples("f16", 80, 2)
    fmt = FORMATS["f16"]
    pairs = (
        [a | b << 16 for a, b in zip(column, other, strict=False)],
        [b | a << 16 for a, b in zip(column, other[::-1], strict=False)],
    )
    low, high = execute("setp.gt.f16x2 %d0|%d1, %a0, %a1;", ["f16x2", "f16x2"], ["pred", "pred"], pairs)
    for a, b, p, q in zip(*pairs, low, high, strict=False):
        assert p == (fmt.decode(a & 0xFFFF) > fmt.decode(b & 0xFFFF)) and q == (fmt.decode(a >> 16) > fmt.decode(b >> 16))
