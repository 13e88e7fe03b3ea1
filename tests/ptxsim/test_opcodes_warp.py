"""Instructions between lanes, control flow, calls and matrices."""

from __future__ import annotations

import numpy as np
import pytest

from . import Arr, Module, SimulatorError
from ._opcode import execute, launch, signed

LANES = 32
FULL = 0xFFFFFFFF


def reference_shuffle(mode: str, lane: int, b: int, clamp: int, segment: int) -> tuple[int, bool]:
    """The PTX ISA's definition of shfl: source lane and whether it was in range."""
    last, first = (lane & segment) | (clamp & ~segment & 31), lane & segment
    if mode == "up":
        source, inside = lane - b, lane - b >= last
    elif mode == "down":
        source, inside = lane + b, lane + b <= last
    elif mode == "bfly":
        source, inside = lane ^ b, lane ^ b <= last
    else:
        source, inside = first | (b & ~segment & 31), (first | (b & ~segment & 31)) <= last
    return (source, True) if inside else (lane, False)


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, width):
    values = np.random.default_rng(0).integers(0, 1 << 32, LANES).tolist()
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (0, 1, 3, 8, 17, 31):
        got, inside = execute(
            f"shfl.sync.{mode}.b32 %d0|%d1, %a0, {b}, {clamp}, -1;", ["b32"], ["b32", "pred"], [values], block=32
        )
        for lane in range(LANES):
            source, want = reference_shuffle(mode, lane, b, clamp & 31, clamp >> 8)
            assert got[lane] == values[source] and inside[lane] == want, (mode, width, b, lane)


def test_vote_and_friends():
    bits = [int(b) for b in np.random.default_rng(1).integers(0, 2, LANES)]
    mask = sum(b << i for i, b in enumerate(bits))
    assert execute("vote.sync.ballot.b32 %d0, %a0, -1;", ["pred"], ["b32"], [bits], block=32) == [[mask] * LANES]
    assert execute("vote.sync.ballot.b32 %d0, !%a0, -1;", ["pred"], ["b32"], [bits], block=32) == [[mask ^ FULL] * LANES]
    for column in ([0] * LANES, bits, [1] * LANES):
        want = {"any": any(column), "all": all(column), "uni": len(set(column)) == 1}
        for mode, answer in want.items():
            assert execute(f"vote.sync.{mode}.pred %d0, %a0, -1;", ["pred"], ["pred"], [column], block=32) == [
                [int(answer)] * LANES
            ], mode
    assert execute("activemask.b32 %d0;", ["b32"], ["b32"], [bits], block=32) == [[FULL] * LANES]
    leader, elected = execute("elect.sync %d0|%d1, -1;", ["b32"], ["b32", "pred"], [bits], block=32)
    assert leader == [0] * LANES and elected == [1] + [0] * (LANES - 1)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_redux(kind):
    values = np.random.default_rng(2).integers(0, 1 << 32, LANES).tolist()
    numbers = [signed(v, 32) if kind == "s32" else v for v in values]
    for op, want in (("add", sum(numbers)), ("min", min(numbers)), ("max", max(numbers))):
        assert execute(f"redux.sync.{op}.{kind} %d0, %a0, -1;", [kind], [kind], [values], block=32) == [[want & FULL] * LANES]
    for op, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        want = int(function.reduce(np.array(values, np.uint32)))
        assert execute(f"redux.sync.{op}.b32 %d0, %a0, -1;", ["b32"], ["b32"], [values], block=32) == [[want] * LANES]


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_match(kind):
    values = [i % 5 for i in range(LANES)]
    want = [sum(1 << k for k in range(LANES) if values[k] == values[i]) for i in range(LANES)]
    assert execute(f"match.any.sync.{kind} %d0, %a0, -1;", [kind], ["b32"], [values], block=32) == [want]
    assert execute(f"match.all.sync.{kind} %d0|%d1, %a0, -1;", [kind], ["b32", "pred"], [values], block=32) == [
        [0] * LANES,
        [0] * LANES,
    ]
    assert execute(f"match.all.sync.{kind} %d0|%d1, %a0, -1;", [kind], ["b32", "pred"], [[9] * LANES], block=32) == [
        [FULL] * LANES,
        [1] * LANES,
    ]


