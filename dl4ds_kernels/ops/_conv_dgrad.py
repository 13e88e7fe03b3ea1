"""Contract of ``conv_bn_act_dgrad_bwd`` and ``bn_act_apply_bwd``, and how a backward pass schedules them.

In a backward pass the input's gradient of a convolution is followed by reads of it: another gradient of the same tensor is
added, and the BatchNorm that made the tensor (or the two that were added) sums over it. On CUDA the convolution's epilogue
(csrc/ops/conv_bn_act/conv_bn_act_dgrad*) does both while the gradient is in registers. There is no CPU or Triton kernel:
:func:`dgrad` is asked only where :func:`serves` says yes: for stride-1 convolutions where the model expects a gain.

The BatchNorm may belong to another node of the autograd graph: :func:`site_of` finds it through the graph, :func:`hand_over`
leaves the sums with it, and :func:`known_sums` takes them if the gradient that arrives is the very tensor that they are of.
What flows between nodes is the true gradient, so hooks and second consumers see what they would see without any of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._activation import MASK_CODES
from .._define import define_op, has_kernel, op
from ._layout import suggested_format


class Site(NamedTuple):
    """A BatchNorm in training and what comes behind it: ``act(bn(y) [+ residual])``; mask: where there is a residual.

    other_y, other_mean, other_rstd: the residual is another BatchNorm's output, and its sums are wanted too.
    """

    y: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    mask: Tensor | None
    eps: float
    eps_std: bool
    activation: int
    negative_slope: float
    other_y: Tensor | None = None
    other_mean: Tensor | None = None
    other_rstd: Tensor | None = None


class Added(NamedTuple):
    """A gradient to add. mask: it is taken through an activation by its bits; step: it holds every step-th row and column."""

    gradient: Tensor
    mask: Tensor | None = None
    activation: int = 0
    negative_slope: float = 0.0
    step: int = 1


Sums = tuple[Tensor, ...]  # the elementwise pass's table, dweight, dbias; of two BatchNorms no table, and dweight of the other


def has_dgrad(namespace: str, x: Tensor) -> bool:
    """Whether the op has a kernel for x (fp64 has none)."""
    return x.is_cuda and x.dtype != torch.float64 and has_kernel("conv_bn_act_dgrad_bwd", namespace, "cuda")


def serves(
    namespace: str, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], step: int = 0, site: Site | None = None,
    masked: bool = False,
) -> bool:  # fmt: skip
    """Whether :func:`dgrad` is to make the gradient of x, the input of a convolution.

    step: of what is added, 0 for nothing; masked: that is taken through an activation by its bits.
    """
    if not has_dgrad(namespace, x) or site is not None and not has_bits(site):
        return False
    if _traced() or type(x).__name__ == "FakeTensor":
        return False  # sizes alone do not tell it: the choice is the call's
    stride, padding, dilation, groups = geometry
    code = 0 if site is None else site.activation
    sums = 0 if site is None else 1 if site.other_y is None else 2
    route = op("conv_bn_act_dgrad_route", namespace)
    return route(x, weight, stride, padding, dilation, groups, step, masked, sums, code)[0] == 0


def has_bits(site: Site) -> bool:
    """Whether the activation's side follows from the mask, or from y alone."""
    return site.mask is not None or site.activation == 0 or site.activation in MASK_CODES


def dgrad(
    namespace: str, dy: Tensor, weight: Tensor, size: tuple[int, int], geometry: tuple[Any, ...], added: Added | None,
    site: Site | None,
) -> tuple[Tensor, Sums | None]:  # fmt: skip
    """``(dx, sums)`` of ``y = conv(x)`` with ``x.shape[2:] == size``: what is added is in dx, and the sums are of it."""
    _, padding, dilation, _ = geometry
    more = (None, None, 0, 0.0, 1) if added is None else tuple(added)
    front: tuple[Any, ...] = (*(None,) * 6, 0.0, False, 0, 0.0, *(None,) * 3) if site is None else tuple(site)
    dx, *sums = op("conv_bn_act_dgrad_bwd", namespace)(dy, weight, [*size], padding, dilation, *more, *front)
    return dx, None if site is None else tuple(sums[: 3 if site.other_y is None else 4])


def apply(namespace: str, dout: Tensor, table: Tensor, site: Site, need_dresidual: bool = False) -> tuple[Tensor, Tensor]:
    """``(dy, dresidual)`` of a BatchNorm whose sums are known."""
    return op("bn_act_apply_bwd", namespace)(
        dout, table, site.y, site.mask, site.activation, site.negative_slope, need_dresidual
    )  # fmt: skip


# ---- Between nodes of the autograd graph.

_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)


def _traced() -> bool:
    """Whether the backward pass is written down, with other tensors than those that will run through it."""
    return torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


_sites: dict[str, Callable[[Any], Site | None]] = {}  # kind of node -> the BatchNorm behind which its output lies


def offers_site(kind: str, site: Callable[[Any], Site | None]) -> None:
    """Nodes whose ``ctx.site_kind`` is ``kind`` can be asked for ``site(ctx)``."""
    _sites[kind] = site


