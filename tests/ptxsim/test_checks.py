"""Every kind of finding: provoked by a small kernel, and absent from its correct twin."""

from __future__ import annotations

import numpy as np
import pytest

from . import Arr, Module, SimulatorError, aligned
from ._opcode import launch

THREADS = 64
# %q2: 4 * thread; %r2: the thread's place in the shared array s
PLACES = (
    "mul.wide.u32 %q2, %r0, 4;\nadd.s64 %q3, %q0, %q2;\nadd.s64 %q4, %q1, %q2;\nmov.u32 %r1, s;\nmad.lo.u32 %r2, %r0, 4, %r1;\n"
)


def arrays(n: int = THREADS) -> tuple[Arr, Arr]:
    """An input and an output of n floats."""
    return Arr(np.arange(n, dtype=np.float32), "x", read_only=True), Arr(np.zeros(n, np.float32), "y", output=True)


def kinds(body: str, args=None, **options) -> set[str]:
    """Kinds of findings of a body on x and y."""
    options.setdefault("block", THREADS)
    options.setdefault("shared", 4 * THREADS)
    return launch(PLACES + body, args or arrays(), **options).kinds


COPY = "ld.global.f32 %f0, [%q3];\nst.global.f32 [%q4], %f0;\n"


def test_clean_copy():
    assert kinds(COPY) == set()


