"""cvt between all types, and comparisons, against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from ._exact import FORMATS, Format
from ._opcode import BITS, execute, operands, samples, signed
from .test_opcodes_float import flush, same, saturate

FLOATS = ["f16", "bf16", "f32", "f64"]
INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]


def limits(kind: str) -> tuple[int, int]:
    """Smallest and largest value of an integer type."""
    n = BITS[kind]
    return (-(1 << (n - 1)), (1 << (n - 1)) - 1) if kind[0] == "s" else (0, (1 << n) - 1)


def number(bits: int, kind: str):
    """The value of a bit pattern of any scalar type."""
    if kind in FORMATS:
        return FORMATS[kind].decode(bits)
    return signed(bits, BITS[kind]) if kind[0] == "s" else bits


def to_integral(value: Fraction, mode: str) -> int:
    """Round to an integer: rzi, rni, rmi, rpi."""
    if mode == "rzi":
        return math.trunc(value)
    return {"rni": round, "rmi": math.floor, "rpi": math.ceil}[mode](value)


def column(kind: str) -> list[int]:
    """Samples of a type; for floats also values around the integer limits."""
    values = samples(kind, 120, 11)
    if kind in FORMATS:
        fmt = FORMATS[kind]
        for edge in [
            Fraction(1, 2),
            Fraction(3, 2),
            Fraction(5, 2),
            *(Fraction(2) ** k for k in (7, 8, 15, 16, 31, 32, 63, 64)),
        ]:
            bits = fmt.encode(edge)
            values += [bits, bits | fmt.sign, bits - 1, bits + 1, (bits - 1) | fmt.sign]
    return values


def wide(kind: str) -> str:
    """The type of a register that can hold it (there are no 8-bit registers)."""
    return kind if BITS[kind] > 8 else f"{kind[0]}16"


@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("source", INTEGERS)
def test_integer_to_integer(source, target):
    values = [b & ((1 << BITS[source]) - 1) for b in samples(source, 100, 3)]
    for saturates in ("", ".sat"):
        (got,) = execute(f"cvt{saturates}.{target}.{source} %d0, %a0;", [wide(source)], [wide(target)], [values])
        low, high = limits(target)
        for bits, g in zip(values, got, strict=False):
            value = number(bits, source)
            if saturates:
                value = max(low, min(high, value))
            want = number(value & ((1 << BITS[target]) - 1), target) & ((1 << BITS[wide(target)]) - 1)
            assert g == want, f"cvt{saturates}.{target}.{source}({number(bits, source)}): {g:#x}, not {want:#x}"


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("target", FLOATS)
def test_integer_to_float(target, mode):
    fmt = FORMATS[target]
    for source in INTEGERS:
        values = [b & ((1 << BITS[source]) - 1) for b in samples(source, 100, 4)]
        (got,) = execute(f"cvt.{mode}.{target}.{source} %d0, %a0;", [wide(source)], [target], [values])
        for bits, g in zip(values, got, strict=False):
            want = fmt.encode(Fraction(number(bits, source)) or 0.0, mode)
            assert g == want, f"cvt.{mode}.{target}.{source}({number(bits, source)}): {g:#x}, not {want:#x}"


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("source", FLOATS)
def test_float_to_integer(source, mode):
    values = column(source)
    for target in INTEGERS:
        (got,) = execute(f"cvt.{mode}.{target}.{source} %d0, %a0;", [source], [wide(target)], [values])
        low, high = limits(target)
        for bits, g in zip(values, got, strict=False):
            value = number(bits, source)
            if isinstance(value, float) and math.isnan(value):
                want = 1 << (BITS[target] - 1) if source == "f64" or BITS[target] == 64 else 0
                want = number(want, target)
            elif isinstance(value, float):
                want = 0 if value == 0 else high if value > 0 else low
            else:
                want = max(low, min(high, to_integral(value, mode)))
            want &= (1 << BITS[wide(target)]) - 1
            assert g == want, f"cvt.{mode}.{target}.{source}({value}): {g:#x}, not {want:#x}"


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_float_to_float(source, target):
    from_format, to_format = FORMATS[source], FORMATS[target]
    values = column(source)
    exact = to_format.exponent >= from_format.exponent and to_format.fraction >= from_format.fraction
    for mode in [""] if exact else ["rn", "rz", "rm", "rp"]:
        instruction = f"cvt{'.' + mode if mode else ''}.{target}.{source} %d0, %a0;"
        (got,) = execute(instruction, [source], [target], [values])
        for bits, g in zip(values, got, strict=False):
            want = to_format.encode(from_format.decode(bits), mode or "rn")
            assert same(g, want, to_format), f"{instruction} {bits:#x}: {g:#x}, not {want:#x}"


def test_float_modifiers():
    f32, f16 = FORMATS["f32"], FORMATS["f16"]
    values = column("f32")

    def expect(instruction, target, reference):
        (got,) = execute(instruction, ["f32"], [target], [values])
        for bits, g in zip(values, got, strict=False):
            assert same(g, reference(bits), FORMATS[target]), f"{instruction} {bits:#x}: {g:#x}, not {reference(bits):#x}"

    expect("cvt.ftz.f32.f32 %d0, %a0;", "f32", lambda b: flush(b, f32))
    expect("cvt.sat.f32.f32 %d0, %a0;", "f32", lambda b: saturate(b, f32))
    expect(
        "cvt.rn.relu.f16.f32 %d0, %a0;",
        "f16",
        lambda b: f16.encode(f32.decode(b)) if b < f32.sign or b & (f32.sign - 1) > f32.infinity else 0,
    )
    expect(
        "cvt.rn.relu.bf16.f32 %d0, %a0;",
        "bf16",
        lambda b: FORMATS["bf16"].encode(f32.decode(b)) if b < f32.sign or b & (f32.sign - 1) > f32.infinity else 0,
    )
    for mode in ("rni", "rzi", "rmi", "rpi"):

        def integral(b, mode=mode):
            value = f32.decode(b)
            if isinstance(value, float):
                return f32.encode(value)
            rounded = to_integral(value, mode)
            return f32.encode(Fraction(rounded)) if rounded else b & f32.sign

        expect(f"cvt.{mode}.f32.f32 %d0, %a0;", "f32", integral)


def test_tf32():
    fmt = Format(8, 10)
    values = column("f32")
    for mode in ("rna", "rn", "rz"):
        (got,) = execute(f"cvt.{mode}.tf32.f32 %d0, %a0;", ["f32"], ["b32"], [values])
        for bits, g in zip(values, got, strict=False):
            value = FORMATS["f32"].decode(bits)
            if not (isinstance(value, float) and math.isnan(value)):
                assert g == fmt.encode(value, mode) << 13, f"{bits:#x}"


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs(kind):
    fmt, f32 = FORMATS[kind], FORMATS["f32"]
    columns = [column("f32"), column("f32")[::-1]]
    for instruction, mode in ((f"cvt.rn.{kind}x2.f32", "rn"), (f"cvt.rz.{kind}x2.f32", "rz")):
        (got,) = execute(f"{instruction} %d0, %a0, %a1;", ["f32", "f32"], [f"{kind}x2"], columns)
        for a, b, g in zip(*columns, got, strict=False):
            assert same(g >> 16, fmt.encode(f32.decode(a), mode), fmt) and same(
                g & 0xFFFF, fmt.encode(f32.decode(b), mode), fmt
            )


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def unordered(*values) -> bool:
    return any(isinstance(v, float) and math.isnan(v) for v in values)


@pytest.mark.parametrize("kind", FLOATS)
def test_float_comparisons(kind):
    columns = operands([kind, kind], count=60)
    rows = [(number(a, kind), number(b, kind)) for a, b in zip(*columns, strict=False)]
    for name, holds in COMPARISONS.items():
        (got,) = execute(f"setp.{name}.{kind} %d0, %a0, %a1;", [kind, kind], ["pred"], columns)
        assert got == [int(not unordered(a, b) and holds(a, b)) for a, b in rows], name
        (got,) = execute(f"setp.{name}u.{kind} %d0, %a0, %a1;", [kind, kind], ["pred"], columns)
        assert got == [int(unordered(a, b) or holds(a, b)) for a, b in rows], f"{name}u"
    for name, want in (("num", 0), ("nan", 1)):
        (got,) = execute(f"setp.{name}.{kind} %d0, %a0, %a1;", [kind, kind], ["pred"], columns)
        assert got == [int(unordered(a, b) == bool(want)) for a, b in rows], name


def test_flushed_comparison():
    fmt = FORMATS["f32"]
    columns = operands(["f32", "f32"], count=40)
    (got,) = execute("setp.lt.ftz.f32 %d0, %a0, %a1;", ["f32", "f32"], ["pred"], columns)
    for a, b, g in zip(*columns, got, strict=False):
        x, y = fmt.decode(flush(a, fmt)), fmt.decode(flush(b, fmt))
        assert g == int(not unordered(x, y) and x < y)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_comparisons(kind):
    columns = operands([kind, kind], count=60)
    rows = [(number(a, kind), number(b, kind)) for a, b in zip(*columns, strict=False)]
    names = dict(COMPARISONS)
    if kind[0] == "u":
        names |= {"lo": COMPARISONS["lt"], "ls": COMPARISONS["le"], "hi": COMPARISONS["gt"], "hs": COMPARISONS["ge"]}
    for name, holds in names.items():
        (got,) = execute(f"setp.{name}.{kind} %d0, %a0, %a1;", [kind, kind], ["pred"], columns)
        assert got == [int(holds(a, b)) for a, b in rows], name


def test_joined_comparisons():
    columns = [[1, 1, 2, 2], [2, 2, 1, 1], [0, 1, 0, 1]]
    kinds = ["s32", "s32", "pred"]
    for join, first, second in (
        ("and", [0, 1, 0, 0], [0, 0, 0, 1]),
        ("or", [1, 1, 0, 1], [0, 1, 1, 1]),
        ("xor", [1, 0, 0, 1], [0, 1, 1, 0]),
    ):
        assert execute(f"setp.lt.{join}.s32 %d0|%d1, %a0, %a1, %a2;", kinds, ["pred", "pred"], columns) == [first, second]
    assert execute("setp.lt.and.s32 %d0, %a0, %a1, !%a2;", kinds, ["pred"], columns) == [[1, 0, 0, 0]]
    assert execute("set.lt.u32.s32 %d0, %a0, %a1;", kinds[:2], ["u32"], columns[:2]) == [[0xFFFFFFFF, 0xFFFFFFFF, 0, 0]]
    assert execute("set.lt.f32.s32 %d0, %a0, %a1;", kinds[:2], ["f32"], columns[:2]) == [[0x3F800000, 0x3F800000, 0, 0]]
