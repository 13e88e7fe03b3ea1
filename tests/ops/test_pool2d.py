"""The poolings: bit for bit stock torch's maxima, their gradient and averages, any geometry, every ISA, and dk.optimize."""

from __future__ import annotations

import itertools
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _isa import every_isa, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels import _extension, reference
from dl4ds_kernels import functional as dkf
from dl4ds_kernels.functional import pool2d as pools

CL = torch.channels_last
OPS = torch.ops.dl4ds_kernels
kernels = pytest.mark.skipif(not _extension.status()["_C"].loaded, reason="the kernels are in the C++ part")
SIZES = [(2, c, h, w) for c in (2, 7, 16, 40, 67) for h, w in ((8, 8), (9, 11), (5, 30))] + [(0, 3, 6, 6)]
GEOMETRIES = [
    {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)}, {"kernel_size": 5, "stride": 3, "padding": 2},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True}, {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    {"kernel_size": 4, "stride": 1}, {"kernel_size": 1, "stride": 2},
]  # fmt: skip
DILATED = [{"kernel_size": 2, "dilation": 3, "stride": 1}, {"kernel_size": (3, 2), "dilation": (2, 4), "padding": (1, 1)}]
AVERAGES = [{}, {"count_include_pad": False}, {"divisor_override": 7}]


def maps(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Few different values, so that equal maxima and zeros of both signs are common."""
    x = (torch.randn(size) * 2).round() / 2 * torch.where(torch.rand(size) < 0.5, -1.0, 1.0)
    return x.to(dtype).to(memory_format=CL)


def same(a: Tensor, b: Tensor) -> None:
    """Bits, NaNs included (whatever their payload), and layout."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert a.numel() == 0 or a.stride() == b.stride()
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(nan=0.0, posinf=None, neginf=None), b.nan_to_num(nan=0.0, posinf=None, neginf=None)
    assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.fixture(params=["reference", "cpu", None], ids=["reference", "cpu", "auto"])
def backend(request: pytest.FixtureRequest) -> str | None:
    if request.param == "cpu" and not _extension.status()["_C"].loaded:
        pytest.skip("the kernels are in the C++ part")
    return request.param


@pytest.mark.parametrize("options", GEOMETRIES + DILATED, ids=str)
def test_maximum(options: dict[str, Any], backend: str | None) -> None:
    with torch.no_grad():
        for size in SIZES:
            x = maps(size)
            out, expected = dkf.max_pool2d(x, **options, backend=backend), TF.max_pool2d(x, **options)
            assert torch.equal(out, expected) if backend == "reference" else same(out, expected) is None


@pytest.mark.parametrize("average", AVERAGES, ids=str)
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_average(options: dict[str, Any], average: dict[str, Any], backend: str | None) -> None:
    with torch.no_grad():
        for size in SIZES:
            x = maps(size) + torch.rand(size)
            out, expected = dkf.avg_pool2d(x, **options, **average, backend=backend), TF.avg_pool2d(x, **options, **average)
            if backend == "reference":
                torch.testing.assert_close(out, expected)
            else:
                same(out, expected)


def both_gradients(x: Tensor, options: dict[str, Any], dout: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ours and stock's, of the input of a maximum pooling."""
    kernel = options["kernel_size"]
    values = kernel, options.get("stride", kernel), options.get("padding", 0), options.get("dilation", 1)
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in values]
    ceil_mode = options.get("ceil_mode", False)
    out, where = torch.ops.aten.max_pool2d_with_indices(x, *pairs, ceil_mode)
    dout = torch.randn_like(out) if dout is None else dout
    stock = torch.ops.aten.max_pool2d_with_indices_backward(dout, x, *pairs, ceil_mode, where)
    return OPS.max_pool2d_bwd(dout, x, *itertools.chain(*pairs), ceil_mode), stock


def all_inside(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether each window of an axis has a tap on the map. Stock's backward pass adds the others' gradients behind the map."""
    return all(
        any(0 <= o * stride - padding + tap * dilation < size for tap in range(kernel)) for o in range(out)
    )  # fmt: skip


@kernels
def test_a_window_without_a_tap_gives_its_gradient_to_nobody() -> None:
    x, geometry = maps((1, 20, 2, 4)), (2, 4, 1, 2, 1, 2, 3, 1, False)
    out = OPS.max_pool2d(x, *geometry)  # taps in rows -1 and 2 of 0 and 1
    assert out.isneginf().all()
    assert not OPS.max_pool2d_bwd(torch.ones_like(out), x, *geometry).any()


@kernels
@pytest.mark.parametrize("options", GEOMETRIES + DILATED, ids=str)
def test_gradient_of_the_maximum(options: dict[str, Any]) -> None:
    """Bit for bit stock's: the first of equal values takes it all, sums in the same order; maps of several bands too."""
    for size in [*SIZES, (2, 67, 70, 40)]:
        same(*both_gradients(maps(size), options))


@kernels
def test_gradient_of_special_values() -> None:
    """Windows of NaN, infinities and the two zeros; gradients that are NaN or infinite stay in their place."""
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0])
    x = torch.cartesian_prod(values, values, values, values).view(1, -1, 2, 2).to(memory_format=CL)
    dout = torch.tensor([1.0, float("nan"), float("inf"), -0.0, -2.0]).repeat(125).view(1, -1, 1, 1).to(memory_format=CL)
    same(*both_gradients(x, {"kernel_size": 2}, dout))
    wide = x.repeat(1, 1, 2, 2).contiguous(memory_format=CL)
    same(*both_gradients(wide, {"kernel_size": 3, "stride": 1, "padding": 1}))


