"""Integer and bit instructions against Python's integers: wrap, saturation, carries, shifts past the width."""

from __future__ import annotations

import pytest

from ._opcode import BITS, execute, operands, samples, signed

INTEGERS = ["u16", "s16", "u32", "s32", "u64", "s64"]


def check(instruction: str, inputs: list[str], output: str, reference, columns=None) -> None:
    """Compares with reference(values…), which gets signed values for s types, modulo the output's width."""
    columns = columns or operands(inputs)
    (got,) = execute(instruction, inputs, [output], columns)
    for row, g in zip(zip(*columns, strict=False), got, strict=False):
        values = [signed(b, BITS[k]) if k[0] == "s" else b for b, k in zip(row, inputs, strict=False)]
        want = int(reference(*values)) & ((1 << BITS[output]) - 1)
        assert g == want, f"{instruction} {values}: got {g:#x}, expected {want:#x}"


def trunc_div(a: int, b: int) -> int:
    """C's division; by zero all ones."""
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def trunc_rem(a: int, b: int) -> int:
    """C's remainder; by zero a."""
    return a if b == 0 else a - b * trunc_div(a, b)


def clamp32(x: int) -> int:
    return max(-(1 << 31), min((1 << 31) - 1, x))


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": trunc_div,
    "rem": trunc_rem,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("op", BINARY)
def test_binary(op, kind):
    check(f"{op}.{kind} %d0, %a0, %a1;", [kind, kind], kind, BINARY[op])


