"""bn_act_pair, bn_stats and their gradient on the CPU: two calls of bn_act, bit for bit, in one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from _cases import lay_out
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES
from dl4ds_kernels._define import op
from dl4ds_kernels.ops import _bn_act_pair
from dl4ds_kernels.ops._bn_act_pair import Normed
from dl4ds_kernels.ops._layout import suggested_format

CODES = [ACTIVATION_CODES[name] for name in ("none", "relu", "leaky_relu", "relu6")]
SHAPES = (
    (2, 63, 7, 5),
    (3, 1, 5, 7),
    (4, 7, 1, 1),
    (1, 1025, 3, 3),
    (5, 24, 16, 16),
    (0, 3, 4, 5),
    (3, 17, 9),
    (2, 33, 2, 5, 7),
)
SHAPES += ((2, 3, 129, 130), (2, 16, 64, 65))  # planes and rows of several pieces
LAYOUTS = ("nchw", "nhwc", "nhwc_cslice", "nchw_hwslice", "transposed")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CASES = [
    (shape, LAYOUTS[(i + j) % len(LAYOUTS)] if j > 1 else LAYOUTS[j], DTYPES[(i + j) % 4], CODES[(i + 2 * j) % 4])
    for i, shape in enumerate(SHAPES)
    for j in range(4)
]


def normed(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int, affine: bool = True) -> Normed:
    """A map with statistics that are its own, and vectors in the accumulation type."""
    g = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    y = lay_out(torch.randn(shape, generator=g, dtype=torch.float64).mul_(2).add_(0.5).to(dtype), layout)
    mean, rstd, _, _ = op("bn_stats")(y, None, None, 0.1, 1e-3, seed % 2 == 1)
    weight, bias = (torch.randn(shape[1], generator=g, dtype=torch.float64).to(acc) for _ in range(2))
    if y.numel() == 0:
        mean, rstd = torch.zeros_like(mean), torch.ones_like(rstd)
    return Normed(y, mean, rstd, weight if affine else None, bias if affine else None, 1e-3, seed % 2 == 1)


def in_two(x: Normed, residual: Normed, code: int) -> tuple[Tensor, Tensor]:
    """The same by bn_act."""
    added, _ = _bn_act_pair._again("dl4ds_kernels", residual, None, 0, 0.0, False)
    return _bn_act_pair._again("dl4ds_kernels", x, added, code, 0.1, True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{'x'.join(map(str, c[0]))}-{c[1]}-{str(c[2])[6:]}-act{c[3]}")
def test_two_calls_in_one(case: tuple[Any, ...], kernels: None) -> None:
    """Output, mask and all gradients have the bits of bn_act's own; sums that are given replace those that are taken."""
    shape, layout, dtype, code = case
    if layout not in ("nchw", "nhwc") and len(shape) != 4:
        layout = "nchw"
    x, residual = (
        normed(shape, layout, dtype, 1),
        normed(shape, "nhwc" if len(shape) == 4 else "nchw", dtype, 2, shape[1] % 2 == 0),
    )
    out, mask = op("bn_act_pair")(*x[:5], *residual[:5], code, 0.1, True)
    want, bits = in_two(x, residual, code)
    assert torch.equal(out, want) and out.stride() == want.stride() and torch.equal(mask, bits)
    assert op("bn_act_pair")(*x[:5], *residual[:5], code, 0.1, False)[1].numel() == 0
    dout = lay_out(torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype), layout)
    bits = mask if code else None
    found = _bn_act_pair.apply_back("dl4ds_kernels", dout, bits, code, 0.1, x, residual)
    order = suggested_format(x.y)  # the sums are taken of dense maps in the order of x
    rest = (None, bits, True, x.eps, x.eps_std, code, 0.1, True, True, False)
    separate = [
        op("bn_act_bwd")(
            dout, n.y.contiguous(memory_format=order), n.weight, None, n.mean, n.rstd, *rest[:3], *n[5:], *rest[5:]
        )
        for n in (x, residual)
    ]
    (dx, dweight, dbias, _), (dresidual, residual_dweight, other, _) = separate
    assert torch.equal(dbias, other) and torch.equal(found.dbias, dbias)
    assert torch.equal(found.dweight, dweight) and torch.equal(found.residual_dweight, residual_dweight)
    for got, want in ((found.dx, dx), (found.dresidual, dresidual)):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6)
    given = _bn_act_pair.apply_back("dl4ds_kernels", dout, bits, code, 0.1, x, residual, (dweight, dbias))
    assert given.dweight is dweight and torch.equal(given.residual_dweight, residual_dweight)
    torch.testing.assert_close(given.dx, dx, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    assert torch.equal(given.dresidual, found.dresidual)
    known = (dweight, dbias, residual_dweight)
    given = _bn_act_pair.apply_back("dl4ds_kernels", dout, bits, code, 0.1, x, residual, known)
    assert all(a is b for a, b in zip(known, (given.dweight, given.dbias, given.residual_dweight), strict=True))
    for got, want in ((given.dx, dx), (given.dresidual, dresidual)):
        torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_same_bits_for_any_number_of_threads(layout: str, kernels: None) -> None:
    x, residual = (normed((3, 48, 40, 33), layout, torch.float32, seed) for seed in (1, 2))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, mask = op("bn_act_pair")(*x[:5], *residual[:5], 1, 0.1, True)
            found = _bn_act_pair.apply_back("dl4ds_kernels", out, mask, 1, 0.1, x, residual)
            results.append((*op("bn_stats")(x.y, None, None, 0.1, 1e-3, False), out, mask, *found))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_statistics_are_those_of_bn_act(kernels: None) -> None:
    for layout, dtype, std in itertools.product(("nchw", "nhwc", "nchw_hwslice"), DTYPES, (False, True)):
        x = normed((3, 20, 9, 8), layout, dtype, 4).y
        running = torch.randn(20).to(dtype), torch.rand(20).to(dtype)
        want = op("bn_act")(x, None, None, *running, None, True, 0.2, 1e-3, std, 0, 0.0, False)
        got = op("bn_stats")(x, *running, 0.2, 1e-3, std)
        assert all(map(torch.equal, got, (want[1], want[2], want[4], want[5])))


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "transposed"])
def test_opcheck(layout: str, kernels: None) -> None:
    x, residual = normed((2, 12, 6, 5), layout, torch.float32, 1), normed((2, 12, 6, 5), "nchw", torch.float32, 2)
    torch.library.opcheck(op("bn_stats"), (x.y, torch.zeros(12), torch.ones(12), 0.1, 1e-3, False))
    for save in (True, False):
        torch.library.opcheck(op("bn_act_pair"), (*x[:5], *residual[:5], 1, 0.0, save))
    mask = torch.zeros(90, dtype=torch.uint8)
    maps = [(n.y, n.weight, n.mean, n.rstd, n.eps, n.eps_std) for n in (x, residual)]
    for known in ((None,) * 3, (torch.zeros(12), torch.zeros(12), None), (torch.zeros(12),) * 3):
        torch.library.opcheck(op("bn_act_pair_bwd"), (torch.randn(2, 12, 6, 5), mask, 1, 0.0, *maps[0], *maps[1], *known))


