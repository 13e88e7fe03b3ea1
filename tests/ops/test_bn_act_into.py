"""bn_act on and into channel slices of larger buffers: inputs without a copy, outputs where they belong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from _assert import copies_made, no_worse_than_torch
from _cases import ACTIVATIONS, BASE, DTYPES, Case, bn_vectors, each, images
from _offline import run_offline
from conftest import device_of
from torch import Tensor

from dl4ds_kernels._activation import ACTIVATION_CODES, apply_activation
from dl4ds_kernels._define import TRITON, has_kernel, op, triton_interpreted

EPS, SLOPE, GUARD = 1e-3, 0.1, 7.0
SMALL = replace(BASE, shape=(2, 13, 5, 7), training=False)
CASES = (
    [replace(SMALL, layout=n) for n in ("nhwc", "nhwc_cslice", "nchw", "nhwc_hwslice")]
    + [replace(SMALL, dtype=d, layout="nhwc_cslice", eps_mode=m) for d in DTYPES for m in ("var", "std")]
    + [replace(SMALL, activation=a, layout="nhwc") for a in ACTIVATIONS]
    + [replace(SMALL, shape=(2, c, 3, 4), layout="nhwc_cslice") for c in (1, 3, 8, 16, 17, 33, 96)]
    + [replace(SMALL, shape=s) for s in ((3, 5, 19), (2, 3, 2, 3, 4), (17, 6), (2, 7, 1, 1), (0, 3, 4, 5))]
    + [replace(SMALL, affine=a, layout="nhwc") for a in ("", "weight", "bias")]
    + [replace(SMALL, shape=(2, 64, 28, 28), layout="nhwc")]
)


def slice_of_buffer(x: Tensor, before: int = 3, after: int = 2) -> tuple[Tensor, Tensor]:
    """A buffer (N, before + C + after, …) in channels_last order full of GUARD, and its channels in the middle."""
    n, c, *spatial = x.shape
    buffer = torch.full((n, *spatial, before + c + after), GUARD, dtype=x.dtype, device=x.device).movedim(-1, 1)
    return buffer, buffer[:, before : before + c]


def stock(case: Case, x: Tensor, v: dict[str, Any]) -> Tensor:
    per_channel = (1, -1, *(1,) * (x.dim() - 2))
    if case.eps_mode == "std":
        mean, var, weight, bias = (v[n].view(per_channel) for n in ("running_mean", "running_var", "weight", "bias"))
        y = (x - mean) / (var.sqrt() + EPS) * weight + bias
    else:
        y = TF.batch_norm(x, v["running_mean"], v["running_var"], v["weight"], v["bias"], False, 0.0, EPS)
    return apply_activation(y, ACTIVATION_CODES[case.activation], SLOPE)


def run_into(case: Case, namespace: str, x: Tensor, v: dict[str, Any], out: Tensor) -> None:
    vectors = (v["weight"], v["bias"], v["running_mean"], v["running_var"])
    op("bn_act_into", namespace)(x, *vectors, out, EPS, case.eps_mode == "std", ACTIVATION_CODES[case.activation], SLOPE)


def check(case: Case, namespace: str, device: str) -> None:
    x = images(case, case.generator(), case.layout)
    v = bn_vectors(case, x)
    truth, want = stock(case, x.double(), {k: t if t is None else t.double() for k, t in v.items()}), stock(case, x, v)
    buffer, out = slice_of_buffer(x.to(device))
    run_into(case, namespace, x.to(device), {k: t if t is None else t.to(device) for k, t in v.items()}, out)
    no_worse_than_torch(out.cpu(), want, truth)
    untouched = torch.cat((buffer[:, :3], buffer[:, 3 + x.shape[1] :]), 1)
    assert (untouched == GUARD).all(), "wrote beside its slice"


@each(CASES)
def test_into_a_slice(case: Case, kernels: None) -> None:
    check(case, "dl4ds_kernels", "cpu")


@pytest.mark.skipif(not triton_interpreted(), reason="Triton compiles for the GPU of this machine")
@each([c for c in CASES if c.dtype != torch.bfloat16 and c.shape[1] < 64])
def test_interpreter(case: Case) -> None:
    check(case, TRITON, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    for case in CASES:
        check(case, TRITON, device_of("triton"))


@pytest.mark.parametrize("namespace", ["dl4ds_kernels", TRITON])
def test_no_copies(namespace: str, kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices are read and written in place; the contiguous result of bn_act on a slice needs no copy either."""
    if namespace == TRITON:
        from dl4ds_kernels._triton import _common

        if not triton_interpreted():
            pytest.skip("Triton compiles for the GPU of this machine")
        monkeypatch.setattr(_common, "launch", lambda *_, **__: None)  # the interpreter makes copies of its own
    case = replace(SMALL, layout="nhwc_cslice")
    x = images(case, case.generator(), case.layout)
    v, (_, out) = bn_vectors(case, x), slice_of_buffer(x)
    assert copies_made(lambda: run_into(case, namespace, x, v, out)) == []
    vectors = (v["weight"], v["bias"], v["running_mean"], v["running_var"])
    assert copies_made(lambda: op("bn_act", namespace)(x, *vectors, None, False, 0.1, EPS, False, 1, SLOPE, False)) == []