@pytest.mark.parametrize("kind", INTEGERS)
def test_products(kind):
    width = BITS[kind]
    check(f"mul.hi.{kind} %d0, %a0, %a1;", [kind, kind], kind, lambda a, b: a * b >> width)
    check(f"mad.lo.{kind} %d0, %a0, %a1, %a2;", [kind] * 3, kind, lambda a, b, c: a * b + c)
    check(f"mad.hi.{kind} %d0, %a0, %a1, %a2;", [kind] * 3, kind, lambda a, b, c: (a * b >> width) + c)
    if width < 64:
        wide = f"{kind[0]}{2 * width}"
        check(f"mul.wide.{kind} %d0, %a0, %a1;", [kind, kind], wide, lambda a, b: a * b)
        check(f"mad.wide.{kind} %d0, %a0, %a1, %a2;", [kind, kind, wide], wide, lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_signs_and_sad(kind):
    check(f"neg.{kind} %d0, %a0;", [kind], kind, lambda a: -a)
    check(f"abs.{kind} %d0, %a0;", [kind], kind, abs)
    for k in (kind, kind.replace("s", "u")):
        check(f"sad.{k} %d0, %a0, %a1, %a2;", [k] * 3, k, lambda a, b, c: abs(a - b) + c)


def test_saturation():
    check("add.sat.s32 %d0, %a0, %a1;", ["s32", "s32"], "s32", lambda a, b: clamp32(a + b))
    check("sub.sat.s32 %d0, %a0, %a1;", ["s32", "s32"], "s32", lambda a, b: clamp32(a - b))
    check("mad.hi.sat.s32 %d0, %a0, %a1, %a2;", ["s32"] * 3, "s32", lambda a, b, c: clamp32((a * b >> 32) + c))


@pytest.mark.parametrize("kind", ["u32", "u64"])
def test_carries(kind):
    width = BITS[kind]
    mask = (1 << width) - 1
    columns = operands([kind] * 4)
    both = [kind, kind]
    low, high = execute(f"add.cc.{kind} %d0, %a0, %a2;\naddc.{kind} %d1, %a1, %a3;", [kind] * 4, both, columns)
    for a0, a1, b0, b1, lo, hi in zip(*columns, low, high, strict=False):
        assert lo | hi << width == ((a0 | a1 << width) + (b0 | b1 << width)) & (mask | mask << width)
    low, high = execute(f"sub.cc.{kind} %d0, %a0, %a2;\nsubc.{kind} %d1, %a1, %a3;", [kind] * 4, both, columns)
    for a0, a1, b0, b1, lo, hi in zip(*columns, low, high, strict=False):
        assert lo | hi << width == ((a0 | a1 << width) - (b0 | b1 << width)) & (mask | mask << width)
    chain = f"mad.lo.cc.{kind} %d0, %a0, %a1, %a2;\nmadc.hi.cc.{kind} %d1, %a0, %a1, %a3;\naddc.cc.{kind} %d2, 0, 0;"
    low, high, top = execute(chain, [kind] * 4, [kind] * 3, columns)
    for a, b, c0, c1, lo, hi, t in zip(*columns, low, high, top, strict=False):
        assert lo | hi << width | t << 2 * width == a * b + (c0 | c1 << width)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_counting(kind):
    width = BITS[kind]

    def pattern(a: int) -> int:
        return a & ((1 << width) - 1)

    if kind[0] == "u":
        b = f"b{width}"
        check(f"popc.{b} %d0, %a0;", [kind], "u32", lambda a: bin(a).count("1"))
        check(f"clz.{b} %d0, %a0;", [kind], "u32", lambda a: width - a.bit_length())
        check(f"brev.{b} %d0, %a0;", [kind], kind, lambda a: int(f"{a:0{width}b}"[::-1], 2))

    def high_bit(a: int) -> int:
        return (pattern(~a) if a < 0 else a).bit_length() - 1

    check(f"bfind.{kind} %d0, %a0;", [kind], "u32", high_bit)
    check(f"bfind.shiftamt.{kind} %d0, %a0;", [kind], "u32", lambda a: -1 if high_bit(a) < 0 else width - 1 - high_bit(a))


def test_find_first_set():
    # __ffs is compiled to brev and bfind
    check(
        "brev.b32 %d0, %a0;\nbfind.shiftamt.u32 %d0, %d0;\nadd.s32 %d0, %d0, 1;",
        ["u32"],
        "u32",
        lambda a: (a & -a).bit_length(),
    )


@pytest.mark.parametrize("sign_a", "us")
@pytest.mark.parametrize("sign_b", "us")
def test_dot_products(sign_a, sign_b):
    def byte(x: int, i: int, sign: str) -> int:
        return signed(x >> 8 * i & 255, 8) if sign == "s" else x >> 8 * i & 255

    def half(x: int, i: int, sign: str) -> int:
        return signed(x >> 16 * i & 0xFFFF, 16) if sign == "s" else x >> 16 * i & 0xFFFF

    kinds = f"{sign_a}32.{sign_b}32"
    check(
        f"dp4a.{kinds} %d0, %a0, %a1, %a2;",
        ["b32"] * 3,
        "u32",
        lambda a, b, c: c + sum(byte(a, i, sign_a) * byte(b, i, sign_b) for i in range(4)),
    )
    for part, first in (("lo", 0), ("hi", 2)):
        check(
            f"dp2a.{part}.{kinds} %d0, %a0, %a1, %a2;",
            ["b32"] * 3,
            "u32",
            lambda a, b, c, first=first: c + sum(half(a, i, sign_a) * byte(b, first + i, sign_b) for i in range(2)),
        )


@pytest.mark.parametrize("width", [16, 32, 64])
def test_logic(width):
    b = f"b{width}"
    check(f"and.{b} %d0, %a0, %a1;", [b, b], b, lambda x, y: x & y)
    check(f"or.{b} %d0, %a0, %a1;", [b, b], b, lambda x, y: x | y)
    check(f"xor.{b} %d0, %a0, %a1;", [b, b], b, lambda x, y: x ^ y)
    check(f"not.{b} %d0, %a0;", [b], b, lambda x: ~x)
    check(f"cnot.{b} %d0, %a0;", [b], b, lambda x: x == 0)


def test_predicate_logic():
    columns = [[0, 0, 1, 1], [0, 1, 0, 1]]
    table = {"and": [0, 0, 0, 1], "or": [0, 1, 1, 1], "xor": [0, 1, 1, 0]}
    for op, want in table.items():
        assert execute(f"{op}.pred %d0, %a0, %a1;", ["pred", "pred"], ["pred"], columns) == [want]
    assert execute("not.pred %d0, %a0;", ["pred"], ["pred"], [[0, 1]]) == [[1, 0]]
    assert execute("and.pred %d0, !%a0, %a1;", ["pred", "pred"], ["pred"], columns) == [[0, 1, 0, 0]]
    assert execute("mov.pred %d0, %a0;", ["pred"], ["pred"], [[0, 1]]) == [[0, 1]]


@pytest.mark.parametrize("kind", INTEGERS)
def test_shifts(kind):
    width = BITS[kind]
    value, amount = operands([kind, "u32"])
    amount = [n % (2 * width + 3) if i % 2 else n for i, n in enumerate(amount)]
    check(f"shl.b{width} %d0, %a0, %a1;", [kind, "u32"], kind, lambda a, n: a << n if n < width else 0, [value, amount])
    check(f"shr.{kind} %d0, %a0, %a1;", [kind, "u32"], kind, lambda a, n: a >> min(n, width), [value, amount])


def test_funnel_shifts():
    columns = operands(["b32", "b32", "u32"])
    columns[2] = [n % 70 if i % 2 else n for i, n in enumerate(columns[2])]
    for mode, amount in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        check(
            f"shf.l.{mode}.b32 %d0, %a0, %a1, %a2;",
            ["b32", "b32", "u32"],
            "b32",
            lambda a, b, n, amount=amount: ((b << 32 | a) << amount(n)) >> 32,
            columns,
        )
        check(
            f"shf.r.{mode}.b32 %d0, %a0, %a1, %a2;",
            ["b32", "b32", "u32"],
            "b32",
            lambda a, b, n, amount=amount: (b << 32 | a) >> amount(n),
            columns,
        )


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0xCA, 0x1B, 0xE8])
def test_lop3(table):
    def reference(a, b, c):
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))

    check(f"lop3.b32 %d0, %a0, %a1, %a2, {table:#x};", ["b32"] * 3, "b32", reference)


