"""CUDA samples through nvcc: right numbers and no findings under shuffled schedules; host code over the stand-in runtime."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from . import Arr, Headers, HostLibrary, Module, SimulatorError, aligned, compile_cuda
from .fixture import require_nvcc

SAMPLES = Path(__file__).parent / "samples"
SCHEDULES = (0, 1, 17)


@pytest.fixture(scope="module")
def kernels() -> Module:
    """All samples, compiled once."""
    require_nvcc()
    module = Module(compile_cuda(SAMPLES / "kernels.cu")[0])
    assert module.unsupported() == []
    return module


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def read(array: np.ndarray, name: str) -> Arr:
    return Arr(array, name, read_only=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_elementwise(kernels, rng, schedule):
    n, channels = 8 * 999, 72
    a, residual = (aligned(rng.standard_normal(n).astype(np.float16)) for _ in range(2))
    scale, shift = (aligned(rng.standard_normal(channels).astype(np.float32)) for _ in range(2))
    y = aligned(np.zeros(n, np.float16))
    args = [
        read(a, "a"),
        read(residual, "residual"),
        read(scale, "scale"),
        read(shift, "shift"),
        Arr(y, "y", output=True),
        n,
        channels,
    ]
    report = kernels.launch("scale_shift_relu", 3, 128, args, schedule=schedule).check()
    exact = a.astype(np.float64).reshape(-1, channels) * scale + shift + residual.astype(np.float64).reshape(-1, channels)
    want = np.maximum(exact, 0).ravel()
    assert np.all(np.abs(y - want) <= 2.0**-11 * want + 1e-6)
    assert report.efficiency("store") == 1.0 and report.tensors["a"]["read"] == -(-2 * n // 32) * 32  # whole sectors


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "dtype"), [("sum_float", np.float32), ("sum_double", np.float64)])
def test_block_sums(kernels, rng, name, dtype, schedule):
    x, sums = rng.standard_normal(5000).astype(dtype), np.zeros(4, dtype)
    kernels.launch(name, 4, 256, [read(x, "x"), Arr(sums, "sums", output=True), 5000], schedule=schedule).check()
    assert abs(sums.sum() - x.astype(np.float64).sum()) < (1e-3 if dtype is np.float32 else 1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_transpose(kernels, rng, schedule):
    x = rng.standard_normal((45, 70)).astype(np.float32)
    y = np.zeros((70, 45), np.float32)
    report = kernels.launch(
        "transpose", (3, 2), (32, 8), [read(x, "x"), Arr(y, "y", output=True), 45, 70], schedule=schedule
    ).check()
    assert np.array_equal(y, x.T) and report.bank_waves() == 1.0


def test_histogram(kernels, rng):
    x, bins = rng.integers(0, 256, 3000).astype(np.uint8), np.zeros(256, np.uint32)
    kernels.launch("histogram", 3, 128, [read(x, "x"), Arr(bins, "bins"), 3000], schedule=3).check()
    assert np.array_equal(bins, np.bincount(x, minlength=256))


def test_bfloat16(kernels, rng):
    x = rng.standard_normal(200).astype(np.float32)
    raw = (x.view(np.uint32) >> 16).astype(np.uint16)
    value = (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    y = np.zeros(200, np.uint16)
    kernels.launch("silu_bf16", 1, 256, [read(raw, "x"), Arr(y, "y", output=True), 200]).check()
    got = (y.astype(np.uint32) << 16).view(np.float32)
    want = value / (1 + np.exp(-value))
    assert np.all(np.abs(got - want) <= 2.0**-8 * np.abs(want) + 1e-6)


def test_functions(kernels, rng):
    x = np.concatenate([rng.standard_normal(60), [0.0, -0.0, 80.0, -80.0]]).astype(np.float32)
    y = np.zeros((64, 6), np.float32)
    kernels.launch("functions", 1, 64, [read(x, "x"), Arr(y, "y", output=True), 64]).check()
    for value, row in zip(x.astype(float).tolist(), y.astype(float), strict=False):
        angle = float(np.float32(value) * np.float32(100))
        want = [
            math.exp(value),
            math.log(abs(value) + 1e-30),
            math.sin(angle),
            math.tanh(value),
            abs(value) ** 1.7,
            1 / math.sqrt(abs(value) + 1),
        ]
        assert np.allclose(row, want, rtol=1e-5, atol=1e-6), (value, row, want)


def test_integers(kernels, rng):
    n = 288
    a = rng.integers(-(2**62), 2**62, n)
    b = rng.integers(-(2**40), 2**40, n)
    out = np.zeros(n, np.int64)
    kernels.launch("integers", 3, 96, [read(a, "a"), read(b, "b"), Arr(out, "out", output=True), n]).check()

    def wrap(v: int) -> int:
        return (v + 2**63) % 2**64 - 2**63

    def expected(i: int, x: int, y: int) -> int:
        ux, uy = x % 2**64, y % 2**64
        quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        cases = [quotient, x - y * quotient, x * y >> 64, bin(ux).count("1") * 1000 + 64 - uy.bit_length(),
                 (ux & -ux).bit_length(),
                 ux >> (uy & 63), min(x, y), int(f"{ux:064b}"[::-1], 2), int(float(x) * 0.5)]  # fmt: skip
        return wrap(cases[i % 9])

    assert out.tolist() == [expected(i, x, y) for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=False))]


def test_calls_and_local_memory(kernels, rng):
    x, y = rng.standard_normal(100).astype(np.float32), np.zeros(100, np.float32)
    kernels.launch("polynomial", 1, 128, [read(x, "x"), Arr(y, "y", output=True), 100, 7]).check()
    c = [1 / (1 + (i * 7 + 7) % 5) for i in range(7)]
    assert np.allclose(y, np.polyval(c[::-1], x.astype(np.float64)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_async_pipeline(kernels, schedule, lazy):
    threads, tiles = 64, 7
    x = aligned(np.arange(2 * tiles * threads * 4, dtype=np.float32))
    y = aligned(np.zeros_like(x))
    report = kernels.launch(
        "reverse_tiles",
        2,
        threads,
        [read(x, "x"), Arr(y, "y", output=True), tiles],
        smem=3 * threads * 16,
        schedule=schedule,
        lazy_copies=lazy,
    ).check()
    assert np.array_equal(y.reshape(-1, threads, 4), x.reshape(-1, threads, 4)[:, ::-1])
    assert report.efficiency("load") == 1.0 and report.counters["async_copies"] == 2 * tiles * threads


def test_tensor_core(kernels, rng):
    k = 48
    a, bt = (aligned(rng.standard_normal(s).astype(np.float16)) for s in ((16, k), (8, k)))
    c = np.zeros((16, 8), np.float32)
    report = kernels.launch("tensor_core", 1, 32, [read(a, "a"), read(bt, "bt"), Arr(c, "c", output=True), k]).check()
    assert np.allclose(c, a.astype(np.float64) @ bt.astype(np.float64).T, atol=1e-5) and report.counters["mma"] == 3


def test_printf_and_trap(kernels):
    kernels.launch("asserts", 1, 32, [read(np.zeros(32, np.int32), "x"), 32]).check()
    with pytest.raises(SimulatorError, match="trap executed"):
        kernels.launch("asserts", 1, 32, [read(np.full(32, -1, np.int32), "x"), 32])


# --- host code


@pytest.fixture(scope="module")
def library() -> HostLibrary:
    """samples/host.cu over the stand-in runtime."""
    require_nvcc()
    return HostLibrary.from_sources([SAMPLES / "host.cu"], includes=[SAMPLES.parent])


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(("kind", "dtype"), [("kFloat", np.float32), ("kDouble", np.float64)])
def test_host_launcher(library, rng, kind, dtype, step):
    headers = Headers(SAMPLES / "host.h", SAMPLES.parent)
    x, out = rng.standard_normal(300 * step).astype(dtype), np.zeros(300, dtype)
    with library.session() as session:
        before = session.call("count_calls")
        params = headers.make(
            "ScaleParams",
            session.pointer,
            kind=kind,
            halve=True,
            size={"count": 300, "step": step},
            x=read(x, "x"),
            out=Arr(out, "out", output=True),
        )
        assert session.call("launch_scale", params, None) == 0
        session.check()
        assert session.call("count_calls") == before + 1
        (report,) = session.reports
    assert (
        np.allclose(out, x[::step])
        and report.grid == (3, 1, 1)
        and f"{'f' if dtype is np.float32 else 'd'}Li{step}E" in report.kernel
    )


def test_host_errors(library):
    headers = Headers(SAMPLES / "host.h", SAMPLES.parent)
    x, out = np.zeros(300, np.float32), np.zeros(300, np.float32)

    def call(library, **values):
        with library.session() as session:
            params = headers.make("ScaleParams", session.pointer, x=read(x, "x"), out=Arr(out, "out", output=True), **values)
            return session.call("launch_scale", params, None), session

    assert call(library, size={"count": 300}, big_shared=True)[0] == 0
    library.device(shared_optin=65536)  # 100 KiB is now refused by cudaFuncSetAttribute
    try:
        assert call(library, size={"count": 300}, big_shared=True)[0] == 1
    finally:
        library.device()
    assert call(library, size={"count": 0})[0] == 9  # a grid of no blocks is an invalid configuration
    status, session = call(library, size={"count": 400})  # the kernel runs past both arrays
    assert status == 0 and {f.kind for f in session.reports[0].findings} == {"OUT-OF-BOUNDS"}
    with pytest.raises(LookupError):
        library.function("launch_nothing")
    with pytest.raises(TypeError, match="no member"):
        call(library, size={"count": 1, "colour": 3})
