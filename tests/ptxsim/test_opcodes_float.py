"""f32 and f64 instructions against exact rational arithmetic: every rounding, NaN, signed zero, denormals, .ftz, .sat."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from . import _exact as exact
from ._exact import FORMATS
from ._opcode import execute, operands, samples

MODES = ["rn", "rz", "rm", "rp"]


def flush(bits: int, fmt: exact.Format) -> int:
    """Denormals become zeros of the same sign."""
    return bits & fmt.sign if bits & (fmt.sign - 1) < 1 << fmt.fraction else bits


def saturate(bits: int, fmt: exact.Format) -> int:
    """Clamp to [0, 1]; NaN becomes 0."""
    value = fmt.decode(bits)
    if isinstance(value, float) and not math.isinf(value):
        return 0
    return (
        fmt.encode(min(max(Fraction(0), value), Fraction(1)) or 0.0)
        if not isinstance(value, float)
        else (fmt.bias << fmt.fraction if value > 0 else 0)
    )


def same(got: int, want: int, fmt: exact.Format) -> bool:
    """Equal bits; every NaN is as good as another."""
    return got == want or (got & (fmt.sign - 1) > fmt.infinity and want & (fmt.sign - 1) > fmt.infinity)


def check(instruction: str, kind: str, arity: int, reference, seed: int = 0, inputs=None) -> None:
    """Compares an instruction on %a0… with reference(bits…) -> bits for every operand row."""
    fmt = FORMATS[kind]
    columns = inputs or operands([kind] * arity, seed=seed)
    (got,) = execute(instruction, [kind] * arity, [kind], columns)
    for row, g in zip(zip(*columns, strict=False), got, strict=False):
        want = reference(*row)
        assert same(g, want, fmt), f"{instruction} {[f'{b:x}' for b in row]}: got {g:x}, expected {want:x}"


BINARY = {
    "add": lambda a, b, mode: exact.add(a, b, mode),
    "sub": lambda a, b, mode: exact.add(a, -b, mode),
    "mul": lambda a, b, mode: exact.mul(a, b),
    "div": lambda a, b, mode: exact.div(a, b),
}


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", BINARY)
def test_binary(op, mode, kind):
    fmt = FORMATS[kind]
    check(
        f"{op}.{mode}.{kind} %d0, %a0, %a1;",
        kind,
        2,
        lambda a, b: fmt.encode(BINARY[op](fmt.decode(a), fmt.decode(b), mode), mode),
    )


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["fma", "mad"])
def test_fma(op, mode, kind):
    fmt = FORMATS[kind]
    check(
        f"{op}.{mode}.{kind} %d0, %a0, %a1, %a2;",
        kind,
        3,
        lambda a, b, c: fmt.encode(exact.fma(fmt.decode(a), fmt.decode(b), fmt.decode(c), mode), mode),
    )


@pytest.mark.parametrize("op", ["add", "mul", "sub"])
def test_flush_and_saturate(op):
    fmt = FORMATS["f32"]

    def result(a, b, ftz, sat):
        if ftz:
            a, b = flush(a, fmt), flush(b, fmt)
        bits = fmt.encode(BINARY[op](fmt.decode(a), fmt.decode(b), "rn"))
        bits = flush(bits, fmt) if ftz else bits
        return saturate(bits, fmt) if sat else bits

    check(f"{op}.ftz.f32 %d0, %a0, %a1;", "f32", 2, lambda a, b: result(a, b, True, False))
    check(f"{op}.sat.f32 %d0, %a0, %a1;", "f32", 2, lambda a, b: result(a, b, False, True))
    check(f"{op}.ftz.sat.f32 %d0, %a0, %a1;", "f32", 2, lambda a, b: result(a, b, True, True))


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("mode", MODES)
def test_sqrt_and_rcp(mode, kind):
    fmt = FORMATS[kind]
    column = [samples(kind, 200, 7)]
    check(f"sqrt.{mode}.{kind} %d0, %a0;", kind, 1, lambda a: exact.sqrt_bits(a, fmt, mode), inputs=column)
    check(
        f"rcp.{mode}.{kind} %d0, %a0;",
        kind,
        1,
        lambda a: fmt.encode(exact.div(Fraction(1), fmt.decode(a)), mode),
        inputs=column,
    )


APPROXIMATE = {
    "rcp.approx.f32": lambda x: math.inf if x == 0 else 1 / x,
    "rcp.approx.ftz.f32": lambda x: math.inf if x == 0 else 1 / x,
    "sqrt.approx.f32": math.sqrt,
    "rsqrt.approx.f32": lambda x: math.inf if x == 0 else 1 / math.sqrt(x),
    "ex2.approx.f32": lambda x: 2.0**x if x < 128 else math.inf,
    "ex2.approx.ftz.f32": lambda x: 2.0**x if x < 128 else math.inf,
    "lg2.approx.f32": lambda x: -math.inf if x == 0 else math.log2(x),
    "sin.approx.f32": math.sin,
    "cos.approx.f32": math.cos,
    "tanh.approx.f32": math.tanh,
}


@pytest.mark.parametrize("op", APPROXIMATE)
def test_approximations(op):
    fmt = FORMATS["f32"]
    values = [fmt.encode(Fraction(i, 16)) if i else 0 for i in range(0, 400, 7)]
    (got,) = execute(f"{op} %d0, %a0;", ["f32"], ["f32"], [values])
    for bits, g in zip(values, got, strict=False):
        want, value = APPROXIMATE[op](float(fmt.decode(bits))), fmt.decode(g)
        assert value == want or abs(float(value) - want) <= 2e-7 * max(abs(want), 1e-30), (
            f"{op}({float(fmt.decode(bits))}): {float(value)}, not {want}"
        )


def test_division_variants():
    fmt = FORMATS["f32"]
    for op in ("div.full.f32", "div.approx.f32"):
        check(f"{op} %d0, %a0, %a1;", "f32", 2, lambda a, b: fmt.encode(exact.div(fmt.decode(a), fmt.decode(b))))


def extreme(fmt, largest: bool, nan: bool):
    """minNum/maxNum on bit patterns; nan: a NaN operand wins."""

    def key(bits):
        value = fmt.decode(bits)
        return (value, 0 if isinstance(value, float) and math.copysign(1, value) < 0 else 1)

    def choose(*row):
        numbers = [b for b in row if b & (fmt.sign - 1) <= fmt.infinity]
        if not numbers or (nan and len(numbers) < len(row)):
            return fmt.nan
        return (max if largest else min)(numbers, key=key)

    return choose


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("op", ["min", "max"])
def test_min_max(op, kind):
    fmt = FORMATS[kind]
    check(f"{op}.{kind} %d0, %a0, %a1;", kind, 2, extreme(fmt, op == "max", False))
    if kind == "f32":
        check(f"{op}.NaN.f32 %d0, %a0, %a1;", kind, 2, extreme(fmt, op == "max", True))
        check(f"{op}.f32 %d0, %a0, %a1, %a2;", kind, 3, extreme(fmt, op == "max", False))
        flushed = extreme(fmt, op == "max", False)
        check(f"{op}.ftz.f32 %d0, %a0, %a1;", kind, 2, lambda a, b: flushed(flush(a, fmt), flush(b, fmt)))
        magnitude = extreme(fmt, op == "max", False)

        def xorsign(a, b):
            bits = magnitude(a & ~fmt.sign, b & ~fmt.sign)
            return bits | ((a ^ b) & fmt.sign)

        check(f"{op}.xorsign.abs.f32 %d0, %a0, %a1;", kind, 2, xorsign)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_signs(kind):
    fmt = FORMATS[kind]
    column = [samples(kind, 100, 3)]
    for op, want in (("neg", lambda a: a ^ fmt.sign), ("abs", lambda a: a & ~fmt.sign)):
        (got,) = execute(f"{op}.{kind} %d0, %a0;", [kind], [kind], column)
        assert got == [want(a) for a in column[0]]
    columns = operands([kind, kind])
    (got,) = execute(f"copysign.{kind} %d0, %a0, %a1;", [kind, kind], [kind], columns)
    assert got == [(a & fmt.sign) | (b & ~fmt.sign) for a, b in zip(*columns, strict=False)]


def test_sign_with_flush():
    fmt = FORMATS["f32"]
    column = [samples("f32", 100, 3)]
    (got,) = execute("neg.ftz.f32 %d0, %a0;", ["f32"], ["f32"], column)
    assert got == [flush(a, fmt) ^ fmt.sign for a in column[0]]
    (got,) = execute("abs.ftz.f32 %d0, %a0;", ["f32"], ["f32"], column)
    assert got == [flush(a, fmt) & ~fmt.sign for a in column[0]]


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_testp(kind):
    fmt = FORMATS[kind]
    column = samples(kind, 60, 5)
    magnitude = [b & (fmt.sign - 1) for b in column]
    expected = {
        "finite": [m < fmt.infinity for m in magnitude],
        "infinite": [m == fmt.infinity for m in magnitude],
        "number": [m <= fmt.infinity for m in magnitude],
        "notanumber": [m > fmt.infinity for m in magnitude],
        "normal": [1 << fmt.fraction <= m < fmt.infinity for m in magnitude],
        "subnormal": [0 < m < 1 << fmt.fraction for m in magnitude],
    }
    for name, want in expected.items():
        (got,) = execute(f"testp.{name}.{kind} %d0, %a0;", [kind], ["pred"], [column])
        assert [bool(g) for g in got] == want, name
