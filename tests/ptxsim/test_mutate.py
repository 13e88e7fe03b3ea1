"""The mutation operators on a hand-written kernel: each makes its change, and the simulator or the numbers notice."""

from __future__ import annotations

import re

import numpy as np
import pytest

from . import Arr, Module, SimulatorError, mutate

# y[i] = max(x[mirror of i], 0) + x[i] * 2, through shared memory filled by cp.async; 64 threads, n = 61
KERNEL = """.version 8.0
.target sm_80
.address_size 64
.visible .entry other(.param .u64 x)
{
ret;
}
.visible .entry k(.param .u64 x, .param .u64 y, .param .u32 n)
{
.reg .pred %p<8>; .reg .b32 %r<16>; .reg .b64 %rd<8>; .reg .f32 %f<8>;
.shared .align 16 .b8 s[512];
ld.param.u64 %rd1, [x];
ld.param.u64 %rd2, [y];
ld.param.u32 %r9, [n];
mov.u32 %r1, %tid.x;
mov.u32 %r15, %ctaid.x;
mad.lo.s32 %r14, %r15, 64, %r1;
mul.wide.s32 %rd3, %r14, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
mov.u32 %r2, s;
mad.lo.s32 %r3, %r1, 4, %r2;
st.shared.f32 [%r3+256], 0f00000000;
setp.ge.s32 %p1, %r14, %r9;
@%p1 bra LOADED;
.loc 1 10 0
cp.async.ca.shared.global [%r3+256], [%rd4], 4;
LOADED:
cp.async.commit_group;
cp.async.wait_group 0;
.loc 1 11 0
bar.sync 0;
sub.s32 %r4, 63, %r1;
mad.lo.s32 %r5, %r4, 4, %r2;
ld.shared.f32 %f1, [%r5+256];
@%p1 bra END;
ld.global.f32 %f2, [%rd4];
max.NaN.f32 %f1, %f1, 0f00000000;
fma.rn.f32 %f3, %f2, 0f40000000, %f1;
.loc 1 12 0
st.global.f32 [%rd5], %f3;
END:
ret;
}
"""


def run(ptx: str) -> tuple[np.ndarray | None, bool]:
    """The result, or None if the kernel stopped, and whether there was no finding; two blocks, x with a NaN."""
    n = 125
    x, y = np.linspace(-3, 5, n).astype(np.float32), np.zeros(n, np.float32)
    x[20] = np.nan
    try:
        report = Module(ptx).launch("k", 2, 64, [Arr(x, "x", read_only=True), Arr(y, "y", output=True), n])
    except SimulatorError:
        return None, False
    return y, not report.errors


def test_the_original_is_clean():
    y, clean = run(KERNEL)
    x = np.linspace(-3, 5, 125).astype(np.float32)
    mirrored = np.concatenate([x[63::-1], np.zeros(3, np.float32), x[:63:-1]])
    want = np.maximum(mirrored[:125], 0) + 2 * x
    assert clean and np.allclose(np.delete(y, [20, 43]), np.delete(want, [20, 43])) and np.isnan(y[[20, 43]]).all()


FOUND = {m.operator for m in mutate.mutants(KERNEL, "k")}


@pytest.mark.parametrize(
    "mutant", mutate.mutants(KERNEL, "k"), ids=lambda m: f"{m.operator}-{re.sub('[^a-z0-9.]+', '_', m.before)[:30]}"
)
def test_mutants_are_noticed(mutant):
    y, clean = run(mutant.ptx)
    original, _ = run(KERNEL)
    assert not clean or not np.array_equal(y, original, equal_nan=True), str(mutant)


def test_operators_and_lines():
    expected = """missing_barrier wait_group_off_by_one off_by_one uninitialised_tail stale_shared_memory swapped_operands
        forgotten_addend nan_losing_max missing_mask wrong_predicate loose_comparison race_between_blocks wrong_thread"""
    assert set(expected.split()) <= FOUND
    barrier = next(m for m in mutate.mutants(KERNEL, "k") if m.operator == "missing_barrier")
    assert (barrier.line, barrier.before, barrier.after) == (11, "bar.sync 0;", "")
    assert "other" not in barrier.ptx and mutate.statement_count(KERNEL, "k") == len(
        re.findall(r";", KERNEL.split("s[512];")[1])
    )


def test_limits_and_executed_code():
    everything = mutate.mutants(KERNEL, "k")
    assert len(mutate.mutants(KERNEL, "k", most=1)) == len(FOUND)
    assert mutate.mutants(KERNEL, "k", executed=set()) == []
    assert len(mutate.mutants(KERNEL, "k", executed=set(range(1000)))) == len(everything)


@pytest.mark.parametrize(
    ("statement", "operator", "changed"),
    [
        (
            "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+16];",
            "misaligned_vector",
            "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+20];",
        ),
        ("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];", "off_by_one", "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+16];"),
        ("setp.gt.f32 %p1, %f1, %f2;", "nan_losing_max", "setp.gtu.f32 %p1, %f1, %f2;"),
        ("setp.lt.s64 %p1, %rd1, 4;", "unsigned_wrap", "setp.lt.u64 %p1, %rd1, 4;"),
        ("shfl.sync.down.b32 %r1, %r2, 16, 31, -1;", "wrong_lane", "shfl.sync.down.b32 %r1, %r2, 19, 31, -1;"),
        ("cvt.rn.f16.f32 %rs1, %f1;", "wrong_rounding", "cvt.rz.f16.f32 %rs1, %f1;"),
        ("add.f32 %f1, %f2, %f3;", "wrong_sign", "sub.f32 %f1, %f2, %f3;"),
        ("cp.async.wait_all;", "wait_group_off_by_one", ""),
        ("selp.f32 %f1, %f2, %f3, %p1;", "swapped_operands", "selp.f32 %f1, %f3, %f2, %p1;"),
        ("@%p1 st.global.f32 [%rd1], %f1;", "missing_mask", "st.global.f32 [%rd1], %f1;"),
    ],
)
def test_single_operators(statement, operator, changed):
    assert changed in list(mutate.OPERATORS[operator](statement))
