"""The only place that chooses a backend.

Order: ``backend=`` argument > ``with dk.backend("triton"):`` / ``dk.backend("triton")`` > ``DL4DS_BACKEND`` > auto.
``auto`` takes the compiled kernels where they are loaded and measured faster than stock torch on the size at hand
(``MIN_NUMEL``), Triton for CUDA tensors without the CUDA part, and stock torch otherwise.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _cpu_conv, _cuda_conv, _extension
from ._activation import ACTIVATION_CODES
from ._define import CPP, TRITON, has_kernel, triton_interpreted

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
STOCK = "stock"
REFERENCE = "reference"

# Elements from which our kernel beats stock torch on the CPU, host overhead included (bench/overhead.py prints both sides).
MIN_NUMEL = {
    "add_act": 32768, "add3_act": 65536, "bn_act": 16384, "conv_bn_act": 8192, "conv_transpose_bn_act": 0,
    "local_response_norm": 0, "max_pool_indices": 0, "upsample_add": 16384, "max_pool2d": 0, "avg_pool2d": 0,
    "global_avg_pool2d": 98304, "linear_act": 0, "nms": 0, "batched_nms": 0, "nms_padded": 0,
    "residual_block": 16384, "dense_block": 16384, "bn_act_max_pool": 16384,
}  # fmt: skip
_CHOSEN_AS = {"bn_act_conv": "bn_act", "bottleneck": "residual_block", "basic_block": "residual_block"}  # whose row decides
FLOATING = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))  # dtypes that the kernels compute in
_FP64_ON_GPU = frozenset(("nms", "batched_nms", "nms_padded"))  # elsewhere stock torch serves it


class _State(threading.local):
    """Per-thread override; a setter call outside ``with`` changes the default of every thread."""

    name: str | None = None


_state = _State()
_default = "auto"
# True until somebody asks for a backend: lets the functionals test one flag for the common case.
untouched = True


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _from_environment() -> None:
    global _default, untouched
    _default = _check(os.environ.get("DL4DS_BACKEND", "auto"), "DL4DS_BACKEND")
    untouched = _default == "auto"


_from_environment()


class backend:
    """Choose the backend: ``dk.backend("triton")`` for the process, ``with dk.backend("triton"):`` for a block of one thread.

    Names: ``auto``, ``cpu``, ``cuda``, ``triton``, ``reference``. An explicit choice is binding: a call that the backend
    cannot serve raises, while ``auto`` falls back to stock torch.
    """

    def __init__(self, name: str) -> None:
        global _default, untouched
        self.name = _check(name, "backend")
        untouched = False
        self._previous_default, self._previous = _default, _state.name
        _default = name

    def __enter__(self) -> backend:
        global _default
        _default, _state.name = self._previous_default, self.name
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        _state.name = self._previous


def current() -> str:
    """The backend that a call without ``backend=`` asks for."""
    return _state.name or _default


def is_large(x: Tensor, least: int) -> bool:
    """Whether ``x`` has ``least`` elements. A size that torch.compile left open counts as large, without a guard: a comparison
    would compile anew on either side of it.
    """
    if torch.compiler.is_compiling():
        return not torch.fx.experimental.symbolic_shapes.statically_known_true(x.numel() < least)
    return x.numel() >= least


def select(op: str, x: Tensor, choice: str | None = None) -> str:
    """Where ``op`` on ``x`` runs: the namespace of a kernel, ``"reference"`` or ``"stock"``."""
    name = choice or _state.name or _default
    if name == "auto":
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or forward_ad._current_level >= 0 or _transforming():
            return STOCK  # what is exported is standard ops; forward-mode derivatives and torch.func exist for those alone
        device = x.device.type
        if device == "cpu":
            return CPP if is_large(x, MIN_NUMEL[op]) and x.dtype in FLOATING and has_kernel(op, CPP, "cpu") else STOCK
        if device != "cuda" or x.dtype not in FLOATING or (x.dtype == torch.float64 and op not in _FP64_ON_GPU):
            return STOCK
        if has_kernel(op, CPP, "cuda") and _extension.runs_on_gpu(x.device.index):
            return CPP
        return TRITON if has_kernel(op, TRITON, "cuda") and _has_triton() else STOCK
    _check(name, f"{op}: backend")
    if name == "reference":
        return REFERENCE
    device = x.device.type
    expected = {"cpu": "cpu", "cuda": "cuda"}.get(name)
    if expected and device != expected:
        raise RuntimeError(f"{op}: backend: {name!r} needs {expected} tensors, got x on {x.device}")
    if name == "cuda" and _extension.status()["_cuda"].loaded and not _extension.runs_on_gpu(x.device.index):
        raise RuntimeError(f"{op}: backend: {_extension.no_code_for(torch.cuda.get_device_capability(x.device.index))}")
    if name == "triton" and device == "cpu" and not triton_interpreted():
        raise RuntimeError(
            f"{op}: backend: 'triton' needs CUDA tensors, got x on {x.device} (TRITON_INTERPRET=1 runs it on the CPU)"
        )
    return TRITON if name == "triton" else CPP


def _transforming() -> bool:
    """Whether torch.func's grad, vmap or jvp is at work: they do not see into ops with a formula of their own."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


