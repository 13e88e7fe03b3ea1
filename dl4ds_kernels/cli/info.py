"""``python -m dl4ds_kernels info``: what is loaded, what is not and why, and one checked call of every op."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import _backend, _extension, benchmark
from . import _doctor, _info_view
from ._console import fail, progress, to_json

# Packages whose version decides what runs or what is compared with.
_PACKAGES = ("torchvision", "triton", "numpy", "timm", "onnxruntime", "openvino", "ncnn", "pybind11", "ninja")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str | None:
    """Version of the NVIDIA kernel driver, or None."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first.split() if word[:1].isdigit() and "." in word), None)


def _why_no_gpu() -> str | None:
    """Why torch sees no CUDA device; None where it does."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if _driver() is None:
        return "no NVIDIA driver is loaded here"
    return "torch sees no CUDA device (driver too old for this CUDA, or CUDA_VISIBLE_DEVICES hides it)"


def _gpu_code() -> list[str]:
    """One sentence for every GPU that the compiled CUDA part has no code for."""
    if not _extension.status()["_cuda"].loaded:
        return []
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [why for index in devices if (why := _extension.no_code_for(torch.cuda.get_device_capability(index)))]


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as JSON-ready data; ``problems`` is empty when all is right."""
    parts = {
        name: {"loaded": part.loaded, "file": os.path.basename(part.path), "reason": part.reason, "cure": part.cure}
        for name, part in _extension.status().items()
    }
    host = _extension.host()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = [row for device in devices for row in _doctor.check(device)]
    problems = [
        f"{row.op} {row.direction} {row.dtype} on {row.device} with {row.provider}: {row.message}"
        for row in rows
        if benchmark.failed(row)
    ]
    if not parts["_C"]["loaded"]:
        problems.insert(0, _extension.status()["_C"].message())
    if "cuda" in devices and not any(row.device == "cuda" and row.provider in ("cuda", "triton") for row in rows):
        problems.append(f"no kernels for the GPU: {_extension.missing_reason('cuda')}")
    reasons = {device: {name: benchmark.why_not(name, device) for name in benchmark.OURS} for device in devices}
    facts: dict[str, Any] = {
        "schema": 2,
        "machine": benchmark.machine(),
        "packages": _versions(),
        "torchvision_problem": _doctor.torchvision_problem(),
        "driver": _driver(),
        "no_gpu": _why_no_gpu(),
        "gpus_without_code": _gpu_code(),
        "cpu_features": _plain(host.cpu_features()) if host else None,
        "cuda_archs": _plain(host.cuda_archs()) if host else None,
        "parts": parts,
        "build": _extension.build_info(),
        "backend": _backend.current(),
        "backends": {device: [n for n, why in found.items() if why is None] for device, found in reasons.items()},
        "not_here": {device: {n: why for n, why in found.items() if why is not None} for device, found in reasons.items()},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("DL4DS_")},
        "checks": [row.as_dict() for row in rows],
        "problems": problems,
    }
    facts["issue"] = _info_view.issue_block(facts)
    return facts


def _plain(value: Any) -> Any:
    """Host facts come as dicts, lists or strings from C++."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple, set)) else value


def info(
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")] = False,
    issue: Annotated[bool, typer.Option("--issue", help="only the block to paste into an issue")] = False,
) -> None:
    """Versions, devices, compiled parts and why one is missing; every op checked once against fp64. Exit 0 if all is right."""
    with progress() as bar:
        bar.add_task("checking every op", total=None)
        facts = collect()
    if json_output:
        print(to_json(facts), end="")
    elif issue:
        print(facts["issue"], end="")
    else:
        _info_view.show(facts)
    if facts["problems"]:
        fail(f"{len(facts['problems'])} problem(s): " + "; ".join(facts["problems"]))
