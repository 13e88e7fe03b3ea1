"""``python -m dl4ds_kernels experiment``: the lecture's phenomena, each with numbers, a check and a picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .. import experiments
from ._console import err, fail, out, require, to_json, write_text


def experiment(
    name: Annotated[str, typer.Argument(help=f"{', '.join(experiments.NAMES)}, or all")],
    quick: Annotated[bool, typer.Option("--quick", help="smaller: seconds instead of minutes")] = False,
    folder: Annotated[Path, typer.Option("--out", help="where NAME.png and NAME.json go")] = Path("experiments"),
    seed: Annotated[int, typer.Option(min=0, help="of data, initialisation and batches")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the networks are small")] = 1,
    figure: Annotated[bool, typer.Option("--figure/--no-figure", help="draw the PNG (needs matplotlib)")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")] = False,
) -> None:
    """Run an experiment; exit code 1 if a measured value lies where the lecture says it does not."""
    import torch

    if name != "all" and name not in experiments.NAMES:
        fail(f"NAME: expected one of {', '.join(experiments.NAMES)} or all, got {name!r}", 2)
    if figure:
        require("matplotlib", extra="cli")
    torch.set_num_threads(threads)
    documents = []
    for one in experiments.NAMES if name == "all" else (name,):
        start = time.perf_counter()
        with err().status(f"{one}: {experiments.module(one).TITLE}"):
            result = experiments.run(one, seed, quick)
        document: dict[str, Any] = {
            "schema": 1, "experiment": one, "title": result.title, "quick": quick, "seed": seed, "ok": result.ok,
            "seconds": round(time.perf_counter() - start, 1), "checks": [c.as_dict() for c in result.checks],
            "numbers": result.numbers, "figure": str(folder / f"{one}.png") if figure else None,
        }  # fmt: skip
        if figure:
            try:
                experiments.save(result, folder / f"{one}.png")
            except OSError as error:
                fail(f"cannot write {folder / one}.png: {error.strerror or error}")
        write_text(folder / f"{one}.json", to_json(document))
        documents.append(document)
        if not json_output:
            _print(document, result)
    if json_output:
        print(to_json(documents[0] if name != "all" else {"schema": 1, "experiments": documents}), end="")
    wrong = [d["experiment"] for d in documents if not d["ok"]]
    if wrong:
        fail(f"checks failed: {', '.join(wrong)}")


def _print(document: dict[str, Any], result: experiments.Result) -> None:
    console = out()
    console.print(f"[bold]{escape(result.title)}[/] ({document['experiment']}, {document['seconds']} s)", soft_wrap=True)
    table = Table("check", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("measured", "expected"):
        table.add_column(column, justify="right")
    table.add_column("")
    for check in result.checks:
        table.add_row(escape(check.name), f"{check.value:.6g}", check.wanted, "ok" if check.ok else "[bold red]WRONG[/]")
    console.print(table)
    if document["figure"]:
        console.print(f"figure: {escape(document['figure'])}", soft_wrap=True)
