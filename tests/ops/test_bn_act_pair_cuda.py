"""bn_act_pair, bn_stats and conv_bn_stats on CUDA: the host functions over the PTX simulator, against the CPU's.

The launchers' numbers, traffic and schedules are gates (tests/ptxsim/gates/workload_bn_act_pair.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cases import lay_out
from _cuda_conv import require_fused_conv
from _cuda_host import host
from conftest import skip_unless_loaded
from torch import Tensor

from dl4ds_kernels._define import op
from dl4ds_kernels.ops import _bn_act_pair, _conv_bn_act_train
from dl4ds_kernels.ops._bn_act_pair import Normed

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()
    skip_unless_loaded("cpu")


def normed(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int, vectors: torch.dtype) -> Normed:
    g = torch.Generator().manual_seed(seed)
    y = lay_out(torch.randn(shape, generator=g).mul_(2).add_(1).to(dtype), layout)
    mean, rstd, _, _ = op("bn_stats")(y, None, None, 0.1, 1e-3, seed == 2)
    weight, bias = (torch.randn(shape[1], generator=g).to(vectors) for _ in range(2))
    return Normed(y, mean, rstd, weight, bias if seed == 1 else None, 1e-3, seed == 2)


def close(got: Any, want: Any, dtype: torch.dtype) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and (a.stride() == b.stride() or a.numel() < 2)
        if a.dtype == torch.uint8:
            assert int((a != b).sum()) <= 1  # a value at the kink
        else:
            limit = TOLERANCE[dtype] * max(1.0, float(b.double().abs().max()))
            torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=limit)


CASES = [
    ((2, 16, 6, 5), "nhwc", torch.float16), ((2, 24, 5, 7), "nchw", torch.bfloat16), ((3, 5, 9), "nchw", torch.float16),
    ((2, 7, 3, 5), "nchw_hwslice", torch.float16), ((2, 8, 3, 4, 5), "transposed", torch.float32),
    ((3, 12, 4, 4), "nhwc_cslice", torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("code", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{'x'.join(map(str, c[0]))}-{c[1]}-{str(c[2])[6:]}")
def test_against_cpu(case: tuple[Any, ...], code: int) -> None:
    """Statistics, output, mask and gradients, with sums that are taken and with sums that are given."""
    shape, layout, dtype = case
    x = normed(shape, layout, dtype, 1, dtype if code else torch.float32)
    residual = normed(shape, "nhwc" if len(shape) == 4 else layout, dtype, 2, torch.float32)
    running = torch.randn(shape[1]), torch.rand(shape[1])
    close(host()("bn_stats", x.y, *running, 0.2, 1e-3, True), op("bn_stats")(x.y, *running, 0.2, 1e-3, True), torch.float32)
    args = (*x[:5], *residual[:5], code, 0.1, True)
    want = op("bn_act_pair")(*args)
    close(host()("bn_act_pair", *args), want, dtype)
    dout = lay_out(torch.randn(shape).to(dtype), layout)
    maps = [v for n in (x, residual) for v in (n.y, n.weight, n.mean, n.rstd, n.eps, n.eps_std)]
    args = (dout, want[1] if code else None, code, 0.1, *maps)
    gradients = op("bn_act_pair_bwd")(*args, None, None, None)
    found = host()("bn_act_pair_bwd", *args, None, None, None)
    close(found, gradients, dtype)
    known = host()("bn_act_pair_bwd", *args, *found[2:4], None)
    assert known[2].numel() == 0
    # The kernel that sums for both BatchNorms adds in the order of the one that then sums for the residual alone.
    assert all(torch.equal(known[i], found[i]) for i in (0, 1, 3, 4))
    known = host()("bn_act_pair_bwd", *args, *found[2:])
    assert all(torch.equal(known[i], found[i]) for i in (0, 1)) and not any(t.numel() for t in known[2:])


def test_errors() -> None:
    """What the kernels do not serve they refuse by name: the schedule asks fits() first."""
    x = normed((2, 6, 4, 4), "nhwc", torch.float16, 1, torch.float32)
    with pytest.raises(RuntimeError, match="bn_act_pair: x: expected fp32, fp16 or bf16 and rows of whole 16-byte vectors"):
        host()("bn_act_pair", *x[:5], *x[:5], 1, 0.0, True)
    x = normed((2, 16, 4, 4), "nhwc", torch.float16, 1, torch.float32)
    with pytest.raises(RuntimeError, match="bn_act_pair: residual_mean: expected dtype"):
        host()("bn_act_pair", *x[:5], *x._replace(mean=x.mean.double())[:5], 1, 0.0, True)
    with pytest.raises(RuntimeError, match="bn_act_pair: activation: expected none, relu, leaky_relu or relu6, got silu"):
        host()("bn_act_pair", *x[:5], *x[:5], 4, 0.0, True)
    with pytest.raises(RuntimeError, match="bn_act_pair_bwd: mask: expected one with an activation"):
        maps = (x.y, None, x.mean, x.rstd, 1e-3, False)
        host()("bn_act_pair_bwd", x.y, None, 1, 0.0, *maps, *maps, None, None, None)
    with pytest.raises(RuntimeError, match="bn_act_pair_bwd: expected dweight and dbias both given"):
        host()("bn_act_pair_bwd", x.y, None, 0, 0.0, *maps, *maps, None, None, x.mean)


@pytest.mark.parametrize("wish", ["fused", "library"])
def test_convolution_with_statistics(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As conv_bn_act_train has them, whichever way the convolution goes."""
    monkeypatch.setenv("DL4DS_CUDA_CONV", wish)
    last = torch.channels_last
    x, weight = torch.randn(2, 16, 9, 8).half().to(memory_format=last), (torch.randn(24, 16, 1, 1) / 4).half()
    running, geometry = (torch.randn(24), torch.rand(24)), ([2, 2], [0, 0], [1, 1], 1)
    y, *statistics = host()("conv_bn_stats", x, weight, None, *running, *geometry, 0.2, 1e-3, False)
    found = host()("conv_bn_act_train", x, weight, None, *running, None, None, None, *geometry, 0.2, 1e-3, False, 1, 0.0, False)
    _, want, mean, rstd, _, *new = found
    assert all(map(torch.equal, (y, *statistics), (want, mean, rstd, *new)))


