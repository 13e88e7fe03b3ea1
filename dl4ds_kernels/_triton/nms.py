"""``nms``, ``batched_nms`` and ``nms_padded`` in Triton, with the arithmetic of torchvision's CUDA kernel.

torch sorts by score. Then chunk by chunk: a bit mask of who suppresses whom within the chunk, one program an image that decides
the chunk, and every later box against those just kept. Memory O(N); boxes of different classes are told apart pair by pair. The
CUDA kernels (csrc/ops/nms) do the same with a cheaper predicate and bins of classes; these are the portable second backend.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common
from ._common import check

CHUNK = 1024  # boxes decided in one round
ROWS = 64  # of a program of the mask; its columns are the 32 of one word


@triton.jit
def load_boxes(boxes, position, valid):
    """Corners (x1, y1, x2, y2) of the boxes at these positions; zeros where not valid."""
    at = boxes + position * 4
    return tl.load(at, valid, 0.0), tl.load(at + 1, valid, 0.0), tl.load(at + 2, valid, 0.0), tl.load(at + 3, valid, 0.0)


@triton.jit
def round_to(value, HALF: tl.constexpr):
    """float16 boxes: torchvision rounds these values to float16."""
    if HALF:
        return value.to(tl.float16).to(tl.float32)
    else:
        return value


@triton.jit
def suppresses(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, threshold, HALF: tl.constexpr):
    """Whether a, of higher score, suppresses b. Compiled without contraction: the one fused operation is written out."""
    w = round_to(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), HALF)
    h = round_to(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), HALF)
    inter = tl.maximum(w, 0.0) * tl.maximum(h, 0.0)
    aw, ah, bw, bh = ax2 - ax1, round_to(ay2 - ay1, HALF), bx2 - bx1, round_to(by2 - by1, HALF)
    if HALF:
        both = tl.fma(tl.broadcast_to(aw, inter.shape), tl.broadcast_to(ah, inter.shape), tl.broadcast_to(bw * bh, inter.shape))
    else:
        both = tl.fma(tl.broadcast_to(bw, inter.shape), tl.broadcast_to(bh, inter.shape), tl.broadcast_to(aw * ah, inter.shape))
    union = both - inter
    if inter.dtype == tl.float32:
        return tl.div_rn(inter, union) > threshold
    else:
        return inter / union > threshold


@triton.jit
def nms_mask_kernel(
    boxes, classes, mask, N, first, tiles, used, threshold,
    HALF: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Bits of one word (32 later boxes) of ROWS rows: mask (B, CHUNK, CHUNK / 32), of which ``tiles`` x ``used`` are needed."""
    words: tl.constexpr = CHUNK // 32
    program = tl.program_id(0)
    word = program % used
    row0 = (program // used) % tiles * ROWS
    image = (program // used // tiles).to(tl.int64)
    row = row0 + tl.arange(0, ROWS)
    column = word * 32 + tl.arange(0, 32)
    i = first + row[:, None]
    j = first + column[None, :]
    bits = tl.zeros((ROWS,), tl.int32)
    if word * 32 + 31 > row0:
        base = image * N
        ax1, ay1, ax2, ay2 = load_boxes(boxes + base * 4, i, i < N)
        bx1, by1, bx2, by2 = load_boxes(boxes + base * 4, j, j < N)
        hit = suppresses(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, threshold, HALF) & (j > i) & (j < N)
        if classes is not None:
            hit = hit & (tl.load(classes + base + i, i < N, 0) == tl.load(classes + base + j, j < N, 0))
        bits = tl.sum(hit.to(tl.int32) << tl.arange(0, 32)[None, :], 1)
    tl.store(mask + (image * CHUNK + row) * words + word, bits)


@triton.jit
def nms_decide_kernel(alive, keep, mask, N, first, used, CHUNK: tl.constexpr):
    """One program an image: the chunk's boxes in order of score."""
    words: tl.constexpr = CHUNK // 32
    image = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, words)
    position = first + word[:, None] * 32 + tl.arange(0, 32)[None, :]
    live = tl.load(alive + image * N + position, position < N, 0).to(tl.int32)
    undecided = tl.sum(live << tl.arange(0, 32)[None, :], 1)
    rows = mask + image * CHUNK * words
    for i in range(0, tl.minimum(N - first, CHUNK)):
        own = tl.sum(tl.where(word == i // 32, undecided, 0), 0)
        kept = (own >> (i % 32)) & 1
        row = tl.load(rows + i * words + word, word < used, 0)
        undecided = tl.where(kept != 0, undecided & ~row, undecided)
        tl.store(keep + image * N + first + i, kept.to(tl.uint8))


@triton.jit
def nms_push_kernel(
    boxes, classes, alive, keep, N, first, blocks, threshold,
    HALF: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """64 boxes after the chunk against those of the chunk that were kept."""
    program = tl.program_id(0)
    base = (program // blocks).to(tl.int64) * N
    j = first + CHUNK + (program % blocks) * 64 + tl.arange(0, 64)
    live = tl.load(alive + base + j, j < N, 0)
    if tl.max(live, 0) != 0:
        later = j[None, :]
        bx1, by1, bx2, by2 = load_boxes(boxes + base * 4, later, later < N)
        hit = tl.zeros((64,), tl.int32)
        for start in range(0, CHUNK, ROWS):
            i = first + start + tl.arange(0, ROWS)[:, None]
            kept = tl.load(keep + base + i)
            ax1, ay1, ax2, ay2 = load_boxes(boxes + base * 4, i, i < N)
            found = suppresses(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, threshold, HALF) & (kept != 0)
            if classes is not None:
                found = found & (tl.load(classes + base + i) == tl.load(classes + base + later, later < N, 0))
            hit = hit | tl.max(found.to(tl.int32), 0)
        tl.store(alive + base + j, tl.where(hit != 0, 0, live.to(tl.int32)).to(tl.uint8), j < N)


def _keep_by_rank(boxes: Tensor, order: Tensor, classes: Tensor | None, alive: Tensor, threshold: float) -> Tensor:
    """(B, N) flags, by rank, of the boxes kept. ``alive``: (B, N) uint8 by rank, which boxes take part; used up."""
    batch, n = order.shape
    wide = boxes if boxes.dtype == torch.float64 else boxes.float()
    wide = wide.gather(1, order[..., None].expand(-1, -1, 4)).contiguous()
    classes = None if classes is None else classes.gather(1, order).contiguous()
    keep = torch.zeros_like(alive)
    mask = torch.empty((batch, CHUNK, CHUNK // 32), dtype=torch.int32, device=boxes.device)
    limit = float(torch.tensor(threshold, dtype=torch.float32))  # torchvision narrows it for every dtype
    # Division and the unfused operations must be rounded as they are written.
    config = {"CHUNK": CHUNK, "num_warps": 4, "enable_fp_fusion": False}
    tiles = {"HALF": boxes.dtype == torch.float16, "ROWS": ROWS, "threshold": limit, **config}
    with _common.device_of(boxes):
        for first in range(0, n if batch else 0, CHUNK):
            sizes = {"N": n, "first": first}
            size = min(n - first, CHUNK)
            used, row_tiles = triton.cdiv(size, 32), triton.cdiv(size, ROWS)
            _common.launch(
                nms_mask_kernel, batch * row_tiles * used,
                boxes=wide, classes=classes, mask=mask, tiles=row_tiles, used=used, **sizes, **tiles,
            )  # fmt: skip
            decide = {**sizes, **config, "num_warps": 1}
            _common.launch(nms_decide_kernel, batch, alive=alive, keep=keep, mask=mask, used=used, **decide)
            blocks = triton.cdiv(max(n - first - CHUNK, 0), 64)
            if blocks:
                _common.launch(
                    nms_push_kernel, batch * blocks,
                    boxes=wide, classes=classes, alive=alive, keep=keep, blocks=blocks, **sizes, **{**tiles, "ROWS": 16},
                )  # fmt: skip
    return keep


def _check(op: str, boxes: Tensor, scores: Tensor, classes: Tensor | None, dims: int) -> None:
    shape = "(N, 4)" if dims == 1 else "(B, N, 4)"
    check(boxes.dtype in _common.TRITON_DTYPE, op, "boxes", "a floating dtype", boxes.dtype)
    check(boxes.dim() == dims + 1 and boxes.shape[-1] == 4, op, "boxes", f"shape {shape}", tuple(boxes.shape))
    check(scores.shape == boxes.shape[:-1], op, "scores", f"one per box {tuple(boxes.shape)}", tuple(scores.shape))
    check(scores.dtype == boxes.dtype, op, "scores", f"dtype {boxes.dtype} like boxes", scores.dtype)
    check(scores.device == boxes.device, op, "scores", f"device {boxes.device}", scores.device)
    if classes is not None:
        check(classes.shape == scores.shape, op, "classes", f"the shape of scores {tuple(scores.shape)}", tuple(classes.shape))
        check(classes.dtype == torch.int64, op, "classes", "dtype int64", classes.dtype)
        check(classes.device == boxes.device, op, "classes", f"device {boxes.device}", classes.device)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """(K,) indices by descending score."""
    _check("nms", boxes, scores, None, 1)
    return _nms(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """(K,) indices by descending score over all classes."""
    _check("batched_nms", boxes, scores, idxs, 1)
    return _nms(boxes, scores, idxs, iou_threshold)


def _nms(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    order = scores.sort(stable=True, descending=True)[1]
    alive = torch.ones_like(order, dtype=torch.uint8)
    batch: Any = None if classes is None else classes[None]
    return order[_keep_by_rank(boxes[None], order[None], batch, alive[None], iou_threshold)[0] != 0]


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor | None,
    iou_threshold: float,
    score_threshold: float,
    max_output: int,
) -> tuple[Tensor, Tensor]:
    """``(keep (B, max_output) padded with -1, count (B,))``; nothing waits for the GPU."""
    _check("nms_padded", boxes, scores, class_ids, 2)
    check(max_output >= 0, "nms_padded", "max_output", "at least 0", max_output)
    takes_part = scores.double() > score_threshold
    # Boxes that take no part go last: by a second stable sort, since their scores may be anything.
    order = scores.sort(stable=True, descending=True)[1]
    order = order.gather(1, takes_part.gather(1, order).to(torch.uint8).sort(stable=True, descending=True)[1])
    alive = takes_part.gather(1, order).to(torch.uint8)
    keep = _keep_by_rank(boxes, order, class_ids, alive, iou_threshold) != 0
    place = keep.cumsum(1) - 1
    place = torch.where(keep & (place < max_output), place, max_output)
    out = torch.full((boxes.shape[0], max_output + 1), -1, dtype=torch.int64, device=boxes.device)
    out.scatter_(1, place, order)
    return out[:, :max_output].contiguous(), keep.sum(1).clamp(max=max_output)