def test_members_gather_before_a_shuffle():
    """Lanes that took the longer way arrive later; the shuffle waits for all it names."""
    out = np.zeros(LANES, np.uint32)
    body = """
and.b32 %r1, %r0, 1;
setp.eq.u32 %p0, %r1, 0;
mov.u32 %r2, %r0;
@%p0 bra MEET;
add.u32 %r2, %r2, 100;
MEET:
shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
mul.wide.u32 %q1, %r0, 4;
add.s64 %q1, %q0, %q1;
st.global.u32 [%q1], %r3;"""
    launch(body, [Arr(out, "out", output=True)]).check()
    assert out.tolist() == [i ^ 1 if i % 2 else (i ^ 1) + 100 for i in range(LANES)]


def test_branches_and_tables():
    """A loop with a trip count per lane, then brx.idx."""
    out = np.zeros(LANES, np.uint32)
    body = """
mov.u32 %r1, 0;
mov.u32 %r2, 0;
LOOP:
add.u32 %r1, %r1, %r2;
add.u32 %r2, %r2, 1;
setp.le.u32 %p0, %r2, %r0;
@%p0 bra.uni LOOP;
rem.u32 %r3, %r0, 3;
ts: .branchtargets ZERO, ONE, TWO;
brx.idx %r3, ts;
ZERO:
add.u32 %r1, %r1, 1000;
bra END;
ONE:
add.u32 %r1, %r1, 2000;
bra END;
TWO:
add.u32 %r1, %r1, 3000;
END:
mul.wide.u32 %q1, %r0, 4;
add.s64 %q1, %q0, %q1;
st.global.u32 [%q1], %r1;"""
    launch(body, [Arr(out, "out", output=True)]).check()
    assert out.tolist() == [sum(range(i + 1)) + 1000 * (i % 3 + 1) for i in range(LANES)]


def test_barriers_with_votes():
    out = np.zeros(3, np.uint32)
    body = """
setp.lt.u32 %p0, %r0, 40;
barrier.sync 1;
bar.red.popc.u32 %r1, 0, %p0;
bar.red.and.pred %p1, 0, %p0;
barrier.cta.red.or.aligned.pred %p2, 0, !%p0;
setp.ne.u32 %p3, %r0, 0;
@%p3 bra OUT;
selp.u32 %r2, 1, 0, %p1;
selp.u32 %r3, 1, 0, %p2;
st.global.u32 [%q0], %r1;
st.global.u32 [%q0+4], %r2;
st.global.u32 [%q0+8], %r3;
OUT:"""
    report = launch(body, [Arr(out, "out", output=True)], block=64).check()
    assert out.tolist() == [40, 0, 1] and report.counters["barriers"] == 8


def test_producer_and_consumer_barriers():
    """Warp 1 arrives without waiting, warp 0 waits for it; then both roles swap on another barrier."""
    out = np.zeros(LANES, np.uint32)
    body = """
mov.u32 %r5, s;
and.b32 %r6, %r0, 31;
mul.lo.u32 %r7, %r6, 4;
add.u32 %r5, %r5, %r7;
setp.lt.u32 %p0, %r0, 32;
@%p0 bra CONSUME;
st.shared.u32 [%r5], %r0;
bar.arrive 2, 64;
bra OUT;
CONSUME:
bar.sync 2, 64;
ld.shared.u32 %r8, [%r5];
cvt.u64.u32 %q1, %r7;
add.s64 %q1, %q0, %q1;
st.global.u32 [%q1], %r8;
OUT:"""
    for schedule in (0, 1, 2, 3):
        launch(body, [Arr(out, "out", output=True)], block=64, shared=128, schedule=schedule).check()
        assert out.tolist() == list(range(32, 64))


CALL = """.version 8.0
.target sm_80
.address_size 64
.func (.param .b32 result) triple(.param .b32 x, .param .b32 y)
{
.reg .b32 %r<4>;
ld.param.u32 %r0, [x];
ld.param.u32 %r1, [y];
mad.lo.u32 %r2, %r0, 3, %r1;
st.param.b32 [result], %r2;
ret;
}
.extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e);
.visible .entry k(.param .u64 out, .param .u32 bad)
{
.reg .pred %p<2>; .reg .b32 %r<8>; .reg .b64 %q<4>;
ld.param.u64 %q0, [out];
ld.param.u32 %r5, [bad];
mov.u32 %r0, %tid.x;
{
.param .b32 param0;
.param .b32 param1;
.param .b32 retval0;
st.param.b32 [param0+0], %r0;
st.param.b32 [param1+0], 7;
call.uni (retval0), triple, (param0, param1);
ld.param.b32 %r1, [retval0+0];
}
setp.ne.u32 %p0, %r0, %r5;
@%p0 bra FINE;
{
.param .b64 param0;
call.uni __assertfail, (param0, param0, param0, param0, param0);
}
FINE:
mul.wide.u32 %q1, %r0, 4;
add.s64 %q1, %q0, %q1;
st.global.u32 [%q1], %r1;
exit;
}
"""


