"""Loads, stores, atomics, address spaces and cp.async."""

from __future__ import annotations

import numpy as np
import pytest

from . import Arr, Module
from ._opcode import BITS, execute, launch, samples, signed

LANES = 32


@pytest.mark.parametrize("vector", [1, 2, 4])
@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "b32", "f32", "b64", "f64"])
def test_vector_widths(kind, vector):
    width = BITS[kind] // 8
    if width * vector > 16:
        vector = 16 // width
    source = np.random.default_rng(0).integers(0, 256, LANES * width * vector, dtype=np.uint8)
    target = np.zeros_like(source)
    registers = [f"%{'h' if width <= 2 else 'r' if width == 4 else 'q'}{8 + i}" for i in range(vector)]
    if kind == "f32":
        registers = [f"%f{i}" for i in range(vector)]
    operand = registers[0] if vector == 1 else "{" + ", ".join(registers) + "}"
    suffix = kind if vector == 1 else f"v{vector}.{kind}"
    body = f"""
mul.wide.u32 %q2, %r0, {width * vector};
add.s64 %q3, %q0, %q2;
add.s64 %q4, %q1, %q2;
ld.global.{suffix} {operand}, [%q3];
st.global.{suffix} [%q4], {operand};"""
    launch(body, [Arr(source, "source", read_only=True), Arr(target, "target", output=True)]).check()
    assert np.array_equal(source, target)


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32"])
def test_loads_into_wider_registers(kind):
    width = BITS[kind]
    values = np.array([v & ((1 << width) - 1) for v in samples(kind, 19, 2)][:LANES], dtype=f"u{width // 8}")
    out = np.zeros(LANES, np.int64)
    body = f"""
mul.wide.u32 %q2, %r0, {width // 8};
add.s64 %q3, %q0, %q2;
ld.global.{kind} %q4, [%q3];
mul.wide.u32 %q2, %r0, 8;
add.s64 %q3, %q1, %q2;
st.global.b64 [%q3], %q4;"""
    launch(body, [Arr(values, "values", read_only=True), Arr(out, "out", output=True)]).check()
    want = [signed(int(v), width) if kind[0] == "s" else int(v) for v in values]
    assert out.tolist() == want


@pytest.mark.parametrize(
    "load",
    ["ld.global.nc.b32", "ld.global.ca.b32", "ld.global.cg.b32", "ld.global.cs.b32", "ld.global.lu.b32",
     "ld.volatile.global.b32", "ld.global.L1::no_allocate.b32",
     "ld.global.L1::evict_last.b32",
     "ld.global.nc.L1::no_allocate.L2::128B.b32", "ld.relaxed.gpu.global.b32", "ld.acquire.sys.global.b32",
     "ld.b32", "ldu.global.b32"],
)  # fmt: skip
@pytest.mark.parametrize(
    "store",
    ["st.global.b32", "st.global.wb.b32", "st.global.cs.b32", "st.global.wt.b32", "st.release.gpu.global.b32", "st.b32"],
)
def test_cache_modifiers_change_nothing(load, store):
    values, out = np.arange(LANES, dtype=np.uint32), np.zeros(LANES, np.uint32)
    body = f"mul.wide.u32 %q2, %r0, 4;\nadd.s64 %q3, %q0, %q2;\nadd.s64 %q4, %q1, %q2;\n{load} %r1, [%q3];\n{store} [%q4], %r1;"
    launch(body, [Arr(values, "values", read_only=True), Arr(out, "out", output=True)]).check()
    assert np.array_equal(values, out)


def test_cache_policy_operand():
    values, out = np.arange(LANES, dtype=np.uint32), np.zeros(LANES, np.uint32)
    body = """
createpolicy.fractional.L2::evict_first.b64 %q9, 1.0;
mul.wide.u32 %q2, %r0, 4;
add.s64 %q3, %q0, %q2;
add.s64 %q4, %q1, %q2;
ld.global.L1::evict_first.L2::cache_hint.b32 %r1, [%q3+0], %q9;
st.global.L2::cache_hint.b32 [%q4], %r1, %q9;
prefetch.global.L2 [%q3];"""
    launch(body, [Arr(values, "values", read_only=True), Arr(out, "out", output=True)]).check()
    assert np.array_equal(values, out)


