"""conv_bn_act_dgrad_bwd and its route on CUDA: the host functions over the PTX simulator.

The schedule that calls them: test_conv_dgrad_schedule_cuda.py; the kernel's numbers: test_conv_dgrad_cuda.py.
"""

from __future__ import annotations

import pytest
import torch
from _cuda_conv import channels_last, require_fused_conv
from _cuda_host import host
from torch import Tensor

from dl4ds_kernels import _cuda_conv
from dl4ds_kernels.ops import _conv_dgrad
from dl4ds_kernels.ops._conv_dgrad import Added, Site

HALF = torch.float16


@pytest.fixture(autouse=True, scope="module")
def _toolchain() -> None:
    require_fused_conv()


def operands(dtype: torch.dtype, residual: bool | str) -> tuple[Tensor, Tensor, Site, Added]:
    """dy, weight, the BatchNorm in front (with a residual, or with another BatchNorm's output: "two"), and another gradient."""
    torch.manual_seed(7)
    dy, weight = channels_last(torch.randn(2, 24, 9, 8).to(dtype)), channels_last((torch.randn(24, 40, 3, 3) / 15).to(dtype))
    y, other = (channels_last(torch.randn(2, 40, 9, 8).to(dtype)) for _ in range(2))
    bits = lambda: torch.randint(0, 256, (y.numel() // 8,), dtype=torch.uint8)  # noqa: E731
    vectors = torch.randn(40), torch.randn(40), torch.randn(40) / 4, torch.rand(40) + 0.5
    site = Site(y, *vectors, bits() if residual else None, 1e-3, False, 1, 0.1)
    if residual == "two":
        second = channels_last(torch.randn(2, 40, 9, 8).to(dtype))
        site = site._replace(other_y=second, other_mean=torch.randn(40) / 4, other_rstd=torch.rand(40) + 0.5)
    return dy, weight, site, Added(other, bits(), 1, 0.1)


@pytest.mark.parametrize("residual", [False, True, "two"])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_host_functions(dtype: torch.dtype, residual: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient, table and elementwise pass: as bn_act's (bn_act_pair's) own gradient of the very dx that the convolution
    stored.
    """
    monkeypatch.setattr(_conv_dgrad, "op", lambda name, namespace: lambda *args: host()(name, *args))
    dy, weight, site, added = operands(dtype, residual)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    dx, sums = _conv_dgrad.dgrad("dl4ds_kernels", dy, weight, (9, 8), geometry, added, site)
    want = torch.nn.grad.conv2d_input(site.y.shape, weight.double(), dy.double(), 1, 1)
    kept = torch.stack([(added.mask >> k) & 1 for k in range(8)], 1).flatten().view(2, 9, 8, 40).permute(0, 3, 1, 2).bool()
    want = want + torch.where(kept, added.gradient.double(), 0.0)
    torch.testing.assert_close(dx.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)
    again, same = _conv_dgrad.dgrad("dl4ds_kernels", dy, weight, (9, 8), geometry, added, site)
    assert torch.equal(again, dx) and all(map(torch.equal, same, sums))
    if residual == "two":
        both = [(site.y, site.weight, site.mean, site.rstd), (site.other_y, None, site.other_mean, site.other_rstd)]
        maps = [v for four in both for v in (*four, 1e-3, False)]
        *want, dweight, dbias, other = host()("bn_act_pair_bwd", dx, site.mask, 1, 0.1, *maps, None, None, None)
        for a, b in zip(sums[1:], (dweight, dbias, other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        *found, no_dweight, no_dbias, no_other = host()("bn_act_pair_bwd", dx, site.mask, 1, 0.1, *maps, *sums[1:])
        assert not any(t.numel() for t in (sums[0], no_dweight, no_dbias, no_other))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps * 2, atol=1e-5)
        return
    vectors = site.weight, site.bias, site.mean, site.rstd
    rest = True, site.eps, False, 1, 0.1, True, True, residual
    dy_want, dweight, dbias, dres = host()("bn_act_bwd", dx, site.y, *vectors, None, site.mask, *rest)
    torch.testing.assert_close(sums[1], dweight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[2], dbias, rtol=1e-5, atol=1e-4)
    dy_got, dres_got = _conv_dgrad.apply("dl4ds_kernels", dx, sums[0], site, residual)
    torch.testing.assert_close(dy_got, dy_want, rtol=torch.finfo(dtype).eps * 2, atol=1e-5)
    assert torch.equal(dres_got, dres)


def test_errors() -> None:
    """Calls that do not fit say which argument; a layer that the kernel cannot serve is named."""
    dy, weight, site, added = operands(HALF, False)
    call = lambda dy, weight, added, site: host()(  # noqa: E731
        "conv_bn_act_dgrad_bwd", dy, weight, [9, 8], [1, 1], [1, 1], *added, *site
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="added: expected shape"):
        call(dy, weight, added._replace(gradient=added.gradient[:1]), site)
    with pytest.raises(RuntimeError, match="weight: expected dtype"):
        call(dy, weight.float(), added, site)
    with pytest.raises(RuntimeError, match=r"not served \(reason 14"):
        call(dy, weight, added, site._replace(activation=4))
    _, _, two, _ = operands(HALF, "two")
    with pytest.raises(RuntimeError, match=r"not served \(reason 14"):
        call(dy, weight, added, two._replace(mask=None))
    with pytest.raises(RuntimeError, match="other_y: expected shape"):
        call(dy, weight, added, two._replace(other_y=two.other_y[:1]))
    with pytest.raises(RuntimeError, match="expected y, other_mean and other_rstd with other_y"):
        call(dy, weight, added, two._replace(other_rstd=None))
    with pytest.raises(RuntimeError, match="other_mean: expected dtype"):
        call(dy, weight, added, two._replace(other_mean=two.other_mean.double()))
    with pytest.raises(RuntimeError, match="sums: expected those of 0, 1 or 2 BatchNorms, got 3"):
        host()("conv_bn_act_dgrad_route", site.y, weight, [1, 1], [1, 1], [1, 1], 1, 0, False, 3, 1)
    with pytest.raises(RuntimeError, match="dout: expected shape"):
        call(dy[:, :16], weight, added, site)
    with pytest.raises(RuntimeError, match="table: expected shape"):
        host()("bn_act_apply_bwd", site.y, torch.zeros(4), site.y, None, 1, 0.1, False)


def test_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """1x1 layers with something to save take the kernel; without it, with a stride or deep 3x3 filters the library does."""
    last = lambda *shape: torch.empty(shape, dtype=HALF, memory_format=torch.channels_last)  # noqa: E731

    def reason(x: Tensor, weight: Tensor, added: int, sums: int, stride: int = 1, activation: int = 1) -> int:
        padding = [weight.shape[2] // 2] * 2
        return host()("conv_bn_act_dgrad_route", x, weight, [stride] * 2, padding, [1, 1], 1, added, False, sums, activation)[0]

    x, weight = last(64, 256, 56, 56), last(64, 256, 1, 1)
    assert reason(x, weight, 1, True) == 0 and reason(x, weight, 2, True) == 0 and reason(x, weight, 0, True) == 0
    assert reason(x, weight, 1, 2) == 0
    words = _cuda_conv.REASONS
    assert "no faster" in words[reason(x, weight, 0, False)]
    assert "stride" in words[reason(x, weight, 1, True, stride=2)]
    assert "no faster" in words[reason(last(64, 512, 14, 14), last(512, 512, 3, 3), 0, True)]
    assert "argument" in words[reason(x, weight, 0, True, activation=4)]
    assert "channels_last" in words[reason(x.contiguous(), weight, 1, True)]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "library")
    assert "asked for" in words[reason(x, weight, 1, True)]
    monkeypatch.setenv("DL4DS_CUDA_CONV", "fused")
    assert reason(last(64, 512, 14, 14), last(512, 512, 3, 3), 0, True) == 0