def test_where_the_kernels_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of bn_act with the statistics that are known, and two of its gradient: the same results."""
    x, residual = (normed((2, 6, 5, 4), "nhwc", torch.float32, seed, torch.float32) for seed in (1, 2))
    run: list[tuple[Tensor, ...]] = []
    for fits in (True, False):
        monkeypatch.setattr(_bn_act_pair, "fits", lambda y, fits=fits: fits)
        out, mask = _bn_act_pair.apply("dl4ds_kernels", x, residual, 1, 0.1, True)
        run.append((out, mask, *_bn_act_pair.apply_back("dl4ds_kernels", out, mask, 1, 0.1, x, residual)))
    for a, b in zip(*run, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_who_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of channels or of planes on CUDA; no kernel for silu; the convolution's statistics where it has an epilogue."""

    class Map:
        def __init__(self, *shape: int, last: bool) -> None:
            self.t = torch.empty(
                shape, dtype=torch.float16, memory_format=torch.channels_last if last else torch.contiguous_format
            )
            self.is_cuda, self.shape = True, self.t.shape
            self.element_size = self.t.element_size

    monkeypatch.setattr(_bn_act_pair, "suggested_format", lambda y: torch._prims_common.suggest_memory_format(y.t))
    assert _bn_act_pair.fits(Map(2, 24, 3, 3, last=True)) and not _bn_act_pair.fits(Map(2, 20, 3, 3, last=True))
    assert _bn_act_pair.fits(Map(2, 20, 3, 3, last=False)) and not _bn_act_pair.fits(Map(2, 24, 2, 3, last=False))
    x = torch.empty(1, 8, 2, 2)
    assert _bn_act_pair.wanted("dl4ds_kernels", x, 1) and not _bn_act_pair.wanted("dl4ds_kernels", x, 4)
    assert not _bn_act_pair.wanted("dl4ds_kernels_triton", x, 1)
    monkeypatch.setattr(_conv_bn_act_train, "has_train", lambda namespace, x: True)
    monkeypatch.setattr(_bn_act_pair, "op", lambda name, namespace: lambda *args: name)
    assert (
        _bn_act_pair.convolve_and_sum("dl4ds_kernels", x, x, None, None, None, ((1, 1),), 0.1, 1e-5, False) == "conv_bn_stats"
    )
