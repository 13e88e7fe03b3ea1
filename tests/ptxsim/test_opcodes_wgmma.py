"""wgmma: every operand type, layout and source against numpy, and what happens without the wait."""

from __future__ import annotations

import numpy as np
import pytest

from . import Arr, Module, aligned

THREADS, ROWS = 128, 64
K_OF = {"f16": 16, "bf16": 16, "tf32": 8}
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # layout code of a descriptor -> bytes of a row
CODES = {16: 0, 128: 1, 64: 2, 32: 3}


def numbers(shape: tuple[int, ...], kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values as stored (2 or 4 bytes each) and as the tensor core sees them."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if kind == "f16":
        return values.astype(np.float16), values.astype(np.float16).astype(np.float64)
    raw = values.view(np.uint32) & (0xFFFF0000 if kind == "bf16" else 0xFFFFE000)
    seen = raw.view(np.float32).astype(np.float64)
    return (raw >> 16).astype(np.uint16) if kind == "bf16" else values, seen


def image(matrix: np.ndarray, width: int, mn_major: bool) -> tuple[np.ndarray, int, int]:
    """(bytes in shared memory, leading and stride offsets in bytes) of an (mn, k) matrix, k one instruction deep.

    Lines of `width` bytes, eight to a group, in which 16-byte pieces change places by the line's number.
    """
    lines = matrix.T if mn_major else matrix
    per_line = width // lines.itemsize
    along, across = lines.shape[1], lines.shape[0]
    if width > 16 and not mn_major:  # lines are wider than one instruction is deep
        lines = np.pad(lines, ((0, 0), (0, per_line - along)))
        along = per_line
    groups, columns = across // 8, along // per_line
    out = np.zeros((columns, groups, 8, width // 16, 16), np.uint8)
    for column in range(columns):
        for line in range(across):
            data = np.ascontiguousarray(lines[line, column * per_line : (column + 1) * per_line]).view(np.uint8).reshape(-1, 16)
            for piece in range(width // 16):
                out[column, line // 8, line % 8, piece ^ (line % 8 * width // 128)] = data[piece]
    by_group, by_column = 8 * width, groups * 8 * width
    if width == 16:  # the two offsets change their names
        return out.ravel(), (by_group if mn_major else by_column), (by_column if mn_major else by_group)
    return out.ravel(), by_column, by_group


def descriptor(address: str, width: int, leading: int, stride: int, register: str) -> str:
    """PTX that makes a descriptor of shared memory."""
    rest = (leading >> 4) << 16 | (stride >> 4) << 32 | CODES[width] << 62
    return f"""
add.u32 %r1, %r9, {address};
shr.u32 %r1, %r1, 4;
cvt.u64.u32 {register}, %r1;
or.b64 {register}, {register}, {rest};"""


def product(
    kind: str, a: np.ndarray, b: np.ndarray, *, width: int = 128, majors: tuple[bool, bool] = (False, False),
    result: str = "f32", registers: np.ndarray | None = None, signs: tuple[int, int] = (1, 1), wait: str = "0",
    accumulate: bool = True, **options: int,
):  # fmt: skip
    """c = 1 + a b^T by one wgmma.mma_async; returns (c, report)."""
    k, columns = K_OF[kind], b.shape[0]
    image_a, leading_a, stride_a = image(a, width, majors[0])
    image_b, leading_b, stride_b = image(b, width, majors[1])
    room_a = -(-len(image_a) // 1024) * 1024
    memory = np.zeros(room_a + -(-len(image_b) // 2048) * 2048, np.uint8)
    memory[: len(image_a)], memory[room_a : room_a + len(image_b)] = image_a, image_b
    count = columns // (4 if result == "f16" else 2)
    fill = "0x3c003c00" if result == "f16" else "0x3f800000"
    results = ", ".join(f"%d{i}" for i in range(count))
    first, flags = "%q4", f"{signs[0]}, {signs[1]}"
    if kind != "tf32":
        flags += f", {int(majors[0])}, {int(majors[1])}" if registers is None else f", {int(majors[1])}"
    loads = ""
    if registers is not None:
        first = "{%a0, %a1, %a2, %a3}"
        loads = "\n".join(f"ld.global.b32 %a{i}, [%q6+{4 * i}];" for i in range(4))
    copies = "\n".join(
        f"ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%q7+{at}];\nst.shared.v4.b32 [%r8+{at}], {{%r1, %r2, %r3, %r4}};"
        for at in range(0, len(memory), 2048)
    )
    stores = "\n".join(f"st.global.b32 [%q8+{4 * i}], %d{i};" for i in range(count))
    source = f""".version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 memory, .param .u64 registers, .param .u64 out)
{{
.reg .pred %p<2>; .reg .b32 %r<12>; .reg .b64 %q<12>; .reg .b32 %a<4>; .reg .b32 %d<{count}>;
.shared .align 128 .b8 s[{len(memory)}];
mov.u32 %r0, %tid.x;
mov.u32 %r9, s;
ld.param.u64 %q7, [memory];
ld.param.u64 %q6, [registers];
ld.param.u64 %q8, [out];
mul.wide.u32 %q9, %r0, 16;
add.s64 %q7, %q7, %q9;
add.s64 %q6, %q6, %q9;
mul.wide.u32 %q9, %r0, {4 * count};
add.s64 %q8, %q8, %q9;
mad.lo.u32 %r8, %r0, 16, %r9;
{copies}
{loads}
bar.sync 0;
fence.proxy.async;
{descriptor("0", width, leading_a, stride_a, "%q4")}
{descriptor(str(room_a), width, leading_b, stride_b, "%q5")}
{"".join(f"mov.b32 %d{i}, {fill};" for i in range(count))}
mov.pred %p0, {int(accumulate)};
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n{columns}k{k}.{result}.{kind}.{kind} {{{results}}}, {first}, %q5, %p0, {flags};
wgmma.commit_group.sync.aligned;
{f"wgmma.wait_group.sync.aligned {wait};" if wait else ""}
{stores}
ret;
}}
"""
    module = Module(source)
    assert module.unsupported() == []
    memory, extra = aligned(memory), aligned(np.zeros(4 * THREADS, np.uint32) if registers is None else registers)
    out = np.zeros((THREADS, count), np.uint32)
    args = [Arr(memory, "memory", read_only=True), Arr(extra, "registers", read_only=True), Arr(out, "out", output=True)]
    report = module.launch("k", 1, THREADS, args, stop=False, **options)
    c = np.zeros((ROWS, columns))
    for t in range(THREADS):
        values = out[t].view(np.float16 if result == "f16" else np.float32)
        for i, value in enumerate(values):  # pairs of columns; eight rows on; the next eight columns
            c[t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + t % 4 * 2 + i % 2] = value
    return c, report


@pytest.mark.parametrize("width", SWIZZLES.values())
@pytest.mark.parametrize("majors", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("kind", K_OF)
def test_layouts(kind, majors, width):
    if kind == "tf32" and any(majors):
        pytest.skip("TF32 operands lie along k")
    (a, seen_a), (b, seen_b) = numbers((ROWS, K_OF[kind]), kind, 1), numbers((64, K_OF[kind]), kind, 2)
    for lazy in (0, 1):
        c, report = product(kind, a, b, width=width, majors=majors, lazy_copies=lazy)
        report.check()
        assert np.abs(c - (1 + seen_a @ seen_b.T)).max() < 1e-5
        assert report.counters["mma"] == 4


@pytest.mark.parametrize("kind", K_OF)
@pytest.mark.parametrize("columns", [8, 24, 256])
def test_widths_signs_and_registers(kind, columns):
    k = K_OF[kind]
    (a, seen_a), (b, seen_b) = numbers((ROWS, k), kind, 3), numbers((columns, k), kind, 4)
    half = k // 2  # a register holds one row's two (TF32: one) neighbours in k; the second pair half of k on
    per = 1 if kind == "tf32" else 2
    registers = np.zeros((THREADS, 4, per), a.dtype)
    for t in range(THREADS):
        row = t // 32 * 16 + t % 32 // 4
        for r in range(4):
            at = t % 4 * per + r // 2 * half
            registers[t, r] = a[row + r % 2 * 8, at : at + per]
    width = 16 if kind == "tf32" or columns != 256 else 128
    c, report = product(kind, a, b, width=width, registers=registers.view(np.uint32).ravel(), signs=(1, -1))
    report.check()
    assert np.abs(c - (1 - seen_a @ seen_b.T)).max() < 1e-5
    c, report = product(kind, a, b, width=width, accumulate=False, signs=(-1, -1))
    report.check()
    assert np.abs(c - seen_a @ seen_b.T).max() < 1e-5


def test_half_results():
    (a, seen_a), (b, seen_b) = numbers((ROWS, 16), "f16", 5), numbers((32, 16), "f16", 6)
    c, report = product("f16", a, b, result="f16")
    report.check()
    assert np.array_equal(c, (1 + seen_a @ seen_b.T).astype(np.float16))


def test_a_missing_wait_shows():
    (a, seen_a), (b, seen_b) = numbers((ROWS, 16), "f16", 7), numbers((16, 16), "f16", 8)
    want = 1 + seen_a @ seen_b.T
    for wait in ("", "1"):
        c, report = product("f16", a, b, wait=wait)
        assert report.kinds == {"ASYNC-LEAK"} and np.all(c == 1), "results are not there before the wait"
        c, _ = product("f16", a, b, wait=wait, lazy_copies=0)
        assert np.abs(c - want).max() < 1e-5