_triton_found: bool | None = None


def _has_triton() -> bool:
    global _triton_found
    if _triton_found is None:
        import importlib.util

        _triton_found = importlib.util.find_spec("triton") is not None
    return _triton_found


def explain(
    op: str,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    behind: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "relu",
    training: bool = False,
    convs: Sequence[Any] = (),
    shortcut: bool = True,
    backend: str | None = None,
) -> dict[str, Any]:
    """Which path a call of ``op`` on ``x`` takes and why, as a dict: op, backend asked for, path, device, reason.

    ``weight`` and what follows it are those of ``conv_bn_act`` (or ``bn_act_conv`` in inference): on CUDA the dict then says
    too which kernels run the layer ("kernels", "kernels_reason", modelled times), the fused convolution or cuDNN and
    ``bn_act``'s kernel; with ``behind``, the filters of the 1x1 layer behind it (a bottleneck block's end; the residual is that
    layer's), whether both are one kernel; in training, as "input_gradient", the same of the gradient of x where x comes from a
    BatchNorm with this activation. On the CPU, for ``conv_bn_act``, which algorithm each convolution of a training step takes
    ("training", "training_reason").

    ``convs`` (of ``residual_block``, ``bottleneck``, ``basic_block``): the ``ConvParams`` of the block's branch, ``shortcut``
    whether something is added; on CUDA "layers" then tells that of each, and "tail" (inference) of the block's end.
    """
    chosen_as = _CHOSEN_AS.get(op, op)
    if chosen_as not in MIN_NUMEL:
        raise ValueError(f"explain: op: expected one of {', '.join((*MIN_NUMEL, *_CHOSEN_AS))}, got {op!r}")
    path = select(chosen_as, x, backend)
    asked = backend or current()
    if path != STOCK:
        reason = "asked for" if asked != "auto" else "measured faster than stock torch at this size"
    elif x.device.type == "cpu" and not _extension.status()["_C"].loaded:
        reason = _extension.missing_reason("cpu")
    elif x.device.type == "cpu" and x.numel() < MIN_NUMEL[chosen_as]:
        reason = f"{x.numel()} elements: stock torch is faster below {MIN_NUMEL[chosen_as]}"
    elif x.device.type == "cuda":
        reason = _extension.missing_reason("cuda")
    else:
        reason = f"no kernel for {x.dtype} on {x.device.type}, or a model is being exported"
    names = {CPP: f"C++ ({x.device.type})", TRITON: "Triton", REFERENCE: "reference", STOCK: "stock torch"}
    report = {"op": op, "backend": asked, "path": names[path], "device": str(x.device), "reason": reason}
    if chosen_as == "residual_block" and convs and path == CPP and x.device.type == "cuda":
        return report | _cuda_conv.explain_block(x, convs, shortcut, ACTIVATION_CODES[activation], training)
    if op not in ("conv_bn_act", "bn_act_conv") or weight is None or path != CPP:
        return report
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
    if x.device.type == "cpu":
        report |= _cpu_conv.explain(x, weight, pairs, groups) if op == "conv_bn_act" else {}
    else:
        code = ACTIVATION_CODES[activation]
        if op == "conv_bn_act" and behind is not None and groups == 1 and not training:
            found = _cuda_conv.explain_tail(x, weight, behind, residual is not None, *pairs, code)
        elif op == "conv_bn_act":
            found = _cuda_conv.explain(x, weight, residual is not None, *pairs, groups, code, training)
            if training:
                found["input_gradient"] = _cuda_conv.explain_dgrad(x, weight, *pairs, groups, code)
        else:
            found = _cuda_conv.explain_prologue(x, weight, *pairs, groups, code)
        report |= {"kernels": found.pop("kernels"), "kernels_reason": found.pop("reason"), **found}
    return report