def test_errors(kernels: None) -> None:
    """Which argument does not fit is named."""
    x, residual = (normed((2, 12, 6, 5), "nhwc", torch.float32, seed) for seed in (1, 2))
    forward = lambda a, b, code=1: op("bn_act_pair")(*a[:5], *b[:5], code, 0.0, True)  # noqa: E731
    with pytest.raises(RuntimeError, match="bn_act_pair: residual: expected shape"):
        forward(x, residual._replace(y=residual.y[:1]))
    with pytest.raises(RuntimeError, match="bn_act_pair: residual_mean: expected shape"):
        forward(x, residual._replace(mean=residual.mean[:3]))
    with pytest.raises(RuntimeError, match="bn_act_pair: rstd: expected dtype"):
        forward(x._replace(rstd=x.rstd.double()), residual)
    with pytest.raises(RuntimeError, match="bn_act_pair: activation: expected none, relu, leaky_relu or relu6, got silu"):
        forward(x, residual, ACTIVATION_CODES["silu"])
    back = lambda mask, *known: op("bn_act_pair_bwd")(  # noqa: E731
        x.y, mask, 1, 0.0, x.y, None, x.mean, x.rstd, 1e-3, False, residual.y, None, residual.mean, residual.rstd, 1e-3, False,
        *known,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="bn_act_pair_bwd: mask: expected one with an activation"):
        back(None, None, None, None)
    with pytest.raises(RuntimeError, match=r"bn_act_pair_bwd: mask: expected shape \(ceil\(numel / 8\),\) = \(90,\)"):
        back(torch.zeros(3, dtype=torch.uint8), None, None, None)
    for known in ((x.mean, None, None), (None, None, x.mean)):
        with pytest.raises(RuntimeError, match="bn_act_pair_bwd: expected dweight and dbias both given"):
            back(torch.zeros(90, dtype=torch.uint8), *known)
    with pytest.raises(RuntimeError, match="bn_act_pair_bwd: residual_dweight: expected shape"):
        back(torch.zeros(90, dtype=torch.uint8), x.mean, x.mean, x.mean[:3])
