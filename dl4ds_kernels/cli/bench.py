"""``python -m dl4ds_kernels bench``: one op or a whole model; parity first, then interleaved medians."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import benchmark
from . import _bench_view
from ._console import fail, out, progress, require, to_json, write_text

_QUICK_ROUNDS, _QUICK_SHAPES = 5, 2
_MODEL_COMPARE = "eager,channels_last,compile"


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


def _providers(module: Any, whole: bool, backends: str | None, compare: str | None, layout: str, device: str) -> list[str]:
    ours = list(benchmark.default_backends(device)) if not whole else ["auto"]
    if backends:
        ours = _choices("backends", backends, benchmark.OURS)
    if whole:
        from ..benchmark.models import COMPARE

        text = (_MODEL_COMPARE if compare is None else compare).replace("eager_cl", "channels_last")
        stock = _choices("compare", text, ("none", *COMPARE))
    elif compare is None:
        stock = list(module.STOCK)
    else:
        stock = _choices("compare", compare.replace("channels_last", "eager_cl"), ("none", *benchmark.STOCK))
    same = {"eager_cl"} if layout == "nhwc" and "eager" in stock else set()  # eager on channels_last input twice
    return [name for name in stock if name != "none" and name not in same] + ours


def _module(op: str | None, model: str | None, exact: bool) -> tuple[str, Any]:
    """(name, what the engine measures) of --op or --model."""
    if (op is None) == (model is None):
        fail(
            f"expected one of --op ({', '.join(benchmark.OPS)}) and --model (such as torchvision:resnet50)",
            2,
        )
    if op is not None:
        name = _choices("op", op, tuple(benchmark.OPS))[0]
        return name, benchmark.OPS[name]
    from ..benchmark.models import ModelBench, ModelError

    try:
        with torch.no_grad():
            return "model", ModelBench(model, exact)
    except ModelError as error:
        fail(f"--{error}", 2)


def bench(
    op: Annotated[str | None, typer.Option(help="one op: " + ", ".join(benchmark.OPS))] = None,
    model: Annotated[
        str | None,
        typer.Option(help="a whole model: torchvision:resnet50, timm:NAME, a name of `models`, or package.module:factory"),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="resnet50, yolo, unet, all, a layer name such as resnet50.layer1, CxHxW; boxes: yolo, heavy, sparse; "
            "models: CxHxW (the images: --batch)"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images a batch")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, fp64, fp16, bf16; several with commas")] = "fp32",
    layout: Annotated[str | None, typer.Option(help="nchw, nhwc or both with a comma; default: nhwc, models nchw")] = None,
    backends: Annotated[
        str | None, typer.Option(help="ours: auto, cpu, cuda, triton, reference; default: the kernels that run here")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="eager, channels_last, eager_inplace (ops), compile or none; models: also folded, onnxruntime, openvino, "
            "ncnn; the first is the ratio's base"
        ),
    ] = None,
    direction: Annotated[str, typer.Option("--pass", help="fwd (inference), fwd+bwd (training) or both with a comma")] = "fwd",
    exact: Annotated[bool, typer.Option("--exact", help="models: only algorithms within 2x stock's rounding error")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved samples of each provider")] = 30,
    quick: Annotated[bool, typer.Option("--quick", help="two shapes and five rounds: a look, not a measurement")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="write everything as JSON; - for stdout instead of the table")
    ] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="write the rows as CSV")] = None,
    html: Annotated[Path | None, typer.Option(help="write a self-contained report with a roofline plot")] = None,
    fail_below: Annotated[
        float | None, typer.Option(help="exit 1 if one of ours is less than R times as fast as the fastest stock provider")
    ] = None,
) -> None:
    """Measure an op or a model; each provider is checked against fp64 first; wrong ones get no speed."""
    name, module = _module(op, model, exact)
    whole = model is not None
    if html is not None:
        require("jinja2", extra="cli")
    device = _device(device)
    dtypes = _choices("dtype", dtype, tuple(benchmark.DTYPES))
    layouts = _choices("layout", layout or ("nchw" if whole else "nhwc"), tuple(benchmark.LAYOUTS))
    layouts = ["nchw"] if name in benchmark.NMS else layouts
    directions = _choices("pass", direction, ("fwd", "fwd+bwd"))
    providers = {lay: _providers(module, whole, backends, compare, lay, device) for lay in layouts}
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
    roof = None
    with progress() as bar:
        task = bar.add_task(name, total=len(plan) * rounds)
        for index, (d, lay, way, layer) in enumerate(plan):
            case = benchmark.Case(name, layer, batch, d, lay, way == "fwd+bwd", device)
            bar.update(task, description=f"{name} {layer.name} {d} {lay} {way}", completed=index * rounds)
            rows += benchmark.run_cases([case], providers[lay], module, rounds=rounds, advance=lambda: bar.advance(task))
        if html is not None:
            bar.update(task, description="the machine's peaks")
            with torch.no_grad():
                kinds = {d: round(benchmark.peak_gflops(device, benchmark.DTYPES[d]), 1) for d in dtypes}
                roof = {"gbytes": round(benchmark.peak_gbytes(device), 1), "gflops": kinds}
    document = {
        "schema": 2,
        "op": name,
        "model": model,
        "machine": benchmark.machine(),
        "rounds": rounds,
        "roof": roof,
        "rows": [row.as_dict() for row in rows],
    }
    if json_path is not None and str(json_path) == "-":
        print(to_json(document), end="")
    else:
        _bench_view.show(rows, document["machine"])
        if json_path is not None:
            write_text(json_path, to_json(document))
    if csv_path is not None:
        write_text(csv_path, _bench_view.to_csv(rows))
    if html is not None:
        from ._bench_report import render

        write_text(html, render(document))
        if str(json_path) != "-":
            out().print(f"report: {html}", soft_wrap=True, markup=False)
    _bench_view.finish(rows, fail_below)
