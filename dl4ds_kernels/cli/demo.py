"""``python -m dl4ds_kernels demo``: stock against optimized model on a real photograph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .. import benchmark
from ._console import fail, out, progress, require, to_json, write_text

_STYLE: dict[str, Any] = {
    "title_justify": "left",
    "caption_justify": "left",
    "title_style": "bold",
    "box": box.SIMPLE_HEAD,
    "pad_edge": False,
}


def demo(
    model: Annotated[str, typer.Option(help="a torchvision classification model")] = "resnet50",
    image: Annotated[Path | None, typer.Option(help="a picture; default: the cat that ships with scikit-image")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="torchvision state_dict, .safetensors or .pth; default: seeded random weights")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="only algorithms within 2x stock torch's own rounding error")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")] = False,
    html: Annotated[Path | None, typer.Option(help="write a self-contained report with plots")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved timing rounds")] = 30,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="leave torch.compile out (it compiles for half a minute)")
    ] = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="also time torch.compile with Inductor's frozen weights")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="print every replaced and kept layer, not only the counts")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Replace the layers of a stock model, check parity against fp64, compare the top-5 classes and measure the speed."""
    require("torchvision", "PIL", extra="demo")
    if html is not None:
        require("matplotlib", "jinja2", extra="demo")
    if device.split(":")[0] not in ("cpu", "cuda"):
        fail(f"--device: expected cpu or cuda, got {device!r}", 2)
    if device.startswith("cuda") and not torch.cuda.is_available():
        fail("--device: cuda was asked for, but torch sees no CUDA device", 2)
    if threads is not None:
        torch.set_num_threads(threads)
    document = _run(model, image, weights, exact, repeats, not no_compile, frozen, device, html)
    if json_output:
        print(to_json(document), end="")
    else:
        _print(document, layers)
        if html is not None:
            out().print(f"report: {escape(str(html))}", soft_wrap=True)
    _finish(document)


def _run(
    name: str,
    image: Path | None,
    weights: Path | None,
    exact: bool,
    repeats: int,
    with_compile: bool,
    frozen: bool,
    device: str,
    html: Path | None,
) -> dict[str, Any]:
    """Load, measure, write the report; the document."""
    from . import _model, _photo
    from ._experiment import experiment

    with progress() as bar:
        task = bar.add_task("photo", total=None)

        def step(what: str) -> None:
            bar.update(task, description=what, **({"total": repeats, "completed": 0} if what == "timing" else {}))

        try:
            path = image or _photo.default_photo()
            picture = _photo.load_photo(path)
            step(f"stock {name}")
            stock = _model.make_model(name)
            if weights is not None:
                _model.load_weights(stock, weights)
            else:
                step("calibrating BatchNorm statistics")
                _model.randomise(stock, picture)
        except (_photo.PhotoError, _model.ModelError) as error:
            fail(str(error), 2)
        document = {
            "schema": 1,
            "machine": benchmark.machine(),
            "device": device,
            "model": name,
            "parameters": sum(p.numel() for p in stock.parameters()),
            "image": {"file": path.name, "default": image is None, "width": picture.width, "height": picture.height},
            "weights": {"file": weights.name, "note": ""} if weights else {"file": None, "note": _model.RANDOM_NOTE},
            **experiment(
                stock,
                _photo.views(picture),
                _model.class_names(name),
                random_weights=weights is None,
                exact=exact,
                device=device,
                rounds=repeats,
                with_compile=with_compile,
                frozen=frozen,
                step=step,
                advance=lambda: bar.advance(task),
            ),
        }
        if html is not None:
            from ._report import render

            step("report")
            write_text(html, render(document, picture))
    return document


def _print(document: dict[str, Any], layers: bool) -> None:
    console, machine, image = out(), document["machine"], document["image"]
    where = (
        machine["gpus"][0]["name"]
        if document["device"].startswith("cuda")
        else f"{machine['cpu']}, {machine['threads']} threads"
    )
    console.print(
        f"[bold]{escape(document['model'])}[/] on {escape(image['file'])} ({image['width']} x {image['height']}), fp32, batch 1"
    )
    console.print(f"{escape(where)}, torch {machine['torch']}")
    if document["weights"]["note"]:
        console.print(f"[yellow]{escape(document['weights']['note'])}[/]")
    console.print(_replaced_table(document["report"], layers))
    state = document["state_dict"]
    same = "keys, shapes and values unchanged" if state["unchanged"] else "[red]changed[/]"
    console.print(f"{escape(document['report']['summary'])}; state_dict: {state['keys']} {same}\n")
    console.print(_parity_table(document["parity"]))
    console.print(_top5_table(document["top5"]))
    if document["speed"]:
        console.print(_speed_table(document["speed"]))


