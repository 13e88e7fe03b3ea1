"""Every public op run once on every device with every backend that has it, against fp64: the checks of ``info``."""

from __future__ import annotations

import torch

from .. import benchmark
from .._define import CPP, TRITON, has_kernel
from ..benchmark.ops.nms import Boxes

# Odd sizes: every vector tail is met, and even Triton's interpreter needs no time.
_SHAPE, _BOXES = "7x5x3", "yolo.98"
_CLASSES = Boxes("yolo.98.classes", 98, 120.0, 448.0, classes=20)
# Dispatcher ops behind a public function of another name; the variants of NMS are plain torch operations.
_KERNELS: dict[str, tuple[str, ...]] = {
    "add_bn_act": ("add_act", "bn_act"), "bn_act_conv": ("bn_act",), "max_pool_indices": ("max_pool_indices", "max_unpool"),
    **dict.fromkeys(("basic_block", "bottleneck", "preact_basic_block", "preact_bottleneck"), ("residual_block",)),
    "soft_nms": (), "diou_nms": (), "matrix_nms": (), "darknet_nms": (),
}  # fmt: skip
_NEEDS_TORCHVISION = ("nms", "nms_padded")  # their contract is torchvision's own answer


def backends(op: str, device: str) -> list[str]:
    """What can run ``op`` on ``device`` here; ``auto`` always can."""
    names = _KERNELS.get(op, (op,))
    found = ["auto"]
    if not names:
        return found
    found.append("reference")
    for name, namespace in ((device, CPP), ("triton", TRITON)):
        if benchmark.why_not(name, device) is None and all(has_kernel(n, namespace, device) for n in names):
            found.append(name)
    return found


def torchvision_problem() -> str | None:
    """Why torchvision's NMS cannot be asked, or None: it may be missing, or built for another torch (then without its ops)."""
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:  # ImportError, or whatever a build for another torch raises
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return None


def check(device: str) -> list[benchmark.Row]:
    """Rows of all ops on ``device``, parity only; fp16 too on a GPU."""
    rows: list[benchmark.Row] = []
    torchvision = torchvision_problem() is None
    for op, module in benchmark.OPS.items():
        boxes = op in benchmark.NMS
        if op in _NEEDS_TORCHVISION and not torchvision:
            continue
        layers = module.select(_BOXES if boxes else _SHAPE)[:1] + ([_CLASSES] if op == "nms" else [])
        ways = (False, True) if benchmark.differentiable(op) else (False,)
        for layer in layers:
            name = "batched_nms" if layer is _CLASSES else op
            for dtype in ("fp32", "fp16") if device == "cuda" and not boxes else ("fp32",):
                for backward in ways:
                    case = benchmark.Case(name, layer, 2, dtype, "nchw", backward, device)
                    rows += benchmark.run_cases([case], backends(name, device), module, time_it=False)
    return rows