def test_negative_offsets_and_spaces():
    """The generic address of a shared array works in ld, st and isspacep; local memory is private to a thread."""
    out = np.zeros(LANES, np.uint32)
    body = """
.local .align 4 .b8 mine[16];
mul.wide.u32 %q2, %r0, 4;
mov.u64 %q3, s;
cvta.shared.u64 %q3, %q3;
add.s64 %q4, %q3, %q2;
st.b32 [%q4+8], %r0;
isspacep.shared %p0, %q4;
isspacep.global %p1, %q4;
cvta.to.shared.u64 %q5, %q4;
ld.shared.b32 %r1, [%q5+8];
st.local.b32 [mine+4], %r1;
mov.u64 %q6, mine;
cvta.local.u64 %q6, %q6;
isspacep.local %p2, %q6;
ld.b32 %r2, [%q6+4];
selp.b32 %r3, 100, 0, %p0;
selp.b32 %r4, 1000, 0, %p1;
selp.b32 %r5, 10000, 0, %p2;
add.s32 %r2, %r2, %r3;
add.s32 %r2, %r2, %r4;
add.s32 %r2, %r2, %r5;
add.s64 %q7, %q0, %q2;
add.s64 %q7, %q7, 16;
st.global.b32 [%q7+-16], %r2;"""
    launch(body, [Arr(out, "out", output=True)], shared=256).check()
    assert out.tolist() == [10100 + i for i in range(LANES)]


def test_module_variables_and_constants():
    source = """.version 8.0
.target sm_80
.address_size 64
.global .align 4 .b32 table[4] = {5, 6, 7, 8};
.const .align 4 .f32 scale[2] = {0f3F800000, 2.5};
.visible .entry k(.param .u64 out, .param .align 8 .b8 pair[16])
{
.reg .b32 %r<8>; .reg .b64 %q<8>; .reg .f32 %f<4>;
ld.param.u64 %q0, [out];
mov.u32 %r0, %tid.x;
mul.wide.u32 %q1, %r0, 4;
mov.u64 %q2, table;
add.s64 %q2, %q2, %q1;
ld.global.u32 %r1, [%q2];
ld.const.f32 %f0, [scale+4];
cvt.rzi.s32.f32 %r2, %f0;
ld.param.u32 %r3, [pair+8];
add.s32 %r1, %r1, %r2;
add.s32 %r1, %r1, %r3;
add.s64 %q3, %q0, %q1;
st.global.u32 [%q3], %r1;
ret;
}
"""
    out = np.zeros(4, np.int32)
    Module(source).launch("k", 1, 4, [Arr(out, "out", output=True), np.array([1, 100], np.int64).tobytes()]).check()
    assert out.tolist() == [107, 108, 109, 110]


ATOMICS = {
    "add.u32": (np.uint32, lambda old, b, c: old + b),
    "add.u64": (np.uint64, lambda old, b, c: old + b),
    "min.s32": (np.int32, lambda old, b, c: min(old, b)),
    "max.s32": (np.int32, lambda old, b, c: max(old, b)),
    "min.u32": (np.uint32, lambda old, b, c: min(old, b)),
    "max.u64": (np.uint64, lambda old, b, c: max(old, b)),
    "and.b32": (np.uint32, lambda old, b, c: old & b),
    "or.b32": (np.uint32, lambda old, b, c: old | b),
    "xor.b64": (np.uint64, lambda old, b, c: old ^ b),
    "exch.b32": (np.uint32, lambda old, b, c: b),
    "cas.b32": (np.uint32, lambda old, b, c: c if old == b else old),
    "inc.u32": (np.uint32, lambda old, b, c: 0 if old >= b else old + 1),
    "dec.u32": (np.uint32, lambda old, b, c: b if old == 0 or old > b else old - 1),
}


@pytest.mark.parametrize("scope", ["", ".relaxed.gpu"])
@pytest.mark.parametrize("op", ATOMICS)
def test_atomics(op, scope):
    """All lanes on one address, in lane order: every lane gets what the one before left."""
    dtype, step = ATOMICS[op]
    width = np.dtype(dtype).itemsize
    target = np.array([7], dtype)
    operand = np.random.default_rng(1).integers(0, 12, LANES).astype(dtype)
    before = np.zeros(LANES, dtype)
    b, t, old, third = ("%r", "%r2", "%r3", "%r4") if width == 4 else ("%q", "%q12", "%q13", "%q14")
    head = op.split(".")
    body = f"""
mul.wide.u32 %q4, %r0, {width};
add.s64 %q5, %q1, %q4;
add.s64 %q6, %q2, %q4;
ld.global.b{8 * width} {t}, [%q5];
add.u{8 * width} {third}, {t}, 1;
atom{scope}.global.{head[0]}.{head[1]} {old}, [%q0], {t}{", " + third if head[0] == "cas" else ""};
st.global.b{8 * width} [%q6], {old};"""
    launch(body, [Arr(target, "target"), Arr(operand, "operand", read_only=True), Arr(before, "before", output=True)]).check()
    value, seen = 7, []
    for x in operand.tolist():
        seen.append(value)
        value = step(value, x, x + 1)
    assert before.tolist() == seen and target.tolist() == [value]


