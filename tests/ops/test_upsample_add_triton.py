"""upsample_add in Triton: through autograd in Triton's interpreter, and offline on the PTX simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _assert import compare
from _cases import Case, each
from _offline import run_offline
from test_upsample_add import PAIRS, SMALL, WRT, gradient, problem, three_ways

from dl4ds_kernels._define import TRITON, has_kernel, op, triton_interpreted
from dl4ds_kernels.functional import upsample_add

pytest.importorskip("triton", reason="the Triton backend needs triton")
interpreted = pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine")
TINY = replace(SMALL, shape=(2, 5, 3, 4))


def test_cuda_tensors_have_a_kernel() -> None:
    assert has_kernel("upsample_add", TRITON, "cuda") and has_kernel("upsample_add_bwd", TRITON, "cuda")


@interpreted
@each(
    [replace(TINY, layout=a, residual=b) for a, b in PAIRS]
    + [replace(TINY, dtype=d, layout=n, residual=n) for d in (torch.float16, torch.float64) for n in ("nchw", "nhwc")]
    + [replace(TINY, shape=shape) for shape in ((0, 3, 4, 5), (1, 1, 1, 1))]
)
def test_interpreter(case: Case) -> None:
    """Values, gradients and strides."""
    compare(*three_ways(case, "triton", WRT), "triton")
    t = problem(case)
    out = upsample_add(t["low"], t["skip"], backend="triton")
    assert out.stride() == upsample_add(t["low"], t["skip"], backend="cpu").stride()


@interpreted
@each([replace(TINY, layout=a, residual=b) for a, b in PAIRS[:4]])
def test_opcheck(case: Case) -> None:
    t = problem(case)
    torch.library.opcheck(op("upsample_add", TRITON), tuple(v.requires_grad_() for v in t.values()))
    torch.library.opcheck(op("upsample_add_bwd", TRITON), (gradient(case),))


@interpreted
def test_gradcheck() -> None:
    t = problem(replace(TINY, dtype=torch.float64, shape=(1, 2, 2, 3)))
    leaves = [v.requires_grad_() for v in t.values()]
    torch.autograd.gradcheck(lambda low, skip: upsample_add(low, skip, backend="triton"), leaves)


@interpreted
def test_errors() -> None:
    x, ops = torch.zeros(2, 3, 4, 5), torch.ops.dl4ds_kernels_triton
    with pytest.raises(RuntimeError, match=r"upsample_add: skip: expected shape \(2, 3, 8, 10\), got \(2, 3, 4, 5\)"):
        ops.upsample_add(x, x)
    with pytest.raises(RuntimeError, match="upsample_add: skip: expected dtype torch.float32, got torch.float64"):
        ops.upsample_add(x, torch.zeros(2, 3, 8, 10).double())
    with pytest.raises(RuntimeError, match="upsample_add_bwd: dout: expected an even height and width"):
        ops.upsample_add_bwd(x)


@pytest.mark.slow
def test_kernels_for_gpus() -> None:
    """Compiled for four architectures and run on the simulator (_upsample_add_triton_offline.py)."""
    run_offline("_upsample_add_triton_offline.py")
