"""``python -m dl4ds_kernels bench``: kernel benchmarks; parity first, then interleaved medians."""

from __future__ import annotations

import csv
import io
import itertools
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .. import benchmark
from ._console import err, fail, out, progress, to_json, write_text

_QUICK_ROUNDS, _QUICK_SHAPES = 5, 2


def _choices(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Comma-separated values, each of ``known``."""
    values = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        fail(f"--{option}: expected one or more of {', '.join(known)}, got {unknown[0] if unknown else 'nothing'!r}", 2)
    return list(dict.fromkeys(values))


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        fail(f"--device: expected cpu or cuda, got {name!r}", 2)
    if name.startswith("cuda") and not torch.cuda.is_available():
        fail("--device: cuda was asked for, but torch sees no CUDA device")
    return name


def _providers(module: Any, backends: str | None, compare: str | None, layout: str, device: str) -> list[str]:
    ours = _choices("backends", backends, benchmark.OURS) if backends else list(benchmark.default_backends(device))
    stock = list(module.STOCK) if compare is None else _choices("compare", compare, ("none", *benchmark.STOCK))
    same = {"eager_cl"} if layout == "nhwc" and "eager" in stock else set()  # eager on channels_last input twice
    return [name for name in stock if name != "none" and name not in same] + ours


def bench(
    op: Annotated[str, typer.Option(help=", ".join(benchmark.OPS))],
    shapes: Annotated[
        str | None,
        typer.Option(help="resnet50, yolo, unet, all, a layer name such as resnet50.layer1, CxHxW; nms: yolo, heavy, sparse"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images a batch")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, fp64, fp16, bf16; several with commas")] = "fp32",
    layout: Annotated[str, typer.Option(help="nchw, nhwc or both with a comma")] = "nhwc",
    backends: Annotated[
        str | None, typer.Option(help="ours: auto, cpu, cuda, triton, reference; default: the kernels that run here")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="stock torch: eager, eager_cl, eager_inplace, compile or none; the first is the ratio's base"),
    ] = None,
    direction: Annotated[str, typer.Option("--pass", help="fwd (inference), fwd+bwd (training) or both with a comma")] = "fwd",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved samples of each provider")] = 30,
    quick: Annotated[bool, typer.Option("--quick", help="two shapes and five rounds: a look, not a measurement")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="write everything as JSON; - for stdout instead of the table")
    ] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="write the rows as CSV")] = None,
    fail_below: Annotated[
        float | None, typer.Option(help="exit 1 if one of ours is less than R times as fast as the fastest stock provider")
    ] = None,
) -> None:
    """Measure one op over named layer shapes; each provider is checked against fp64 first; wrong ones get no speed."""
    module = benchmark.OPS[_choices("op", op, tuple(benchmark.OPS))[0]]
    device = _device(device)
    dtypes = _choices("dtype", dtype, tuple(benchmark.DTYPES))
    layouts = _choices("layout", layout, tuple(benchmark.LAYOUTS)) if op != "nms" else ["nchw"]
    directions = _choices("pass", direction, ("fwd", "fwd+bwd"))
    try:
        selected = module.select(shapes or module.DEFAULT)
    except ValueError as error:
        fail(f"--{error}", 2)
    if quick:
        selected, rounds = selected[:_QUICK_SHAPES], min(rounds, _QUICK_ROUNDS)
    if threads is not None:
        torch.set_num_threads(threads)
    plan = list(itertools.product(dtypes, layouts, directions, selected))
    rows: list[benchmark.Row] = []
    with progress() as bar:
        task = bar.add_task(op, total=len(plan) * rounds)
        for index, (d, lay, way, layer) in enumerate(plan):
            case = benchmark.Case(op, layer, batch, d, lay, way == "fwd+bwd", device)
            bar.update(task, description=f"{op} {layer.name} {d} {lay} {way}", completed=index * rounds)
            providers = _providers(module, backends, compare, lay, device)
            rows += benchmark.run_cases([case], providers, module, rounds=rounds, advance=lambda: bar.advance(task))
    document = {
        "schema": 1,
        "op": op,
        "machine": benchmark.machine(),
        "rounds": rounds,
        "rows": [row.as_dict() for row in rows],
    }
    if json_path is not None and str(json_path) == "-":
        print(to_json(document), end="")
    else:
        _print(rows, document["machine"])
        if json_path is not None:
            write_text(json_path, to_json(document))
    if csv_path is not None:
        write_text(csv_path, _csv(rows))
    _finish(rows, fail_below)


def _csv(rows: list[benchmark.Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(benchmark.Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    return text.getvalue()


def _print(rows: list[benchmark.Row], machine: dict[str, Any]) -> None:
    """One small table a case, the fastest row marked."""
    console = out()
    where = machine["gpus"][0]["name"] if rows[0].device.startswith("cuda") else machine["cpu"]
    console.print(f"{escape(where)}, {machine['threads']} threads, torch {machine['torch']}")
    for (name, shape, dtype, layout, direction), group in itertools.groupby(rows, _key):
        listed = list(group)
        fastest = min((row.median_ms for row in listed if row.median_ms is not None), default=None)
        heading = f"[bold]{listed[0].op}[/] {escape(name)} {shape} {dtype} {layout} {direction}"
        table = Table(title=heading, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("provider", no_wrap=True)
        for column in ("median ms", "p20 - p80", "rate", "faults", "error", "vs first", "vs fastest"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in listed:
            table.add_row(*_cells(row), style="bold" if row.median_ms == fastest and fastest is not None else None)
        console.print(table)
    console.print(
        "error: max |y - fp64| / max |fp64|; vs: how many times faster than the first and the fastest stock row", style="dim"
    )


def _key(row: benchmark.Row) -> tuple[str, ...]:
    return (row.case, row.shape, row.dtype, row.layout, row.direction)


def _cells(row: benchmark.Row) -> list[str]:
    provider = f"ours: {row.provider}" if row.ours else row.provider
    error = "-" if row.error is None else f"{row.error:.1e}"
    if row.median_ms is None:
        color = "red" if benchmark.failed(row) else "yellow"
        return [provider, f"[{color}]{row.status}[/]", "", "", "", error, "", ""]
    ratios = ["" if value is None else f"{value:.2f}x" for value in (row.speedup, row.speedup_best_stock)]
    rate = f"{row.gflop_per_s:.0f} GFLOP/s" if row.gflop_per_s is not None else f"{row.gbytes_per_s:.1f} GB/s"
    return [provider, f"{row.median_ms:.3f}", f"{row.p20_ms:.3f} - {row.p80_ms:.3f}", rate, f"{row.faults:.0f}", error, *ratios]


def _finish(rows: list[benchmark.Row], fail_below: float | None) -> None:
    """Messages of the rows without a speed, and the exit code."""
    for row in rows:
        if row.message:
            where = f"{row.case} {row.dtype} {row.layout} {row.direction} {row.provider}"
            err().print(f"{where}: {row.status}: {escape(row.message)}", soft_wrap=True)
    bad = [row for row in rows if benchmark.failed(row)]
    if bad:
        fail(f"{len(bad)} of {len(rows)} rows failed: " + ", ".join(sorted({f"{row.provider} {row.status}" for row in bad})))
    slow = [row for row in rows if row.ours and fail_below is not None and not (row.speedup_best_stock or 0.0) >= fail_below]
    if slow:
        worst = min(slow, key=lambda row: row.speedup_best_stock or 0.0)
        fail(
            f"{len(slow)} rows below {fail_below}x; the slowest is {worst.case} {worst.provider} at {worst.speedup_best_stock}x"
        )