def test_float_and_shared_atomics():
    total, pair, counted = np.zeros(1, np.float32), np.zeros(2, np.float16), np.zeros(1, np.uint32)
    body = """
cvt.rn.f32.u32 %f0, %r0;
red.global.add.f32 [%q0], %f0;
cvt.rn.f16.f32 %h0, 1.5;
mov.b32 %r1, {%h0, %h0};
red.global.add.noftz.f16x2 [%q1], %r1;
mov.u32 %r2, s;
setp.eq.u32 %p0, %r0, 0;
@%p0 st.shared.u32 [%r2], 0;
bar.sync 0;
atom.shared.add.u32 %r3, [%r2], 2;
bar.sync 0;
ld.shared.u32 %r4, [%r2];
@%p0 st.global.u32 [%q2], %r4;"""
    body = body.replace("cvt.rn.f16.f32 %h0, 1.5;", "mov.b16 %h0, 0x3E00;")
    report = launch(
        body, [Arr(total, "total"), Arr(pair, "pair"), Arr(counted, "counted", output=True)], block=64, shared=16
    ).check()
    assert total[0] == sum(range(64)) and pair.tolist() == [96.0, 96.0] and counted[0] == 128
    assert report.counters["atomics"] == 3 * 64


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(("mode", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_async_copies(mode, size, lazy):
    """Whole, zero-filled and ignored copies; groups complete in order."""
    source = np.arange(LANES * size, dtype=np.uint8)
    out = np.full(LANES * size, 255, np.uint8)
    body = f"""
mul.lo.u32 %r1, %r0, {size};
mov.u32 %r2, s;
add.u32 %r2, %r2, %r1;
cvt.u64.u32 %q2, %r1;
add.s64 %q3, %q0, %q2;
add.s64 %q4, %q1, %q2;
and.b32 %r3, %r0, 1;
mul.lo.u32 %r3, %r3, {size // 2};
cp.async.{mode}.shared.global [%r2], [%q3], {size}, %r3;
cp.async.commit_group;
cp.async.wait_group 0;
"""
    words = size // 4
    for i in range(words):
        body += f"ld.shared.b32 %r4, [%r2+{4 * i}];\nst.global.b32 [%q4+{4 * i}], %r4;\n"
    launch(
        body, [Arr(source, "source", read_only=True), Arr(out, "out", output=True)], shared=LANES * size, lazy_copies=lazy
    ).check()
    want = source.reshape(LANES, size).copy()
    for lane in range(LANES):
        want[lane, size // 2 if lane % 2 else 0 :] = 0
    assert np.array_equal(out.reshape(LANES, size), want)


def test_async_wait_all_and_prefetch_size():
    source, out = np.arange(LANES, dtype=np.float32), np.zeros(LANES, np.float32)
    body = """
mul.lo.u32 %r1, %r0, 4;
mov.u32 %r2, s;
add.u32 %r2, %r2, %r1;
cvt.u64.u32 %q2, %r1;
add.s64 %q3, %q0, %q2;
add.s64 %q4, %q1, %q2;
cp.async.ca.shared.global.L2::128B [%r2+0], [%q3+0], 4;
cp.async.wait_all;
ld.shared.f32 %f0, [%r2];
st.global.f32 [%q4], %f0;"""
    report = launch(body, [Arr(source, "source", read_only=True), Arr(out, "out", output=True)], shared=128).check()
    assert np.array_equal(source, out) and report.counters["async_copies"] == LANES


def test_fences_are_accepted():
    out = np.zeros(1, np.uint32)
    body = (
        "membar.cta;\nmembar.gl;\nfence.acq_rel.gpu;\nfence.sc.sys;\nfence.proxy.async;\n"
        "nanosleep.u32 10;\ngriddepcontrol.wait;\nst.global.u32 [%q0], 1;"
    )
    body = "setp.ne.u32 %p0, %r0, 0;\n@%p0 bra OUT;\n" + body + "\nOUT:\n"
    launch(body, [Arr(out, "out", output=True)]).check()
    assert out[0] == 1


def test_special_registers():
    values = execute(
        "mov.u32 %d0, %tid.x;\nmov.u32 %d1, %laneid;\nmov.u32 %d2, %warpid;\nmov.u32 %d3, %ntid.x;\nmov.u32 %d4, %nctaid.x;",
        ["b32"],
        ["b32"] * 5,
        [[0] * 96],
        block=48,
    )
    threads = [i % 48 for i in range(96)]
    assert values == [threads, [t % 32 for t in threads], [t // 32 for t in threads], [48] * 96, [2] * 96]
    masks = ["eq", "lt", "le", "gt", "ge"]
    moves = "\n".join(f"mov.u32 %d{i}, %lanemask_{m};" for i, m in enumerate(masks))
    got = execute(moves, ["b32"], ["b32"] * 5, [[0] * 32], block=32)
    full = (1 << 32) - 1
    for lane in range(32):
        eq, below = 1 << lane, (1 << lane) - 1
        assert [g[lane] for g in got] == [eq, below, below | eq, full & ~(below | eq), full & ~below]