def test_out_of_bounds_names_tensor_line_and_thread():
    source = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 x)
{
.reg .b32 %r<2>; .reg .b64 %q<4>;
.loc 1 12 3
ld.param.u64 %q0, [x];
mov.u32 %r0, %tid.x;
mul.wide.u32 %q1, %r0, 4;
add.s64 %q2, %q0, %q1;
.loc 1 13 3
ld.global.u32 %r1, [%q2+4];
ret;
}
.file 1 "folder/some.cu"
"""
    report = Module(source).launch("k", 2, 8, [Arr(np.zeros(8, np.int32), "table", read_only=True)])
    (finding,) = report.findings
    assert (finding.kind, finding.file, finding.line, finding.block, finding.thread, finding.times) == (
        "OUT-OF-BOUNDS",
        "some.cu",
        13,
        (0, 0, 0),
        7,
        2,
    )
    assert "4 bytes outside table" in finding.message and "ld.global.u32" in finding.instruction
    assert "some.cu:13" in str(finding)


@pytest.mark.parametrize("below", [4, 16])
def test_out_of_bounds_below_a_null_pointer(below):
    """The last bytes of the address space: where the access ends is zero again."""
    assert kinds(f"mov.u64 %q5, {-below};\nld.global.f32 %f0, [%q5];\nst.global.f32 [%q4], %f0;") == {"OUT-OF-BOUNDS"}
    assert kinds(f"mov.u64 %q5, {-below};\nst.global.f32 [%q5], 0f3F800000;\n" + COPY) == {"OUT-OF-BOUNDS"}


@pytest.mark.parametrize("offset", [4, -4, 1 << 20])
def test_out_of_bounds(offset):
    assert kinds(f"ld.global.f32 %f0, [%q3+{offset}];\nst.global.f32 [%q4], %f0;") == {"OUT-OF-BOUNDS"}
    assert kinds(f"ld.global.f32 %f0, [%q3];\nst.global.f32 [%q4+{offset}], %f0;") >= {"OUT-OF-BOUNDS"}


def test_tags_catch_landing_in_another_tensor():
    both = np.zeros(2 * THREADS, np.float32)
    left, right = both[:THREADS], both[THREADS:]
    body = COPY.replace("[%q3]", "[%q3+4]")
    args = [
        Arr(left, "left", read_only=True),
        Arr(np.zeros(THREADS, np.float32), "y", output=True),
        Arr(right, "right", read_only=True),
    ]
    report = launch(PLACES + body, args, block=THREADS, shared=4)
    assert report.kinds == {"OUT-OF-BOUNDS"} and "inside right" in report.findings[0].message
    assert launch(PLACES + body, args, block=THREADS, shared=4, tags=0).kinds == set()  # plain bounds can't tell


def test_misalignment():
    wide = PLACES + "ld.global.v2.f32 {%f0, %f1}, [%q3];\nst.global.f32 [%q4], %f0;"
    x, y = Arr(np.zeros(THREADS + 2, np.float32), "x", read_only=True), arrays()[1]
    assert launch(wide, [x, y], block=THREADS, shared=4).kinds == {"MISALIGNED"}
    assert kinds("st.shared.f32 [%r2+2], 0f00000000;\n" + COPY, shared=4 * THREADS + 4) == {"MISALIGNED"}


def test_write_to_read_only():
    assert kinds("st.global.f32 [%q3], 0f3F800000;\n" + COPY) == {"WRITE-TO-READONLY"}


def test_shared_out_of_bounds():
    assert kinds("st.shared.f32 [%r2+4], 0f3F800000;\n" + COPY) == {"SHARED-OUT-OF-BOUNDS"}
    assert kinds("st.shared.f32 [%r2], 0f3F800000;\n" + COPY, shared=4 * THREADS - 4) == {"SHARED-OUT-OF-BOUNDS"}


def test_local_out_of_bounds():
    assert kinds(".local .align 4 .b8 mine[16];\nst.local.u32 [mine+16], 1;\n" + COPY) == {"LOCAL-OUT-OF-BOUNDS"}


REVERSE = (
    "ld.global.f32 %f0, [%q3];\nst.shared.f32 [%r2], %f0;\n{barrier}\nmov.u32 %r3, 63;\n"
    "sub.u32 %r3, %r3, %r0;\nmad.lo.u32 %r4, %r3, 4, %r1;\nld.shared.f32 %f1, [%r4];\n"
    "st.global.f32 [%q4], %f1;"
)


@pytest.mark.parametrize("schedule", range(4))
def test_shared_race(schedule):
    assert kinds(REVERSE.format(barrier="bar.sync 0;"), schedule=schedule) == set()
    assert kinds(REVERSE.format(barrier=""), schedule=schedule) >= {"SHARED-RACE"}
    assert kinds(REVERSE.format(barrier="bar.warp.sync -1;"), schedule=schedule) >= {"SHARED-RACE"}


def test_write_after_read_race():
    again = "\n{barrier}\nst.shared.f32 [%r2], %f1;"
    body = REVERSE.format(barrier="bar.sync 0;") + again
    assert kinds(body.format(barrier="bar.sync 0;")) == set()
    assert kinds(body.format(barrier="")) == {"SHARED-RACE"}


def test_race_inside_a_warp():
    swap = (
        "ld.global.f32 %f0, [%q3];\nst.shared.f32 [%r2], %f0;\n{sync}\nxor.b32 %r3, %r0, 1;\n"
        "mad.lo.u32 %r4, %r3, 4, %r1;\nld.shared.f32 %f1, [%r4];\nst.global.f32 [%q4], %f1;"
    )
    assert kinds(swap.format(sync="bar.warp.sync 0xffffffff;")) == set()
    assert kinds(swap.format(sync="")) == {"WARP-RACE"}


def test_write_collision_and_harmless_equal_writes():
    assert kinds("st.shared.u32 [%r1], %r0;\n" + COPY, block=32, args=arrays(32)) == {"WRITE-COLLISION"}
    assert kinds("st.shared.u32 [%r1], 7;\n" + COPY) == set()
    assert kinds("shr.u32 %r5, %r0, 5;\nst.shared.u32 [%r1], %r5;\n" + COPY) == {"SHARED-RACE"}


def test_bytes_of_one_word_do_not_race():
    body = "add.u32 %r5, %r1, %r0;\nst.shared.u8 [%r5], %r0;\nbar.sync 0;\nld.shared.u8 %r6, [%r5];\n" + COPY
    assert kinds(body) == set()
    # words first, bytes later: the shadow is refined on the way
    assert kinds("st.shared.u32 [%r2], %r0;\nbar.sync 0;\n" + body) == set()
    assert kinds("st.shared.u32 [%r2], %r0;\n" + body) >= {"SHARED-RACE"}


@pytest.mark.parametrize("schedule", range(3))
def test_global_races(schedule):
    def run(body, grid, size):
        data = Arr(np.zeros(size, np.uint8), "data")
        return launch(
            "cvt.u64.u32 %q2, %r0;\nmov.u32 %r1, %ctaid.x;\ncvt.u64.u32 %q3, %r1;\n" + body,
            [data],
            block=THREADS,
            grid=grid,
            schedule=schedule,
        ).kinds

    own_byte = "mad.lo.u64 %q4, %q3, 64, %q2;\nadd.s64 %q4, %q4, %q0;\n"
    assert run(own_byte + "st.global.u8 [%q4], %r0;", 4, 256) == set()
    block_byte = "add.s64 %q4, %q0, %q3;\n"
    assert run(block_byte + "st.global.u8 [%q4], %r0;", 1, 256) == {"WRITE-COLLISION", "GLOBAL-RACE"}
    assert run(own_byte + "ld.global.u8 %r2, [%q0];\nst.global.u8 [%q4], 0;", 1, 256) == {
        "GLOBAL-RACE"
    }  # lane 0 of warp 0 against warp 1
    same_block = (
        own_byte + "st.global.u8 [%q4], 1;\n{barrier}\nxor.b64 %q5, %q2, 32;\nadd.s64 %q6, %q0, %q5;\nld.global.u8 %r2, [%q6];"
    )
    assert run(same_block.format(barrier="bar.sync 0;"), 1, 256) == set()
    assert run(same_block.format(barrier=""), 1, 256) == {"GLOBAL-RACE"}
    between_blocks = own_byte + "st.global.u8 [%q4], 1;\nbar.sync 0;\nadd.s64 %q6, %q0, %q2;\nld.global.u8 %r2, [%q6];"
    assert run(between_blocks, 4, 256) == {"GLOBAL-RACE"}


def test_atomics_do_not_race_with_each_other():
    data = [Arr(np.zeros(4, np.uint32), "counter")]
    assert launch("atom.global.add.u32 %r1, [%q0], 1;", data, block=THREADS, grid=8).kinds == set()
    assert launch("atom.global.add.u32 %r1, [%q0], 1;\nld.global.u32 %r2, [%q0];", data, block=THREADS, grid=8).kinds == {
        "GLOBAL-RACE",
        "WARP-RACE",
    }
    assert (
        launch("atom.global.add.u32 %r1, [%q0], 1;\nld.relaxed.gpu.global.u32 %r2, [%q0];", data, block=THREADS, grid=8).kinds
        == set()
    )


ASYNC = (
    "cp.async.ca.shared.global [%r2], [%q3], 4;\ncp.async.commit_group;\n{wait}\n{barrier}\n"
    "ld.shared.f32 %f1, [%r2];\nst.global.f32 [%q4], %f1;\ncp.async.wait_all;"
)


@pytest.mark.parametrize("lazy", [True, False])
def test_async_hazards(lazy):
    good = ASYNC.format(wait="cp.async.wait_group 0;", barrier="")
    assert kinds(good, lazy_copies=lazy) == set()
    assert kinds(ASYNC.format(wait="cp.async.wait_group 1;", barrier=""), lazy_copies=lazy) == {"ASYNC-RACE"}
    other = good.replace(
        "ld.shared.f32 %f1, [%r2]", "xor.b32 %r3, %r0, 32;\nmad.lo.u32 %r4, %r3, 4, %r1;\nld.shared.f32 %f1, [%r4]"
    )
    assert kinds(other, lazy_copies=lazy) & {"SHARED-RACE", "ASYNC-RACE"}  # by who runs first
    assert kinds(other.replace("cp.async.wait_group 0;", "cp.async.wait_group 0;\nbar.sync 0;"), lazy_copies=lazy) == set()
    leak = COPY + "cp.async.ca.shared.global [%r2], [%q3], 4;"
    assert kinds(leak, lazy_copies=lazy) == {"ASYNC-LEAK"}


def test_groups_belong_to_lanes():
    """Half of the lanes commit one group more; wait_group 1 then completes only theirs."""
    body = """