def open_node(ctx: Any, kind: str) -> None:
    """In setup_context of an op whose output 0 lies behind a BatchNorm: consumers may ask for it.

    Not under hooks on saved tensors: what these unpack (a checkpoint computes it again) is for the node itself.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    ctx.site_kind = kind if hooks is not None and hooks(True) is None else None
    ctx.known = ctx.left = None


def _stream(t: Tensor) -> int:
    """Of the calls that are made now. Memory that one stream frees must not be in use on another."""
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def site_of(ctx: Any) -> tuple[Any, Site] | None:
    """The node that made the call's first input, and its BatchNorm; in backward, before that node ran."""
    if _traced():
        return None
    node, output = ctx.next_functions[0] if getattr(ctx, "next_functions", ()) else (None, 0)
    kind = getattr(node, "site_kind", None)
    if kind is None or output != 0:
        return None
    try:
        site = _sites[kind](node)
    except RuntimeError:  # freed, or changed in place: the node itself will say so
        return None
    return None if site is None or not has_bits(site) else (node, site)


def hand_over(node: Any, dx: Tensor, sums: Sums) -> None:
    """Leaves the sums over dx with the node that dx goes to."""
    node.known = (torch._C._current_graph_task_id(), dx, dx._version, _stream(dx), sums)


def known_sums(ctx: Any, dout: Tensor) -> Sums | None:
    """The sums over dout, if they were left here; each is taken once."""
    known, ctx.known = getattr(ctx, "known", None), None
    if known is None:
        return None
    task, dx, version, stream, sums = known
    same = dx is dout and version == dout._version and task == torch._C._current_graph_task_id()
    return sums if same and stream == _stream(dx) else None


def leave_residual(ctx: Any, edge: int, added: Added) -> bool:
    """Leaves a residual's gradient with the convolution that reads the residual too, whose gradient it is added to.

    That is the first of the layers that end in this node, each reading the one before it: it runs in this backward pass if the
    residual's gradient is needed, and after this node. ``edge``: of the residual, among the node's. False if there is none.
    """
    if _traced() or ctx.site_kind != "conv_bn_act_train" or not hasattr(ctx, "next_functions"):
        return False
    target, node = ctx.next_functions[edge], ctx
    while True:
        node, output = node.next_functions[0]
        if getattr(node, "site_kind", None) != "conv_bn_act_train" or output != 0:
            return False
        if node.next_functions[0] == target:
            node.left = (torch._C._current_graph_task_id(), _stream(added.gradient), added)
            return True


def left_residual(ctx: Any) -> Added | None:
    """What another node of this backward pass left to be added to the gradient of the call's first input."""
    left, ctx.left = getattr(ctx, "left", None), None
    if left is None or left[0] != torch._C._current_graph_task_id():
        return None
    _, stream, added = left
    if stream != _stream(added.gradient):
        for t in (added.gradient, added.mask):
            if t is not None:
                t.record_stream(torch.cuda.current_stream(t.device))
    return added


# ---- Contracts.


def _fake_dgrad(dout: Tensor, weight: Tensor, size: list[int], *rest: Any) -> tuple[Tensor, ...]:
    channels, y, other = weight.shape[1], rest[7], rest[17]
    dx = dout.new_empty((dout.shape[0], channels, *size)).to(memory_format=torch.channels_last)
    n = channels if y is not None else 0
    table, others = (4 * ((n + 3) // 4 * 4), 0) if other is None else (0, n)
    return dx, *(dout.new_empty(length, dtype=torch.float32) for length in (table, n, n, others))


def _fake_apply(dout: Tensor, table: Tensor, x: Tensor, mask: Any, code: int, slope: float, need: bool) -> tuple[Tensor, ...]:
    like_x = [torch.empty_like(x, memory_format=suggested_format(x)) if n else x.new_empty(0) for n in (True, need)]
    return tuple(like_x)


def _fake_route(*args: Any) -> list[int]:
    raise RuntimeError("conv_bn_act_dgrad_route: asks about eager calls; it needs tensors with memory")


define_op(
    "conv_bn_act_dgrad_bwd",
    "(Tensor dout, Tensor weight, int[] size, int[] padding, int[] dilation, Tensor? added, Tensor? added_mask, "
    "int added_activation, float added_slope, int added_step, Tensor? y, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, "
    "Tensor? rstd, Tensor? mask, float eps, bool eps_std, int activation, float negative_slope, Tensor? other_y, "
    "Tensor? other_mean, Tensor? other_rstd) "
    "-> (Tensor dx, Tensor table, Tensor dweight, Tensor dbias, Tensor other_dweight)",
    fake=_fake_dgrad,
    stem="conv_bn_act",
    triton=False,
)
define_op(
    "bn_act_apply_bwd",
    "(Tensor dout, Tensor table, Tensor x, Tensor? mask, int activation, float negative_slope, bool need_dresidual) "
    "-> (Tensor dx, Tensor dresidual)",
    fake=_fake_apply,
    stem="bn_act",
    triton=False,
)
define_op(
    "conv_bn_act_dgrad_route",
    "(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, int added, bool masked, int sums, "
    "int activation) "
    "-> int[]",
    fake=_fake_route,
    stem="conv_bn_act",
    triton=False,
)
