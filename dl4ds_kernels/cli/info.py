"""``python -m dl4ds_kernels info``: what is loaded, what is not and why, and one checked call of every op."""

from __future__ import annotations

import importlib.util
import os
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .. import _backend, _extension, benchmark
from ._console import fail, out, progress, to_json

# Odd sizes, a residual, forward and backward: small enough to take no time even in Triton's interpreter.
_CHECK_SHAPE = "7x5x3"
_CHECK_BOXES = "yolo.98"


def _checks(device: str) -> list[benchmark.Row]:
    """Every op with every backend that can run on ``device``, against fp64."""
    rows: list[benchmark.Row] = []
    dtypes = ("fp32", "fp16") if device == "cuda" else ("fp32",)
    for op, module in benchmark.OPS.items():
        if op == "nms" and importlib.util.find_spec("torchvision") is None:
            continue  # its contract is torchvision's own answer: nothing to check against
        layer = module.select(_CHECK_BOXES if op == "nms" else _CHECK_SHAPE)[0]
        ours = [name for name in benchmark.OURS if benchmark.why_not(name, device) is None]
        if op == "nms":
            ours = [name for name in ours if name in ("auto", "reference", device)]
        for dtype in dtypes if op != "nms" else ("fp32",):
            for backward in (False, True) if op != "nms" else (False,):
                case = benchmark.Case(op, layer, 2, dtype, "nchw", backward, device)
                rows += benchmark.run_cases([case], ours, module, time_it=False)
    return rows


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as JSON-ready data; ``problems`` is empty when all is right."""
    parts = {
        name: {"loaded": part.loaded, "file": os.path.basename(part.path), "reason": part.reason, "cure": part.cure}
        for name, part in _extension.status().items()
    }
    host = _extension.host()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    checks = []
    for device in devices:
        checks += _checks(device)
    problems = [
        f"{row.op} {row.direction} {row.dtype} on {row.device} with {row.provider}: {row.message}"
        for row in checks
        if benchmark.failed(row)
    ]
    if not parts["_C"]["loaded"]:
        problems.insert(0, _extension.status()["_C"].message())
    if "cuda" in devices and not any(row.device == "cuda" and row.provider in ("cuda", "triton") for row in checks):
        problems.append(f"no kernels for the GPU: {_extension.missing_reason('cuda')}")
    return {
        "schema": 1,
        "machine": benchmark.machine(),
        "cpu_features": _plain(host.cpu_features()) if host else None,
        "cuda_archs": _plain(host.cuda_archs()) if host else None,
        "parts": parts,
        "build": _extension.build_info(),
        "backend": _backend.current(),
        "backends": {device: [n for n in benchmark.OURS if benchmark.why_not(n, device) is None] for device in devices},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("DL4DS_")},
        "checks": [row.as_dict() for row in checks],
        "problems": problems,
    }


def _plain(value: Any) -> Any:
    """Host facts come as dicts, lists or strings from C++."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple, set)) else value


def _text(value: Any) -> str:
    if isinstance(value, dict):
        on = [k for k, v in value.items() if v is True]
        return ", ".join(on + [f"{k}={v}" for k, v in value.items() if not isinstance(v, bool)])
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def info(json_output: Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")] = False) -> None:
    """Versions, devices, compiled parts and why one is missing; every op checked once against fp64. Exit 0 if all is right."""
    with progress() as bar:
        bar.add_task("checking every op", total=None)
        facts = collect()
    if json_output:
        print(to_json(facts), end="")
    else:
        _print(facts)
    if facts["problems"]:
        fail(f"{len(facts['problems'])} problem(s): " + "; ".join(facts["problems"]))


def _print(facts: dict[str, Any]) -> None:
    console, machine = out(), facts["machine"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def line(name: str, value: Any) -> None:
        table.add_row(name, escape(_text(value)) if value not in (None, "", [], {}) else "[dim]none[/]")

    line("dl4ds_kernels", machine["dl4ds_kernels"])
    line("torch", f"{machine['torch']} ({'CUDA ' + machine['cuda'] if machine['cuda'] else 'CPU build'})")
    line("python", f"{machine['python']} on {machine['system']}")
    line("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads")
    line("CPU features", facts["cpu_features"])
    line("GPU", [f"{g['name']} (sm_{g['capability'].replace('.', '')}, {g['memory_gib']} GiB)" for g in machine["gpus"]])
    for name, part in facts["parts"].items():
        state = (
            f"[green]loaded[/] {escape(part['file'])}" if part["loaded"] else f"[yellow]not loaded[/] {escape(part['reason'])}"
        )
        table.add_row(f"part {name}", state)
        if part["cure"] and not part["loaded"]:
            table.add_row("", f"[dim]{escape(part['cure'])}[/]")
    line("CUDA archs", facts["cuda_archs"])
    line("build", facts["build"])
    line("backend", facts["backend"])
    for device, names in facts["backends"].items():
        line(f"runs on {device}", names)
    line("environment", facts["environment"])
    console.print(table)
    columns = ("op", "pass", "dtype", "device", "backend", "error", "allowed", "result")
    checks = Table(
        *columns, title="every op once, error against fp64", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for row in facts["checks"]:
        figures = ["-" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "limit")]
        color = "red" if row["status"] in ("wrong", "error", "unavailable") else "green"
        names = (row[key] for key in ("op", "direction", "dtype", "device", "provider"))
        checks.add_row(*names, *figures, f"[{color}]{row['status']}[/]")
    console.print(checks)