cp.async.ca.shared.global [%r2], [%q3], 4;
cp.async.commit_group;
and.b32 %r5, %r0, 1;
setp.eq.u32 %p0, %r5, 0;
@%p0 cp.async.commit_group;
cp.async.wait_group 1;
ld.shared.f32 %f1, [%r2];
st.global.f32 [%q4], %f1;
cp.async.wait_all;"""
    report = launch(PLACES + body, arrays(), block=THREADS, shared=4 * THREADS)
    assert report.kinds == {"ASYNC-RACE"} and report.findings[0].times == THREADS // 2


def test_uninitialised_reads():
    assert kinds("ld.shared.f32 %f1, [%r2];\n" + COPY) == {"UNINITIALISED"}
    assert kinds("atom.shared.add.u32 %r3, [%r2], 1;\n" + COPY) == {"UNINITIALISED"}
    assert kinds("ld.global.f32 %f1, [%q4];\n" + COPY) == {"UNINITIALISED"}
    # what another block left in shared memory is gone
    twice = (
        "mov.u32 %r5, %ctaid.x;\nsetp.ne.u32 %p0, %r5, 0;\n@!%p0 st.shared.f32 [%r2], 0f00000000;\nld.shared.f32 %f1, [%r2];"
    )
    assert launch(PLACES + twice, arrays(), block=THREADS, grid=2, shared=4 * THREADS).kinds >= {"UNINITIALISED"}


def test_unwritten_output():
    report = launch(PLACES + COPY, arrays(), block=THREADS - 3, shared=4)
    assert report.errors == ["UNWRITTEN: 12 bytes of output y were never written"]
    assert np.isnan(np.frombuffer(b"\xff" * 4, np.float32)[0])  # poison is NaN, so that it shows in results


def test_scratch_arrays():
    scratch = Arr(np.zeros(THREADS, np.float32), "scratch", scratch=True)
    assert launch(PLACES + "st.global.f32 [%q4], 0f00000000;", [arrays()[0], scratch], block=8, shared=4).kinds == set()
    assert launch(PLACES + "ld.global.f32 %f0, [%q4];", [arrays()[0], scratch], block=8, shared=4).kinds == {"UNINITIALISED"}


def test_barrier_deadlock():
    body = "setp.lt.u32 %p0, %r0, 32;\n@%p0 bra.uni SKIP;\nbar.sync 1, 64;\nSKIP:\n" + COPY
    report = launch(PLACES + body, arrays(), block=THREADS, shared=4)
    assert report.kinds == {"DEADLOCK", "STOPPED"} and "32 threads arrived of 64" in report.findings[0].message


def test_diverged_barrier():
    body = "setp.lt.u32 %p0, %r0, 16;\n@%p0 bra OTHER;\nbar.sync 0;\nbra MEET;\nOTHER:\nbar.sync 0;\nMEET:\n" + COPY
    assert kinds(body) == {"DIVERGED-BARRIER"}
    assert kinds(body.replace("bar.sync", "barrier.sync")) == set()  # may be executed by a part of the warp


def test_exited_threads_do_not_count():
    body = "setp.lt.u32 %p0, %r0, 40;\n@%p0 exit;\nbar.sync 0;\n"
    assert kinds(COPY + body) == set()


@pytest.mark.parametrize(
    "operation",
    ["shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;", "vote.sync.ballot.b32 %r3, %p1, -1;", "redux.sync.add.u32 %r3, %r0, -1;",
     "bar.warp.sync -1;",
     "match.any.sync.b32 %r3, %r0, -1;", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r1];"],
)  # fmt: skip
def test_divergence_at_warp_wide_operations(operation):
    setup = (
        "setp.lt.u32 %p1, %r0, 1;\nst.shared.u32 [%r2], 0;\nst.shared.u32 [%r2+128], 0;\nbar.sync 0;\n"
        if "ldmatrix" in operation
        else "setp.lt.u32 %p1, %r0, 1;\n"
    )
    body = setup + "and.b32 %r4, %r0, 2;\nsetp.eq.u32 %p0, %r4, 0;\n@%p0 bra SKIP;\n" + operation + "\nSKIP:\n" + COPY
    assert kinds(body, block=32, args=arrays(32)) == {"DIVERGENT"}
    assert kinds(body.replace("@%p0 bra SKIP;\n", ""), block=32, args=arrays(32)) == set()


def test_shuffle_from_an_absent_lane():
    body = (
        "and.b32 %r4, %r0, 1;\nsetp.eq.u32 %p0, %r4, 0;\n@%p0 bra SKIP;\n"
        "shfl.sync.bfly.b32 %r3, %r0, 1, 31, 0xaaaaaaaa;\nSKIP:\n" + COPY
    )
    assert kinds(body) == {"SHFL-INACTIVE"}


def test_use_after_free():
    from . import library as core

    x = np.zeros(8, np.float32)
    address = Arr(x, "gone").register()
    core.library().ptxsim_unregister(address)
    body = "ld.global.f32 %f0, [%q0];"
    source = (
        f".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n"
        f".reg .b64 %q<2>; .reg .f32 %f<2>;\nld.param.u64 %q0, [p];\n{body}\nret;\n}}\n"
    )
    assert Module(source).launch("k", 1, 1, [address]).kinds == {"USE-AFTER-FREE"}


def test_endless_loop_and_bad_launches():
    report = launch("AGAIN:\nbra AGAIN;", [], budget=1000)
    assert report.kinds == {"STOPPED"} and "endless loop" in report.errors[0]
    assert "invalid launch" in launch("", [], block=2048).errors[0]
    assert "shared memory" in launch("", [], smem=300000).errors[0]


@pytest.mark.parametrize(
    "instruction",
    ["wmma.load.a.sync.aligned.row.m16n16k16.global.f16 {%r1, %r2}, [%q0], %r0;", "add.rn.rz.quick.f32 %f0, %f1, %f2;", 
     "frobnicate.b32 %r1, %r2;", "ld.global.v3.f32 {%f0, %f1, %f2}, [%q0];",
     "shfl.up.b32 %r1, %r2, 1, 0;", "add.f32 %f0, %r1, %f2, %f3;", "cvt.pack.sat.s16.s32.b32 %r1, %r2, %r3, %r4;",
     "mov.b32 %r1, %nosuch;", "cp.async.bulk.commit_group;"],
)  # fmt: skip
def test_unsupported_instructions_stop_when_reached(instruction):
    """…with their text and line; where they are not reached they only appear in the list."""
    source = f""".version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u32 go)
{{
.reg .pred %p<2>; .reg .b32 %r<8>; .reg .b64 %q<4>; .reg .f32 %f<4>;
ld.param.u32 %r7, [go];
setp.eq.u32 %p1, %r7, 0;
@%p1 bra END;
.loc 1 77 5
{instruction}
END:
ret;
}}
"""
    module = Module(source)
    assert len(module.unsupported()) == 1 and "line 77" in module.unsupported()[0]
    module.launch("k", 1, 32, [0]).check()
    with pytest.raises(SimulatorError, match="line 77: unsupported instruction") as stopped:
        module.launch("k", 1, 32, [1])
    assert instruction.rstrip(";").split()[0] in str(stopped.value)


def test_findings_are_deduplicated_and_limited():
    body = "ld.global.f32 %f0, [%q3+400];\n" * 5 + COPY
    report = launch(PLACES + body, arrays(), block=THREADS, shared=4, max_reports=3)
    assert len(report.findings) == 3 and all(f.times == THREADS for f in report.findings)


def test_counters():
    n = THREADS
    x, y = aligned(np.zeros(n * 8, np.float32)), aligned(np.zeros(n, np.float32))
    args = [Arr(x, "x", read_only=True), Arr(y, "y", output=True)]
    body = (
        "mul.wide.u32 %q5, %r0, 32;\nadd.s64 %q5, %q0, %q5;\nld.global.f32 %f0, [%q5];\n"
        "st.global.f32 [%q4], %f0;\nshl.b32 %r3, %r0, 7;\nand.b32 %r3, %r3, 1023;\n"
        "add.u32 %r3, %r3, %r1;\nst.shared.f32 [%r3], 0f00000000;"
    )
    report = launch(PLACES + body, args, block=n, shared=1024).check()
    c = report.counters
    assert (c["load_requests"], c["load_sectors"], c["load_ideal_sectors"], c["load_bytes"]) == (2, 64, 8, 256)
    assert (c["store_requests"], c["store_sectors"], c["store_ideal_sectors"]) == (2, 8, 8)
    assert (c["shared_requests"], c["shared_waves"], c["shared_ideal_waves"]) == (2, 16, 2)
    assert report.efficiency("load") == 0.125 and report.efficiency("store") == 1.0 and report.bank_waves() == 8.0
    assert report.tensors["x"]["read"] == n * 32 and report.tensors["y"]["written"] == n * 4
    line = next(entry for entry in report.lines if entry["text"].startswith("ld.global"))
    assert (line["sectors"], line["ideal_sectors"], line["lanes"]) == (64, 8, n)
    assert "72        16" in report.profile()  # sectors of loads and stores, ideal


def test_every_opcode_has_a_test():
    """The names in the instruction table, each used in an instruction of some test."""
    import re
    from pathlib import Path

    from . import library as core

    texts = "\n".join(path.read_text().replace("\\n", "\n") for path in Path(__file__).parent.glob("test_*.py"))
    loops = {"min", "max", "neg", "abs", "and", "or", "xor", "fma", "add", "sub", "mul", "div", "rem"}  # parametrised names
    missing = [
        o for o in core.library().ptxsim_opcodes().decode().split() if not re.search(rf"\b{o}\b[.;]", texts) and o not in loops
    ]
    assert missing == []