def _replaced_table(report: dict[str, Any], layers: bool) -> Table:
    if layers:
        table = Table("layer", "pattern", "status", "backend", "reason", title="layers", **_STYLE)
        for row in report["rows"]:
            reason = ": ".join(filter(None, (row["reason"], row["detail"])))
            table.add_row(
                *(escape(cell) for cell in (row["fqn"] or "(model)", row["pattern"], row["status"], row["backend"], reason))
            )
        return table
    table = Table("pattern", "status", "backend", "reason", title="what was replaced (--layers lists each)", **_STYLE)
    table.add_column("layers", justify="right")
    counts = Counter((row["pattern"], row["status"], row["backend"], row["reason"]) for row in report["rows"])
    for cells, count in counts.most_common():
        table.add_row(*map(escape, cells), str(count))
    return table


def _parity_table(parity: dict[str, Any]) -> Table:
    table = Table(
        title=f"parity: max |y - fp64| / max |fp64| of the logits, worst of {parity['views']} views of the photo",
        caption=f"ours is allowed {parity['limit']:.1e}" + (" (2x stock's own)" if parity["exact"] else ""),
        **_STYLE,
    )
    table.add_column("model")
    table.add_column("error", justify="right")
    table.add_column("against stock", justify="right")
    for name, error in parity["errors"].items():
        if error is None:
            table.add_row(name, "-", f"[yellow]not available: {escape(parity['unavailable'][name])}[/]")
            continue
        style = ("bold green" if parity["ok"] else "bold red") if name == "ours" else None
        ratio = f"{error / parity['stock_error']:.2f}x" if parity["stock_error"] else "-"
        table.add_row(name, f"{error:.2e}", ratio, style=style)
    return table


def _top5_table(top5: dict[str, Any]) -> Table:
    order = "same order" if top5["same_order"] else "another order"
    table = Table(title=f"top-5: {top5['agreement']} of {top5['of']} classes agree, {order}", **_STYLE)
    table.add_column("stock")
    table.add_column("", justify="right")
    table.add_column("ours")
    table.add_column("", justify="right")
    for a, b in zip(top5["stock"], top5["ours"], strict=True):
        table.add_row(escape(a["label"]), f"{a['probability']:.1%}", escape(b["label"]), f"{b['probability']:.1%}")
    return table


def _speed_table(speed: list[dict[str, Any]]) -> Table:
    table = Table(title="speed, interleaved in one process (ratio: median, 20th to 80th percentile by round)", **_STYLE)
    table.add_column("model")
    for column in ("median ms", "p20 - p80", "faults", "ours is faster by"):
        table.add_column(column, justify="right")
    for row in speed:
        mine = row["name"] == "ours"
        ratio = "" if mine else f"{row['ours_speedup']:.2f}x ({row['ours_speedup_p20']:.2f} - {row['ours_speedup_p80']:.2f})"
        spread = f"{row['p20_ms']:.1f} - {row['p80_ms']:.1f}"
        table.add_row(
            row["name"], f"{row['median_ms']:.2f}", spread, f"{row['faults']:.0f}", ratio, style="bold" if mine else None
        )
    return table


def _finish(document: dict[str, Any]) -> None:
    """The exit code: wrong numbers, changed predictions or a changed state_dict are failures."""
    parity, top5, state = document["parity"], document["top5"], document["state_dict"]
    if not parity["ok"]:
        fail(f"parity: ours is {parity['ours_error']:.2e} from fp64, allowed {parity['limit']:.2e}; no speed is given")
    if top5["agreement"] < top5["of"]:
        fail(f"top-5: only {top5['agreement']} of {top5['of']} classes agree with the stock model")
    if not state["unchanged"]:
        fail("the optimized model's state_dict differs from the stock model's")
