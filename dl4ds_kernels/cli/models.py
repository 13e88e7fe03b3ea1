"""``python -m dl4ds_kernels models``: every model with its exact parameter count."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ._console import fail, out, progress, to_json


def models(
    family: Annotated[str | None, typer.Option(help="one family only: resnet, densenet, yolov1, …")] = None,
    macs: Annotated[bool, typer.Option("--macs", help="also count multiply-adds (a few seconds)")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")] = False,
) -> None:
    """List the models: parameters, counted on models built without memory, input size and where the count comes from."""
    from .. import models as zoo

    try:
        names = zoo.list_models(family)
    except ValueError as error:
        fail(f"--family: {str(error).split(': ', 2)[2]}", 2)
    rows: list[dict[str, Any]] = []
    with progress() as bar:
        task = bar.add_task("building on the meta device", total=len(names))
        for name in names:
            info, model = zoo.model_info(name), zoo.build_on_meta(name).eval()
            rows.append(
                {
                    "name": name,
                    "family": info.family,
                    "parameters": zoo.count_parameters(model),
                    "expected": info.parameters,
                    "input_size": list(info.input_size),
                    "source": info.source,
                    **({"macs": zoo.count_macs(model, info.input_size)} if macs else {}),
                }
            )
            bar.advance(task)
    if json_output:
        print(to_json({"schema": 1, "models": rows}), end="")
    else:
        out().print(_table(rows, macs))
    wrong = [row["name"] for row in rows if row["parameters"] != row["expected"]]
    if wrong:
        fail(f"parameter counts differ from their source: {', '.join(wrong)}")


def _table(rows: list[dict[str, Any]], macs: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    table.add_column("parameters", justify="right")
    if macs:
        table.add_column("GMACs", justify="right")
    table.add_column("input")
    table.add_column("count from")
    for row in rows:
        cells = [row["name"], f"{row['parameters']:,}"]
        cells += [f"{row['macs'] / 1e9:.3f}"] if macs else []
        table.add_row(*cells, " x ".join(map(str, row["input_size"])), row["source"])
    return table
