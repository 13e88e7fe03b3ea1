"""local_response_norm in Triton: through autograd in Triton's interpreter, and offline on the PTX simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _assert import compare
from _cases import Case, each
from _offline import run_offline
from test_local_response_norm import PAPER, SETTINGS, SMALL, gradient, problem, three_ways

from dl4ds_kernels._define import TRITON, has_kernel, op, triton_interpreted
from dl4ds_kernels.functional import local_response_norm

pytest.importorskip("triton", reason="the Triton backend needs triton")
interpreted = pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine")
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
TINY = replace(SMALL, shape=(2, 7, 3, 4))


def test_cuda_tensors_have_kernels() -> None:
    assert all(has_kernel(f"local_response_norm{tail}", TRITON, "cuda") for tail in ("", "_bwd"))


@interpreted
@pytest.mark.parametrize("settings", [PAPER, *SETTINGS], ids=str)
@each(
    [replace(TINY, layout=n, dtype=d) for n, d in (("nchw", torch.float32), ("nhwc", torch.float16), ("nhwc", torch.float64))]
)
def test_interpreter(case: Case, settings: tuple[Any, ...]) -> None:
    compare(*three_ways(case, "triton", *settings), "triton")


@interpreted
@each(
    [replace(TINY, layout=n) for n in ("nhwc_cslice", "nchw_hwslice", "transposed", "nslice", "expanded")]
    + [replace(TINY, shape=s) for s in ((0, 3, 4, 5), (2, 6, 9), (2, 6, 2, 3, 4), (3, 9, 1, 1))]
)
def test_layouts(case: Case) -> None:
    compare(*three_ways(case, "triton"), "triton")
    x = problem(case)["x"]
    assert local_response_norm(x, *PAPER, backend="triton").stride() == local_response_norm(x, *PAPER, backend="cpu").stride()


@interpreted
@each([replace(TINY, layout=n) for n in ("nchw", "nhwc", "nhwc_cslice")])
def test_opcheck(case: Case) -> None:
    x = problem(case)["x"]
    torch.library.opcheck(op("local_response_norm", TRITON), (x.clone().requires_grad_(), *PAPER))
    torch.library.opcheck(op("local_response_norm_bwd", TRITON), (gradient(case), x, *PAPER))


@pytest.mark.slow
def test_kernels_for_gpus() -> None:
    """Compiled for four architectures and run on the simulator (_local_response_norm_triton_offline.py)."""
    run_offline("_local_response_norm_triton_offline.py")