@pytest.mark.parametrize("namespace", ["dl4ds_kernels", TRITON])
def test_opcheck(namespace: str, kernels: None) -> None:
    if namespace == TRITON and not triton_interpreted():
        pytest.skip("Triton compiles for the GPU of this machine")
    for layout in ("nchw", "nhwc", "nhwc_cslice"):
        x = images(replace(SMALL, layout=layout), SMALL.generator(), layout)
        v, (_, out) = bn_vectors(SMALL, x), slice_of_buffer(x)
        vectors = (v["weight"], v["bias"], v["running_mean"], v["running_var"])
        torch.library.opcheck(op("bn_act_into", namespace), (x, *vectors, out, EPS, False, 1, SLOPE))


def test_same_bits_with_any_number_of_threads(kernels: None) -> None:
    case = replace(SMALL, shape=(2, 40, 64, 63), layout="nhwc")
    x = images(case, case.generator(), case.layout)
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        buffer, out = slice_of_buffer(x)
        run_into(case, "dl4ds_kernels", x, bn_vectors(case, x), out)
        outs.append(buffer)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("namespace", ["dl4ds_kernels", TRITON])
def test_errors(namespace: str, kernels: None) -> None:
    if namespace == TRITON and not triton_interpreted():
        pytest.skip("Triton compiles for the GPU of this machine")
    x, vector = torch.ones(2, 3, 4, 5), torch.ones(3)
    for out, message in (
        (torch.ones(2, 3, 4, 5), "out: expected channels_last, or a slice of its channels"),
        (torch.ones(2, 3, 4, 4), r"out: expected shape \(2, 3, 4, 5\), got \(2, 3, 4, 4\)"),
        (x.double(), "out: expected dtype (torch.)?float32, got (torch.)?float64"),
        (torch.ones(2, 1, 4, 5).to(memory_format=torch.channels_last).expand(2, 3, 4, 5), "out: expected channels_last"),
    ):
        with pytest.raises(RuntimeError, match=f"bn_act_into: {message}"):
            op("bn_act_into", namespace)(x, None, None, vector, vector, out, EPS, False, 1, 0.0)


def test_cuda_tensors_have_a_kernel() -> None:
    assert has_kernel("bn_act_into", TRITON, "cuda")


@pytest.mark.slow
def test_kernels_for_gpus() -> None:
    """Compiled for four architectures and run on the simulator (_bn_act_into_triton_offline.py)."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    run_offline("_bn_act_into_triton_offline.py")
