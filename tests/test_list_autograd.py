"""The Autograd kernel of ops with lists of tensors: the gradients of torch.library.register_autograd's, and what is kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dl4ds_kernels._define import defined_ops, op
from dl4ds_kernels._list_autograd import autograd_kernel, has_tensor_lists

SCHEMA = "(Tensor x, Tensor[] weights, float scale, Tensor? bias, int[] code) -> (Tensor out, Tensor[] parts, Tensor count)"
seen: list[Any] = []


def forward(x: Tensor, weights: list[Tensor], scale: float, bias: Tensor | None, code: list[int]) -> Any:
    parts = [x * w for w in weights]
    out = sum(parts, torch.zeros_like(x)) * scale
    return out if bias is None else out + bias, parts, torch.tensor(len(weights))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, ctx.scale, bias, code = inputs
    assert code == [3, 4] and [p.shape for p in output[1]] == [w.shape for w in weights]
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, *weights)


def backward(ctx: Any, dout: Tensor | None, dparts: list[Tensor | None], dcount: None) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    seen.append((ctx.needs_input_grad, [part is not None for part in dparts]))
    zero = torch.zeros_like(x)
    down = [(zero if dout is None else dout * ctx.scale) + (zero if part is None else part) for part in dparts]
    dx = sum((d * w for d, w in zip(down, weights, strict=True)), zero)
    return dx, [d * x for d in down], None, dout if ctx.has_bias else None, None


@pytest.fixture(scope="module")
def ops() -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    library = torch.library.Library("dl4ds_list_autograd", "DEF")
    for name in ("ours", "theirs"):
        library.define(name + SCHEMA)
        library.impl(name, forward, "CPU")
    found = torch.ops.dl4ds_list_autograd
    torch.library.register_autograd("dl4ds_list_autograd::theirs", backward, setup_context=setup_context, lib=library)
    library.impl("ours", autograd_kernel(found.ours.default, setup_context, backward), "Autograd", with_keyset=True)
    yield found.ours.default, found.theirs.default
    library._destroy()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("use", ["out", "parts", "both"])
@pytest.mark.parametrize("frozen", ["", "x", "weight"])
def test_gradients(frozen: str, use: str, count: int, bias: bool, ops: Any) -> None:
    found = []
    for function in ops:
        g = torch.Generator().manual_seed(0)
        x, *weights, b = (torch.randn(3, 4, generator=g).requires_grad_() for _ in range(count + 2))
        x.requires_grad_(frozen != "x")
        for w in weights[:1]:
            w.requires_grad_(frozen != "weight")
        out, parts, number = function(x, weights, 2.0, b if bias else None, [3, 4])
        assert type(parts) is list and len(parts) == count == int(number) and not number.requires_grad
        used = [out] * (use != "parts") + parts[: 1 if use == "parts" else count] * (use != "out")
        leaves = [t for t in (x, *weights, b) if t.requires_grad]
        total = sum((t.sum() for t in used), torch.zeros(()))
        if not total.requires_grad:
            pytest.skip("nothing to differentiate")
        seen.clear()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        found.append((out, grads, list(seen)))
    (out, ours, asked), (expected, theirs, wanted) = found
    assert torch.equal(out, expected) and asked == wanted
    assert all(torch.equal(a, b) if a is not None else b is None for a, b in zip(ours, theirs, strict=True))


def test_nothing_but_what_is_saved_stays(ops: Any) -> None:
    x, bias = torch.randn(3).requires_grad_(), torch.randn(3)
    gone = weakref.ref(bias)
    out = ops[0](x, [torch.ones(3)], 1.0, bias, [3, 4])[0]
    del bias
    gc.collect()
    assert gone() is None and out.requires_grad


def test_without_gradients(ops: Any) -> None:
    x = torch.randn(3).requires_grad_()
    with torch.no_grad():
        assert not ops[0](x, [x], 1.0, None, [3, 4])[0].requires_grad
    assert not ops[0](x.detach(), [x.detach()], 1.0, None, [3, 4])[0].requires_grad


def test_whose_ops_have_lists() -> None:
    lists = {name for name in defined_ops() if has_tensor_lists(op(name))}
    assert {"residual_block", "dense_block", "conv2d_step_bwd"} <= lists and not {"bn_act", "conv2d_step", "nms"} & lists
