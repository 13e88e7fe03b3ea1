"""``define_op``: one contract (schema, fake, autograd, autocast) -> every kernel namespace.

A dispatcher key holds one kernel and a second registration silently wins, so C++ (CPU and CUDA) lives in
``dl4ds_kernels::<op>`` and Triton in ``dl4ds_kernels_triton::<op>``. Both get the same schema, fake kernel and backward;
a backward receives the namespace it belongs to and calls the gradient op of that namespace.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from . import _extension
from ._list_autograd import autograd_kernel, has_tensor_lists

CPP, TRITON = "dl4ds_kernels", "dl4ds_kernels_triton"


def _library(namespace: str) -> torch.library.Library:
    """The only definition of a namespace in this process; ImportError where another copy of the package made it."""
    try:
        return torch.library.Library(namespace, "DEF")
    except RuntimeError as error:
        previous = re.search(r"Previous registration of TORCH_LIBRARY was registered at (\S+?):\d+", str(error))
        if previous is None:
            raise
        raise ImportError(
            f"dl4ds_kernels: the ops {namespace}:: are registered already in this process, by {previous.group(1)}; "
            f"expected one copy of the package, got a second one in {os.path.dirname(__file__)}. Leave one of them on "
            "sys.path, and do not delete it from sys.modules (importlib.reload works)"
        ) from None


_libraries = {namespace: _library(namespace) for namespace in (CPP, TRITON)}
_defined: dict[str, str] = {}  # op name -> stem of the file that holds its kernels
_kernels: set[tuple[str, str, str]] = set()  # (op name, namespace, device type) with a kernel to run
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def triton_interpreted() -> bool:
    """True when Triton kernels run in Triton's interpreter and so serve CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_composed: dict[str, Callable[..., Any]] = {}  # op name -> compose(namespace, *args)


def op(name: str, namespace: str = CPP) -> Any:
    """The callable of a defined op: ``torch.ops.<namespace>.<name>.default``."""
    return getattr(getattr(torch.ops, namespace), name).default


def defined_ops() -> dict[str, str]:
    """Every defined op name and the stem of the files that hold its kernels."""
    return dict(_defined)


def composition(name: str) -> Callable[..., Any] | None:
    """``compose(namespace, *args)`` of an op that only schedules others, None for one with kernels."""
    return _composed.get(name)


def has_kernel(name: str, namespace: str, device: str) -> bool:
    """Whether ``namespace`` has a kernel of the op for a device type; what it has instead only raises."""
    return (name, namespace, device) in _kernels


def define_op(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    stem: str | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: Callable[..., tuple[Any, ...]] | None = None,
    triton: bool = True,
    compose: Callable[..., Any] | None = None,
    composed_of: str = "",
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define ``name`` in both namespaces.

    Args:
        name: op name; gradient ops end in ``_bwd``.
        schema: arguments and returns, ``"(Tensor x, …) -> Tensor"``.
        fake: shapes, dtypes and strides of the result from those of the arguments.
        stem: stem of the files in ``csrc/ops``, ``_triton`` (default: ``name`` without ``_bwd``).
        setup_context, backward: autograd formula; ``backward(namespace, ctx, *grads)``.
        autocast: ``autocast(dtype, *args) -> args`` casts the arguments under autocast.
        triton: whether a Triton twin exists; where not, its namespace reports the op as missing.
        compose, composed_of: ``compose(namespace, *args)`` is the kernel of every namespace and device that has one of the op
            ``composed_of`` (defined before), for an op that only schedules others.
        tags: more dispatcher tags; ``pt2_compliant_tag`` and ``needs_exact_strides`` (the bit masks lie in memory order, so
            Inductor must not relayout arguments) are always set.
    """
    stem = stem or name.removesuffix("_bwd")
    _defined[name] = stem
    if compose is not None:
        _composed[name] = compose
    for namespace, library in _libraries.items():
        qualified = f"{namespace}::{name}"
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides, *tags))
        torch.library.register_fake(qualified, partial(_run_fake, name, fake), lib=library)
        if name.endswith("_bwd"):
            # Without a formula torch would only warn and leave second-order gradients out.
            torch.library.register_autograd(qualified, partial(_no_second_derivative, name), lib=library)
        elif backward is not None and setup_context is not None and has_tensor_lists(op(name, namespace)):
            kernel = autograd_kernel(op(name, namespace), setup_context, partial(backward, namespace))
            library.impl(name, kernel, "Autograd", with_keyset=True)
        elif backward is not None:
            torch.library.register_autograd(qualified, partial(backward, namespace), setup_context=setup_context, lib=library)
        if autocast is not None:
            for device, key in _AUTOCAST_KEYS.items():
                library.impl(name, partial(_run_autocast, qualified, device, key, autocast), key)
        for key in ("CPU", "CUDA"):
            if compose is not None and has_kernel(composed_of, namespace, key.lower()):
                library.impl(name, partial(compose, namespace), key)
                _kernels.add((name, namespace, key.lower()))
            else:
                _register_kernel(library, namespace, name, stem, key, triton and compose is None)


def define_question(name: str, kind: str, answer: Callable[..., Any], arguments: str = "") -> None:
    """``dl4ds_kernels::name(arguments) -> kind``: what only Python knows and the C++ part asks through the dispatcher."""
    library = _libraries[CPP]
    library.define(f"{name}({arguments}) -> {kind}")
    library.impl(name, answer, "CompositeExplicitAutograd")


def _run_fake(name: str, fake: Callable[..., Any], *args: Any) -> Any:
    """One meta tensor among CPU tensors makes the dispatcher take the fake kernel: an error, not an uninitialised result."""
    devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
    return fake(*args)


def _no_second_derivative(name: str, ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(f"{name.removesuffix('_bwd')}: expected a first-order gradient, got a second backward (create_graph)")


def _register_kernel(library: Any, namespace: str, name: str, stem: str, key: str, triton: bool) -> None:
    if namespace == TRITON and triton and (key == "CUDA" or triton_interpreted()):
        library.impl(name, partial(_run_triton, stem, name), key)
        _kernels.add((name, namespace, key.lower()))
    elif torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key):
        _kernels.add((name, namespace, key.lower()))
    else:
        # Without this the dispatcher's own message would list keys instead of saying what to do.
        library.impl(name, partial(_raise_missing, namespace, name, key), key)


def _run_triton(stem: str, name: str, *args: Any) -> Any:
    """Import the Triton module on first use: triton is optional and slow to import."""
    try:
        module = importlib.import_module(f"dl4ds_kernels._triton.{stem}")
    except ImportError as error:
        raise RuntimeError(f"{TRITON}::{name}: {error}; install it with `pip install triton`") from error
    return getattr(module, name)(*args)


def _raise_missing(namespace: str, name: str, key: str, *args: Any) -> Any:
    if namespace == TRITON:
        raise RuntimeError(
            f"{namespace}::{name}: no Triton kernel for {key.lower()} tensors; "
            "move them to a CUDA device, or set TRITON_INTERPRET=1 before importing dl4ds_kernels to run Triton's interpreter"
        )
    raise RuntimeError(f"{namespace}::{name}: {_extension.missing_reason(key.lower())}")


def _run_autocast(qualified: str, device: str, key: str, rule: Callable[..., Any], *args: Any) -> Any:
    namespace, name = qualified.split("::")
    cast = rule(torch.get_autocast_dtype(device), *args)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
        return op(name, namespace)(*cast)