@kernels
def test_gradient_of_odd_tensors() -> None:
    """Layouts are copied, wrong shapes and dtypes refused; opcheck."""
    x, geometry = maps((2, 20, 9, 8)), (3, 3, 2, 2, 1, 1, 1, 1, False)
    dout = torch.randn(2, 20, 5, 4)
    expected = OPS.max_pool2d_bwd(dout.to(memory_format=CL), x, *geometry)
    same(OPS.max_pool2d_bwd(dout, x.contiguous(), *geometry), expected)
    torch.library.opcheck(OPS.max_pool2d_bwd.default, (dout, x, *geometry))
    with pytest.raises(RuntimeError, match=r"max_pool2d_bwd: dout: expected the output's shape \(2, 20, 5, 4\), got"):
        OPS.max_pool2d_bwd(dout[..., :3], x, *geometry)
    with pytest.raises(RuntimeError, match="max_pool2d_bwd: dout: expected dtype"):
        OPS.max_pool2d_bwd(dout.double(), x, *geometry)


@kernels
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    pair = lambda low, high: (draw(low, high), draw(low, high))  # noqa: E731
    kernel, stride, dilation, ceil_mode = pair(1, 5), pair(1, 4), pair(1, 3), data.draw(st.booleans())
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(0, k // 2) for k in kernel)
    x = maps((draw(1, 2), draw(2, 40), *(max(1, r - 2 * p) + draw(0, 9) for r, p in zip(reach, padding, strict=True))))
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    with torch.no_grad():
        same(dkf.max_pool2d(x, dilation=dilation, **options, backend="cpu"), TF.max_pool2d(x, dilation=dilation, **options))
        out = OPS.max_pool2d(x, *kernel, *stride, *padding, *dilation, ceil_mode)
        if all(map(all_inside, x.shape[2:], out.shape[2:], kernel, stride, padding, dilation)):
            same(*both_gradients(x, {"dilation": dilation, **options}))
        average = data.draw(st.sampled_from(AVERAGES))
        same(dkf.avg_pool2d(x, **options, **average, backend="cpu"), TF.avg_pool2d(x, **options, **average))


@pytest.mark.parametrize("size", [*SIZES, (1, 300, 7, 7), (16, 512, 7, 7), (2, 64, 16, 16), (1, 3, 40, 41)], ids=str)
def test_global_average(size: tuple[int, ...], backend: str | None) -> None:
    """Not torch's order of summation: at most its error against fp64 and a little."""
    x = torch.randn(size).to(memory_format=CL) + 1
    with torch.no_grad():
        out, expected = dkf.global_avg_pool2d(x, backend=backend), TF.adaptive_avg_pool2d(x, 1)
    assert out.shape == expected.shape and (not out.numel() or out.stride() == expected.stride() or backend == "reference")
    torch.testing.assert_close(out.double(), x.double().mean((2, 3), keepdim=True), rtol=3e-7, atol=3e-7)


@kernels
def test_special_values() -> None:
    """All 5^4 windows of NaN, infinities and the two zeros; NaN and infinities in averages."""
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0])
    x = torch.cartesian_prod(values, values, values, values).view(1, -1, 2, 2).to(memory_format=CL)
    with torch.no_grad():
        same(dkf.max_pool2d(x, 2, backend="cpu"), TF.max_pool2d(x, 2))
        same(dkf.avg_pool2d(x, 2, backend="cpu"), TF.avg_pool2d(x, 2))
        wide = x.repeat(1, 1, 2, 2).contiguous(memory_format=CL)
        same(dkf.max_pool2d(wide, 3, 1, 1, backend="cpu"), TF.max_pool2d(wide, 3, 1, 1))
        same(dkf.avg_pool2d(wide, 3, 1, 1, backend="cpu"), TF.avg_pool2d(wide, 3, 1, 1))
        assert torch.equal(
            dkf.global_avg_pool2d(x, backend="cpu").isnan(), TF.adaptive_avg_pool2d(x, 1).isnan()
        )  # fmt: skip