def test_prmt():
    def pick(a, b, i):
        byte = (b << 32 | a) >> 8 * (i & 7) & 255
        return (255 if byte & 128 else 0) if i & 8 else byte

    def join(picks):
        return sum(p << 8 * i for i, p in enumerate(picks))

    check(
        "prmt.b32 %d0, %a0, %a1, %a2;", ["b32"] * 3, "b32", lambda a, b, c: join(pick(a, b, c >> 4 * i & 15) for i in range(4))
    )
    modes = {
        "f4e": lambda s, i: (s + i) & 7,
        "b4e": lambda s, i: (s - i) & 7,
        "rc8": lambda s, i: s,
        "ecl": max,
        "ecr": min,
        "rc16": lambda s, i: 2 * (s & 1) + (i & 1),
    }
    for mode, index in modes.items():
        check(
            f"prmt.b32.{mode} %d0, %a0, %a1, %a2;",
            ["b32"] * 3,
            "b32",
            lambda a, b, c, index=index: join(pick(a, b, index(c & 3, i)) for i in range(4)),
        )


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    width = BITS[kind]
    columns = operands([kind, "u32", "u32"])
    columns[1] = [n % (width + 9) for n in columns[1]]
    columns[2] = [n % (width + 9) if i % 3 else 0 for i, n in enumerate(columns[2])]

    def extract(a, position, length):
        if length == 0:
            return 0
        pattern = a & ((1 << width) - 1)
        field = pattern >> position & ((1 << min(length, width)) - 1) if position < width else 0
        if kind[0] == "s":
            sign = pattern >> min(position + length - 1, width - 1) & 1
            have = min(length, max(width - position, 0))
            field |= -1 << have if sign else 0
        return field

    check(f"bfe.{kind} %d0, %a0, %a1, %a2;", [kind, "u32", "u32"], kind, extract, columns)
    if kind[0] == "u":
        b = f"b{width}"

        def insert(a, into, position, length):
            field = (((1 << length) - 1) << position) & ((1 << width) - 1)
            return (into & ~field) | ((a << position) & field)

        check(
            f"bfi.{b} %d0, %a0, %a1, %a2, %a3;",
            [b, b, "u32", "u32"],
            b,
            insert,
            [columns[0], columns[0][::-1], columns[1], columns[2]],
        )


def test_bit_mask():
    columns = [[n % 40 for n in c] for c in operands(["u32", "u32"])]
    check(
        "bmsk.clamp.b32 %d0, %a0, %a1;",
        ["u32", "u32"],
        "u32",
        lambda p, n: ((1 << min(n, 32)) - 1) << p if p < 32 else 0,
        columns,
    )
    check("bmsk.wrap.b32 %d0, %a0, %a1;", ["u32", "u32"], "u32", lambda p, n: ((1 << (n & 31)) - 1) << (p & 31), columns)


def test_moves():
    for b in ("b16", "b32", "b64"):
        check(f"mov.{b} %d0, %a0;", [b], b, lambda a: a)
    column = [samples("b32", 40, 1)]
    got = execute("mov.b32 {%d0, %d1}, %a0;", ["b32"], ["b16", "b16"], column)
    assert got == [[a & 0xFFFF for a in column[0]], [a >> 16 for a in column[0]]]
    assert execute("mov.b32 %d0, {%a0, %a1};", ["b16", "b16"], ["b32"], got) == column
    wide = [samples("b64", 40, 2)]
    got = execute("mov.b64 {%d0, %d1}, %a0;", ["b64"], ["b32", "b32"], wide)
    assert got == [[a & 0xFFFFFFFF for a in wide[0]], [a >> 32 for a in wide[0]]]
    assert execute("mov.b64 %d0, {%a0, %a1};", ["b32", "b32"], ["b64"], got) == wide
    assert execute("mov.u32 %d0, WARP_SZ;", ["b32"], ["b32"], [[0]]) == [[32]]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_selection(kind):
    columns = [[1, 2, 3, 4], [5, 6, 7, 8], [0, 1, 0, 1]]
    assert execute(f"selp.{kind} %d0, %a0, %a1, %a2;", [kind, kind, "pred"], [kind], columns) == [[5, 2, 7, 4]]
    assert execute(f"selp.{kind} %d0, %a0, %a1, !%a2;", [kind, kind, "pred"], [kind], columns) == [[1, 6, 3, 8]]
    if kind != "b16":
        conditions = [0, 5, (1 << 32) - 1, 1 << 31]
        assert execute(
            f"slct.{kind}.s32 %d0, %a0, %a1, %a2;", [kind, kind, "s32"], [kind], [columns[0], columns[1], conditions]
        ) == [[1, 2, 7, 8]]
        floats = [0, 1 << 31, 0x3F800000, 0xBF800000]  # 0, -0, 1, -1
        assert execute(
            f"slct.{kind}.f32 %d0, %a0, %a1, %a2;", [kind, kind, "f32"], [kind], [columns[0], columns[1], floats]
        ) == [[1, 2, 3, 8]]
