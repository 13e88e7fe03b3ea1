"""``python -m dl4ds_kernels train``: train a small model, the stock-layer run beside it if wanted."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .. import recipes
from ._console import fail, out, progress, to_json

_DATA = "cifar: digits, mnist1d, or a folder of the binary files; unet: skimage; yolo: a VOC folder; default: synthetic"


def train(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help=", ".join(recipes.NAMES))],
    folder: Annotated[Path | None, typer.Option("--out", help="checkpoint and logs; default: runs/RECIPE")] = None,
    data: Annotated[str | None, typer.Option(help=_DATA)] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="default: the recipe's")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stock: Annotated[bool, typer.Option("--stock", help="also train with stock layers, in FOLDER/stock, and compare")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="start again instead of from the folder's checkpoint")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="a few pictures: a look, not a training")] = False,
    small: Annotated[bool, typer.Option("--small", help="the narrow net whose trained weights come with the package")] = False,
    save: Annotated[Path | None, typer.Option(help="where the weights go in the end (.safetensors, fp16)")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")] = False,
) -> None:
    """Train a recipe; exit code 1 if its metric is not reached (not with --quick). Run again to go on where it stopped."""
    import torch

    if name not in recipes.NAMES:
        fail(f"RECIPE: expected one of {', '.join(recipes.NAMES)}, got {name!r}", 2)
    if threads is not None:
        torch.set_num_threads(threads)
    folder = folder or Path("runs") / name
    runs: dict[str, Any] = {"ours": _run(name, folder, False, save, data, epochs, seed, fresh, quick, small)}
    if stock:
        runs["stock"] = _run(name, folder / "stock", True, None, data, epochs, seed, fresh, quick, small)
    metric, target = runs["ours"]["metric"], runs["ours"]["target"]
    reached = runs["ours"]["rows"][-1][metric]
    document = {"schema": 1, "recipe": name, "folder": str(folder), "quick": quick, "reached": reached >= target, **runs}
    if stock:
        pairs = [(a["seconds"], b["seconds"]) for a, b in zip(runs["stock"]["rows"], runs["ours"]["rows"], strict=True)]
        document["stock_over_ours"] = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    if json_output:
        print(to_json(document), end="")
    else:
        _print(document, runs)
    if not quick and reached < target:
        fail(f"{name}: {metric}: expected at least {target}, got {reached:.4f}")


def _run(name: str, folder: Path, stock: bool, save: Path | None, *options: Any) -> dict[str, Any]:
    import contextlib

    data, epochs, seed, fresh, quick, small = options
    try:
        if save is not None and save.suffix != ".safetensors":
            fail(f"--save: expected a name that ends in .safetensors, got {save.name!r}", 2)
        recipe = recipes.make(name, seed=seed, epochs=epochs, data=data, quick=quick, small=small)
        with recipes.stock_layers() if stock else contextlib.nullcontext(), progress() as bar:
            task = bar.add_task(f"{name}{' (stock layers)' if stock else ''}", total=recipe.epochs * recipe.steps)

            def advance(step: int, loss: float) -> None:
                bar.update(task, completed=step + 1, description=f"{name}{' (stock layers)' if stock else ''} loss {loss:.3f}")

            rows = recipes.train(recipe, folder, resume=not fresh, advance=advance)
        if save is not None:
            recipes.save_half(recipe.model, save)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    # Linux counts kilobytes, macOS bytes; of the whole process, so the second run's is at least the first's.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"metric": recipe.metric, "target": recipe.target, "rows": rows, "peak_mib": round(peak)}


def _print(document: dict[str, Any], runs: dict[str, Any]) -> None:
    console, metric = out(), runs["ours"]["metric"]
    table = Table("epoch", box=box.SIMPLE_HEAD, pad_edge=False)
    for label in runs:
        for column in ("loss", metric, "s"):
            table.add_column(f"{label} {column}", justify="right")
    for i, row in enumerate(runs["ours"]["rows"]):
        cells = [f"{run['rows'][i][key]:.4g}" for run in runs.values() for key in ("loss", metric, "seconds")]
        table.add_row(str(row["epoch"]), *cells)
    console.print(table)
    if "stock_over_ours" in document:
        console.print(f"time of the stock layers over ours: {document['stock_over_ours']:.2f}")
    console.print(
        f"target: {metric} {runs['ours']['target']}; checkpoint and log: {escape(document['folder'])}", soft_wrap=True
    )
