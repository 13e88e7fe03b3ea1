"""Non-maximum suppression, of one class and of many: ours against torchvision's, index for index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ... import functional as F
from .._case import Case, Problem, Run, Unavailable, generator, remembered

IOU_THRESHOLD = 0.5
STOCK = ("eager",)
DEFAULT = "all"


@dataclass(frozen=True)
class Boxes:
    """``count`` boxes of about ``side`` pixels on a square image of ``image`` pixels.

    ``objects``: boxes crowd around so many places, as a detector's do; 0: they lie anywhere. ``classes``: batched_nms over so
    many classes; 0: nms.
    """

    name: str
    count: int
    side: float
    image: float
    objects: int = 0
    classes: int = 0

    def describe(self, batch: int) -> str:
        return f"B{self.count}" + (f"-K{self.classes}" if self.classes else "")


def _groups() -> dict[str, list[Boxes]]:
    # yolo: 7 x 7 cells with 2 boxes, then the same for a batch of 20; heavy: most boxes overlap; sparse: hardly any do;
    # clustered: 50 boxes an object; classes: clustered boxes of 80 classes.
    sizes = (1000, 5000, 20000)
    return {
        "yolo": [Boxes(f"yolo.{n}", n, 120.0, 448.0) for n in (98, 1960)],
        "heavy": [Boxes(f"heavy.{n}", n, 80.0, 20.0 * n**0.5) for n in sizes],
        "sparse": [Boxes(f"sparse.{n}", n, 10.0, 50.0 * n**0.5) for n in sizes],
        "clustered": [Boxes(f"clustered.{n}", n, 60.0, 1000.0, objects=n // 50) for n in (*sizes, 50000)],
        "classes": [Boxes(f"classes.{n}", n, 60.0, 1000.0, objects=n // 50, classes=80) for n in sizes[1:]],
    }


def select(selection: str) -> list[Boxes]:
    """Box sets of a comma-separated selection: ``all``, a group (yolo, heavy, ...) or a name; ValueError for anything else."""
    groups = _groups()
    chosen: dict[str, Boxes] = {}
    for item in filter(None, (part.strip() for part in selection.split(","))):
        found = [b for group, boxes in groups.items() for b in boxes if item in ("all", group, b.name)]
        if not found:
            raise ValueError(f"shapes: nms: expected all, {', '.join(groups)} or a name like heavy.1000, got {item!r}")
        chosen.update((boxes.name, boxes) for boxes in found)
    if not chosen:
        raise ValueError("shapes: expected at least one shape, got none")
    return list(chosen.values())


def make_inputs(case: Case) -> dict[str, Tensor]:
    """boxes (N, 4), scores (N,) and, with classes, idxs (N,) of a case; Unavailable for what NMS does not do."""
    if case.backward:
        raise Unavailable(f"{case.op} has no gradient here: use --pass fwd")
    if case.dtype not in ("fp32", "fp64"):
        raise Unavailable(f"{case.op}: dtype: expected fp32 or fp64, got {case.dtype}")
    g, boxes = generator(case), case.layer
    centre = torch.rand(boxes.objects or boxes.count, 2, generator=g, dtype=torch.float64) * boxes.image
    if boxes.objects:
        chosen = torch.randint(boxes.objects, (boxes.count,), generator=g)
        centre = centre[chosen] + torch.randn(boxes.count, 2, generator=g, dtype=torch.float64) * (0.08 * boxes.side)
    half = boxes.side * (0.35 + 0.3 * torch.rand(boxes.count, 2, generator=g, dtype=torch.float64))
    # Scores all differ: torchvision's loop over classes leaves the order of equal ones to an unstable sort.
    scores = torch.randperm(boxes.count, generator=g).to(torch.float64) / boxes.count
    inputs = {
        "boxes": torch.cat([centre - half, centre + half], dim=1).to(case.torch_dtype),
        "scores": scores.to(case.torch_dtype),
    }
    if boxes.classes:
        inputs["idxs"] = torch.randint(boxes.classes, (boxes.count,), generator=g)
    return inputs


@remembered
def problem(case: Case) -> Problem:
    inputs, boxes = make_inputs(case), case.layer
    # The contract is torchvision's own answer on the same device, whose threshold rule differs between CPU and CUDA.
    on_device = [t.to(case.device) for t in inputs.values()]
    return Problem(inputs, {"keep": _contract(boxes)(*on_device, IOU_THRESHOLD).cpu()})


def _contract(boxes: Boxes) -> Callable[..., Tensor]:
    """With classes torchvision's loop over them: its offsets for few boxes lose digits of the coordinates."""
    import torchvision

    return torchvision.ops.boxes._batched_nms_vanilla if boxes.classes else torchvision.ops.nms


def _stock(boxes: Boxes) -> Callable[..., Tensor]:
    import torchvision

    return torchvision.ops.batched_nms if boxes.classes else torchvision.ops.nms


def setup(case: Case, provider: str) -> Run:
    """The call of one provider."""
    made = problem(case)
    inputs = [t.to(case.device, copy=True) for t in made.inputs.values()]
    ours = F.batched_nms if case.layer.classes else F.nms
    device = torch.device(case.device).type
    if provider == "eager":
        call = partial(_stock(case.layer), *inputs, IOU_THRESHOLD)
    elif provider in ("auto", "reference", "triton") or provider == device:
        call = partial(ours, *inputs, IOU_THRESHOLD, backend=provider)
    else:
        raise Unavailable(f"nms has no provider {provider!r}; known: eager (torchvision), auto, reference, triton, {device}")

    def outputs() -> dict[str, Tensor]:
        return {"keep": call()}

    return Run(call, outputs, sum(t.numel() * t.element_size() for t in inputs))
