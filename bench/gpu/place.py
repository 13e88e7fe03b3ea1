"""Where a check runs: on the GPU, or in a dry run the same calls on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dl4ds_kernels import benchmark
from dl4ds_kernels._define import CPP, TRITON, has_kernel

CPU_ONLY = ("linear_act",)
# Made of other ops' kernels, or (relatives of nms) plain torch on any device.
BUILT_OF = ("add_bn_act", "basic_block", "bn_act_conv", "bottleneck", "preact_basic_block", "preact_bottleneck", *benchmark.NMS)
_NAMESPACES = {"cuda": CPP, "triton": TRITON}
PARITY_SHAPES = "1x1x1,3x7x5,63x7x5,64x1x1,129x13x17,256x28x28"
RULE_SHAPES = "24x9x7"
RULE_BOXES = "yolo.98"


@dataclass(frozen=True)
class Place:
    """``device`` of all tensors; ``small``: the two smallest shapes of each op only (the sanitizer is slow)."""

    device: str
    small: bool = False

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"

    def backends(self) -> list[str]:
        """Backends of ours that claim to run here."""
        names = ("cuda", "triton", "auto") if not self.is_dry else ("cpu", "auto")
        return [name for name in names if benchmark.why_not(name, self.device) is None]

    def missing(self, op: str, backend: str) -> str | None:
        """Why a backend has no kernel of its own for an op (an op with one must run, or it is wrong)."""
        if self.is_dry or backend == "auto":
            return None
        if op in CPU_ONLY:
            return f"{op} has a CPU kernel only: stock torch serves it on a GPU"
        if op in BUILT_OF or has_kernel(op, _NAMESPACES[backend], "cuda"):
            return None
        return f"{op} has no kernel of this backend on a GPU"

    def synchronize(self) -> None:
        if not self.is_dry:
            torch.cuda.synchronize()


def shapes_of(op: str, maps: str) -> str:
    """``maps``, or the box sets of an op on boxes: all of nms, of its relatives (quadratic, in Python) their default."""
    return maps if op not in benchmark.NMS else "all" if op == "nms" else benchmark.OPS[op].DEFAULT


def parity_cases(place: Place) -> Iterator[benchmark.Case]:
    """Every op, dtype, layout and direction, on odd and on real shapes."""
    for op, module in benchmark.OPS.items():
        nms = op in benchmark.NMS
        layers = module.select(shapes_of(op, PARITY_SHAPES))
        axes = (
            layers[:2] if place.small else layers,
            ("fp32", "fp64") if nms else ("fp32", "fp16", "bf16"),
            ("nchw",) if nms else ("nchw", "nhwc"),
            (False, True) if benchmark.differentiable(op) else (False,),
        )
        for layer, dtype, layout, backward in itertools.product(*axes):
            # Of two values a channel the normalised ones are +-1 and every gradient a difference of equals.
            batch = 2 if nms or layer.H_out * layer.W_out > 1 else 32
            yield benchmark.Case(op, layer, batch, dtype, layout, backward, place.device)


def rule_cases(place: Place) -> Iterator[tuple[benchmark.Case, str]]:
    """One small case of every op and direction, on every backend by name."""
    for op, module in benchmark.OPS.items():
        nms = op in benchmark.NMS
        for layer in module.select(RULE_BOXES if nms else RULE_SHAPES):
            for backward in (False, True) if benchmark.differentiable(op) else (False,):
                case = benchmark.Case(op, layer, 2, "fp32", "nchw" if nms else "nhwc", backward, place.device)
                for backend in place.backends():
                    yield case, backend
