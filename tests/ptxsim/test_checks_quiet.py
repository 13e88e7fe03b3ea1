"""Mistakes that leave no trace in ordinary memory: constants and parameters read too far, registers nobody wrote, lanes that a
membermask leaves out, a write over what a third warp reads, and kernels that run on and on."""

from __future__ import annotations

import numpy as np
import pytest

from . import Arr, Module
from ._opcode import launch
from .test_checks import COPY, PLACES, THREADS, arrays, kinds

TABLE = """.version 8.0
.target sm_80
.address_size 64
.const .align 4 .b8 table[16] = {1,0,0,0,2,0,0,0,3,0,0,0,4,0,0,0};
.visible .entry k(.param .u64 y, .param .u32 at)
{
.reg .b32 %r<4>; .reg .b64 %q<6>;
ld.param.u64 %q0, [y];
ld.param.u32 %r0, [at];
mov.u64 %q1, table;
mul.wide.s32 %q2, %r0, 4;
add.s64 %q3, %q1, %q2;
ld.const.u32 %r1, [%q3];
st.global.u32 [%q0], %r1;
ret;
}
"""


@pytest.mark.parametrize(("at", "expected"), [(0, 1), (3, 4), (4, None), (-1, None), (1 << 28, None)])
def test_constants_have_an_end(at: int, expected: int | None) -> None:
    y = np.zeros(1, np.uint32)
    report = Module(TABLE).launch("k", 1, 1, [Arr(y, "y", output=True), at], stop=False)
    assert report.kinds == (set() if expected else {"OUT-OF-BOUNDS"})
    assert expected is None or y[0] == expected


@pytest.mark.parametrize("offset", [0, 4096, -64])
def test_parameters_have_an_end(offset: int) -> None:
    source = TABLE.replace("ld.const.u32 %r1, [%q3];", f"ld.param.u32 %r1, [at+{offset}];")
    report = Module(source).launch("k", 1, 1, [Arr(np.zeros(1, np.uint32), "y", output=True), 0], stop=False)
    assert report.kinds == (set() if offset == 0 else {"OUT-OF-BOUNDS"})


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_unwritten_registers_are_nan(kind: str) -> None:
    """So that a sum which begins with whatever was there is never right."""
    register = {"f16": "%h0", "bf16": "%h0", "f32": "%f3", "f64": "%d0"}[kind]
    y = np.zeros(THREADS, np.float64)
    body = ".reg .b16 %h<2>; .reg .f64 %d<4>;\nmul.wide.u32 %q4, %r0, 8;\nadd.s64 %q4, %q1, %q4;\n"
    body += f"cvt.f64.{kind} %d1, {register};\n" if kind in ("f16", "f32") else "mov.f64 %d1, %d0;\n"
    if kind == "bf16":
        body += "mov.b32 %r3, {0, %h0};\nmov.b32 %f0, %r3;\ncvt.f64.f32 %d1, %f0;\n".replace("{0,", "{%h1,")
    launch(PLACES + body + "st.global.f64 [%q4], %d1;\n", [arrays()[0], Arr(y, "y", output=True)], block=THREADS, shared=256)
    assert np.isnan(y).all()


@pytest.mark.parametrize("operation", ["shfl.sync.bfly.b32 %r3, %r0, 1, 31, {};", "redux.sync.add.u32 %r3, %r0, {};"])
def test_a_lane_that_the_mask_leaves_out(operation: str) -> None:
    assert kinds(operation.format(-1) + COPY) == set()
    assert kinds(operation.format(0xFFFF) + COPY) == {"DIVERGENT"}


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_a_write_over_what_several_warps_read(readers: int) -> None:
    """However many warps have read, the one that writes without a barrier is found."""
    threads = 32 * (readers + 1)
    body = f"""st.shared.u32 [%r1], 7;
bar.sync 0;
setp.ge.u32 %p0, %r0, {32 * readers};
@%p0 bra WRITE;
ld.shared.u32 %r3, [%r1];
bra END;
WRITE:
st.shared.u32 [%r1], 9;
END:
"""
    args = arrays(threads)
    assert "SHARED-RACE" in launch(PLACES + body + COPY, args, block=threads, shared=4 * threads).kinds
    ordered = body.replace("WRITE:\n", "WRITE:\nbar.sync 1;\n").replace("bra END;", "bar.sync 1;\nbra END;")
    assert launch(PLACES + ordered + COPY, arrays(threads), block=threads, shared=4 * threads).kinds == set()


def test_a_limit_on_all_warps_together() -> None:
    loop = "mov.u32 %r3, 0;\nAGAIN:\nadd.u32 %r3, %r3, 1;\nsetp.lt.u32 %p0, %r3, 100;\n@%p0 bra AGAIN;\n"
    assert launch(PLACES + loop + COPY, arrays(), block=THREADS, shared=256, limit=10_000).kinds == set()
    report = launch(PLACES + loop + COPY, arrays(), block=THREADS, shared=256, limit=500)
    assert report.kinds == {"STOPPED"} and "endless loop" in report.errors[-1]