@kernels
def test_same_bits_for_any_number_of_threads() -> None:
    x, results = torch.randn(2, 300, 29, 30).to(memory_format=CL), []
    dout = torch.randn(2, 300, 15, 15).to(memory_format=CL)
    with torch.no_grad():
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append((
                dkf.max_pool2d(x, 3, 2, 1, backend="cpu"), dkf.avg_pool2d(x, 3, 2, 1, backend="cpu"),
                OPS.global_avg_pool2d(x), OPS.max_pool2d_bwd(dout, x, 3, 3, 2, 2, 1, 1, 1, 1, False),
            ))  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


CALLS = {
    "max_pool2d": (dkf.max_pool2d, TF.max_pool2d, (3, 2, 1)),
    "avg_pool2d": (dkf.avg_pool2d, TF.avg_pool2d, (3, 2, 1)),
    "global_avg_pool2d": (dkf.global_avg_pool2d, lambda x: TF.adaptive_avg_pool2d(x, 1), ()),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_rest_is_stock(name: str, backend: str | None) -> None:
    """Gradients, other dtypes, layouts and dimensions: torch's own results."""
    ours, stock, arguments = CALLS[name]
    if backend == "reference":
        pytest.skip("asks for the reference")
    for x in (
        torch.randn(2, 5, 9, 9), torch.randn(2, 5, 9, 9, dtype=torch.float64).to(memory_format=CL),
        torch.randn(2, 5, 9, 9).to(memory_format=CL).bfloat16(), torch.randn(5, 9, 9), torch.randn(2, 1, 9, 9),
        torch.randn(2, 8, 1, 1) if not arguments else torch.randn(2, 8, 3, 3),
        torch.randn(2, 40, 9, 9).to(memory_format=CL)[:, 3:20],
    ):  # fmt: skip
        same(ours(x, *arguments, backend=backend), stock(x, *arguments))
    a, b = (torch.randn(2, 40, 30, 30, generator=torch.Generator().manual_seed(0)).to(memory_format=CL) for _ in range(2))
    a.requires_grad_(), b.requires_grad_()
    out, expected = ours(a, *arguments, backend=backend), stock(b, *arguments)
    dout = torch.randn(out.shape)
    assert torch.equal(*(torch.autograd.grad(y, x, dout)[0] for y, x in ((out, a), (expected, b))))


@pytest.mark.parametrize(
    "arguments",
    [
        (0,),
        (-1,),
        (3, 0),
        (3, 1, 2),
        (3, 1, -1),
        (9, 1),
        ("a",),
        (3, 1, 0, 0),
        ((1, 2, 3),),
        (None,),
        (2.5,),
        ([2, 2],),
        ([2],),
    ],
    ids=str,
)
def test_errors_are_torchs(arguments: tuple[Any, ...]) -> None:
    x = torch.randn(2, 40, 8, 8).to(memory_format=CL)
    for ours, stock, _ in list(CALLS.values())[:2]:
        outcomes = []
        for function in (ours, stock):
            try:
                outcomes.append(function(x, *arguments))
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert type(outcomes[0]) is type(outcomes[1]), outcomes
        assert torch.equal(*outcomes) if isinstance(outcomes[0], Tensor) else outcomes[0] == outcomes[1]


@kernels
def test_errors_of_the_ops() -> None:
    x = torch.randn(2, 4, 8, 8)
    for call, message in (
        (lambda: OPS.max_pool2d(x, 3, 3, 1, 1, 2, 0, 1, 1, False), "max_pool2d: padding: expected at most half of the kernel"),
        (lambda: OPS.max_pool2d(x, 9, 9, 1, 1, 0, 0, 1, 1, False), "max_pool2d: x: expected a map at least as large"),
        (lambda: OPS.max_pool2d(x[0], 2, 2, 1, 1, 0, 0, 1, 1, False), r"max_pool2d: x: expected \(N, C, H, W\)"),
        (lambda: OPS.avg_pool2d(x, 2, 2, 0, 1, 0, 0, False, True, 0), "avg_pool2d: stride: expected two numbers of at least 1"),
        (lambda: OPS.avg_pool2d(x.double(), 2, 2, 1, 1, 0, 0, False, True, 0), "avg_pool2d: x: expected dtype float32"),
        (lambda: OPS.global_avg_pool2d(x[..., :0]), "global_avg_pool2d: x: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@kernels
def test_opcheck_and_other_layouts() -> None:
    x = torch.randn(2, 20, 9, 8)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(OPS.max_pool2d.default, (x, 3, 2, 2, 1, 1, 0, 1, 2, True), **tests)
    torch.library.opcheck(OPS.avg_pool2d.default, (x.to(memory_format=CL), 3, 2, 2, 1, 1, 0, True, False, 0), **tests)
    torch.library.opcheck(OPS.global_avg_pool2d.default, (x,), **tests)
    for layout in (x, x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert torch.equal(OPS.max_pool2d(layout, 3, 3, 2, 2, 1, 1, 1, 1, False), TF.max_pool2d(x, 3, 2, 1))


class Net(nn.Module):
    """Three poolings inside and one in a Sequential; and calls of functionals, which stay stock."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 64, 3, padding=1), nn.MaxPool2d(3, 2, 1)
        self.down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(64, 64, 1), nn.ReLU())
        self.head = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.pool(self.conv(x)))) + TF.max_pool2d(x, 2).mean()


def test_optimize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken in inference, left alone in training, excluded by name, switched off by a hook, pickled, restored."""
    taken = []
    for name in ("max_pool2d", "avg_pool2d", "global_avg_pool2d"):
        function = getattr(sys.modules["dl4ds_kernels.modules._pool"], name)
        monkeypatch.setattr(
            f"dl4ds_kernels.modules._pool.{name}", lambda *a, n=name, f=function, **k: (taken.append(n), f(*a, **k))[1]
        )
    stock, x = Net().eval(), torch.randn(2, 3, 64, 64)
    model = dk.optimize(stock)
    every = ["max_pool2d", "avg_pool2d", "global_avg_pool2d"]
    for net in (model, pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            torch.testing.assert_close(net(x), stock(x), rtol=1e-4, atol=1e-5)
        assert taken == every
        taken.clear()
    assert not any("pool" in row.pattern for row in model.dl4ds_report)
    with torch.no_grad():
        dk.optimize(stock, exclude="pool")(x)
    assert taken == every[1:]
    taken.clear()
    with torch.no_grad():
        model.pool.register_forward_hook(lambda module, args, out: out * 0)
        assert not torch.allclose(model(x), stock(x))
    assert taken == every[1:]
    taken.clear()
    dk.restore(model)
    with torch.no_grad():
        model(x)
    assert not taken and "forward" not in vars(model)


@kernels
@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
     nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2, return_indices=True), nn.AdaptiveAvgPool2d(2), nn.MaxPool2d([2, 2])],
    ids=str,
)  # fmt: skip
def test_modules(pool: nn.Module) -> None:
    """Through the run-time helper at a size where the kernels are chosen, with and without gradients."""
    from dl4ds_kernels.modules._pool import run_pool

    x = torch.randn(4, 256, 56, 56).to(memory_format=CL)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got, want = run_pool(x, pool), pool(x)
        for a, b in zip(*([v] if isinstance(v, Tensor) else v for v in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 if isinstance(pool, nn.AdaptiveAvgPool2d) else 0)
            assert a.stride() == b.stride()


@kernels
def test_which_calls_are_taken() -> None:
    """By size, unless the backend was named."""

    def path(x: Tensor, backend: str | None = None) -> str:
        pairs = pools._geometry(x, 2, None, 0)
        return pools._path("max_pool2d", x, backend, pools._enough(x, pairs, backend, pools._LEAST_COMPARED))

    large, small = torch.randn(1, 64, 112, 112).to(memory_format=CL), torch.randn(1, 64, 8, 8).to(memory_format=CL)
    with torch.no_grad():
        assert (path(large), path(small), path(small, "cpu")) == ("dl4ds_kernels", "stock", "dl4ds_kernels")
        assert path(large.contiguous()) == path(large.double()) == "stock"
    assert path(large.requires_grad_()) == "stock"


def test_references_in_fp64() -> None:
    x = maps((2, 5, 9, 11), torch.float64)
    for options, average in itertools.product(GEOMETRIES, AVERAGES):
        pairs = pools._geometry(x, options["kernel_size"], options.get("stride"), options.get("padding", 0))
        ceil_mode = options.get("ceil_mode", False)
        assert torch.equal(reference.max_pool2d(x, *pairs, ceil_mode), TF.max_pool2d(x, **options))
        counts = average.get("count_include_pad", True), average.get("divisor_override", 0)
        torch.testing.assert_close(
            reference.avg_pool2d(x, *pairs[:3], ceil_mode, *counts), TF.avg_pool2d(x, **options, **average)
        )  # fmt: skip


RUN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_pool2d as tests
for options in tests.GEOMETRIES:
    tests.test_maximum(options, "cpu")
    tests.test_average(options, {"count_include_pad": False}, "cpu")
    tests.test_gradient_of_the_maximum(options)
for size in tests.SIZES:
    tests.test_global_average(size, "cpu")
tests.test_special_values()
tests.test_gradient_of_special_values()
"""


@kernels
@pytest.mark.slow
@every_isa
def test_every_instruction_set(isa: str) -> None:
    run_with(isa, RUN, __file__)
