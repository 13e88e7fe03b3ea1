"""max_pool_indices in Triton: through autograd in Triton's interpreter, and offline on the PTX simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _cases import Case, each
from _offline import run_offline
from test_max_pool_indices import SMALL, maps

from dl4ds_kernels._define import TRITON, has_kernel, op, triton_interpreted
from dl4ds_kernels.functional import max_pool_indices, max_unpool

pytest.importorskip("triton", reason="the Triton backend needs triton")
interpreted = pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine")
TINY = replace(SMALL, shape=(2, 5, 4, 6))
LAYOUTS = ("nchw", "nhwc", "nhwc_cslice", "nhwc_hwslice", "nchw_hwslice", "nslice", "offset", "transposed")


def test_cuda_tensors_have_kernels() -> None:
    assert all(has_kernel(name + tail, TRITON, "cuda") for name in ("max_pool_indices", "max_unpool") for tail in ("", "_bwd"))


@interpreted
@each(
    [replace(TINY, layout=layout) for layout in LAYOUTS]
    + [replace(TINY, dtype=d, layout=n) for d in (torch.float16, torch.bfloat16, torch.float64) for n in ("nchw", "nhwc")]
    + [replace(TINY, shape=shape) for shape in ((0, 3, 4, 6), (3, 5, 2, 2))]
)
def test_interpreter(case: Case) -> None:
    """The values, places and gradients of the CPU's kernels, bit for bit, and their strides."""
    results = []
    for backend in ("triton", "cpu"):
        x = maps(case).requires_grad_()
        out, where = max_pool_indices(x, backend=backend)
        back = max_unpool(out * 2, where, backend=backend)
        weights = torch.randn(x.shape, generator=case.generator()).to(x.dtype)
        (dx,) = torch.autograd.grad(back, x, weights)
        results.append((out, where, back, dx))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()


@interpreted
def test_gradcheck() -> None:
    x = maps(replace(TINY, shape=(1, 2, 4, 4), dtype=torch.float64))
    x += torch.arange(x.numel(), dtype=x.dtype).view_as(x) * 1e-3  # no ties: there the function has no derivative
    torch.autograd.gradcheck(lambda v: max_pool_indices(v, backend="triton")[0], x.requires_grad_())
    where = max_pool_indices(x.detach())[1]
    y = torch.randn(where.shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: max_unpool(v, where, backend="triton"), y)


@interpreted
@each([replace(TINY, layout=n) for n in ("nchw", "nhwc", "nhwc_cslice", "transposed")])
def test_opcheck(case: Case) -> None:
    x = maps(case)
    out, where = op("max_pool_indices", TRITON)(x)
    torch.library.opcheck(op("max_pool_indices", TRITON), (x.requires_grad_(),))
    torch.library.opcheck(op("max_unpool", TRITON), (out.detach().requires_grad_(), where))
    torch.library.opcheck(op("max_pool_indices_bwd", TRITON), (out.detach(), where))
    torch.library.opcheck(op("max_unpool_bwd", TRITON), (x.detach(), where))


@interpreted
def test_errors() -> None:
    x, ops = torch.zeros(2, 3, 4, 6), torch.ops.dl4ds_kernels_triton
    for call, message in (
        (lambda: ops.max_pool_indices(x[..., :5]), "max_pool_indices: x: expected an even height and width, got (2, 3, 4, 5)"),
        (lambda: ops.max_unpool(x, x), "max_unpool: where: expected dtype torch.uint8, got torch.float32"),
        (lambda: ops.max_unpool(x, x[:1].byte()), "max_unpool: where: expected shape (2, 3, 4, 6), got (1, 3, 4, 6)"),
        (lambda: ops.max_unpool_bwd(x, x.byte()), "max_unpool_bwd: where: expected shape (2, 3, 2, 3), got (2, 3, 4, 6)"),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.slow
def test_kernels_for_gpus() -> None:
    """Compiled for four architectures and run on the simulator (_max_pool_indices_triton_offline.py)."""
    run_offline("_max_pool_indices_triton_offline.py")