def test_calls_and_assertions():
    out = np.zeros(64, np.uint32)
    module = Module(CALL)
    module.launch("k", 1, 64, [Arr(out, "out", output=True), 64]).check()
    assert out.tolist() == [3 * i + 7 for i in range(64)]
    with pytest.raises(SimulatorError, match=r"device assertion failed.*thread 33"):
        module.launch("k", 1, 64, [Arr(out, "out", output=True), 33])


def test_trap_stops():
    assert launch("trap;", []).kinds == {"STOPPED"}


# --- matrices


def fragment(matrix: np.ndarray, kind: str, side: str) -> list[np.ndarray]:
    """Registers of a 16 x K operand A (side "a") or K x 8 operand B ("b"), as the PTX ISA lays them out."""
    per = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}[kind]
    size = 4 * per
    rows, cols = matrix.shape
    registers = []
    lanes = range(LANES)
    if side == "a":
        for k in range(0, cols, size):
            for half in range(0, rows, 8):
                registers.append([[matrix[half + lane // 4, k + lane % 4 * per + e] for e in range(per)] for lane in lanes])
    else:
        for k in range(0, rows, size):
            registers.append([[matrix[k + lane % 4 * per + e, lane // 4] for e in range(per)] for lane in lanes])
    return [np.array(r, dtype=matrix.dtype).reshape(LANES, per).view(np.uint32).ravel() for r in registers]


def result(registers: list[list[int]], dtype) -> np.ndarray:
    """A 16 x 8 accumulator from its registers."""
    out = np.zeros((16, 8), dtype)
    per = 4 // np.dtype(dtype).itemsize
    for r, column in enumerate(registers):
        values = np.array(column, np.uint32).view(dtype).reshape(LANES, per)
        for lane in range(LANES):
            for e in range(per):
                i = r * per + e
                out[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] = values[lane, e]
    return out


def bf16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truncated to bf16: bit patterns and values."""
    raw = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return raw, (raw.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    "shape", [("f16", 8), ("f16", 16), ("bf16", 8), ("bf16", 16), ("tf32", 4), ("tf32", 8), ("s8", 16), ("s8", 32), ("u8", 32)]
)
def test_mma(shape):
    kind, k = shape
    rng = np.random.default_rng(3)
    if kind in ("s8", "u8"):
        dtype = np.int8 if kind == "s8" else np.uint8
        a, b = (rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, s).astype(dtype) for s in ((16, k), (k, 8)))
        c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
        exact_a, exact_b, accumulator = a.astype(np.int64), b.astype(np.int64), np.int32
    else:
        a, b = rng.standard_normal((16, k)), rng.standard_normal((k, 8))
        c = rng.standard_normal((16, 8)).astype(np.float32)
        accumulator = np.float32
        if kind == "f16":
            a, b = a.astype(np.float16), b.astype(np.float16)
            exact_a, exact_b = a.astype(np.float64), b.astype(np.float64)
        elif kind == "bf16":
            (a, exact_a), (b, exact_b) = bf16(a), bf16(b)
        else:
            a, b = a.astype(np.float32), b.astype(np.float32)
            exact_a, exact_b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b))
    want = exact_a.astype(np.float64) @ exact_b.astype(np.float64) + c
    ra, rb = fragment(a, kind, "a"), fragment(b, kind, "b")
    rc = [
        np.array([c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for lane in range(LANES)]).view(np.uint32) for i in range(4)
    ]
    inputs = [list(map(int, r)) for r in [*ra, *rb, *rc]]
    names = [f"%a{i}" for i in range(len(inputs))]
    lists = [names[: len(ra)], names[len(ra) : len(ra) + len(rb)], names[-4:]]
    operands = ", ".join("{" + ", ".join(group) + "}" for group in lists)
    out_kind = "s32" if accumulator is np.int32 else "f32"
    text = f"mma.sync.aligned.m16n8k{k}.row.col.{out_kind}.{kind}.{kind}.{out_kind} {{%d0, %d1, %d2, %d3}}, {operands};"
    got = result(execute(text, ["b32"] * len(inputs), [out_kind] * 4, inputs, block=32), accumulator)
    tolerance = 0 if accumulator is np.int32 else 1e-6 * (np.abs(want).max() + 1)
    assert np.abs(got - want).max() <= tolerance


def test_mma_with_half_accumulators():
    rng = np.random.default_rng(4)
    a, b, c = (rng.standard_normal(s).astype(np.float16) for s in ((16, 16), (16, 8), (16, 8)))
    rc = [
        np.array([[c[lane // 4 + 8 * r, lane % 4 * 2 + e] for e in range(2)] for lane in range(LANES)]).view(np.uint32).ravel()
        for r in range(2)
    ]
    inputs = [list(map(int, r)) for r in [*fragment(a, "f16", "a"), *fragment(b, "f16", "b"), *rc]]
    text = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%d0, %d1}, {%a0, %a1, %a2, %a3}, {%a4, %a5}, {%a6, %a7};"
    got = result(execute(text, ["b32"] * 8, ["b32"] * 2, inputs, block=32), np.float16)
    want = a.astype(np.float64) @ b.astype(np.float64) + c.astype(np.float64)
    assert np.array_equal(got, want.astype(np.float16))


def test_mma_double():
    rng = np.random.default_rng(5)
    a, b, c = rng.standard_normal((8, 4)), rng.standard_normal((4, 8)), rng.standard_normal((8, 8))
    columns = [
        [int(a[i // 4, i % 4].view(np.uint64)) for i in range(LANES)],
        [int(b[i % 4, i // 4].view(np.uint64)) for i in range(LANES)],
        *([int(c[i // 4, i % 4 * 2 + e].view(np.uint64)) for i in range(LANES)] for e in range(2)),
    ]
    text = "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d0, %d1}, {%a0}, {%a1}, {%a2, %a3};"
    got = execute(text, ["f64"] * 4, ["f64"] * 2, columns, block=32)
    values = np.array(got, np.uint64).view(np.float64)
    want = a @ b + c
    assert all(abs(values[e][i] - want[i // 4, i % 4 * 2 + e]) < 1e-12 for i in range(LANES) for e in range(2))


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, trans):
    """Rows come from the addresses of lanes 8 i to 8 i + 7; a store of what was loaded gives the rows back."""
    source = np.arange(count * 64, dtype=np.uint16)
    loaded, stored = np.zeros((count, LANES), np.uint32), np.zeros(count * 64, np.uint16)
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    body = f"""
mul.lo.u32 %r1, %r0, 16;
mov.u32 %r2, s;
add.u32 %r3, %r2, %r1;
setp.ge.u32 %p0, %r0, {8 * count};
cvt.u64.u32 %q3, %r1;
add.s64 %q4, %q0, %q3;
@%p0 bra COPIED;
ld.global.v2.b64 {{%q5, %q6}}, [%q4];
st.shared.v2.b64 [%r3], {{%q5, %q6}};
COPIED:
bar.sync 0;
rem.u32 %r4, %r0, {8 * count};
mul.lo.u32 %r4, %r4, 16;
add.u32 %r4, %r2, %r4;
ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r4];
mul.wide.u32 %q7, %r0, 4;
add.s64 %q7, %q1, %q7;
"""
    body += "\n".join(f"st.global.b32 [%q7+{128 * i}], %r{10 + i};" for i in range(count))
    body += f"""
bar.sync 0;
stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r4+{128 * count}], {registers};
bar.sync 0;
add.s64 %q8, %q2, %q3;
@%p0 bra END;
ld.shared.v2.b64 {{%q5, %q6}}, [%r3+{128 * count}];
st.global.v2.b64 [%q8], {{%q5, %q6}};
END:"""
    arrays = [Arr(source, "source", read_only=True), Arr(loaded, "loaded", output=True), Arr(stored, "stored", output=True)]
    report = launch(body, arrays, shared=256 * count).check()
    for i, tile in enumerate(source.reshape(count, 8, 8)):
        tile = tile.T if trans else tile
        want = [int(tile[lane // 4, lane % 4 * 2]) | int(tile[lane // 4, lane % 4 * 2 + 1]) << 16 for lane in range(LANES)]
        assert loaded[i].tolist() == want
    assert np.array_equal(stored, source)
    assert report.bank_waves() == 1.0


def test_movmatrix():
    tile = np.arange(64, dtype=np.uint16).reshape(8, 8)
    column = [int(tile[i // 4, i % 4 * 2]) | int(tile[i // 4, i % 4 * 2 + 1]) << 16 for i in range(LANES)]
    (got,) = execute("movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;", ["b32"], ["b32"], [column], block=32)
    assert got == [int(tile.T[i // 4, i % 4 * 2]) | int(tile.T[i // 4, i % 4 * 2 + 1]) << 16 for i in range(LANES)]
